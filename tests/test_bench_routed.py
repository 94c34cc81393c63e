"""``ezpz-moe bench --layer routed``: who computes it, and what is counted. No time is judged."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_cases import figures, measured
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ezpz_moe import cli
from ezpz_moe.cli.bench import rows, title
from ezpz_moe.compute import get_backend, native
from ezpz_moe.compute.arguments import Biases
from ezpz_moe.compute.plain import plain_loop
from ezpz_moe.compute.reference import relative_error
from ezpz_moe.errors import EzpzError
from ezpz_moe.tools.bench import routed
from ezpz_moe.tools.bench.contender import Contender, Prepared
from ezpz_moe.tools.bench.measuring import measure, saved_bytes
from ezpz_moe.tools.bench.routed_case import RoutedCase, random_routed_case
from ezpz_moe.tools.bench.routings import STANDARD, counts_of
from ezpz_moe.tools.bench.shapes import Shape, parse_shape

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))

import routed_layer

CPU = torch.device("cpu")
COUNTS = [9, 0, 5, 8, 2]  # of 12 tokens with two experts each
E, K, T, R, D, F = 5, 2, 12, 24, 32, 48
SHAPE = Shape("small", E, D, F, R, K)


def case(dtype: torch.dtype = torch.float32, **ffn: Any) -> RoutedCase:
    return random_routed_case(COUNTS, top_k=K, dim=D, hidden_dim=F, dtype=dtype, **ffn)


def contender(name: str) -> Contender:
    """A reference, a peer, or what a backend is measured as."""
    if name.startswith(("stock", "transformers")):
        return routed.others([name])[0]
    found = routed.backends([name.removesuffix(" composed")])
    return next(each for each in found if each.name == name)


def computed(prepared: Prepared, grad: Tensor) -> tuple[Tensor, ...]:
    """The output, and the gradients of the inputs."""
    out = prepared.forward()
    return out.detach(), *torch.autograd.grad(out, prepared.inputs, grad.to(out.dtype))


def plain(of: RoutedCase) -> dict[str, Tensor]:
    """Token by token as it is written on a blackboard: output and all gradients."""
    weights = {"w1": of.w1_EFD, "w2": of.w2_EDF, "w3": of.w3_EFD}
    biases = dict(zip(("b1", "b2", "b3"), of.biases or (None, None, None), strict=True))
    given = {**weights, **biases, "x": of.x_TD, "scores": of.scores_TK}
    leaves = {name: None if t is None else t.detach().requires_grad_() for name, t in given.items()}
    inputs = {name: t for name, t in leaves.items() if t is not None}
    x_TD, scores_TK = leaves["x"], leaves["scores"]
    by_expert = sorted((int(of.ids_TK[t, k]), t, k) for t in range(T) for k in range(K))
    token_R = torch.tensor([t for _, t, _ in by_expert])
    score_R = torch.stack([scores_TK[t, k] for _, t, k in by_expert])
    y_RD = plain_loop(
        *(leaves[name] for name in weights),
        x_TD[token_R],
        of.num_tokens_per_expert_E,
        activation=of.activation,
        biases=of.biases and Biases(*(leaves[name] for name in biases)),
    )
    weighted_RD = (y_RD * score_R[:, None]).to(x_TD.dtype)
    out_TD = torch.zeros_like(x_TD).index_add(0, token_R, weighted_RD)
    gradients = torch.autograd.grad(out_TD, inputs.values(), of.grad_out_TD)
    names = ("out", *(f"grad_{name}" for name in inputs))
    return dict(zip(names, (out_TD.detach(), *gradients), strict=True))


def bounds(of: RoutedCase, true: dict[str, Tensor]) -> dict[str, float]:
    """Twice what the plain loop rounds in the same dtype, as the contract has it."""
    return {name: 2 * relative_error(value, true[name]) + 1e-6 for name, value in plain(of).items()}


# --- the case -------------------------------------------------------------------------------------


def test_a_tokens_experts_differ_and_are_counted() -> None:
    ids_TK = case().ids_TK
    assert all(len(set(ids)) == K for ids in ids_TK.tolist())
    assert torch.bincount(ids_TK.flatten(), minlength=E).tolist() == COUNTS
    assert ids_TK[:, 0].tolist() != sorted(ids_TK[:, 0].tolist()), "neighbours in a text differ"


def test_scores_are_in_float32_beside_half_weights() -> None:
    half = case(torch.bfloat16)
    assert (half.x_TD.dtype, half.scores_TK.dtype) == (torch.bfloat16, torch.float32)
    assert half.to(torch.float64).scores_TK.dtype == torch.float64
    biased = case(torch.bfloat16, activation="gelu", biased=True).to(torch.float64)
    assert {each.dtype for each in biased.parameters} == {torch.float64}
    assert half.to(torch.float32).to(torch.bfloat16).scores_TK.dtype == torch.float32
    assert torch.equal(half.to(torch.float64).ids_TK, half.ids_TK)
    torch.testing.assert_close(half.scores_TK.sum(1), torch.ones(T))


@given(st.sampled_from([*STANDARD, "zipf2.5"]), st.integers(1, 40), st.data())
def test_no_expert_gets_more_rows_than_there_are_tokens(routing: str, experts: int, data) -> None:
    top_k = data.draw(st.integers(1, experts))
    tokens = data.draw(st.integers(0, 50))
    counts = counts_of(routing, experts, tokens * top_k, top_k)
    assert sum(counts) == tokens * top_k
    assert all(0 <= count <= tokens for count in counts)


def test_what_is_over_goes_to_the_others_by_their_shares() -> None:
    # Of 24 rows the first share would be 11.5. It gets the 8 tokens; 16 are left for 1/2, 1/3, 1/4.
    assert sorted(counts_of("zipf1", 4, 24, 3)) == [4, 5, 7, 8]
    assert Counter(counts_of("one_hot", 6, 20, 2)) == {10: 2, 0: 4}
    assert Counter(counts_of("empty25", 4, 16, 4)) == {4: 4}, "four experts of a token are not idle"


def test_a_shape_of_five_sizes_has_the_experts_of_a_token() -> None:
    assert parse_shape("8,64,32,24,2", scale=4, tokens=1) == Shape("8,64,32,24,2", 8, 64, 32, 24, 2)
    assert parse_shape("deepseek_v3", scale=1, tokens=64).T == 64
    for text in ("8,64,32,24,5", "2,64,32,24,3"):
        with pytest.raises(EzpzError, match=r"at most E = \d and divide the R = 24 rows"):
            parse_shape(text, scale=1, tokens=1)


# --- the contenders -------------------------------------------------------------------------------

LAYERS = ["stock_copy", "for_loop", "for_loop composed", "for_loop(recompute=true) composed"]


@pytest.mark.parametrize(
    "ffn", [{}, {"activation": "geglu", "biased": True}, {"activation": "relu2"}], ids=str
)
@pytest.mark.parametrize("name", LAYERS)
def test_contenders_compute_the_routed_layer(name: str, ffn: dict[str, Any]) -> None:
    there = case(**ffn)
    true = plain(there.to(torch.float64))
    limit = bounds(there, true)
    values = computed(contender(name).prepare(there), there.grad_out_TD)
    for what, value in zip(true, values, strict=True):
        assert relative_error(value, true[what]) <= limit[what], what


def test_stock_computes_the_routed_layer() -> None:
    there = case(torch.bfloat16)
    true = plain(there.to(torch.float64))
    limit = bounds(there, true)
    out, *gradients = computed(contender("stock").prepare(there), there.grad_out_TD)
    assert relative_error(out, true["out"]) <= limit["out"]
    assert relative_error(gradients[-2], true["grad_x"]) <= limit["grad_x"]
    assert relative_error(gradients[-1], true["grad_scores"]) <= limit["grad_scores"]


@pytest.mark.parametrize("how", ["eager", "batched_mm", "grouped_mm"])
def test_transformers_block_computes_the_routed_layer(how: str) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    there = case()
    true = plain(there.to(torch.float64))
    limit = bounds(there, true)
    out, *gradients = computed(contender(f"transformers_{how}").prepare(there), there.grad_out_TD)
    assert relative_error(out, true["out"]) <= limit["out"]
    assert relative_error(gradients[-2], true["grad_x"]) <= limit["grad_x"]
    assert relative_error(gradients[-1], true["grad_scores"]) <= limit["grad_scores"]


def test_a_backend_is_measured_twice_and_one_without_a_kernel_of_its_own_once() -> None:
    names = [each.name for each in routed.backends(["for_loop", "grouped_mm"])]
    assert names == ["for_loop", "for_loop composed", "grouped_mm composed"]
    all_names = {each.name for each in routed.backends([])}
    assert {*names, "for_loop(recompute=true)"} <= all_names
    assert "grouped_mm(recompute=true) composed" not in all_names, "it has no such option"
    with pytest.raises(EzpzError, match="fr_loop"):
        routed.backends(["fr_loop"])
    with pytest.raises(EzpzError, match="Did you mean 'stock_copy'"):
        routed.others(["stock_cpy"])


def test_without_a_host_that_dispatches_apart_only_a_backends_own_layer_is_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(**_: int) -> None:
        raise EzpzError("torchtitan is not installed")

    monkeypatch.setattr(routed, "stock_dispatcher", refuse)
    where = (CPU, torch.bfloat16, SHAPE)
    for name in ("stock", "stock_copy", "for_loop composed"):
        assert contender(name).why_not(*where) == ["torchtitan is not installed"]
    assert contender("for_loop").why_not(*where) == []
    assert routed.stock_saved_bytes(SHAPE) is None


# --- what is checked and counted ------------------------------------------------------------------


def by_hand(name: str, forward, *, may_drop: bool = False) -> Contender:
    """A contender of ``forward(w1, w2, w3, x, scores, ids, counts)``."""

    def prepare(of: RoutedCase) -> Prepared:
        given = (of.w1_EFD, of.w2_EDF, of.w3_EFD, of.x_TD, of.scores_TK)
        inputs = tuple(each.detach().requires_grad_() for each in given)
        others = (of.ids_TK, of.num_tokens_per_expert_E)
        return Prepared(lambda: forward(*inputs, *others), inputs, others)

    return Contender(name, prepare, lambda *_: [], may_drop=may_drop)


own = get_backend("for_loop").routed


def test_a_layer_that_weighs_its_experts_otherwise_is_not_timed() -> None:
    def squared(w1, w2, w3, x, scores, ids, counts) -> Tensor:
        return own(w1, w2, w3, x, scores.square(), ids, counts)

    def drops(w1, w2, w3, x, scores, ids, counts) -> Tensor:
        return own(w1, w2, w3, x, scores * (ids != 2), ids, counts)

    def drops_and_squares(w1, w2, w3, x, scores, ids, counts) -> Tensor:
        return drops(w1, w2, w3, x, scores.square(), ids, counts)

    them = [
        by_hand("right", own),
        by_hand("squared", squared),
        by_hand("silent", drops),
        by_hand("drops", drops, may_drop=True),
        by_hand("both", drops_and_squares, may_drop=True),
    ]
    found, failed = measure(them, case(), 1, lambda name: None)
    assert list(found) == ["right", "drops"]
    assert found["drops"].dropped == pytest.approx(COUNTS[2] / R)
    assert found["right"].dropped == 0
    assert failed.keys() == {"squared", "silent", "both"}
    assert all("its output is wrong" in reason for reason in failed.values())


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_what_one_node_saves(dtype: torch.dtype, size: int) -> None:
    """Gate and up, and the order as int64; the same is counted without computing."""
    for name, elements in (("for_loop", 2), ("for_loop(recompute=true)", 0)):
        prepare = contender(name).prepare
        expected = elements * R * F * size + 8 * R
        assert saved_bytes(prepare(case(dtype)))[0] == expected
        assert routed.saved_without_computing(prepare, SHAPE, dtype) == expected


def test_bytes_of_stock_are_the_same_without_computing() -> None:
    """Rows of x, four [R, F], y in float32, tokens and scores of rows, and ends of experts."""
    computed = saved_bytes(contender("stock").prepare(case(torch.bfloat16)))[0]
    assert routed.stock_saved_bytes(SHAPE) == computed
    assert computed >= R * (2 * D + 4 * 2 * F + 4 * D + 8 + 4)


# --- the command ----------------------------------------------------------------------------------


@pytest.fixture
def native_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Say which half dtypes this CPU multiplies; afterwards it is asked again."""

    def say(dtypes: str) -> None:
        monkeypatch.setenv(native.VARIABLE, dtypes)
        native.native_halves.cache_clear()

    yield say
    native.native_halves.cache_clear()


