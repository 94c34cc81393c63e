"""What the commands that look at a run before it exists have in common with ``train``."""

from __future__ import annotations

from dataclasses import dataclass

from tyro.conf import Suppress

from ezpz_moe.cli.arguments import refuse_no_ranks
from ezpz_moe.cli.command import Reporting
from ezpz_moe.errors import EzpzError


# Named only, so that a command's own fields may have no default.
@dataclass(frozen=True, kw_only=True)
class Inspected(Reporting):
    """A command that takes what follows ``ezpz-moe train``, word for word."""

    world_size: int | None = None
    """Assume this many ranks. Default: --nproc times --nnodes, if one of them is given."""
    nproc: int | None = None
    """As in `train`: processes on one machine."""
    nnodes: int = 1
    """As in `train`: machines."""
    node_rank: int | None = None
    """Accepted as in `train`; changes nothing here."""
    master_addr: str | None = None
    """Accepted as in `train`; changes nothing here."""
    master_port: int = 29500
    """Accepted as in `train`; changes nothing here."""
    resume_from_last_whole: bool = False
    """Accepted as in `train`; changes nothing here."""
    host_flags: Suppress[tuple[str, ...]] = ()

    def ranks(self) -> int | None:
        """Return the number of ranks that the command line names; None if it names none.

        Raises:
            EzpzError: it is not a number of ranks, or it is given twice and differs.
        """
        for flag, number in (("--nproc", self.nproc), ("--nnodes", self.nnodes)):
            if number is not None and number < 1:
                raise EzpzError(f"{flag} {number}: must be at least 1.")
        if self.world_size is not None:
            refuse_no_ranks(self.world_size)
        if self.nproc is None and self.nnodes == 1:
            return self.world_size
        started = (self.nproc or 1) * self.nnodes
        if self.world_size not in (None, started):
            raise EzpzError(
                f"--world-size {self.world_size}: but --nproc {self.nproc or 1} on --nnodes "
                f"{self.nnodes} are {started} ranks. Leave --world-size out."
            )
        return started
