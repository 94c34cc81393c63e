"""What ``ezpz-moe bench`` counts, on cases that are known by hand. No time is judged."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ezpz_moe.compute import for_loop, get_backend, tuning
from ezpz_moe.compute.reference import random_case
from ezpz_moe.tools.bench import contenders
from ezpz_moe.tools.bench.contender import Contender, Prepared, leaves, prepared
from ezpz_moe.tools.bench.measuring import measure, peak_bytes, saved_bytes, syncs, ticks

CPU = torch.device("cpu")
COUNTS = [5, 0, 9, 4]
R, D, F = 18, 32, 48


def case(dtype: torch.dtype = torch.float32):
    return random_case(COUNTS, dim=D, hidden_dim=F, dtype=dtype)


def contender(name: str, ffn, **others) -> Contender:
    return Contender(name, prepared(ffn), lambda *_: [], **others)


def no_tick(name: str) -> None:
    pass


def saved_by(forward, *inputs: Tensor, constants: tuple[Tensor, ...] = ()) -> int:
    ready = leaves(*inputs)
    return saved_bytes(Prepared(lambda: forward(*ready), ready, constants))[0]


def test_auto_chooses_for_the_load_that_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not for the one before it: in a run of its own it would look at its first call."""
    asked = []

    def fastest(situation, runs, device):
        asked.append(situation.skew)
        return "for_loop"

    monkeypatch.setattr(tuning, "fastest", fastest)
    for counts in (COUNTS, [0, 0, 18, 0]):
        layer = random_case(counts, dim=D, hidden_dim=F)
        measure([contender("auto", get_backend("auto").ffn)], layer, 1, no_tick)
    assert asked == [2, 4]  # twice and four times the mean


def test_auto_is_measured_anew_and_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A former choice may be of a busier hour, or of another allocator's turn of this command."""
    asked = []

    def count(runs, device):
        asked.append(list(runs))
        return tuning.Measured(dict.fromkeys(runs, 1.0))

    monkeypatch.setattr(tuning, "measure", count)
    monkeypatch.setenv(tuning.CACHE_VARIABLE, str(tmp_path))
    for _ in range(2):
        measure([contender("auto", get_backend("auto").ffn)], case(), 1, no_tick)
    assert len(asked) == 2
    assert not list(tmp_path.iterdir())
    assert os.environ[tuning.CACHE_VARIABLE] == str(tmp_path)


def test_saved_are_neither_inputs_nor_what_is_a_view_of_them() -> None:
    x_RD, w_DF = torch.randn(R, D), torch.randn(D, F)
    assert saved_by(lambda x, w: x @ w, x_RD, w_DF) == 0
    assert saved_by(lambda x, w: x.T[:, :4].T @ w.view(-1, F), x_RD, w_DF) == 0
    assert saved_by(lambda x: x * w_DF.sum(), x_RD, constants=()) == 4, "one number"
    mask_RD = torch.ones(R, D)
    assert saved_by(lambda x: x * mask_RD, x_RD) == 4 * R * D
    assert saved_by(lambda x: x * mask_RD, x_RD, constants=(mask_RD,)) == 0


def test_saved_counts_each_storage_once_and_whole() -> None:
    x_RD = torch.randn(R, D)

    def squared_slices(x: Tensor) -> Tensor:
        h = x.exp()  # saves its result, which the products save again, as two views
        return h[:2] * h[2:4]

    assert saved_by(squared_slices, x_RD) == 4 * R * D


@pytest.mark.parametrize(
    ("name", "elements"),
    [("for_loop", 2), ("for_loop(recompute=true)", 0), ("stock_products", 4), ("dense", 4)],
)
def test_what_an_expert_layer_saves(name: str, elements: int) -> None:
    """Gate and up are two [R, F]; torch's own silu and product keep two more."""
    find = contenders.backends if name.startswith("for_loop") else contenders.others
    ready = find([name])[0].prepare(case())
    offsets = 4 * len(COUNTS) if name == "stock_products" else 0  # int32, by three products
    assert saved_bytes(ready)[0] == 4 * elements * R * F + offsets


def test_peak_is_the_most_at_a_time() -> None:
    def work() -> Tensor:
        first = torch.empty(1000)
        second = torch.empty(500)
        del first
        third = torch.empty(600)
        del second, third
        return torch.empty(10)

    assert peak_bytes(work, CPU) == 4 * 1500


