"""The compute contract, in numbers: every backend against float64, whatever the routing.

Both entry points (``ffn`` and the ``grouped_mm`` seam), output and all gradients. The bound is
the contract's own: twice the error of the plain loop in the same dtype. Runs with torch alone;
what autograd, compilers and memory are promised is in ``test_contract_autograd.py``.
"""

from __future__ import annotations

import dataclasses
from itertools import product

import pytest
import torch
from contract_cases import (
    BACKENDS,
    COUNT_DTYPES,
    DEVICES,
    INSTALLED,
    PATTERNS,
    REQUESTED_DEVICES,
    Pattern,
    assert_same_bits,
    assert_within,
    auto_chooses_at_once,
    leaves,
    make_case,
    make_product_case,
    new_memory_holds_nan,
    over_backends,
    over_devices,
    over_dtypes,
    over_patterns,
    over_squares,
    over_squares_and_layouts,
    plain_product,
    run_product,
    usable,
    usable_dtypes,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from ezpz_moe.compute import get_backend
from ezpz_moe.compute.contract import missing_device
from ezpz_moe.compute.reference import (
    error_bounds,
    random_case,
    relative_error,
    run,
    truth,
)

UNEVEN = PATTERNS["uneven"]
TAIL = PATTERNS["tail_and_empty_last"]

_nan = pytest.fixture(autouse=True)(new_memory_holds_nan)
_at_once = pytest.fixture(autouse=True)(auto_chooses_at_once)


def test_requested_devices_are_there() -> None:
    reasons = [missing_device(torch.device(name)) for name in REQUESTED_DEVICES]
    assert not any(reasons), reasons


@pytest.mark.parametrize("name", INSTALLED)
def test_a_backend_is_under_the_contract_here(name: str) -> None:
    if not any(usable_dtypes(name, device) for device in DEVICES):
        usable(name, "cpu", torch.float32)  # skips, with every reason


@over_devices
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", ["for_loop", "batched_mm_padded"])
def test_the_portable_backends_run_everywhere(name: str, dtype: torch.dtype, device: str) -> None:
    """So that a wrong ``why_not`` cannot turn the tests below into skips."""
    assert get_backend(name).why_not(torch.device(device), dtype) == []


@pytest.mark.parametrize(
    ("dtype", "limit"), [(torch.float64, 1e-6), (torch.float32, 3e-6), (torch.bfloat16, 1e-2)]
)
def test_the_bound_is_tight(dtype: torch.dtype, limit: float) -> None:
    """The judge is judged: near the dtype's own rounding, so that no wrong row fits below it."""
    case = make_case(UNEVEN, dtype=dtype)
    assert max(error_bounds(case, truth(case)).values()) <= limit


@over_squares
def test_ffn_equals_float64(
    name: str, device: str, dtype: torch.dtype, count_dtype: torch.dtype, pattern: Pattern
) -> None:
    backend = usable(name, device, dtype)
    case = make_case(pattern, device, dtype)
    case = dataclasses.replace(
        case, num_tokens_per_expert_E=case.num_tokens_per_expert_E.to(count_dtype)
    )
    result = run(backend.ffn, case)
    true = truth(case)
    assert_within(result, true, error_bounds(case, true))
    assert {value.dtype for value in result.values()} == {dtype}
    owned = sum(pattern.counts)
    assert not result["y"][owned:].any()
    assert not result["grad_x"][owned:].any()
    empty = [expert for expert, count in enumerate(pattern.counts) if count == 0]
    for weight in ("grad_w1", "grad_w2", "grad_w3"):
        assert not result[weight][empty].any()


@over_squares_and_layouts
def test_grouped_mm_equals_float64(
    name: str,
    device: str,
    dtype: torch.dtype,
    count_dtype: torch.dtype,
    pattern: Pattern,
    transposed: bool,
) -> None:
    backend = usable(name, device, dtype)
    case = make_product_case(pattern, transposed=transposed, device=device, dtype=dtype)
    case = dataclasses.replace(case, offs_E=case.offs_E.to(count_dtype))
    result = run_product(backend.grouped_mm, case)
    true = run_product(plain_product, case.true())
    plain = run_product(plain_product, case)
    bounds = {key: 2 * relative_error(plain[key], true[key]) + 1e-6 for key in plain}
    assert_within(result, true, bounds)
    assert {value.dtype for value in result.values()} == {dtype}
    owned = sum(pattern.counts)
    assert not result["C"][owned:].any()
    assert not result["grad_A"][owned:].any()
    empty = [expert for expert, count in enumerate(pattern.counts) if count == 0]
    assert not result["grad_B"][empty].any()


@pytest.mark.full
@over_devices
@over_patterns
@over_backends
def test_every_combination_equals_float64(name: str, pattern: Pattern, device: str) -> None:
    """All that the two tests above have a square of."""
    for dtypes in product(usable_dtypes(name, device), COUNT_DTYPES):
        case = (name, device, *dtypes, pattern)
        test_ffn_equals_float64(*case)
        for transposed in (True, False):
            test_grouped_mm_equals_float64(*case, transposed)


@over_devices
@pytest.mark.parametrize("pattern", ["uneven", "tail_and_empty_last"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_fused_forward_has_the_bits_of_three_products(
    dtype: torch.dtype, pattern: str, device: str, cpu_with
) -> None:
    usable("grouped_mm", device, dtype)
    cpu_with("float32,bfloat16")  # where it is emulated, the fused one is more exact than the host
    case = make_case(PATTERNS[pattern], device, dtype)
    host, fused = (run(get_backend(name).ffn, case) for name in ("grouped_mm", "grouped_mm_fused"))
    assert torch.equal(host["y"], fused["y"])


@over_devices
@over_dtypes
@over_backends
def test_a_rerun_gives_the_same_bits(name: str, dtype: torch.dtype, device: str) -> None:
    """Fresh memory holds other garbage the second time: an unwritten element shows."""
    backend = usable(name, device, dtype)
    layer = make_case(TAIL, device, dtype)
    product = make_product_case(TAIL, transposed=True, device=device, dtype=dtype)
    first = run(backend.ffn, layer) | run_product(backend.grouped_mm, product)
    garbage = [torch.full_like(value, torch.nan) for value in first.values()]
    del garbage
    second = run(backend.ffn, layer) | run_product(backend.grouped_mm, product)
    assert_same_bits(first, second)


@over_devices
@over_backends
def test_inputs_are_not_changed(name: str, device: str) -> None:
    backend = usable(name, device, torch.float32)
    layer = make_case(TAIL, device)
    product = make_product_case(TAIL, transposed=True, device=device)
    everything = vars(layer) | vars(product)
    inputs = {key: each for key, each in everything.items() if isinstance(each, torch.Tensor)}
    before = {key: tensor.clone() for key, tensor in inputs.items()}
    versions = {key: tensor._version for key, tensor in inputs.items()}
    run(backend.ffn, layer)
    run_product(backend.grouped_mm, product)
    assert_same_bits(before, inputs)
    assert {key: tensor._version for key, tensor in inputs.items()} == versions


@over_devices
@over_backends
def test_counts_may_stay_on_the_host(name: str, device: str) -> None:
    backend = usable(name, device, torch.float32)
    layer = make_case(UNEVEN, device)
    on_host = dataclasses.replace(
        layer, num_tokens_per_expert_E=layer.num_tokens_per_expert_E.cpu()
    )
    assert_same_bits(run(backend.ffn, layer), run(backend.ffn, on_host))


def _every_second_column(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.repeat_interleave(2, dim=-1)[..., ::2]


def _transposed_storage(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.transpose(-2, -1).contiguous().transpose(-2, -1)


def _window(tensor: torch.Tensor) -> torch.Tensor:
    """A slice of a wider buffer, whose row stride is no multiple of 16 bytes."""
    buffer = tensor.new_full((*tensor.shape[:-1], tensor.shape[-1] + 5), torch.nan)
    buffer[..., 2:-3] = tensor
    return buffer[..., 2:-3]


def _as_it_is(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


STRIDES = (_as_it_is, _every_second_column, _transposed_storage, _window)
over_strides = pytest.mark.parametrize("shift", range(len(STRIDES)))


def _strided(case, names: tuple[str, ...], shift: int):
    """The same case with each of these tensors in other strides; over all shifts in every one."""
    strided = {
        name: STRIDES[(number + shift) % len(STRIDES)](getattr(case, name))
        for number, name in enumerate(names)
    }
    return dataclasses.replace(case, **strided)


@over_devices
@over_strides
@over_backends
def test_ffn_takes_any_strides(name: str, shift: int, device: str) -> None:
    backend = usable(name, device, torch.float32)
    layer = make_case(UNEVEN, device)
    other = _strided(layer, ("w1_EFD", "w2_EDF", "w3_EFD", "x_RD", "grad_y_RD"), shift)
    true = truth(layer)
    assert_within(run(backend.ffn, other), true, error_bounds(layer, true))


@over_devices
@over_strides
@over_backends
def test_grouped_mm_takes_any_strides(name: str, shift: int, device: str) -> None:
    backend = usable(name, device, torch.float32)
    product = make_product_case(UNEVEN, transposed=False, device=device)
    other = _strided(product, ("A_RK", "B_EKN", "grad_C_RN"), shift)
    true = run_product(plain_product, product.true())
    result = run_product(backend.grouped_mm, other)
    assert_within(result, true, dict.fromkeys(result, 1e-6))


@over_devices
@pytest.mark.parametrize(
    ("rows", "strided"), [(0, _every_second_column), (1, _transposed_storage), (1, _window)]
)
@over_backends
def test_one_row_or_none_may_have_any_strides(name: str, rows: int, strided, device: str) -> None:
    """torch takes them for contiguous whatever their strides are."""
    backend = usable(name, device, torch.float32)
    layer = make_case(Pattern((0, rows, 0)), device)
    product = make_product_case(Pattern((0, rows, 0)), transposed=True, device=device)
    expanded = torch.ones(1, 1, device=device)
    for gradient in (strided(layer.grad_y_RD), expanded.expand(layer.grad_y_RD.shape)):
        other = dataclasses.replace(layer, x_RD=strided(layer.x_RD), grad_y_RD=gradient)
        true = truth(other)
        assert_within(run(backend.ffn, other), true, error_bounds(other, true))
    for gradient in (strided(product.grad_C_RN), expanded.expand(product.grad_C_RN.shape)):
        other = dataclasses.replace(product, A_RK=strided(product.A_RK), grad_C_RN=gradient)
        true = run_product(plain_product, other.true())
        assert_within(run_product(backend.grouped_mm, other), true, dict.fromkeys(true, 1e-6))


@over_devices
@over_backends
def test_counts_and_offsets_take_any_strides(name: str, device: str) -> None:
    backend = usable(name, device, torch.float32)
    layer = make_case(UNEVEN, device)
    product = make_product_case(UNEVEN, transposed=True, device=device)
    strided_layer = dataclasses.replace(
        layer, num_tokens_per_expert_E=_every_second_column(layer.num_tokens_per_expert_E)
    )
    strided_product = dataclasses.replace(product, offs_E=_every_second_column(product.offs_E))
    assert_same_bits(run(backend.ffn, layer), run(backend.ffn, strided_layer))
    assert_same_bits(
        run_product(backend.grouped_mm, product), run_product(backend.grouped_mm, strided_product)
    )


@over_devices
@over_backends
def test_an_expanded_gradient_is_taken(name: str, device: str) -> None:
    """``y.sum().backward()`` hands every kernel a gradient whose strides are all zero."""
    backend = usable(name, device, torch.float32)
    layer = make_case(UNEVEN, device)
    layer = dataclasses.replace(layer, grad_y_RD=torch.ones_like(layer.grad_y_RD))
    inputs = leaves(layer)
    backend.ffn(*inputs, layer.num_tokens_per_expert_E).sum().backward()
    gradients = dict(zip(("grad_w1", "grad_w2", "grad_w3", "grad_x"), inputs, strict=True))
    true = truth(layer)
    assert_within(
        {key: leaf.grad for key, leaf in gradients.items()}, true, error_bounds(layer, true)
    )

    product = make_product_case(UNEVEN, transposed=True, device=device)
    product = dataclasses.replace(product, grad_C_RN=torch.ones(1, 1, device=device).expand(45, 48))
    true = run_product(plain_product, product.true())
    assert_within(run_product(backend.grouped_mm, product), true, dict.fromkeys(true, 1e-6))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", BACKENDS)
@settings(max_examples=25)
@given(
    counts=st.lists(st.integers(0, 12), min_size=1, max_size=6),
    tail=st.integers(0, 5),
    dim=st.integers(1, 4).map(lambda n: 8 * n),
    hidden_dim=st.integers(1, 4).map(lambda n: 8 * n),
    seed=st.integers(0, 2**31),
)
def test_any_layer_equals_float64(
    name: str, device: str, counts: list[int], tail: int, dim: int, hidden_dim: int, seed: int
) -> None:
    """float32: there the bound's fixed part outweighs the luck of the plain loop's rounding."""
    backend = usable(name, device, torch.float32)
    case = random_case(counts, dim=dim, hidden_dim=hidden_dim, tail=tail, device=device, seed=seed)
    true = truth(case)
    assert_within(run(backend.ffn, case), true, error_bounds(case, true))
