"""``ezpz-moe train``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tyro.conf import Suppress

from ezpz_moe.cli import display
from ezpz_moe.cli.arguments import Config
from ezpz_moe.cli.command import Command
from ezpz_moe.errors import EzpzError

if TYPE_CHECKING:
    from ezpz_moe.tools.nodes import Placement


@dataclass(frozen=True)
class Launched(Command):
    """A command that starts the trainer with torchrun."""

    group = "runs"

    config: Config
    """The name of a flavor, or the path to a job's TOML. It comes first."""
    nproc: int = 1
    """Start this many processes on this machine, one per accelerator."""
    nnodes: int = 1
    """Train on this many machines. Run the same command on each, with its own --node-rank."""
    node_rank: int | None = None
    """Number this machine, from 0."""
    master_addr: str | None = None
    """Name node 0, by host name or address."""
    master_port: int = 29500
    """Use this free port of node 0."""
    host_flags: Suppress[tuple[str, ...]] = ()

    def _launch(self) -> dict[str, Any]:
        """Return what the launcher must know in addition to the job."""
        return {
            "nproc": self.nproc,
            "placement": self._placement(),
            "tell": display.print_to_stderr,
        }

    def _placement(self) -> Placement | None:
        from ezpz_moe.tools.nodes import Placement

        # A script may always pass --node-rank. A single machine meets no others; Placement refuses
        # any other rank of it than 0.
        if self.nnodes == 1 and self.node_rank in (None, 0):
            return None
        if self.nnodes > 1 and (self.node_rank is None or self.master_addr is None):
            raise EzpzError(
                f"--nnodes {self.nnodes} needs --node-rank, this machine's number from 0, and "
                "--master-addr, the name or address of node 0."
            )
        return Placement(self.nnodes, self.node_rank or 0, self.master_addr or "", self.master_port)


@dataclass(frozen=True)
class Train(Launched):
    """Train a flavor or job with torchtitan. All other flags go to the trainer unchanged."""

    resume_from_last_whole: bool = False
    """Resume from the newest step that is whole, if a later one is damaged."""

    def run(self) -> int:
        from ezpz_moe.tools.launch import train

        return train(
            self.config,
            list(self.host_flags),
            from_last_whole=self.resume_from_last_whole,
            **self._launch(),
        )


COMMAND = Train