TINY = ["bench", "--layer", "routed", "--device", "cpu", "--shape", "4,32,48,16,2"]
SOON = ["--repeats", "1", "--routing", "zipf1", "--backends", "for_loop(recompute=true)"]


def test_the_command_measures_other_ffns(tmp_path: Path, capsys) -> None:
    file = tmp_path / "figures.json"
    ffns = ["--activation", "relu2", "swiglu", "--bias", "--dtype", "float32"]
    assert cli.main([*TINY, *SOON, *ffns, "--out", str(file)]) == 0
    assert "4,32,48,16,2 relu2 biases (routed layer" in capsys.readouterr().out
    relu2, swiglu = json.loads(file.read_text())["measured"]
    assert [each["shape"]["activation"] for each in (relu2, swiglu)] == ["relu2", "swiglu"]
    for each in (relu2, swiglu):
        assert {"stock_copy", "for_loop(recompute=true)"} <= each["figures"].keys()
        assert all("SwiGLU" in why[0] for why in each["left_out"].values())
        assert each["failed"] == {}


def test_the_command_measures_routed_layers(tmp_path: Path, capsys, native_in) -> None:
    native_in("bfloat16")
    file = tmp_path / "figures.json"
    assert cli.main([*TINY, *SOON, "--dtype", "bfloat16", "float32", "--out", str(file)]) == 0
    output = capsys.readouterr().out
    assert "(routed layer, E=4 K=2 D=32 F=48 T=8), zipf1: 2 to 8 rows per expert" in output
    half, single = json.loads(file.read_text())["measured"]
    mine = {"for_loop(recompute=true)", "for_loop(recompute=true) composed"}
    assert {*mine, "stock"} <= half["figures"].keys()
    assert {*mine, "stock_copy"} <= single["figures"].keys()
    assert (half["stock"], single["stock"]) == ("stock", "stock_copy")
    for row in (half, single):
        assert not row["failed"]
        assert row["layer"] == "routed"
        assert row["figures"][row["stock"]]["summary"]["saved_of_stock"] == 1
        assert row["figures"]["for_loop(recompute=true)"]["saved_bytes"] == 8 * 16


