"""Name a job on torchtitan 0.2's command line.

Pure data: this file imports neither torch nor torchtitan.
"""

from __future__ import annotations

from collections.abc import Sequence

from ezpz_moe.config.job import MODEL_NAME, Job


def arguments(job: Job) -> list[str]:
    """Return the arguments of ``torchtitan.train`` that train the job."""
    # Also with a job file that does not name the plugin: without it the host knows no flavor.
    plugin = ["--job.custom_config_module", MODEL_NAME]
    if job.path is not None:
        return ["--job.config_file", str(job.path), *plugin]
    return [*plugin, "--model.name", MODEL_NAME, "--model.flavor", job.flavor]


def has_flags(words: Sequence[str], job: Job) -> bool:
    """Return whether the trainer's command line says more than which job it trains."""
    flags = (word.partition("=")[0] for word in words if word.startswith("--"))
    # The host reads --job.config-file too.
    return not {f"--{flag[2:].replace('-', '_')}" for flag in flags} <= set(arguments(job))
