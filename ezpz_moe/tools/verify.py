"""Check every usable backend against the float64 reference, on this machine: ``ezpz-moe verify``.

Covers the expert FFN and the routed layer, each over several routings and with every activation,
without biases and with them: the output and all gradients. The compute contract is the judge: its
error bound, exact zeros where there are no tokens, and the dtypes of the inputs. A backend that
drops tokens gets a capacity at which it drops none. Results are plain rows, which the command line
prints.

Legend of the shape suffixes: :mod:`ezpz_moe.compute.contract`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from typing import Any

import torch
from torch import Tensor

from ezpz_moe.compute import backend_names, get_backend
from ezpz_moe.compute.activations import ACTIVATIONS
from ezpz_moe.compute.reference import (
    LayerCase,
    error_bounds,
    random_case,
    random_routed_case,
    relative_error,
    run,
    truth,
)
from ezpz_moe.compute.registry import options_of
from ezpz_moe.errors import EzpzError

DIM, HIDDEN_DIM = 128, 192  # unequal, to expose a swapped matrix

EXPERTS = 8

# Of the expert FFN: tokens of each expert, and rows after them that belong to no expert.
ROUTINGS: dict[str, tuple[list[int], int]] = {
    "balanced": ([64] * 8, 0),
    "uneven, empty": ([0, 190, 1, 0, 77, 31, 213, 0], 0),
    "all zero": ([0] * 8, 16),
    "one hot": ([0, 0, 0, 0, 0, 512, 0, 0], 0),
    "tail": ([64, 9, 80, 0, 101, 64, 64, 33], 41),
}
# Of the routed layer: each token's two experts, and how many choices become rows, if not all.
TOKEN_ROUTINGS: dict[str, tuple[list[tuple[int, int]], int | None]] = {
    "balanced": ([(t % 8, (t + 3) % 8) for t in range(256)], None),
    "uneven, empty, repeated": ([(t * t % 8, t % 5) for t in range(256)], None),
    # The ids 8 and 9 are of no expert: some of these choices are left out, some are tail rows.
    "left out": ([(7 * t % 10, t % 9) for t in range(256)], 450),
}

_NAMES_OF = {"ffn": tuple(ROUTINGS), "routed": tuple(TOKEN_ROUTINGS)}
"""The routings of each entry point, a method of a backend."""

_HARDEST = {"ffn": "tail", "routed": "left out"}
"""Of each entry point the routing that has most of the others: idle experts, rows of none."""


@dataclass(frozen=True)
class Check:
    """One entry point of a backend on one routing in one dtype, with one kind of FFN."""

    backend: str
    device: str
    dtype: str
    entry: str
    routing: str
    activation: str
    biased: bool

    @property
    def ffn(self) -> str:
        """The kind of FFN in words."""
        return f"{self.activation} with biases" if self.biased else self.activation


@dataclass(frozen=True)
class Row(Check):
    """How one tensor of a :class:`Check` compares with float64.

    ``verdict`` is ``"ok"`` or what is wrong; a figure is None if it is not a finite number.
    """

    tensor: str
    max_abs_error: float | None
    relative_error: float | None
    bound: float
    cosine: float | None
    verdict: str

    @property
    def ok(self) -> bool:
        return self.verdict == "ok"


def default_device() -> str:
    """Return the accelerator that torch sees, else the CPU."""
    # check_available: torch may be built for an accelerator that this machine does not have.
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return accelerator.type if accelerator else "cpu"


def reasons_against(device: str, dtype: str) -> dict[str, list[str]]:
    """Return, for every installed backend, why it cannot run there; an empty list means usable.

    Raises:
        EzpzError: torch knows no such device.
    """
    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise EzpzError(f"--device {device!r}: {str(error).splitlines()[0]}") from error
    return {name: _reasons(name, place, getattr(torch, dtype)) for name in backend_names()}


def properties(name: str) -> dict[str, Any]:
    """Return what a backend says about itself; None if its package does not load."""
    keys = ("host_syncs", "static_shapes", "drops_tokens", "summary")
    try:
        backend = get_backend(name)
    except EzpzError:
        return dict.fromkeys((*keys, "options"))
    options = ", ".join(f"{key}={value}" for key, value in options_of(backend).items())
    return {key: getattr(backend, key) for key in keys} | {"options": options or None}


def plan(device: str, dtypes: Sequence[str], activations: Sequence[str] = ()) -> list[Check]:
    """List every check of the usable backends on ``device``, those of one case side by side.

    Args:
        activations: check these on every routing, without biases and with them. Empty: SwiGLU
            without biases on every routing, and every other FFN on the hardest.

    Raises:
        EzpzError: nothing can be compared there; if no backend is usable, with all reasons.
    """
    if not dtypes:
        raise EzpzError("--dtype: name at least one, for example bfloat16")
    reasons = {dtype: reasons_against(device, dtype) for dtype in dtypes}
    # After the reasons, which refuse a name that torch does not know.
    if torch.device(device).type == "meta":
        raise EzpzError("--device 'meta': meta tensors hold no values to compare; use cpu")
    checks = [
        Check(name, device, dtype, *case)
        for dtype in dtypes
        for case in _cases(activations)
        for name, against in reasons[dtype].items()
        if not against
    ]
    if not checks:
        # A reason that holds for several dtypes is printed once.
        lines = dict.fromkeys(
            f"{name}: {reason}"
            for by_name in reasons.values()
            for name, against in by_name.items()
            for reason in against
        )
        raise EzpzError("\n  ".join([f"no backend can run on {device}:", *lines]))
    return checks


def _cases(activations: Sequence[str]) -> Iterator[tuple[str, str, str, bool]]:
    """Yield the entry point, routing, activation and biases of every case."""
    for entry, routings in _NAMES_OF.items():
        for routing in routings:
            for activation, biased in product(activations or ACTIVATIONS, (False, True)):
                is_plain = (activation, biased) == ("swiglu", False)
                if activations or is_plain or routing == _HARDEST[entry]:
                    yield entry, routing, activation, biased


def compare(check: Check) -> list[Row]:
    """Run one check; return a row for the output and each gradient. Syncs the device.

    An exception of the backend becomes a verdict, and the other checks still run.
    """
    # Whatever the backend, of which the reference knows nothing.
    case, true, bounds = _reference(replace(check, backend=""))
    try:
        # lossless, because dropped rows would count as errors.
        values = run(getattr(get_backend(check.backend).lossless, check.entry), case)
    except Exception as error:
        # An assertion has no text of its own.
        text = str(error).strip().partition("\n")[0]
        verdict = f"{type(error).__name__}: {text}" if text else type(error).__name__
        return [Row(**vars(check), **_unknown(name, bounds[name], verdict)) for name in case.names]
    return [
        Row(**vars(check), **_judged(name, values[name], true[name], bounds[name], case))
        for name in case.names
    ]


def worst_of_each(rows: Iterable[Row]) -> list[Row]:
    """Return one row of each routing that a backend computed: its worst tensor, of all its FFNs."""
    of_each: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        of_each.setdefault((row.dtype, row.backend, row.entry, row.routing), []).append(row)
    return [worst(each) for each in of_each.values()]


def worst(rows: Sequence[Row]) -> Row:
    """Return the row that failed, or the one nearest to its bound."""
    # As a share of the bound: errors in bfloat16 and float32 are not comparable by themselves.
    # A row without a figure has failed, so the first part of the key decides.
    return max(rows, key=lambda row: (not row.ok, (row.relative_error or 0.0) / row.bound))


def verdict(rows: Sequence[Row]) -> str:
    """Return in a line whether the backends compute here what they promise."""
    of_backend: dict[str, list[Row]] = {}
    for row in rows:
        of_backend.setdefault(row.backend, []).append(row)
    wrong = [_wrong(name, its) for name, its in of_backend.items() if not _all_ok(its)]
    right = [name for name, its in of_backend.items() if _all_ok(its)]
    device, failed = rows[0].device, sum(not row.ok for row in rows)
    agree = "agree" if right[1:] else "agrees"
    agrees = f"{_and(right)} {agree} with float64 on {device}, {_ffns(rows)}" if right else ""
    if not wrong:
        return f"{agrees}: 0 of {len(rows)} tensors are wrong."
    others = f"; {agrees}" if agrees else ""
    return (
        f"Do not train with {_and(wrong)} on {device}: {failed} of {len(rows)} tensors are "
        f"wrong{others}."
    )


def _all_ok(rows: Iterable[Row]) -> bool:
    return all(row.ok for row in rows)


def _wrong(name: str, rows: Sequence[Row]) -> str:
    """Return a backend's name, and the FFNs that are wrong unless all are."""
    wrong = dict.fromkeys(row.ffn for row in rows if not row.ok)
    is_all = wrong.keys() == {row.ffn for row in rows}
    return name if is_all else f"{name} ({', '.join(wrong)})"


