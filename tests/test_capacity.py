"""``batched_mm_capacity`` where it drops: which tokens, what is left, what it says of itself.

Where it drops nothing it is under the whole contract, as every other backend.
"""

from __future__ import annotations

import dataclasses
import re
from itertools import product
from math import ceil

import pytest
import torch
from contract_cases import (
    DEVICES,
    HIDDEN_DIM,
    PATTERNS,
    ROUTINGS,
    Pattern,
    assert_same_bits,
    assert_within,
    leaves,
    make_case,
    make_product_case,
    make_routed_case,
    over_devices,
    over_patterns,
    plain_product,
    run_product,
)

from ezpz_moe.compute import get_backend
from ezpz_moe.compute.backends import batched_mm_capacity
from ezpz_moe.compute.plain import plain_loop
from ezpz_moe.compute.reference import Case, RoutedCase, error_bounds, relative_error, run, truth
from ezpz_moe.errors import EzpzError

FACTORS = (0.3, 0.75, 1.0, 1.25)
over_factors = pytest.mark.parametrize("factor", FACTORS)


def capacity(factor: float, **options: object):
    more = "".join(f", {key}={value}" for key, value in options.items())
    return get_backend(f"batched_mm_capacity(capacity_factor={factor}{more})")


def kept_rows(pattern: Pattern, factor: float) -> torch.Tensor:
    """bool [R, 1]: the first rows of every expert, and neither the later ones nor the tail."""
    limit = ceil(factor * (sum(pattern.counts) + pattern.tail) / max(1, len(pattern.counts)))
    kept = [place < limit for count in pattern.counts for place in range(count)]
    return torch.tensor([*kept, *[False] * pattern.tail], dtype=torch.bool).unsqueeze(1)


def dropping(computed, kept_R1: torch.Tensor):
    """What computes rows, with the dropped ones cut out of the output and so of every gradient."""

    def cut(*arguments: torch.Tensor) -> torch.Tensor:
        rows = computed(*arguments)
        return torch.where(kept_R1.to(rows.device), rows, 0)

    return cut


def bounds_of(plain: dict, true: dict) -> dict[str, float]:
    return {name: 2 * relative_error(plain[name], true[name]) + 1e-6 for name in true}