def test_where_bfloat16_is_emulated_a_copy_stands_in_for_the_time(
    tmp_path: Path, capsys, native_in
) -> None:
    native_in("float32")
    file = tmp_path / "figures.json"
    assert cli.main([*TINY, *SOON, "--against", "stock_copy", "--out", str(file)]) == 0
    (reason,) = contender("stock").why_not(CPU, torch.bfloat16, SHAPE)
    assert "which this CPU emulates: stock_copy, a copy of its forward made for this" in reason
    (row,) = json.loads(file.read_text())["measured"]
    assert row["stock"] == "stock_copy"
    # In float32, against the host's bytes in bfloat16.
    assert row["figures"]["stock_copy"]["summary"]["saved_of_stock"] > 1.4
    assert "speed / stock copy" in capsys.readouterr().out


def test_a_table_of_routed_layers_has_what_is_saved_and_the_backward_pass() -> None:
    them = {"stock": figures(6, 6, saved=100), "mine": figures(3, 3, saved=20)}
    it = measured(them, layer="routed", shape=SHAPE, stock_saved_bytes=100)
    mine, stock = rows(it)
    assert (mine["contender"], mine["forward ms"], mine["backward ms"]) == ("mine", "1", "2")
    assert (mine["saved / stock"], stock["saved / stock"]) == ("0.20", "1.00")
    assert "time / dense" not in mine
    assert title(it).startswith("small (routed layer, E=5 K=2 D=32 F=48 T=12), balanced")
    ffn = next(rows(measured({"mine": figures(3)})))
    assert "saved / stock" not in ffn
    assert "backward ms" not in ffn


