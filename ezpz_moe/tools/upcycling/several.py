"""Several dense models of the same sizes: what they have in common, and their mean.

Every function takes the models in the order of the command line; one is enough.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import combinations
from pathlib import Path

import torch

from ezpz_moe.errors import EzpzError
from ezpz_moe.tools.checkpoints.storage import same_bits
from ezpz_moe.tools.upcycling import weights
from ezpz_moe.tools.upcycling.dense import Dense
from ezpz_moe.tools.upcycling.fit import Fit


def listed(folders: Iterable[Path]) -> str:
    """Return ``a, b and c``."""
    *most, last = map(str, folders)
    return f"{', '.join(most)} and {last}" if most else last


def common_dtype(models: Sequence[Dense], name: str) -> torch.dtype:
    """Return the dtype that holds a tensor of all models: of two, the wider one.

    Raises:
        EzpzError: there are several, and it has no mean.
    """
    return _common(models, name, [each.dtype(name) for each in models])


def widest(models: Sequence[Dense], names: Iterable[str]) -> int:
    """Return the bytes of the widest dtype, as :func:`common_dtype`; of one model at most that."""
    if len(models) == 1:
        return models[0].itemsize
    return max(common_dtype(models, name).itemsize for name in names)


def read_each(models: Sequence[Dense], name: str) -> list[torch.Tensor]:
    """Read a tensor of every model, all in their common dtype."""
    tensors = [each.read(name) for each in models]
    dtype = _common(models, name, [each.dtype for each in tensors])
    return [each.to(dtype) for each in tensors]


def _common(models: Sequence[Dense], name: str, dtypes: Sequence[torch.dtype]) -> torch.dtype:
    common, *others = dtypes
    if not others:
        return common
    for dense, dtype in zip(models, dtypes, strict=True):
        # One byte is float8, which is useless without its scales.
        if not dtype.is_floating_point or dtype.itemsize == 1:
            raise EzpzError(
                f"{dense.folder}: {name} is {_short(dtype)}, of which there is no mean. Convert "
                "the model to bfloat16 first."
            )
        common = torch.promote_types(common, dtype)
    return common


def read_mean(models: Sequence[Dense], name: str) -> torch.Tensor:
    """Read the mean of a tensor, in the common dtype; of one model, the tensor itself."""
    return weights.mean(read_each(models, name))


def are_same(models: Sequence[Dense], names: Iterable[str]) -> bool:
    """Return whether all models have the same bits; it ends with the first tensor that differs."""
    return len(models) == 1 or all(
        same_bits(first, each)
        for first, *others in (read_each(models, name) for name in names)
        for each in others
    )


def check_copies(models: Sequence[Dense], fit: Fit, num_experts: int, where: str) -> None:
    """Refuse a layer with fewer copies of a dense FFN than there are models.

    Args:
        fit: how an FFN becomes experts.
        num_experts: of the layer.
        where: the layer and the flavor, in words.

    Raises:
        EzpzError: names the models that no expert would come from.
    """
    copies = num_experts // fit.granularity
    if lost := models[copies:]:
        parts = f" in {fit.granularity} parts each" if fit.granularity > 1 else ""
        raise EzpzError(
            f"{listed(each.folder for each in lost)}: no expert would come from there, because "
            f"{where} has room for {copies} dense FFNs{parts}. Name at most {copies} dense models, "
            "or a flavor with more experts."
        )


def origin_note(models: Sequence[Dense], fit: Fit, num_experts: int) -> str:
    """Return which experts come from which model."""
    copies = num_experts // fit.granularity
    counts = [len(range(place, copies, len(models))) for place in range(len(models))]
    shares = ", ".join(f"{n} of {each.folder}" for n, each in zip(counts, models, strict=True))
    together = f", {fit.granularity} neighbouring experts each" if fit.granularity > 1 else ""
    return f"The experts are copies of the dense FFNs in turn{together}: {shares}."


def dtype_notes(models: Sequence[Dense], names: Iterable[str]) -> Iterator[str]:
    """Yield which dtypes become one, once for all tensors that have these."""
    found: dict[tuple[torch.dtype, ...], list[str]] = {}
    for name in names:
        dtypes = tuple(each.dtype(name) for each in models)
        if len(set(dtypes)) > 1:
            found.setdefault(dtypes, []).append(name)
    for dtypes, mixed in found.items():
        said = ", ".join(
            f"{_short(dtype)} in {each.folder}" for dtype, each in zip(dtypes, models, strict=True)
        )
        more = f" (and {len(mixed) - 1} more)" if mixed[1:] else ""
        yield f"{mixed[0]}{more}: {said}. Written in {_short(common_dtype(models, mixed[0]))}."


def distance_note(models: Sequence[Dense], names: Iterable[str]) -> str:
    """Return how far apart the models are in what is averaged: where they agree least.

    The measure is the cosine of two models' matrices: near 1 for models that were trained from the
    same weights, and near 0 for others, whose mean is the function of neither.
    """
    least = (math.inf, "", "")
    for name in names:
        each = zip(models, read_each(models, name), strict=True)
        for (a, x), (b, y) in combinations(each, 2):
            least = min(least, (_cosine(x, y), name, f"{a.folder} and {b.folder}"))
    cosine, name, pair = least
    return (
        f"Of the matrices that are averaged, {name} differs most: cosine {cosine:.2f} between "
        f"{pair}. It is near 1 for models that were trained from the same weights; the mean of "
        "others is of little use."
    )


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _cosine(x: torch.Tensor, y: torch.Tensor) -> float:
    x, y = x.float().flatten(), y.float().flatten()
    norms = torch.linalg.vector_norm(x) * torch.linalg.vector_norm(y)
    return (x.dot(y) / norms).item() if norms else 0.0
