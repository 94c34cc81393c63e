"""Which layers ``ezpz-moe bench`` measures: sizes, routings, and who computes them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ezpz_moe.compute.reference import Case, error_bounds, random_case, relative_error, truth
from ezpz_moe.errors import EzpzError
from ezpz_moe.hosts.detect import host
from ezpz_moe.tools.bench import contenders
from ezpz_moe.tools.bench.contender import Contender
from ezpz_moe.tools.bench.routings import STANDARD, counts_of, skew
from ezpz_moe.tools.bench.shapes import MODELS, Shape, parse_shape


def test_a_model_scaled_down() -> None:
    """D, F and tokens are divided; experts and top-k are the model's."""
    assert parse_shape("olmoe", scale=4, tokens=4096) == Shape("olmoe/4", 64, 512, 256, 8192, K=8)
    assert parse_shape("mixtral", scale=1, tokens=512) == Shape(
        "mixtral", 8, 4096, 14336, 1024, K=2
    )


def test_explicit_sizes_are_not_scaled() -> None:
    shape = parse_shape("8,1024,3584,2048", scale=4, tokens=1)
    assert shape.sizes == (8, 1024, 3584, 2048)
    assert shape.flops == 18 * 2048 * 1024 * 3584


@pytest.mark.parametrize(
    ("text", "scale", "tokens", "parts"),
    [
        ("olmo", 4, 4096, ["'olmo'", "Did you mean 'olmoe'"]),
        ("8,1024,3584", 4, 4096, ["'8,1024,3584'", "E,D,F,R"]),
        ("8,1024,3584,0", 4, 4096, ["above 0"]),
        ("8,a,3584,9", 4, 4096, ["E,D,F,R"]),
        ("olmoe", 3, 4096, ["--scale 3", "D = 2048"]),
        ("olmoe", 4, 2, ["--tokens = 2"]),
    ],
)
def test_wrong_shapes(text: str, scale: int, tokens: int, parts: list[str]) -> None:
    with pytest.raises(EzpzError) as raised:
        parse_shape(text, scale=scale, tokens=tokens)
    assert all(part in str(raised.value) for part in parts)


@given(st.sampled_from([*STANDARD, "zipf1.7"]), st.integers(1, 40), st.integers(0, 500))
def test_every_row_has_an_expert(routing: str, experts: int, rows: int) -> None:
    counts = counts_of(routing, experts, rows)
    assert len(counts) == experts
    assert sum(counts) == rows
    assert min(counts) >= 0
    assert counts == counts_of(routing, experts, rows), "the same again"


def test_the_routings_are_what_they_say() -> None:
    assert set(counts_of("balanced", 4, 14)) == {3, 4}
    assert sorted(counts_of("zipf1", 4, 25)) == [3, 4, 6, 12]
    # 5.45, 2.73 and 1.82: the two rows that are left go to the largest remainders
    assert sorted(counts_of("zipf1", 3, 10)) == [2, 3, 5]
    assert sorted(counts_of("zipf0.5", 4, 28)) == [5, 6, 7, 10]
    assert sorted(counts_of("empty25", 8, 30)) == [0, 0, 5, 5, 5, 5, 5, 5]
    assert sorted(counts_of("one_hot", 4, 9)) == [0, 0, 0, 9]
    assert counts_of("zipf1", 64, 4096) != sorted(counts_of("zipf1", 64, 4096), reverse=True)


def test_skew_is_of_the_busiest_expert() -> None:
    assert skew([4, 4]) == 1
    assert skew([0, 9, 0]) == 3


@pytest.mark.parametrize("routing", ["zipf", "zipf-1", "even"])
def test_unknown_routings(routing: str) -> None:
    with pytest.raises(EzpzError, match="Known: balanced"):
        counts_of(routing, 4, 8)