def _ffns(rows: Sequence[Row]) -> str:
    """Return in words which FFNs were computed."""
    activations = list(dict.fromkeys(row.activation for row in rows))
    biases = {False: "without biases", True: "with biases"}
    return ", ".join([_and(activations), _and([biases[each] for each in {r.biased for r in rows}])])


def _and(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if names[1:] else names)


def cosine(value: Tensor, true: Tensor) -> float:
    """Return the cosine of the angle between two tensors; 1 when both are zero, 0 when one is."""
    norms = [torch.linalg.vector_norm(tensor).item() for tensor in (value, true)]
    # A gradient may be exactly zero, as with no tokens: equal then means both are.
    if not all(norms):
        return float(norms[0] == norms[1])
    return torch.sum(value * true).item() / math.prod(norms)


# plan() lists the backends of a case one after the other.
@lru_cache(maxsize=1)
def _reference(check: Check) -> tuple[LayerCase, dict[str, Tensor], dict[str, float]]:
    """Return a case's inputs, float64's results and the allowed errors, for all backends."""
    case = _CASES[check.entry](
        check.routing,
        activation=check.activation,
        biased=check.biased,
        device=check.device,
        dtype=getattr(torch, check.dtype),
    )
    true = truth(case)
    return case, true, error_bounds(case, true)


