"""docs/guides/finetune.md: its commands as typed, and what they print."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import fork_server
import pytest

from ezpz_moe.hosts.detect import presumed_host
from ezpz_moe.hosts.titan.v0_3 import Titan03

pytestmark = [
    pytest.mark.train,
    pytest.mark.skipif(
        type(presumed_host()) is not Titan03, reason="only torchtitan 0.3 has such chat data"
    ),
]

ROOT = Path(__file__).parents[1]
GUIDE = ROOT / "docs" / "guides" / "finetune.md"
JOB = ROOT / "flavors" / "jobs" / "finetune"


def blocks(language: str) -> list[str]:
    """The guide's fenced blocks of a language; those without one are what commands print."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", GUIDE.read_text(), re.DOTALL | re.MULTILINE)
    return [text for found, text in fenced if found == language]


def programs(folder: Path) -> Path:
    """What the guide types, as forks of a process that has imported torch and the host."""
    folder.mkdir()
    python = fork_server.python()
    for name, command in {
        "ezpz-moe": f'exec {python} -m ezpz_moe.cli "$@"',
        "python": f'[ "$1" = - ] && exec {python} -c "$(cat)"\nexec {python} "$@"',
    }.items():
        (folder / name).write_text(f"#!/bin/sh\n{command}\n")
        (folder / name).chmod(0o755)
    return folder


@pytest.fixture(scope="module")
def printed(tmp_path_factory) -> str:
    """What all of the guide's commands print, in order, in a folder with what a clone has."""
    folder = tmp_path_factory.mktemp("clone")
    shutil.copytree(JOB, folder / "flavors" / "jobs" / "finetune")
    shutil.copytree(ROOT / "scripts", folder / "scripts")
    ran = subprocess.run(
        ["bash", "-eux", "-c", "\n".join(blocks("bash"))],
        cwd=folder,
        env={
            **os.environ,
            "PATH": f"{programs(folder / 'bin')}:{os.environ['PATH']}",
            "PYTHON_EXEC": fork_server.python(),  # torchrun's
            "PYTHONPATH": str(ROOT),
            "NO_COLOR": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "HF_HUB_OFFLINE": "1",
            "EZPZ_MOE_NATIVE_DTYPES": "float32",  # the same, and fast, on every CPU
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )
    assert ran.returncode == 0, ran.stdout[-8000:]
    return re.sub(r"\x1b\[[\d;]*m", "", ran.stdout)  # torchtitan's own colours


def test_the_guides_commands_print_what_it_shows(printed: str) -> None:
    """But for numbers; "..." stands for anything."""
    shown = [line for block in blocks("") for line in block.splitlines() if line.strip("| .")]
    assert len(shown) > 20
    for line in shown:
        pattern = re.escape(line.strip()).replace(re.escape("..."), ".*")
        pattern = re.sub(r"(\d[\d,]*(\\\.\d+)?(e\\?-\d+)?)", r"[\\d.,e-]+", pattern)
        pattern = re.sub(r"(\\ )+", r"\\s+", pattern)
        assert re.search(pattern, printed), line


def test_the_model_has_learnt_its_answers(printed: str) -> None:
    """By the trainer's model and by transformers with its export."""
    answers = [line.strip() for line in printed.splitlines()]
    assert answers.count("Paris.") == 2
    assert "Coal is black." in answers


def test_the_flavor_that_the_guide_shows_is_the_shipped_one() -> None:
    (shown,) = blocks("toml")
    assert shown == (JOB / "watched.toml").read_text()
    (chat,) = blocks("json")
    assert chat in (JOB / "chats.jsonl").read_text()