# --- benchmarks/routed_layer.py -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "cells"),
    [
        (
            "bfloat16",
            {
                "saved": "0.230 (<= 0.22): MISSED",
                "saved, recompute": "0.030 (<= 0.03): met",
                "speed": "0.960 (>= 1.05): MISSED, below 0.97",
                "speed, recompute": "0.850 (>= 0.85): met",
            },
        ),
        ("float32", {"saved": "0.230", "saved, recompute": "0.030"}),
    ],
)
def test_the_table_has_the_goals_beside_the_figures(dtype: str, cells: dict[str, str]) -> None:
    them = {
        "stock": figures(0.96, saved=1000),
        "for_loop": figures(1, saved=230),
        "for_loop(recompute=true)": figures(0.96 / 0.85, saved=30),
    }
    it = measured(them, layer="routed", dtype=dtype, stock_saved_bytes=1000)
    line = routed_layer.row(it, "for_loop", routed_layer.GOALS["olmoe", 4])
    assert line["layer"] == f"tiny balanced {dtype}"
    assert cells.items() <= line.items()
    del it.figures["for_loop"]
    failed = routed_layer.row(it, "for_loop", routed_layer.GOALS["olmoe", 4])
    assert (failed["saved"], failed["speed"]) == ("-", "-")


def test_deepseek_v3_is_counted_at_full_size() -> None:
    """Of each row stock keeps x, four F, and y in float32, and one node gate and up."""
    line = routed_layer.uncomputed_row(routed_layer.contenders("for_loop", "stock_copy")[1:])
    ratio = float(line["saved"].split()[0])
    assert ratio == pytest.approx(2 * 2 * 2048 / (2 * 7168 + 4 * 2 * 2048 + 4 * 7168), rel=0.01)
    assert line["saved"].endswith("(<= 0.15): met")
    assert line["saved, recompute"] == "0.000 (<= 0.03): met"


