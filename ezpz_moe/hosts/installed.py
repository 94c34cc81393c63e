"""Which torch and torchtitan are installed, and how the host tests went with which pairs.

A release of the host is known by its version. A checkout is known by its commit, because the
version that stands in it may be any. Nothing here imports torch or the host.
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
        """The version of a release, the commit of a snapshot."""
        if self.commit:
            return f"commit {self.commit[:12]}"
        return self.version or "of no known version"


@dataclass(frozen=True)
class HostRun:
    """One run of the host tests (``make test-hosts``).

    Attributes:
        torch: its version.
        torchtitan: the host's name: a version or a commit.
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
    """(torch, torchtitan) of the runs in which no test failed."""
    return tuple((run.torch, run.torchtitan) for run in runs if not run.failed)


RECORD = Path(__file__).with_name("tested.json")
HOST_RUNS = tuple(HostRun(**run) for run in json.loads(RECORD.read_text()))
"""The last run with each pair, the newest host last; docs/rebasing.md shows them."""

TESTED_PAIRS = passed(HOST_RUNS)


def version(distribution: str) -> str | None:
    """The installed version without its local part ("2.15.0+cu130" is 2.15.0)."""
    try:
        return metadata.version(distribution).partition("+")[0]
    except metadata.PackageNotFoundError:
        return None


@cache
def host() -> Host | None:
    """The torchtitan that an import would find; None where there is none."""
    spec = util.find_spec(HOST)
    if spec is None or spec.origin is None:
        return None
    folder = Path(spec.origin).resolve().parent
    for distribution in metadata.distributions(name=HOST):
        origin = json.loads(distribution.read_text("direct_url.json") or "{}")
        if folder in (_installed_folder(distribution), _editable_folder(origin)):
            commit = origin.get("vcs_info", {}).get("commit_id", "") or _commit(folder)
            return Host(folder, distribution.version.partition("+")[0], commit)
    return Host(folder, commit=_commit(folder))


def host_name() -> str | None:
    """What the installed torchtitan is called in a pair; None where there is none."""
    found = host()
    return found.name if found else None


def _installed_folder(distribution: metadata.Distribution) -> Path:
    return Path(str(distribution.locate_file(HOST))).resolve()


def _editable_folder(origin: dict) -> Path | None:
    """The package of ``pip install --editable CHECKOUT``."""
    if not origin.get("dir_info", {}).get("editable"):
        return None
    return Path(unquote(urlparse(origin["url"]).path), HOST).resolve()


def _commit(folder: Path) -> str:
    """The commit of the checkout that ``folder`` is the package of; empty where git is missing."""
    if not (folder.parent / ".git").exists() or shutil.which("git") is None:
        return ""
    command = ["git", "-C", str(folder.parent), "rev-parse", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip()
