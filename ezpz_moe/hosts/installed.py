"""Find the installed torch and torchtitan, and look up how the host tests went with each pair.

A release of the host is identified by its version, a checkout by its commit: the version in a
checkout can be anything. Nothing here imports torch or the host.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from importlib import metadata, util
from pathlib import Path
from urllib.parse import unquote, urlparse

HOST = "torchtitan"


@dataclass(frozen=True)
class Host:
    """The torchtitan that an import finds.

    Attributes:
        folder: its package.
        version: of the distribution that the package belongs to; empty for files without one.
        commit: empty unless it comes from a git repository.
    """

    folder: Path
    version: str = ""
    commit: str = ""

    @property
    def name(self) -> str:
        """The version of a release, or the commit of a snapshot."""
        if self.commit:
            return f"commit {self.commit[:12]}"
        return self.version or "of no known version"


@dataclass(frozen=True)
class HostRun:
    """One run of the host tests (``make test-hosts``).

    Attributes:
        torch: version of torch.
        torchtitan: name of the host: a version or a commit.
        generation: the binding that was chosen, in words.
        device: what the models trained on.
        date: of the run.
        passed, failed, skipped: numbers of tests.
    """

    torch: str
    torchtitan: str
    generation: str
    device: str
    date: str
    passed: int
    failed: int
    skipped: int


def passed(runs: Iterable[HostRun]) -> tuple[tuple[str, str], ...]:
    """Return (torch, torchtitan) of the runs without a failed test."""
    return tuple((run.torch, run.torchtitan) for run in runs if not run.failed)


# Beside this file, because an installed package, which has no docs/, has to know it too.
RECORD = Path(__file__).with_name("tested.json")
HOST_RUNS = tuple(HostRun(**run) for run in json.loads(RECORD.read_text()))
"""The last run with each pair, newest host last; docs/internals/rebasing.md shows them."""

TESTED_PAIRS = passed(HOST_RUNS)


def version(distribution: str) -> str | None:
    """Return the installed version without its local part ("2.15.0+cu130" is 2.15.0)."""
    try:
        return metadata.version(distribution).partition("+")[0]
    except metadata.PackageNotFoundError:
        return None


@cache
def host() -> Host | None:
    """Return the torchtitan that an import would find, or None."""
    spec = util.find_spec(HOST)
    if spec is None or spec.origin is None:
        return None
    folder = Path(spec.origin).resolve().parent
    # A distribution may be installed while PYTHONPATH points to another torchtitan. Its version
    # says something only if it owns the folder that is imported.
    for distribution in metadata.distributions(name=HOST):
        origin = json.loads(distribution.read_text("direct_url.json") or "{}")
        if folder in (_installed_folder(distribution), _editable_folder(origin)):
            # pip writes down the commit of a `git+https` installation; a checkout has its own.
            commit = origin.get("vcs_info", {}).get("commit_id", "") or _commit(folder)
            return Host(folder, distribution.version.partition("+")[0], commit)
    return Host(folder, commit=_commit(folder))


def host_name() -> str | None:
    """Return the name of the installed torchtitan in a pair, or None."""
    found = host()
    return found.name if found else None


def _installed_folder(distribution: metadata.Distribution) -> Path:
    return Path(str(distribution.locate_file(HOST))).resolve()


def _editable_folder(origin: dict) -> Path | None:
    """Return the package folder of ``pip install --editable CHECKOUT``; None if not editable."""
    if not origin.get("dir_info", {}).get("editable"):
        return None
    # A URL: a space in the folder's name is %20 there.
    return Path(unquote(urlparse(origin["url"]).path), HOST).resolve()


def _commit(folder: Path) -> str:
    """Return the commit of the checkout that contains ``folder``; empty without git."""
    # Only a .git right beside the package counts. `git rev-parse` would also search the parents,
    # and find the repository that a virtual environment happens to lie in.
    if not (folder.parent / ".git").exists() or shutil.which("git") is None:
        return ""
    command = ["git", "-C", str(folder.parent), "rev-parse", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip()
