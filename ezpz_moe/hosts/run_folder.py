"""The folder of a run: which process trains in it, and what the host takes for its steps.

No torch and no host: the launcher asks before it imports either.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import logging
import os
import re
import socket
import time
from pathlib import Path
from typing import Any

from ezpz_moe.errors import EzpzError

LOCK = "run.lock"
"""In the dump folder. It stays when the run has ended: what counts is who holds it."""

_ATTEMPTS = 5
"""A launcher that asks shares the lock for an instant, so a refusal is asked about again."""

logger = logging.getLogger(__name__)

_held: dict[Path, int] = {}
"""Folder -> the open file, whose lock lasts as long as the process."""


def _leave_to_parent() -> None:
    for file in _held.values():
        os.close(file)
    _held.clear()


def hold(dump_folder: str) -> None:
    """Make this process the only one that trains in ``dump_folder``, until it ends.

    Once more in the same process has no effect. Where files cannot be locked, warn.

    Raises:
        EzpzError: another process trains there, or the folder cannot be written to.
    """
    folder = Path(dump_folder).resolve()
    if folder in _held:
        return
    if "://" in dump_folder:
        _warn(dump_folder, "it is not a folder of this machine")
        return
    file = _locked(folder, dump_folder)
    if file is not None:
        # What the last holder wrote may be longer.
        os.truncate(file, 0)
        os.pwrite(file, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
        if not _held:
            # A fork shares the lock: a data loader's worker would keep it for seconds after its run
            # was killed.
            os.register_at_fork(after_in_child=_leave_to_parent)
        _held[folder] = file


def hold_for(config: Any, dump_folder: str) -> None:
    """Hold the folder of a run that this process is rank 0 of, if the run writes into it.

    Telemetry and checkpoints of two runs would be mixed. Without either, a run may share a folder;
    and so may what only pretends to be a run (``preflight``).

    Args:
        config: the host's, of any generation.
        dump_folder: where that writes; each generation has another key for it.

    Raises:
        EzpzError: as :func:`hold`.
    """
    # Not at the top, which has no torch. Whoever has a host's config has imported it.
    from ezpz_moe.hosts.ranks import is_dry_run

    is_writing = saves_checkpoints(config) or getattr(config.metrics, "telemetry", None) is not None
    if is_writing and os.environ.get("RANK") == "0" and not is_dry_run(config):
        hold(dump_folder)


def saves_checkpoints(config: Any) -> bool:
    """Return whether a run with this config, the host's, saves any."""
    return config.checkpoint.enable and not config.checkpoint.load_only


def refuse_if_held(dump_folder: str) -> None:
    """Do what :func:`hold` would refuse, without holding the folder or creating anything.

    Raises:
        EzpzError: another process trains there.
    """
    folder = Path(dump_folder).resolve()
    # The one that trains will say whatever else is wrong.
    if os.access(folder / LOCK, os.R_OK | os.W_OK):
        with contextlib.suppress(OSError):
            # Shared: several launchers may ask at once, one of each machine.
            file = _lock(folder / LOCK, dump_folder, fcntl.LOCK_SH)
            os.close(file)


def _locked(folder: Path, name: str) -> int | None:
    """Return the locked file of a folder; None after a warning that locks do not work there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / LOCK).touch()
    except OSError as error:
        raise EzpzError(
            f"{name}: cannot be written to: {error.strerror}. Give the run another --dump_folder."
        ) from error
    for left in reversed(range(_ATTEMPTS)):
        try:
            return _lock(folder / LOCK, name, fcntl.LOCK_EX)
        except EzpzError:
            if not left:
                raise
            time.sleep(0.1)
        except OSError as error:
            _warn(name, str(error))
            return None
    raise AssertionError("the last attempt returns or raises")


def _lock(path: Path, folder: str, how: int) -> int:
    """Return the file at ``path``, open and locked; ``how`` is ``LOCK_EX`` or ``LOCK_SH``.

    Raises:
        EzpzError: somebody else has locked it.
        OSError: it cannot be locked.
    """
    file = os.open(path, os.O_RDWR)  # NFS locks only what is open for writing
    try:
        fcntl.flock(file, how | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(file, 200, 0).decode(errors="replace") or "a process"
        os.close(file)
        raise EzpzError(
            f"{folder}: {holder} is training in this folder. Wait until it has ended, or give this "
            "run another --dump_folder."
        ) from None
    except OSError:
        os.close(file)
        raise
    return file


def _warn(folder: str, reason: str) -> None:
    logger.warning(
        "ezpz_moe: %s cannot be locked: %s. Another run in it would not be refused, and the two "
        "would overwrite each other's checkpoints.",
        folder,
        reason,
    )


def steps(folder: Path) -> dict[str, int]:
    """Return name -> step of what the host takes for checkpoints in ``folder``.

    It looks for ``step-N`` anywhere in a name, so a copy such as ``step-61.bak`` counts.
    """
    return {
        name: step
        for name, step in _named_like_steps(folder).items()
        if (folder / name / ".metadata").is_file()
        or (folder / name / "model.safetensors.index.json").is_file()
    }


def return_to(step: int, folder: Path) -> None:
    """Move whatever the host takes for later steps than ``step`` where it does not look.

    The host goes on at the newest step that it finds, and keeps the newest when it deletes old
    ones. So after a return to an earlier step it must not find those of the abandoned attempt.
    """
    later = {name: each for name, each in _named_like_steps(folder).items() if each > step}
    if not later:
        return
    target = _new_folder(folder)
    names = sorted(later, key=lambda name: (later[name], name))
    for name in names:
        (folder / name).rename(target / name)
    logger.warning(
        "ezpz_moe: the run goes back to step %d. Later steps are of an abandoned attempt, and now "
        "in %s: %s. To go on from those instead, end this run, put them in the place of its own "
        "later steps, and leave checkpoint.load_step out.",
        step,
        target,
        ", ".join(names),
    )


def _named_like_steps(folder: Path) -> dict[str, int]:
    """Return name -> step, also of those without contents: the host counts them when it deletes."""
    if not folder.is_dir():
        return {}
    matches = ((each.name, re.search(r"step-(\d+)", each.name)) for each in folder.iterdir())
    return {name: int(match[1]) for name, match in matches if match}


def _new_folder(parent: Path) -> Path:
    for number in itertools.count(1):
        with contextlib.suppress(FileExistsError):
            # mkdir() itself is the question: another process may take a name after a look at it.
            (made := parent / f"abandoned-{number}").mkdir()
            return made
    raise AssertionError("numbers do not end")
