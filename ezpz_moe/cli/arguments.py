"""What commands share: the types of their arguments, and access to the host."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Literal, Protocol

from tyro.conf import Positional, arg

from ezpz_moe.cli import display
from ezpz_moe.errors import EzpzError, did_you_mean

if TYPE_CHECKING:
    from ezpz_moe.hosts.host import Host
    from ezpz_moe.tools.nodes import Placement


def print_emulated(device: str, dtypes: Iterable[str]) -> None:
    """Print a line for each dtype that the device only emulates, before the user waits for it."""
    import torch

    from ezpz_moe.compute.native import emulation_note

    # dict.fromkeys keeps the order: each dtype once, as the user named them.
    for dtype in dict.fromkeys(dtypes):
        if note := emulation_note(device, getattr(torch, dtype)):
            display.print_line(f"{note}.")


DType = Literal["bfloat16", "float32", "float16", "float64"]
# Without a metavar, tyro would show these types in the help as {None}|STR and STR.
Device = Annotated[str | None, arg(metavar="DEVICE")]
Config = Annotated[Positional[str], arg(metavar="FLAVOR|JOB.toml")]

# A tuple, because tyro takes flags of the trainer for the value of an optional argument. Its help
# has no hint, which would be the empty "(default: )".
OptionalConfig = Annotated[
    Positional[tuple[str, ...]], arg(metavar="FLAVOR|JOB.toml", help_behavior_hint="")
]


def only(configs: tuple[str, ...]) -> str | None:
    """Return what an :data:`OptionalConfig` names; None if nothing.

    Raises:
        EzpzError: it names several.
    """
    if configs[1:]:
        raise EzpzError(f"{' '.join(configs)}: name one flavor or job.")
    return configs[0] if configs else None


class _Placed(Protocol):
    """The flags that say which of several machines this is."""

    @property
    def nnodes(self) -> int: ...
    @property
    def node_rank(self) -> int | None: ...
    @property
    def master_addr(self) -> str | None: ...
    @property
    def master_port(self) -> int: ...


def placement(command: _Placed) -> Placement | None:
    """Return this machine's place among several; None if it is the only one.

    Raises:
        EzpzError: a flag is missing or wrong.
    """
    from ezpz_moe.tools.nodes import Placement

    nnodes, node_rank, address = command.nnodes, command.node_rank, command.master_addr
    # A script may always pass --node-rank. A single machine meets no others; Placement refuses any
    # other rank of it than 0.
    if nnodes == 1 and node_rank in (None, 0):
        return None
    if nnodes > 1 and (node_rank is None or address is None):
        raise EzpzError(
            f"--nnodes {nnodes} needs --node-rank, this machine's number from 0, and "
            "--master-addr, the name or address of node 0."
        )
    return Placement(nnodes, node_rank or 0, address or "", command.master_port)


def refuse_no_ranks(world_size: int) -> None:
    """Refuse a ``--world-size`` that is not a number of ranks.

    Raises:
        EzpzError: it is less than 1.
    """
    if world_size < 1:
        raise EzpzError(f"--world-size {world_size}: a run needs at least 1 rank.")


def refuse_unknown_device(device: str | None) -> None:
    """Refuse a ``--device`` of a kind that torch certainly does not know, before torch is imported.

    Raises:
        EzpzError: it is of such a kind.
    """
    from ezpz_moe.hosts.accelerator import is_certainly_unknown

    if device is not None and is_certainly_unknown(device):
        kind = device.partition(":")[0]
        raise EzpzError(
            f"--device {device!r}: torch knows no such kind of device."
            f"{did_you_mean(kind, ('cpu', 'cuda', 'xpu'))}"
        )


@contextmanager
def many_imports() -> Iterator[None]:
    """Import torch and the host without looking for garbage, which takes a fifth of the time.

    What is imported stays until the end, so the collector leaves it alone afterwards too.
    """
    if not gc.isenabled():  # an outer one of these ends it
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def import_host() -> Host:
    """Return the host, for looking at configs. Silences the host's remarks about training."""
    with many_imports():
        from ezpz_moe.hosts.detect import check_host, host

        # First: it refuses a host that lacks what every run needs, before anything uses that.
        check_host()
    # Only now, to let through the notice of check_host() that a pair of versions is untested.
    display.set_log_level()
    return host()
