"""The trainer's settings that this package has to know before and after a run."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from ezpz_moe.config.job import Job

_NEWEST = -1  # the default of ``checkpoint.load_step``; as a step that was found: none


def pipeline_degree(job: Job, host_flags: list[str]) -> int:
    parser = _parser()
    key = "parallelism.pipeline_parallel_degree"
    parser.add_argument(*_spellings(key), dest="degree", type=int, default=job.values.get(key, 1))
    return max(1, parser.parse_known_args(host_flags)[0].degree)


def last_checkpoint(job: Job, host_flags: list[str]) -> Path | None:
    """Return the folder that the trainer would resume from; None if there is none, or it must not.

    Follows the trainer's own layout: ``checkpoint.folder`` in ``dump_folder``, with a folder
    ``step-N`` per checkpoint, which is complete once it has its metadata. The trainer takes the
    newest of them, or without checking the one that ``checkpoint.load_step`` names, which may not
    exist.
    """
    values, parser = job.values, _parser()
    enable, disable = "--checkpoint.enable", "--checkpoint.no-enable"
    default = values.get("checkpoint.enable", False)
    # Both switches write one value, so the last one given wins, as in the trainer.
    parser.add_argument(enable, dest="enable", action="store_true", default=default)
    parser.add_argument(disable, dest="enable", action="store_false")
    parser.add_argument(
        *_spellings("checkpoint.folder"),
        dest="folder",
        default=values.get("checkpoint.folder", "checkpoint"),
    )
    parser.add_argument(
        *_spellings("dump_folder"),
        *_spellings("job.dump_folder"),  # torchtitan 0.2
        dest="dump_folder",
        default=values.get("job.dump_folder", "./outputs"),
    )
    parser.add_argument(
        *_spellings("checkpoint.load_step"),
        dest="load_step",
        type=int,
        default=values.get("checkpoint.load_step", _NEWEST),
    )
    # The trainer parses all its flags; only the ones above matter here.
    told = parser.parse_known_args(host_flags)[0]
    if not told.enable:
        return None
    folder = Path(told.dump_folder, told.folder)
    step = _newest_step(folder) if told.load_step == _NEWEST else told.load_step
    return None if step == _NEWEST else folder / f"step-{step}"


def _newest_step(folder: Path) -> int:
    whole = (file.parent.name for file in folder.glob("step-*/.metadata"))
    # Ignore others such as "step-20.partial", which a `ckpt remap` is writing, or a user's copy.
    matches = (re.fullmatch(r"step-(\d+)", name) for name in whole)
    return max((int(match[1]) for match in matches if match), default=_NEWEST)


def _parser() -> argparse.ArgumentParser:
    # No abbreviations: --checkpoint.enable must not match a longer flag that is only the trainer's.
    return argparse.ArgumentParser(add_help=False, allow_abbrev=False)


def _spellings(key: str) -> list[str]:
    """Return the spellings of a flag: the host accepts both underscores and dashes."""
    return list(dict.fromkeys([f"--{key}", f"--{key.replace('_', '-')}"]))