def computed(contender: Contender, case: Case) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Output, and the gradients of the inputs."""
    prepared = contender.prepare(case)
    y_RD = prepared.forward()
    return y_RD.detach(), list(torch.autograd.grad(y_RD, prepared.inputs, case.grad_y_RD))


COUNTS = [5, 0, 9, 4]
# Whose inputs are w1, w2, w3 and x, as a backend's.
AS_A_BACKEND = [
    "indexed",
    "stock_products",
    "single_buffer",
    "for_loop",
    "for_loop(recompute=true)",
]


FFNS = [("swiglu", False), ("clamped_swiglu", True), ("relu2", False), ("gelu", True)]


@pytest.mark.parametrize(("activation", "biased"), FFNS)
@pytest.mark.parametrize("name", AS_A_BACKEND)
def test_contenders_compute_the_layer(name: str, activation: str, biased: bool) -> None:
    find = contenders.backends if name.startswith("for_loop") else contenders.others
    case = random_case(COUNTS, dim=32, hidden_dim=48, activation=activation, biased=biased)
    ((contender,), true) = find([name]), truth(case)
    y_RD, gradients = computed(contender, case)
    bounds = error_bounds(case, true)
    for what, value in zip(true, [y_RD, *gradients], strict=True):
        assert relative_error(value, true[what]) <= bounds[what], what


def test_dense_computes_all_rows_with_one_expert() -> None:
    """As many products of the same sizes: the case of one expert that has all rows."""
    case = random_case([18], dim=32, hidden_dim=48)
    two = random_case([9, 9], dim=32, hidden_dim=48)
    assert two.x_RD.shape == case.x_RD.shape
    (dense,) = contenders.others(["dense"])
    true = truth(case)
    y_RD, (grad_w1_FD, _, _, grad_x_RD) = computed(dense, case)
    bounds = error_bounds(case, true)
    assert relative_error(y_RD, true["y"]) <= bounds["y"]
    assert relative_error(grad_x_RD, true["grad_x"]) <= bounds["grad_x"]
    assert relative_error(grad_w1_FD, true["grad_w1"][0]) <= bounds["grad_w1"]
    sizes = [each.shape for each in dense.prepare(two).inputs]
    assert sizes == [(48, 32), (32, 48), (48, 32), (18, 32)]


def test_dense_has_no_product_with_a_gate_that_is_not_there() -> None:
    case = random_case([18], dim=32, hidden_dim=48, activation="gelu")
    (dense,) = contenders.others(["dense"])
    true = truth(case)
    y_RD, (grad_w1_FD, _, _) = computed(dense, case)
    bounds = error_bounds(case, true)
    assert relative_error(y_RD, true["y"]) <= bounds["y"]
    assert relative_error(grad_w1_FD, true["grad_w1"][0]) <= bounds["grad_w1"]


def test_other_projects_layers_are_left_out_of_another_ffn() -> None:
    shape = Shape("small", 4, 32, 48, 18)
    where = (torch.device("cpu"), torch.bfloat16)
    plain, relu2, biased = (
        shape.of_ffn(activation, biased=is_biased)
        for activation, is_biased in (("swiglu", False), ("relu2", False), ("swiglu", True))
    )
    assert (plain, relu2.name, biased.name) == (shape, "small relu2", "small biases")
    assert (relu2.flops, biased.flops) == (shape.flops * 2 // 3, shape.flops)
    for each in (*contenders.others([]), *contenders.backends(["for_loop"])):
        of_any = each.name in ("stock_products", "indexed", "dense", "for_loop")
        for other in (relu2, biased):
            reasons = each.reasons_against(*where, other)
            assert any("SwiGLU without biases alone" in why for why in reasons) != of_any
        assert each.reasons_against(*where, plain) == each.why_not(*where, plain)


def test_stock_is_the_hosts_own_class() -> None:
    (stock,) = contenders.others(["stock"])
    case = random_case(COUNTS, dim=32, hidden_dim=48, dtype=torch.bfloat16)
    layer = host().stock_experts()(case.w1_EFD, case.w2_EDF, case.w3_EFD)
    assert type(layer).__module__.startswith("torchtitan.")
    assert stock.why_not(torch.device("cpu"), torch.bfloat16, Shape("", 4, 32, 48, 18)) == []


def test_stock_is_not_measured_where_it_would_compute_in_another_dtype() -> None:
    (stock,) = contenders.others(["stock"])
    (reason,) = stock.why_not(torch.device("cpu"), torch.float32, Shape("", 4, 32, 48, 18))
    assert "bfloat16" in reason
    assert "stock_products" in reason


def test_stock_says_what_is_wrong_with_the_host(monkeypatch) -> None:
    def refuse() -> None:
        raise EzpzError("torchtitan is not installed")

    monkeypatch.setattr("ezpz_moe.hosts.detect.host", refuse)
    (stock,) = contenders.others(["stock"])
    where = (torch.device("cpu"), torch.bfloat16, Shape("", 4, 32, 48, 18))
    assert stock.why_not(*where) == ["torchtitan is not installed"]


def test_without_names_everything_is_a_contender() -> None:
    names = [each.name for each in contenders.others([])]
    assert names[:4] == ["stock", "stock_products", "indexed", "dense"]
    assert len(names) == len(set(names)) == 10
    assert "single_buffer" not in names, "many times as slow and large under skew"
    assert {each.name for each in contenders.backends([])} >= {"for_loop", "grouped_mm"}
    assert {"olmoe", "qwen3_30b"} <= MODELS.keys()


def test_unknown_contenders() -> None:
    with pytest.raises(EzpzError, match="Did you mean 'indexed'"):
        contenders.others(["indxed"])
    with pytest.raises(EzpzError, match="fr_loop"):
        contenders.backends(["fr_loop"])