def test_peak_holds_what_work_returns_and_not_what_was_there() -> None:
    before = [torch.empty(5000)]

    def work() -> list[Tensor]:
        before.clear()  # its memory was held before, so that giving it back is no room for more
        return [torch.empty(1000), torch.empty(200)]

    assert peak_bytes(work, CPU) == 4 * 1200


def test_peak_knows_nothing_of_what_an_earlier_measurement_allocated() -> None:
    """torch's profiler reports an address as freed with the size that an earlier profile saw."""
    kept: list[Tensor] = []
    assert peak_bytes(lambda: kept.append(torch.empty(5000)), CPU) == 4 * 5000

    def work() -> list[Tensor]:
        kept.clear()
        return [torch.empty(1000), torch.empty(200)]

    assert peak_bytes(work, CPU) == 4 * 1200


def test_peak_sees_the_inside_of_operators() -> None:
    """A product of two bfloat16 matrices per expert, in an operator of its own."""
    ready = contenders.backends(["for_loop(recompute=true)"])[0].prepare(case())
    # y, gate and up, and silu(gate) * up while y is computed
    with torch.no_grad():
        assert peak_bytes(ready.forward, CPU) == 4 * (R * D + 3 * R * F)


def test_syncs_are_counted_on_cuda_only() -> None:
    assert syncs(lambda: None, CPU) is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="counts what a CUDA device waits for")
def test_syncs_of_a_cuda_device() -> None:
    ones = torch.ones(8, device="cuda")
    assert syncs(lambda: ones.sum().item() + ones.sum().item(), ones.device) == 2
    assert syncs(lambda: ones + ones, ones.device) == 0


def test_contenders_take_turns_and_the_first_turn_does_not_count() -> None:
    calls: list[str] = []

    def counting(name: str) -> Contender:
        def ffn(*arguments: Tensor) -> Tensor:
            calls.append(name)
            return for_loop(*arguments)

        return contender(name, ffn)

    them = [counting(name) for name in "abc"]
    steps: list[str] = []
    figures, failed = measure(them, case(), 2, steps.append)
    assert failed == {}
    assert {len(each.both_ms) for each in figures.values()} == {2}
    assert {len(each.forward_ms) for each in figures.values()} == {2}
    assert "".join(calls[-9:]) == "abccabbca"
    assert len(steps) == ticks(them, 2) == 3 * (1 + 1 + 2)


def test_one_that_breaks_or_computes_something_else_is_told_and_the_others_measured() -> None:
    def raises(*_: Tensor) -> Tensor:
        raise RuntimeError("no\nkernel")

    def wrong(w1, w2, w3, x, counts) -> Tensor:
        return for_loop(w3, w2, w1, x, counts)

    def short(*arguments: Tensor) -> Tensor:
        return for_loop(*arguments)[:-1]

    them = [
        contender("raises", raises),
        contender("wrong", wrong),
        contender("short", short),
        contender("right", for_loop, declares_syncs=True),
    ]
    figures, failed = measure(them, case(torch.bfloat16), 1, no_tick)
    assert list(figures) == ["right"]
    assert figures["right"].declares_syncs is True
    assert figures["right"].saved_bytes == 2 * 2 * R * F
    assert failed["raises"] == "RuntimeError: no kernel"
    assert "its output is wrong" in failed["wrong"]
    assert "(17, 32), not (18, 32)" in failed["short"]


def _without_last_rows(w1, w2, w3, x, counts) -> Tensor:
    kept = torch.ones(len(x), 1).index_fill(0, torch.arange(len(x) - 6, len(x)), 0)
    return for_loop(w1, w2, w3, x, counts) * kept


def test_rows_that_are_dropped_are_counted_where_dropping_is_allowed() -> None:
    drops = contender("drops", _without_last_rows, may_drop=True)
    silent = replace(drops, name="silent", may_drop=False)
    figures, failed = measure([drops, silent], case(), 1, no_tick)
    assert figures["drops"].dropped == pytest.approx(6 / R)
    assert "its output is wrong" in failed["silent"]


def test_rows_that_are_kept_have_to_be_right() -> None:
    def halved(*arguments: Tensor) -> Tensor:
        return _without_last_rows(*arguments) / 2

    _, failed = measure([contender("halved", halved, may_drop=True)], case(), 1, no_tick)
    assert "its output is wrong" in failed["halved"]
