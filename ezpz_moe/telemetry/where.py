"""Where the records of a run are. Nothing here reads them, or imports what draws them."""

from __future__ import annotations

from pathlib import Path

from ezpz_moe.errors import EzpzError

FILE_NAME = "telemetry.jsonl"


def find_records(run: Path) -> Path:
    """Find the file with a run's records."""
    if not run.exists():
        raise EzpzError(f"{run}: there is no such folder or file. Name a run's dump_folder.")
    if not run.is_dir():
        return run
    if (file := run / FILE_NAME).exists():
        return file
    # Look two levels down only: a dump folder is often named by its parent, but may hold large
    # checkpoints.
    below = sorted([*run.glob(f"*/{FILE_NAME}"), *run.glob(f"*/*/{FILE_NAME}")])
    hint = f" There is one below it: {below[0]}." if below else ""
    raise EzpzError(
        f"{run}: holds no {FILE_NAME}. A run whose job or flavor has a [telemetry] table writes it "
        f"into its dump_folder.{hint}"
    )