def test_a_backend_without_a_layer_of_its_own_has_no_table() -> None:
    with pytest.raises(EzpzError, match="--backend grouped_mm: has no routed layer of its own"):
        routed_layer.contenders("grouped_mm", "stock_copy")


def test_the_table_is_one_command(tmp_path: Path, monkeypatch, capsys, native_in) -> None:
    """A line for each dtype and routing, and a file; a goal out of reach is an exit code."""
    native_in("bfloat16")
    unreachable = routed_layer.Goals(saved=0.3, speed=1e9)
    monkeypatch.setattr(routed_layer, "GOALS", {("olmoe", 64): unreachable})
    monkeypatch.setattr(routed_layer, "TOKENS", 64)
    file = tmp_path / "figures.json"
    monkeypatch.setattr(sys, "argv", ["routed_layer.py", "--turns", "1", "--json", str(file)])
    assert routed_layer.main() == 1
    lines = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert [line[0] for line in lines] == [
        *(f"| olmoe/64 {routing} bfloat16" for routing in ("balanced", "zipf1")),
        *(f"| olmoe/64 {routing} float32" for routing in ("balanced", "zipf1")),
        "| deepseek_v3 bfloat16, not computed",
    ]
    assert all(line[1].endswith("(<= 0.3): met") for line in lines[:2])
    assert all("(>= 1e+09): MISSED" in line[3] for line in lines[:4])
    stock = [row["stock"] for row in json.loads(file.read_text())["measured"]]
    assert stock == ["stock", "stock", "stock_copy", "stock_copy"]
