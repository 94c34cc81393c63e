"""How torchtitan 0.3's command line names a job.

Pure data: this file imports neither torch nor torchtitan.
"""

from __future__ import annotations

from ezpz_moe.config.job import MODEL_NAME, Job

VARIABLES = ("MODULE", "CONFIG")
"""What tells the host's ``run_train.sh`` the job."""


def arguments(job: Job) -> list[str]:
    """Arguments of ``torchtitan.train`` that train the job."""
    return named(str(job.path or job.flavor))


def named(config: str) -> list[str]:
    """The same for a flavor's name or the path of a job's TOML."""
    return ["--module", MODEL_NAME, "--config", config]


def one_step(folder: str) -> list[str]:
    """Flags for a run of one step that writes to ``folder`` only."""
    return [
        *("--training.steps", "1", "--dump-folder", folder),
        *("--checkpoint.no-enable", "--validator.no-enable"),
        *("--metrics.no-enable-wandb", "--metrics.no-enable-tensorboard"),
    ]
