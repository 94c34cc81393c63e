"""Name a job on the command line of torchtitan since 0.3.

Pure data: this file imports neither torch nor torchtitan.
"""

from __future__ import annotations

from ezpz_moe.config.job import MODEL_NAME


def named(config: str) -> list[str]:
    """Return ``torchtitan.train`` arguments for a flavor's name or the path of a job's TOML."""
    return ["--module", MODEL_NAME, "--config", config]
