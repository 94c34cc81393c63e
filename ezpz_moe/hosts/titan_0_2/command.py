"""Name a job on torchtitan 0.2's command line.

Pure data: this file imports neither torch nor torchtitan.
"""

from __future__ import annotations

from ezpz_moe.config.job import MODEL_NAME, Job


def arguments(job: Job) -> list[str]:
    """Return the arguments of ``torchtitan.train`` that train the job."""
    # Also with a job file that does not name the plugin: without it the host knows no flavor.
    plugin = ["--job.custom_config_module", MODEL_NAME]
    if job.path is not None:
        return ["--job.config_file", str(job.path), *plugin]
    return [*plugin, "--model.name", MODEL_NAME, "--model.flavor", job.flavor]
