"""The file of a machine that was measured, in the form of :class:`.machine.Machine`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import date
from typing import Any

from ezpz_moe.config.toml_edit import assignment
from ezpz_moe.tools.bench.plan import environment
from ezpz_moe.tools.calibration.rank import Found
from ezpz_moe.tools.planning.machine import Measured

_COLLECTIVE = ("tier", "kind", "ranks")
_DIGITS = 4
"""Significant ones: more were not measured."""


def as_toml(found: Found, config: str, compute_bytes: int) -> str:
    """Return the file of a machine.

    The peak is the fastest product. It is that of the job's dtype; the other dtype has the same,
    which no plan of this job reads.

    Args:
        found: what the ranks have measured.
        config: the job that they have measured for.
        compute_bytes: of a number in its products.
    """
    peak = max(found.products.values())
    shares = {name: _shares(rates, peak) for name, rates in found.experts.items()}
    fastest = max((max(each.values()) for each in shares.values()), default=1.0)
    machine = {
        "name": f"{found.ranks} ranks of {found.device}",
        "device": "cpu" if found.kind == "cpu" else "accelerator",
        "ranks_per_node": found.per_node,
        "overlap": found.overlap,
    }
    compute = {
        "bfloat16": peak,
        "float32": peak,
        "products": 1.0,
        "experts": min(1.0, fastest),
        "attention": min(1.0, found.attention / peak),
        "alone": found.alone,
    }
    lines = [*_table("", machine), *_table("compute", compute)]
    lines += _table("compute.by_flops", _curve(_shares(found.products, peak)))
    for name, of_rows in shares.items():
        lines += _table(f'compute.backends."{name}"', _curve(of_rows))
    lines += _table("memory", {"size": found.memory, "bandwidth": found.bandwidth})
    for tier in ("node", "network"):
        lines += _table(tier, _link(found, tier))
    dtype = "bfloat16" if compute_bytes == 2 else "float32"
    about = environment(found.kind)
    source = f"`ezpz-moe plan {config} --calibrate`, {date.today()}, {about['device']}"
    lines += _table("sources", {"all": f"{source}, torch {about['versions']['torch']}, {dtype}"})
    for each in found.collectives:
        lines += _table("[collectives]", {key: getattr(each, key) for key in _COLLECTIVE})
        lines += _table("collectives.seconds", each.seconds.model_dump(mode="json"))
    return "".join(lines)


def _shares(rates: Mapping[float, float], peak: float) -> dict[float, float]:
    return {size: rate / peak for size, rate in rates.items()}


def _curve(values: Mapping[float, float]) -> dict[str, list[float]]:
    return {"sizes": list(values), "values": list(values.values())}


def _link(found: Found, tier: str) -> dict[str, float]:
    """Return bandwidth and latency of a tier: of its all-gathers, the largest and the smallest.

    A tier that no rank has reached is taken to be like the other one.
    """
    known = _gathers(found, tier) or _gathers(found, "node") or _gathers(found, "network")
    curve = known[0].seconds
    passed = curve.sizes[-1] * (known[0].ranks - 1) / known[0].ranks
    return {"bandwidth": passed / curve.values[-1], "achieved": 1.0, "latency": curve.values[0]}


def _gathers(found: Found, tier: str) -> list[Measured]:
    return [e for e in found.collectives if e.tier == tier and e.kind == "all-gather"]


def _table(name: str, values: Mapping[str, Any]) -> Iterator[str]:
    if name:
        yield f"\n[{name}]\n"
    for key, value in values.items():
        yield assignment(key, _rounded(value))


def _rounded(value: Any) -> Any:
    if isinstance(value, list):
        return [_rounded(each) for each in value]
    return float(f"{value:.{_DIGITS}g}") if isinstance(value, float) else value
