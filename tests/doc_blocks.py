"""The shell blocks of the documents, and a folder in which a reader would type them.

A block is run as it stands, from the root of a repository with a reader's files in it. One that is
not has a comment on the line above its fence that says so:

- ``<!-- shell: full -->``: takes long, so only ``make test-all`` runs it;
- ``<!-- shell: exit 1 -->``: ends with this code, because it shows a refusal;
- ``<!-- shell: not run: it needs eight GPUs -->``: nobody can run it on a CPU, and why.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import fork_server

ROOT = Path(__file__).parent.parent
DATA = Path(__file__).parent / "data"
PAGES = ("README.md", *sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("docs/**/*.md")))

_SHELLS = "bash|console|sh|shell|zsh"
_BLOCK = re.compile(
    rf"(?:^ *<!-- shell: (?P<note>[^\n]*) -->\n)?"
    rf"^(?P<indent> *)```(?P<shell>{_SHELLS})\b[^\n]*\n(?P<text>.*?)^(?P=indent)```",
    re.MULTILINE | re.DOTALL,
)
_NOTE = re.compile(r"(?P<full>full)?(?:, )?(?:exit (?P<code>\d+))?|not run: (?P<why>\w.+)")

_RUN = re.compile(r"\b(outputs(?:/\w+)*?)(?:/checkpoint/step-|/telemetry\.jsonl)")
_PLOTTED = re.compile(r"\bplot (outputs(?:/\w+)*)")
_STEP = re.compile(r"\boutputs/(?:\w+/)*checkpoint/step-\d+")
_WATCHED = 'inherits = "tiny"\nattention = "sdpa"\n[telemetry]\n'
_TRAIN = """\
sed 's/"tiny_sdpa"/"watched"/' my/job.toml > my/watched_job.toml
ezpz-moe train my/watched_job.toml --checkpoint.enable --training.steps 2"""


@dataclass(frozen=True)
class Block:
    """A shell block of a page.

    Attributes:
        line: of its fence.
        text: what a reader types.
        why_not: the reason why it is not run; empty if it is.
        full: it takes long.
        code: how it ends.
    """

    page: str
    line: int
    text: str
    why_not: str = ""
    full: bool = False
    code: int = 0

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(page: str, text: str | None = None) -> Iterator[Block]:
    """Yield the shell blocks of a page.

    Raises:
        ValueError: nobody knows what a block's comment asks for.
    """
    text = (ROOT / page).read_text() if text is None else text
    for found in _BLOCK.finditer(text):
        line = text.count("\n", 0, found.start("indent")) + 1
        note = _NOTE.fullmatch(found["note"] or "")
        if note is None:
            raise ValueError(f"{page}:{line}: nobody knows <!-- shell: {found['note']} -->")
        yield Block(
            page,
            line,
            _typed(found["text"], found["shell"]),
            why_not=note["why"] or "",
            full=bool(note["full"]),
            code=int(note["code"] or 0),
        )


def _typed(text: str, shell: str) -> str:
    """Return what is typed: in a console's block that is what follows a prompt."""
    if shell != "console":
        return text
    return "".join(f"{line[2:]}\n" for line in text.splitlines() if line.startswith("$ "))


class Reader:
    """Who types the blocks of one page, one after the other, in a folder of their own."""

    def __init__(self, folder: Path, trained: Path) -> None:
        """``trained``: a folder, for the run that pages share; it is made for the first of them."""
        self._folder = folder
        self._trained = trained
        self._programs = folder / ".programs"
        for each in ROOT.iterdir():
            if not each.name.startswith(".") and each.name not in ("flavors", "outputs", "site"):
                (folder / each.name).symlink_to(each)
        shutil.copytree(ROOT / "flavors", folder / "flavors")  # readers write theirs into it
        # What the documents take a reader to have.
        shutil.copytree(DATA / "reader", folder, dirs_exist_ok=True)
        shutil.copytree(DATA / "tiny", folder / "my")
        shutil.copyfile(ROOT / "CHANGELOG.md", folder / "text.txt")
        self._programs.mkdir()
        self._program("ezpz-moe", "-m ezpz_moe.cli")
        self._program("torchrun", "-m torch.distributed.run")
        self._program("python", "")

    def types(self, text: str) -> subprocess.CompletedProcess[str]:
        """Run what a block has; the output has both streams."""
        self._train_what_it_reads(text)
        return self._run(text)

    def _run(self, text: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", "-euo", "pipefail", "-c", text],
            cwd=self._folder,
            env={
                **os.environ,
                "PATH": f"{self._programs}:{os.environ['PATH']}",
                "PYTHON_EXEC": fork_server.python(),  # torchrun's interpreter
                "EZPZ_MOE_CACHE": str(self._folder / ".cache"),
            },
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )

    def _program(self, name: str, arguments: str) -> None:
        program = self._programs / name
        program.write_text(f'#!/bin/sh\nexec {fork_server.python()} {arguments} "$@"\n')
        program.chmod(0o755)

    def _train_what_it_reads(self, text: str) -> None:
        """Let each run and checkpoint be one of the tests' model, unless the block trains it."""
        if re.search(r"\b(ezpz-moe train|torchrun)\b", text):
            return
        for folder in dict.fromkeys([*_RUN.findall(text), *_PLOTTED.findall(text)]):
            if not (self._folder / folder).exists():
                self._train()
                shutil.copytree(self._trained, self._folder / folder)
        for step in set(_STEP.findall(text)):
            if not (place := self._folder / step).exists():
                shutil.copytree(self._trained / "checkpoint" / "step-2", place)

    def _train(self) -> None:
        if not self._trained.exists():
            (self._folder / "my" / "watched.toml").write_text(_WATCHED)
            done = self._run(f"{_TRAIN} --dump_folder {self._trained}")
            assert done.returncode == 0, done.stdout
