"""The contract of ``routed``, in numbers: whole routed layers against float64, whatever the ids.

Output and all five gradients. What autograd, compilers and memory are promised is in
``test_contract_routed_autograd.py``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch
from contract_cases import (
    BACKENDS,
    DEVICES,
    ROUTINGS,
    assert_same_bits,
    assert_within,
    auto_chooses_at_once,
    leaves,
    make_routed_case,
    new_memory_holds_nan,
    over_backends,
    over_devices,
    usable,
    usable_dtypes,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from test_contract import STRIDES, over_strides

from ezpz_moe.compute import get_backend
from ezpz_moe.compute.dispatch import sum_by_token
from ezpz_moe.compute.reference import (
    RoutedCase,
    error_bounds,
    random_routed_case,
    run,
    truth,
)

UNEVEN, CUT = ROUTINGS["uneven"], ROUTINGS["cut"]
HALVES = (torch.bfloat16, torch.float16)

_nan = pytest.fixture(autouse=True)(new_memory_holds_nan)
_at_once = pytest.fixture(autouse=True)(auto_chooses_at_once)


def _squares() -> Iterator[tuple]:
    """(backend, device, dtypes of weights, x and scores, routing): every routing once.

    As the host mixes them: x in float32 beside weights in half of it, or the other way round, and
    scores in float32.
    """
    for number, name in enumerate(BACKENDS):
        for device in DEVICES:
            mixed = [(dtype,) * 3 for dtype in usable_dtypes(name, device)]
            mixed += [(dtype, dtype, torch.float32) for dtype, *_ in mixed if dtype in HALVES]
            mixed += [(torch.bfloat16, torch.float32, torch.float32)]
            mixed += [(torch.float32, torch.bfloat16, torch.float32)]
            mixed = [each for each in mixed if each[0] in usable_dtypes(name, device)]
            for i, routing in enumerate(ROUTINGS if mixed else ()):
                yield name, device, mixed[(i + number) % len(mixed)], routing


@pytest.mark.parametrize(
    ("name", "device", "dtypes", "routing"),
    list(_squares()),
    ids=lambda value: None if isinstance(value, str) else "-".join(str(d)[6:] for d in value),
)
def test_routed_equals_float64(
    name: str, device: str, dtypes: tuple[torch.dtype, ...], routing: str
) -> None:
    backend = usable(name, device, dtypes[0])
    case = make_routed_case(ROUTINGS[routing], device, *dtypes)
    result, true = run(backend.routed, case), truth(case)
    assert_within(result, true, error_bounds(case, true))
    weights, x, scores = dtypes
    assert [value.dtype for value in result.values()] == [x, *[weights] * 3, x, scores]
    for tensor, mask, otherwise in case.zeros():
        assert not result[tensor][mask.to(device)].any(), f"{tensor}: {otherwise}"


@pytest.mark.parametrize(
    ("dtypes", "limit"),
    [
        ((torch.float64,) * 3, 1e-6 + 1e-14),  # scores in the other order: not the truth itself
        ((torch.float32,) * 3, 3e-6),
        ((torch.bfloat16,) * 3, 1.5e-2),
        ((torch.bfloat16, torch.bfloat16, torch.float32), 1.5e-2),
    ],
)
def test_the_bound_is_tight(dtypes: tuple[torch.dtype, ...], limit: float) -> None:
    """The judge is judged; and a score may multiply before the second product or after it."""
    case = make_routed_case(UNEVEN, "cpu", *dtypes)
    true = truth(case)
    bounds = error_bounds(case, true)
    assert max(bounds.values()) <= limit
    for plain in case.plains:
        assert_within(run(plain, case), true, bounds)


@over_devices
@over_backends
def test_a_score_is_not_rounded(name: str, device: str) -> None:
    """Scores in float32 that bfloat16 would round down, by 2e-3 in the mean.

    Other roundings go up and down: in the length along the truth they average out.
    """
    backend = usable(name, device, torch.bfloat16)
    case = make_routed_case(UNEVEN, device, torch.bfloat16, torch.float32, torch.float32)
    grid_TK = (1 + torch.rand_like(case.scores_TK)).bfloat16().float()
    case = dataclasses.replace(case, scores_TK=grid_TK + 0.45 * 2**-7)
    result, true = run(backend.routed, case), truth(case)
    for key in ("out", "grad_w1", "grad_w2", "grad_w3", "grad_x"):
        value = result[key].cpu().double()
        length = (torch.sum(value * true[key]) / true[key].square().sum()).item()
        assert length == pytest.approx(1, abs=1e-3), key


@over_devices
@over_backends
def test_nan_stays_with_its_token(name: str, device: str) -> None:
    backend = usable(name, device, torch.float32)
    case = make_routed_case(UNEVEN, device)
    sound = run(backend.routed, case)
    x_TD = case.x_TD.clone()
    x_TD[3] = torch.nan
    result = run(backend.routed, dataclasses.replace(case, x_TD=x_TD))
    others = [token for token in range(len(x_TD)) if token != 3]
    for key in ("out", "grad_x", "grad_scores"):
        assert result[key][3].isnan().any()
        assert torch.equal(result[key][others], sound[key][others]), key


@over_devices
@over_backends
def test_a_rerun_gives_the_same_bits_and_changes_no_input(name: str, device: str) -> None:
    """Fresh memory holds other garbage the second time: an unwritten element shows."""
    backend = usable(name, device, torch.bfloat16)
    case = make_routed_case(CUT, device, torch.bfloat16, scores_dtype=torch.float32)
    inputs = {key: value for key, value in vars(case).items() if isinstance(value, torch.Tensor)}
    before = {key: tensor.clone() for key, tensor in inputs.items()}
    versions = {key: tensor._version for key, tensor in inputs.items()}
    first = run(backend.routed, case)
    garbage = [torch.full_like(value, torch.nan) for value in first.values()]
    del garbage
    assert_same_bits(first, run(backend.routed, case))
    assert_same_bits(before, inputs)
    assert {key: tensor._version for key, tensor in inputs.items()} == versions


@over_devices
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@over_backends
def test_counts_may_stay_on_the_host(name: str, dtype: torch.dtype, device: str) -> None:
    """In either dtype, and the ids too."""
    backend = usable(name, device, torch.float32)
    case = make_routed_case(UNEVEN, device)
    counts_E = case.num_tokens_per_expert_E.cpu().to(dtype)
    on_host = dataclasses.replace(
        case, num_tokens_per_expert_E=counts_E, ids_TK=case.ids_TK.to(dtype)
    )
    assert_same_bits(run(backend.routed, case), run(backend.routed, on_host))


@over_devices
@over_strides
@over_backends
def test_routed_takes_any_strides(name: str, shift: int, device: str) -> None:
    backend = usable(name, device, torch.float32)
    case = make_routed_case(UNEVEN, device)
    names = ("w1_EFD", "w2_EDF", "w3_EFD", "x_TD", "scores_TK", "grad_out_TD")
    strided = {
        key: STRIDES[(number + shift) % len(STRIDES)](getattr(case, key))
        for number, key in enumerate(names)
    }
    strided["ids_TK"] = case.ids_TK.T.contiguous().T
    strided["num_tokens_per_expert_E"] = case.num_tokens_per_expert_E.repeat_interleave(2)[::2]
    true = truth(case)
    result = run(backend.routed, dataclasses.replace(case, **strided))
    assert_within(result, true, error_bounds(case, true))


@over_devices
@over_backends
def test_an_expanded_gradient_is_taken(name: str, device: str) -> None:
    backend = usable(name, device, torch.float32)
    case = make_routed_case(UNEVEN, device)
    case = dataclasses.replace(case, grad_out_TD=torch.ones_like(case.grad_out_TD))
    inputs = leaves(case)
    case.apply(backend.routed, *inputs).sum().backward()
    true = truth(case)
    gradients = dict(zip(case.names[1:], (leaf.grad for leaf in inputs), strict=True))
    assert_within(gradients, true, error_bounds(case, true))


def test_without_num_rows_every_choice_is_a_row() -> None:
    case = make_routed_case(ROUTINGS["tail"])
    routed = get_backend("for_loop").routed
    out_TD = routed(*case.inputs, case.ids_TK, case.num_tokens_per_expert_E)
    assert torch.equal(out_TD, run(routed, case)["out"])


@pytest.mark.parametrize(
    ("argument", "wrong", "error", "message"),
    [
        ("x_TD", torch.zeros(56, 33), ValueError, r"x has shape \(56, 33\)"),
        ("x_TD", torch.zeros(56, 32).long(), TypeError, "x must have a floating-point dtype"),
        ("scores_TK", torch.zeros(56, 2), ValueError, r"scores have shape \(56, 2\)"),
        ("scores_TK", torch.zeros(56, 3).long(), TypeError, "scores must have a floating-point"),
        ("scores_TK", torch.zeros(56, 3, device="meta"), ValueError, "scores is on meta"),
        ("ids_TK", torch.zeros(56).long(), ValueError, "ids must have 2 dimensions"),
        ("ids_TK", torch.zeros(55, 3).long(), ValueError, "ids are of 55 tokens, but x has 56"),
        ("ids_TK", torch.zeros(56, 3), TypeError, "ids must be int32 or int64"),
        ("w3_EFD", torch.zeros(4, 48, 33), ValueError, r"w3 has shape \(4, 48, 33\)"),
        ("num_tokens_per_expert_E", torch.zeros(3).long(), ValueError, "has 3 entries"),
        ("num_tokens_per_expert_E", torch.tensor([90, 90, 9, 9]), ValueError, "sums to 198"),
        ("num_tokens_per_expert_E", torch.tensor([-1, 1, 9, 9]), ValueError, "negative count"),
        ("num_rows", 169, ValueError, "num_rows is 169: must be between 0 and T"),
        ("num_rows", -1, ValueError, "num_rows is -1"),
    ],
)
def test_a_wrong_argument_is_named(argument: str, wrong, error: type, message: str) -> None:
    case = dataclasses.replace(make_routed_case(UNEVEN), **{argument: wrong})
    with pytest.raises(error, match=message):
        case.apply(get_backend("for_loop").routed, *case.inputs)


@st.composite
def _any_case(draw: st.DrawFn) -> RoutedCase:
    experts, top_k = draw(st.integers(1, 6)), draw(st.integers(1, 4))
    beyond = draw(st.integers(0, 2))  # ids of no expert
    chosen = st.tuples(*[st.integers(0, experts - 1 + beyond)] * top_k)
    ids = draw(st.lists(chosen, max_size=12))
    return random_routed_case(
        ids,
        num_experts=experts,
        top_k=top_k,
        num_rows=draw(st.integers(0, len(ids) * top_k)),
        dim=8 * draw(st.integers(1, 4)),
        hidden_dim=8 * draw(st.integers(1, 4)),
        seed=draw(st.integers(0, 2**31)),
    )


@pytest.mark.parametrize("name", BACKENDS)
@settings(max_examples=25)
@given(case=_any_case())
def test_any_routing_equals_float64(name: str, case: RoutedCase) -> None:
    """float32: there the bound's fixed part outweighs the luck of the plain loop's rounding."""
    true = truth(case)
    result = run(usable(name, "cpu", torch.float32).routed, case)
    assert_within(result, true, error_bounds(case, true))


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize(("dtype", "half"), [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
def test_sums_by_token_round_halves_to_even(dtype: torch.dtype, half: float, strided: bool) -> None:
    """torch's own sum of bfloat16 rows on a CPU rounds them away from zero, unless strided."""
    rows_RD = torch.tensor([[1.0, -1.0], [half, -half]], dtype=dtype)
    if strided:
        rows_RD = rows_RD.repeat_interleave(2, dim=1)[:, ::2]
    sums_TD = sum_by_token(rows_RD, torch.zeros(2, dtype=torch.int64), 1)
    assert sums_TD.tolist() == [[1.0, -1.0]]
