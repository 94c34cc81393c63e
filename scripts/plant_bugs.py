"""Plant known bugs, one at a time, and run the tests that should see each.

    python scripts/plant_bugs.py                       all of them
    python scripts/plant_bugs.py --only for_loop_tail auto_key_without_dtype
    python scripts/plant_bugs.py --list

scripts/planted_bugs.toml has the bugs: a file, a piece of its text, what stands there instead, and
the tests. Each is planted in a copy of the checkout, never in the checkout itself. Before that the
same tests have to pass without it. The exit code is 1 when a bug survives, when its text is no
longer in its file (then find what became of it), or when tests fail without any bug.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import tomli

ROOT = Path(__file__).parent.parent
TABLE = Path(__file__).with_name("planted_bugs.toml")
SECONDS = 600  # a bug may make a test hang; the slowest selection takes a tenth of it

# Imported once: every run of pytest is a fork of this process. Nothing of our own is among them,
# nor the host, which a fork imports with the device that it is told.
_PYTEST = ("-q", "-x", "--tb=short", "--disable-warnings", "-p", "no:cacheprovider")
_SLOW_TO_IMPORT = ("datasets", "hypothesis", "torch._dynamo", "torch.distributed.checkpoint")


@dataclass(frozen=True)
class Bug:
    """A mistake that somebody could make.

    Attributes:
        name: of the bug.
        file: where it is, from the root of the repository.
        old: a piece of that file's text, which is there once.
        new: what the bug has in its place.
        tests: arguments of pytest: the tests that should see it.
    """

    name: str
    file: str
    old: str
    new: str
    tests: str

    def planted(self, text: str) -> str:
        """The text of the file with the bug in it.

        Raises:
            ValueError: ``old`` is not in it, or more than once.
        """
        if (found := text.count(self.old)) != 1:
            raise ValueError(f"{self.file}: its text is there {found} times: {self.old!r}")
        return text.replace(self.old, self.new)


def bugs(table: Path = TABLE) -> list[Bug]:
    """All of them, in the order of the table."""
    return [Bug(**row) for row in tomli.loads(table.read_text())["bug"]]


@contextlib.contextmanager
def copy_of_checkout() -> Iterator[Path]:
    """A folder with the files of the checkout as they are now, gone afterwards."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    with tempfile.TemporaryDirectory(prefix="planted-") as folder:
        for name in filter(None, names.split("\0")):
            if (ROOT / name).is_file():  # not deleted
                (Path(folder) / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, Path(folder) / name)
        yield Path(folder)


@contextlib.contextmanager
def in_place(bug: Bug, checkout: Path) -> Iterator[None]:
    """Meanwhile the copy has the bug.

    Raises:
        ValueError: as :meth:`Bug.planted`.
    """
    path = checkout / bug.file
    sound = path.read_text()
    path.write_text(bug.planted(sound))
    try:
        yield
    finally:
        path.write_text(sound)


@dataclass(frozen=True)
class Run:
    """What came of a run of pytest: its exit code, and what it said."""

    code: int
    said: str

    @property
    def failed(self) -> list[str]:
        """The names of the tests that failed."""
        return re.findall(r"^(?:FAILED|ERROR) (\S+)", self.said, re.MULTILINE)


def run_tests(tests: str, checkout: Path) -> Run:
    """Run tests of the copy in a process of their own, up to the first failure."""
    with tempfile.TemporaryFile("w+") as output:
        if (child := os.fork()) == 0:
            _run_pytest(shlex.split(tests), checkout, output)
        code = _wait(child)
        output.seek(0)
        return Run(code, output.read())


def _run_pytest(arguments: Sequence[str], checkout: Path, output: io.TextIOBase) -> None:
    """In the fork; does not return."""
    os.setsid()  # with everything that the tests start it can be ended
    for stream in (1, 2):
        os.dup2(output.fileno(), stream)
    sys.stdout, sys.stderr = (os.fdopen(stream, "w", closefd=False) for stream in (1, 2))
    os.chdir(checkout)
    sys.path[:0] = [str(checkout)]
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(checkout), before]))
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"  # two texts of one second and size look alike
    sys.dont_write_bytecode = True
    code = 3  # as pytest's for an error of its own
    try:
        code = pytest.main([*_PYTEST, *arguments])
    finally:
        sys.stdout.flush()
        os._exit(code)


def _wait(child: int) -> int:
    """The exit code of the fork; what is left of its tests is ended."""
    end = time.monotonic() + SECONDS
    try:
        while (status := os.waitpid(child, os.WNOHANG))[0] == 0:
            if time.monotonic() > end:
                os.killpg(child, signal.SIGKILL)
                status = os.waitpid(child, 0)
                break
            time.sleep(0.02)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(status[1])


def judge(bug: Bug, checkout: Path, sound: dict[str, Run]) -> tuple[bool, str]:
    """Whether the bug is caught, and a line about it.

    Args:
        sound: what came of tests without any bug; those of this one are added.
    """
    if bug.tests not in sound:
        sound[bug.tests] = run_tests(bug.tests, checkout)
    if sound[bug.tests].code:
        return False, f"its tests do not pass without it:\n{sound[bug.tests].said}"
    try:
        with in_place(bug, checkout):
            planted = run_tests(bug.tests, checkout)
    except ValueError as error:
        return False, f"no longer applies: {error}"
    if planted.code in (0, pytest.ExitCode.NO_TESTS_COLLECTED):
        return False, f"SURVIVES {bug.tests}"
    if planted.code < 0:
        return True, f"by a process that was ended (signal {-planted.code})"
    if planted.code != pytest.ExitCode.TESTS_FAILED or not planted.failed:
        return False, f"the tests cannot be run with it:\n{planted.said}"
    return True, f"by {planted.failed[0]}"


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    arguments.add_argument("--only", nargs="+", metavar="NAME", help="plant these alone")
    arguments.add_argument("--list", action="store_true", help="name them, plant none")
    given = arguments.parse_args()
    chosen = [bug for bug in bugs() if not given.only or bug.name in given.only]
    if unknown := {*(given.only or ())} - {bug.name for bug in chosen}:
        arguments.error(f"no such bug: {', '.join(sorted(unknown))}. --list has their names.")
    if given.list:
        for bug in chosen:
            print(f"{bug.name:45} {bug.file}")
        return 0
    for name in _SLOW_TO_IMPORT:
        importlib.import_module(name)
    sound: dict[str, Run] = {}
    missed = []
    with copy_of_checkout() as checkout:
        for bug in chosen:
            start = time.monotonic()
            caught, what = judge(bug, checkout, sound)
            took = f"{time.monotonic() - start:.0f} s"
            print(f"{'caught' if caught else 'MISSED'}  {bug.name}  {what}  ({took})", flush=True)
            missed += [] if caught else [bug.name]
    print(f"{len(chosen) - len(missed)} of {len(chosen)} caught")
    if missed:
        print(f"missed: {' '.join(missed)}", file=sys.stderr)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