def _ffn_case(routing: str, **others: Any) -> LayerCase:
    counts, tail = ROUTINGS[routing]
    return random_case(counts, tail=tail, dim=DIM, hidden_dim=HIDDEN_DIM, **others)


def _routed_case(routing: str, **others: Any) -> LayerCase:
    ids, num_rows = TOKEN_ROUTINGS[routing]
    return random_routed_case(
        ids,
        num_experts=EXPERTS,
        top_k=len(ids[0]),
        num_rows=num_rows,
        dim=DIM,
        hidden_dim=HIDDEN_DIM,
        scores_dtype=torch.float32,  # as trainers have them
        **others,
    )


_CASES = {"ffn": _ffn_case, "routed": _routed_case}


def _reasons(name: str, device: torch.device, dtype: torch.dtype) -> list[str]:
    try:
        return get_backend(name).why_not(device, dtype, dims=(DIM, HIDDEN_DIM))
    except EzpzError as error:  # a package that does not load affects only its own backend
        return [str(error)]


def _unknown(tensor: str, bound: float, verdict: str) -> dict[str, Any]:
    figures = dict.fromkeys(("max_abs_error", "relative_error", "cosine"))
    return {"tensor": tensor, "bound": bound, "verdict": verdict, **figures}


def _judged(
    name: str, value: Tensor | None, true: Tensor, bound: float, case: LayerCase
) -> dict[str, Any]:
    if value is None:
        return _unknown(name, bound, "is None")
    # In float64 on the CPU: comparing in the value's dtype would round the difference.
    on_host = value.cpu().double()
    error = relative_error(value, true)
    within = ["beyond the bound"] if not error <= bound else []  # NaN is not within
    return {
        "tensor": name,
        "max_abs_error": _number((on_host - true).abs().max().item()),
        "relative_error": _number(error),
        "bound": bound,
        "cosine": _number(cosine(on_host, true)),
        "verdict": "; ".join([*within, *_broken_rules(name, value, case)]) or "ok",
    }


def _broken_rules(name: str, value: Tensor, case: LayerCase) -> Iterator[str]:
    """Yield what the contract demands exactly, besides the error bound."""
    like = dict(zip(case.names, (case.grad_output, *case.inputs), strict=True))[name]
    if value.dtype != like.dtype:
        yield f"is {value.dtype}"
    for tensor, mask, otherwise in case.zeros():
        # any() is True for NaN as well.
        if tensor == name and value[mask.to(value.device)].any():
            yield otherwise


def _number(figure: float) -> float | None:
    return figure if math.isfinite(figure) else None
