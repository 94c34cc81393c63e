"""What a calibration is asked for: its file, and the sizes that the ranks measure. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ezpz_moe.errors import EzpzError
from ezpz_moe.hosts.model_sheet import ModelSheet


@dataclass(frozen=True)
class Layer:
    """An expert layer, of which ranks measure every backend.

    Attributes:
        num_experts: E.
        dim, hidden_dim: D and F.
    """

    num_experts: int
    dim: int
    hidden_dim: int


@dataclass(frozen=True)
class Asked:
    """What to measure.

    Attributes:
        dtype: that the job computes in, by torch's name.
        seq_len: of a sequence, for attention.
        largest: FLOPs of the largest product that the job has in a microbatch of its own.
        layer: of experts; None for a dense model.
    """

    dtype: str
    seq_len: int
    largest: float
    layer: Layer | None


def check_asked(path: Path, ranks: int) -> None:
    """Refuse what cannot be measured or written, before anything is started.

    Args:
        path: the file that is to be written.
        ranks: of the run.

    Raises:
        EzpzError: the file's name does not end in .toml, it is there already, or its folder is not;
            or one rank is to measure links.
    """
    if path.suffix != ".toml":
        raise EzpzError(f"--calibrate {path}: a machine's file ends in .toml.")
    if path.exists():
        raise EzpzError(f"--calibrate {path}: is there already, and nothing is overwritten.")
    if not path.absolute().parent.is_dir():
        raise EzpzError(f"--calibrate {path}: there is no folder {path.parent}.")
    if ranks < 2:
        raise EzpzError("--calibrate: links are measured between ranks. Start several: --nproc 2.")


def asked_of(sheet: ModelSheet) -> Asked:
    """Return what to measure for a job."""
    tokens = sheet.job.local_batch * sheet.job.seq_len
    largest = max(
        tokens * weight.forward
        for part in sheet.parts.values()
        for weight in part.weights
        if not weight.is_expert
    )
    return Asked(
        dtype="bfloat16" if sheet.job.compute_bytes == 2 else "float32",
        seq_len=sheet.job.seq_len,
        largest=largest,
        layer=next(_layers(sheet), None),
    )


def _layers(sheet: ModelSheet) -> Iterator[Layer]:
    for part in sheet.parts.values():
        if part.routed is not None:
            shapes = [weight.shape for weight in part.weights if weight.is_expert and weight.used]
            hidden = shapes[0][1] * shapes[0][2] // part.routed.row_width
            yield Layer(part.routed.num_experts, part.routed.row_width, hidden)
