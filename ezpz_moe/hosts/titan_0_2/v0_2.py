"""How torchtitan 0.2's command line names a job.

Pure data: this file imports neither torch nor torchtitan.
"""

from __future__ import annotations

from ezpz_moe.config.job import MODEL_NAME, Job

VARIABLES = ("CONFIG_FILE",)
"""What tells the host's ``run_train.sh`` the job."""


def arguments(job: Job) -> list[str]:
    """Arguments of ``torchtitan.train`` that train the job."""
    plugin = ["--job.custom_config_module", MODEL_NAME]
    if job.path is not None:
        return ["--job.config_file", str(job.path), *plugin]
    return [*plugin, "--model.name", MODEL_NAME, "--model.flavor", job.flavor]


def one_step(folder: str) -> list[str]:
    """Flags for a run of one step that writes to ``folder`` only."""
    return [
        *("--training.steps", "1", "--job.dump-folder", folder),
        *("--checkpoint.no-enable", "--validation.no-enable"),
        *("--metrics.no-enable-wandb", "--metrics.no-enable-tensorboard"),
    ]
