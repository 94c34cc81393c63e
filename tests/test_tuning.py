"""Measuring who is the fastest: in turns, within memory and half a minute, by classes of skew.

What ``auto`` makes of it is in ``test_auto.py``.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch

from ezpz_moe.compute import tuning


def _raise_out_of_memory() -> None:
    raise torch.OutOfMemoryError("no room")


@pytest.mark.parametrize(
    "run_out", [_raise_out_of_memory, lambda: torch.empty(2**50)], ids=("device", "CPU")
)
def test_what_does_not_fit_in_memory_is_not_chosen(run_out) -> None:
    calls = []

    def too_large() -> None:
        calls.append("too_large")
        run_out()

    measured = tuning.measure(
        {"large": too_large, "small": lambda: calls.append("small")}, torch.device("cpu")
    )
    assert measured.fastest == "small"
    assert measured.milliseconds["large"] is None
    assert calls.count("large") <= 1
    with pytest.raises(torch.OutOfMemoryError, match="none of large fits"):
        tuning.measure({"large": too_large}, torch.device("cpu"))


def test_what_breaks_otherwise_is_told() -> None:
    def broken() -> None:
        raise RuntimeError("wrong sizes")

    with pytest.raises(RuntimeError, match="wrong sizes"):
        tuning.measure({"broken": broken, "right": lambda: None}, torch.device("cpu"))


@pytest.mark.parametrize(("seconds", "calls"), [(1000, 1 + tuning._TURNS), (0, 2)])
def test_a_slow_layer_is_not_measured_for_minutes(
    monkeypatch: pytest.MonkeyPatch, seconds: float, calls: int
) -> None:
    """But each candidate once after its warm-up."""
    monkeypatch.setattr(tuning, "_SECONDS", seconds)
    ran: list[str] = []
    runs = {name: partial(ran.append, name) for name in ("first", "second")}
    tuning.measure(runs, torch.device("cpu"))
    assert ran == ["first", "second"] * calls


def test_measuring_finds_the_faster_one() -> None:
    """Not a timing: one of the two does nothing at all."""
    few, many = torch.ones(2, 2), torch.ones(700, 700)
    runs = {"slow": lambda: many @ many @ many, "fast": lambda: few}
    assert tuning.measure(runs, torch.device("cpu")).fastest == "fast"


@pytest.mark.parametrize(
    ("load", "expected"),
    [
        (0.99, 0),
        (1.0, 0),
        (1.18, 0),
        (1.2, 1),
        (1.34, 1),
        (1.69, 2),
        (2.0, 2),
        (4.0, 4),
        (64.0, 12),
    ],
)
def test_two_classes_of_skew_double(load: float, expected: int) -> None:
    assert tuning.skew_class(load) == expected
