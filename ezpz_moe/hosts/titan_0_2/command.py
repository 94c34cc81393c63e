"""How torchtitan 0.2's command line names a job.

Pure data: this file imports neither torch nor torchtitan.
"""

from __future__ import annotations

from ezpz_moe.config.job import MODEL_NAME, Job


def arguments(job: Job) -> list[str]:
    """Arguments of ``torchtitan.train`` that train the job."""
    plugin = ["--job.custom_config_module", MODEL_NAME]
    if job.path is not None:
        return ["--job.config_file", str(job.path), *plugin]
    return [*plugin, "--model.name", MODEL_NAME, "--model.flavor", job.flavor]
