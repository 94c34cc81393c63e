"""``ezpz-moe train``."""

from __future__ import annotations

from dataclasses import dataclass

from tyro.conf import Suppress

from ezpz_moe.commands.arguments import Config


@dataclass(frozen=True)
class Train:
    """Train a flavor or job with torchtitan. All other flags go to the trainer as they are."""

    config: Config
    """A flavor's name, or the path of a job's TOML. It comes first."""
    nproc: int = 1
    """Processes on this machine, one per accelerator."""
    host_flags: Suppress[tuple[str, ...]] = ()

    def run(self) -> int:
        from ezpz_moe.launch import train

        return train(self.config, list(self.host_flags), nproc=self.nproc)