def _square():
    """Every pattern with every factor once, each saved for backward or not, in both dtypes."""
    for (i, pattern), (j, factor) in product(enumerate(PATTERNS), enumerate(FACTORS)):
        dtype = (torch.float32, torch.bfloat16)[(i + j // 2) % 2]
        recompute = ("true", "false")[(i + j) % 2]
        name = f"{pattern}-{factor}-{recompute}-{str(dtype).removeprefix('torch.')}"
        yield pytest.param(PATTERNS[pattern], factor, recompute, dtype, id=name)


@over_devices
@pytest.mark.parametrize(("pattern", "factor", "recompute", "dtype"), list(_square()))
def test_what_is_kept_equals_float64_and_what_is_dropped_is_zero(
    dtype: torch.dtype, recompute: str, factor: float, pattern: Pattern, device: str
) -> None:
    case = make_case(pattern, device, dtype)
    kept_R1 = kept_rows(pattern, factor)
    expected = dropping(plain_loop, kept_R1)
    true = run(expected, case.to("cpu", torch.float64))
    result = run(capacity(factor, recompute=recompute).ffn, case)
    assert_within(result, true, bounds_of(run(expected, case), true))
    dropped_R = ~kept_R1.squeeze(1)
    for name in ("y", "grad_x"):
        assert not result[name][dropped_R.to(device)].any()


@over_devices
@over_patterns
@over_factors
def test_the_seam_drops_the_same_rows(factor: float, pattern: Pattern, device: str) -> None:
    case = make_product_case(pattern, transposed=True, device=device)
    kept_R1 = kept_rows(pattern, factor)
    expected = dropping(plain_product, kept_R1)
    true = run_product(expected, case.true())
    result = run_product(capacity(factor).grouped_mm, case)
    assert_within(result, true, bounds_of(run_product(expected, case), true))
    dropped_R = ~kept_R1.squeeze(1)
    for name in ("C", "grad_A"):
        assert not result[name][dropped_R.to(device)].any()


def without_dropped_choices(case: RoutedCase, factor: float) -> RoutedCase:
    """The case with an id of no expert for every choice that is dropped: an expert's last ones."""
    experts, ids = len(case.w1_EFD), case.ids_TK.flatten().tolist()
    limit = ceil(factor * case.num_rows / experts)
    kept = [expert if ids[:i].count(expert) < limit else experts for i, expert in enumerate(ids)]
    return dataclasses.replace(case, ids_TK=torch.tensor(kept).view(case.ids_TK.shape))


@pytest.mark.parametrize("recompute", ["true", "false"])
@pytest.mark.parametrize("routing", ["uneven", "repeated", "tail"])
@over_factors
def test_a_routed_layer_drops_an_experts_last_choices(
    factor: float, routing: str, recompute: str
) -> None:
    case = make_routed_case(ROUTINGS[routing])
    kept = without_dropped_choices(case, factor)
    true = truth(kept)
    result = run(capacity(factor, recompute=recompute).routed, case)
    assert_within(result, true, error_bounds(kept, true))
    for name, mask, _ in kept.zeros():
        assert not result[name][mask].any()


def test_a_dropped_row_may_hold_anything() -> None:
    """Its value reaches nothing: NaN there is not NaN in a weight's gradient."""
    pattern = Pattern((6, 2))
    case = make_case(pattern)
    case.x_RD[5] = torch.nan
    assert not kept_rows(pattern, 1.25)[5]
    result = run(capacity(1.25).ffn, case)
    assert all(value.isfinite().all() for value in result.values())


@pytest.mark.parametrize("recompute", ["true", "false"])
def test_weights_of_an_idle_expert_reach_nothing(recompute: str) -> None:
    """They are multiplied with empty slots, and 0 * NaN is NaN."""
    case = make_case(Pattern((3, 0, 6), tail=1))
    backend = capacity(1.0, recompute=recompute)
    results = []
    for value in (1.0, torch.nan):
        for weights in (case.w1_EFD, case.w2_EDF, case.w3_EFD):
            weights[1] = value
        results.append(run(backend.ffn, case))
    assert_same_bits(*results)
    assert all(value.isfinite().all() for value in results[1].values())
    product = make_product_case(Pattern((3, 0, 6), tail=1), transposed=True)
    product.B_EKN[1] = torch.nan
    found = run_product(backend.grouped_mm, product)
    assert all(value.isfinite().all() for value in found.values())


def test_no_experts_compute_no_rows() -> None:
    none_E = torch.empty(0, dtype=torch.int64)
    assert capacity(1.25).rows_used(none_E, 7).tolist() == [0, 0]


def test_no_kernel_reads_a_value(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors without values go through the kernels themselves, not through their stand-ins."""
    backend = capacity(1.25)
    assert not backend.host_syncs
    case: Case = make_case(PATTERNS["uneven"]).to("meta", torch.bfloat16)
    counts_E = case.num_tokens_per_expert_E
    inputs = (*case.parameters, case.x_RD, counts_E, None)
    kernels, options = backend.operators.kernels, backend.kernel_options
    y_RD, gate_RF, up_RF = kernels.ffn(*inputs, "swiglu", *options)
    assert (y_RD.shape, gate_RF.shape) == (case.x_RD.shape, (len(case.x_RD), HIDDEN_DIM))
    for saved in ((gate_RF, up_RF), (None, None)):
        gradients = kernels.ffn_backward(case.grad_y_RD, *inputs, *saved, "swiglu", *options)
        assert [g.shape for g in gradients] == [each.shape for each in case.inputs]
    B_EKN, offs_E = case.w2_EDF.transpose(1, 2), counts_E.cumsum(0)
    C_RN = kernels.mm(gate_RF, B_EKN, offs_E, *options)
    assert C_RN.shape == case.x_RD.shape
    kernels.mm_backward(C_RN, gate_RF, B_EKN, offs_E, *options)
    assert backend.rows_used(counts_E, len(case.x_RD)).is_meta


@pytest.mark.skipif("cuda" not in DEVICES, reason="CUDA graphs need a CUDA device")
def test_a_cuda_graph_replays_it_with_other_counts() -> None:
    backend = capacity(1.25)
    case = make_case(PATTERNS["uneven"], "cuda")
    inputs, counts_E = leaves(case), case.num_tokens_per_expert_E
    run(backend.ffn, case)  # libraries are set up outside of the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y_RD = backend.ffn(*inputs, counts_E)
        gradients = torch.autograd.grad(y_RD, inputs, case.grad_y_RD)
    counts_E.copy_(torch.tensor([1, 30, 0, 14]))
    graph.replay()
    expected = run(backend.ffn, case)
    for value, name in zip((y_RD, *gradients), expected, strict=True):
        assert torch.equal(value, expected[name])


def test_compiled_it_drops_the_same() -> None:
    backend = capacity(1.0)
    compiled = torch.compile(backend.ffn, backend="aot_eager", fullgraph=True, dynamic=True)
    for name in ("uneven", "tail", "one_hot"):
        case = make_case(PATTERNS[name])
        expected = run(backend.ffn, case)
        for key, value in run(compiled, case).items():
            assert torch.equal(value, expected[key]), key


@over_patterns
@over_factors
@pytest.mark.parametrize("count_dtype", [torch.int32, torch.int64])
def test_it_says_how_many_rows_it_computes_and_drops(
    count_dtype: torch.dtype, factor: float, pattern: Pattern
) -> None:
    case = make_case(pattern)
    rows, E = len(case.x_RD), len(pattern.counts)
    computed, dropped = (
        capacity(factor).rows_used(case.num_tokens_per_expert_E.to(count_dtype), rows).tolist()
    )
    assert computed == E * min(rows, ceil(factor * rows / max(1, E)))
    assert dropped == sum(pattern.counts) - int(kept_rows(pattern, factor).sum())


@over_patterns
def test_lossless_it_drops_nothing(pattern: Pattern) -> None:
    backend = get_backend("batched_mm_capacity").lossless
    case = make_case(pattern)
    _, dropped = backend.rows_used(case.num_tokens_per_expert_E, len(case.x_RD)).tolist()
    assert dropped == 0
    assert dataclasses.replace(backend, capacity_factor=1.25) == get_backend("batched_mm_capacity")


def test_a_capacity_beyond_all_rows_is_all_rows() -> None:
    rows = batched_mm_capacity.rows_per_expert
    assert rows(100, 4, 1e308) == rows(100, 4, 4) == 100


@pytest.mark.parametrize("value", ["0", "-1.0", "1e999", "true", "'much'"])
def test_a_capacity_that_is_none(value: str) -> None:
    with pytest.raises(EzpzError, match=re.escape("capacity_factor = ")):
        get_backend(f"batched_mm_capacity(capacity_factor={value})")


def test_tail_rows_are_zero_whatever_the_weights_are() -> None:
    """A tail row has no slot, not even a void one of the last expert."""
    case = make_case(Pattern((5, 0, 9, 1), tail=2))
    case.w2_EDF[-1] = torch.nan
    y_RD = run(capacity(1.25).ffn, case)["y"]
    assert y_RD[14].isnan().all()
    assert not y_RD[15:].any()
