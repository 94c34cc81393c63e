"""What the trainer will be told, as far as this package has to know it before and after a run."""

from __future__ import annotations

import argparse
from pathlib import Path

from ezpz_moe.job import Job


def pipeline_degree(job: Job, host_flags: list[str]) -> int:
    parser = _parser()
    key = "parallelism.pipeline_parallel_degree"
    parser.add_argument(*_spellings(key), dest="degree", type=int, default=job.values.get(key, 1))
    return max(1, parser.parse_known_args(host_flags)[0].degree)


def last_checkpoint(job: Job, host_flags: list[str]) -> Path | None:
    """The folder that the trainer would resume from; None when there is none, or it is not told to.

    Where checkpoints are is said in the trainer's own way: ``checkpoint.folder`` in
    ``dump_folder``, one ``step-N`` each, which is whole when it has its metadata.
    """
    values, parser = job.values, _parser()
    enable, disable = "--checkpoint.enable", "--checkpoint.no-enable"
    default = values.get("checkpoint.enable", False)
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
    told = parser.parse_known_args(host_flags)[0]
    if not told.enable:
        return None
    whole = Path(told.dump_folder, told.folder).glob("step-*/.metadata")
    steps = {int(file.parent.name.removeprefix("step-")): file.parent for file in whole}
    return steps[max(steps)] if steps else None


def _parser() -> argparse.ArgumentParser:
    return argparse.ArgumentParser(add_help=False, allow_abbrev=False)


def _spellings(key: str) -> list[str]:
    """The host takes underscores and dashes alike."""
    return list(dict.fromkeys([f"--{key}", f"--{key.replace('_', '-')}"]))
