"""Kernels where a dtype is emulated: products in float32, results rounded once, nothing held."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ezpz_moe.compute import get_backend, native
from ezpz_moe.compute.reference import (
    Case,
    error_bounds,
    random_case,
    relative_error,
    run,
    truth,
)
from ezpz_moe.errors import EzpzError
from ezpz_moe.hosts import precision

HALVES = (torch.bfloat16, torch.float16)
ONES_OF_TORCHS_PRODUCTS = (
    "for_loop",
    "for_loop(recompute=true)",
    "batched_mm_padded",
    "batched_mm_padded(max_padding=1e9)",
    "batched_mm_capacity(capacity_factor=5)",
    "grouped_mm_fused",
)
COUNTS = [5, 0, 40, 5, 4]


def test_the_cpu_is_asked_of_torch(monkeypatch):
    monkeypatch.delenv(native.VARIABLE, raising=False)
    native.native_halves.cache_clear()
    has_bfloat16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    assert native.is_emulated("cpu", torch.bfloat16) is not has_bfloat16


@pytest.mark.parametrize("dtype", HALVES)
def test_an_accelerator_and_the_wider_dtypes_are_native(cpu_with, dtype):
    cpu_with("float32")
    assert native.is_emulated("cpu", dtype)
    assert not native.is_emulated("cuda", dtype)
    assert not native.is_emulated("cpu", torch.float64)


def test_a_word_that_is_no_dtype_is_refused(cpu_with):
    cpu_with("float32,bf16")
    with pytest.raises(EzpzError, match=r"EZPZ_MOE_NATIVE_DTYPES = 'float32,bf16': 'bf16'"):
        native.native_halves()


def run_kernels(name: str, case: Case) -> dict[str, torch.Tensor]:
    """Output and gradients, by the kernels themselves: no mode looks into an operator."""
    backend = get_backend(name)
    inputs = (*case.parameters, case.x_RD, case.num_tokens_per_expert_E, None)
    y_RD, *saved = backend.compute("ffn", *inputs, case.activation)
    saved = [None, None] if backend.recompute else saved
    gradients = backend.compute("ffn_backward", case.grad_y_RD, *inputs, *saved, case.activation)
    return dict(zip(case.names, (y_RD, *gradients), strict=True))


class _Products(TorchDispatchMode):
    """Dtypes that products are computed in, and the largest new float32 tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()
        self.largest_float32 = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "mm" in func.__name__:
            self.dtypes.add(args[0].dtype)
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.dtype is torch.float32:
            self.largest_float32 = max(self.largest_float32, result.numel())
        return result


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", ONES_OF_TORCHS_PRODUCTS)
def test_emulated_kernels_keep_the_contract_with_products_in_float32(cpu_with, name, dtype):
    case = random_case(COUNTS, dim=32, hidden_dim=48, tail=3, dtype=dtype)
    cpu_with("float32,bfloat16,float16")  # the bounds are of the plain loop in the dtype itself
    true = truth(case)
    bounds = error_bounds(case, true)
    cpu_with("float32")
    with _Products() as seen:
        results = run_kernels(name, case)
    assert seen.dtypes == {torch.float32}
    for tensor in case.names:
        assert results[tensor].dtype is dtype
        assert relative_error(results[tensor], true[tensor]) <= bounds[tensor], tensor


@pytest.mark.parametrize("name", ONES_OF_TORCHS_PRODUCTS)
def test_native_kernels_multiply_in_the_dtype(cpu_with, name):
    cpu_with("float32,bfloat16")
    with _Products() as seen:
        run_kernels(name, random_case(COUNTS, dim=32, hidden_dim=48, dtype=torch.bfloat16))
    assert seen.dtypes == {torch.bfloat16}


@pytest.mark.parametrize("name", ONES_OF_TORCHS_PRODUCTS)
def test_no_float32_copy_of_a_weight_stack_is_held(cpu_with, name):
    cpu_with("float32")
    # 24 experts of 256 x 256: a stack has 2 ** 19 elements three times over.
    case = random_case([3] * 24, dim=256, hidden_dim=256, dtype=torch.bfloat16)
    with _Products() as seen:
        run_kernels(name, case)
    assert 0 < seen.largest_float32 <= case.w1_EFD.numel() // 3


@pytest.mark.parametrize("name", ONES_OF_TORCHS_PRODUCTS)
def test_saved_tensors_keep_the_dtype(cpu_with, name):
    cpu_with("float32")
    case = random_case(COUNTS, dim=32, hidden_dim=48, dtype=torch.bfloat16)
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        run(get_backend(name).ffn, case)
    assert {each.dtype for each in saved if each.is_floating_point()} == {torch.bfloat16}


@pytest.mark.parametrize("name", ONES_OF_TORCHS_PRODUCTS)
def test_the_seam_alone_multiplies_in_float32_too(cpu_with, name):
    cpu_with("float32")
    case = random_case(COUNTS, dim=32, hidden_dim=48, dtype=torch.bfloat16)
    offs_E = case.num_tokens_per_expert_E.cumsum(0).int()
    A_RK, B_EKN = case.x_RD, case.w1_EFD.transpose(1, 2)
    with _Products() as seen:
        C_RN = get_backend(name).compute("mm", A_RK, B_EKN, offs_E)
        get_backend(name).compute("mm_backward", C_RN, A_RK, B_EKN, offs_E)
    assert seen.dtypes == {torch.float32}


def test_the_hosts_own_path_stays_its_own(cpu_with):
    cpu_with("float32")
    case = random_case([8, 8], dim=32, hidden_dim=48, dtype=torch.bfloat16)
    with _Products() as seen:
        run(get_backend("grouped_mm").ffn, case)
    assert seen.dtypes == {torch.bfloat16}


# --- what a job trains in -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "param", "emulated", "native_"),
    [
        (None, "float32", "float32", "bfloat16"),
        (None, "bfloat16", "bfloat16", "bfloat16"),
        ("host", "float32", "bfloat16", "bfloat16"),
        ("bfloat16", "float32", "bfloat16", "bfloat16"),
        ("float32", "bfloat16", "float32", "float32"),
    ],
)
def test_what_experts_compute_in(cpu_with, asked, param, emulated, native_):
    cpu_with("float32")
    assert precision.experts_dtype(asked, param, "cpu") == emulated
    assert precision.experts_dtype(asked, param, "cuda") == native_
    cpu_with("float32,bfloat16")
    assert precision.experts_dtype(asked, param, "cpu") == native_


def test_for_an_accelerator_this_machines_cpu_is_not_asked(cpu_with):
    cpu_with("float32")
    assert precision.trains_in_float32("cpu")
    with precision.as_on_an_accelerator():
        assert not precision.trains_in_float32("cpu")
    assert precision.trains_in_float32("cpu")


@pytest.mark.parametrize(
    ("asked", "backend", "hosts_forward", "said"),
    [
        ("float32", "grouped_mm", None, r"cannot be combined with compute_backend 'grouped_mm'"),
        ("bfloat16", "grouped_mm", None, r"cannot be combined with compute_backend 'grouped_mm'"),
        (
            "float32",
            "for_loop",
            "GptOssGroupedExperts",
            r"GptOssGroupedExperts uses torchtitan's own forward",
        ),
    ],
)
def test_a_precision_that_nothing_brings_about_is_refused(asked, backend, hosts_forward, said):
    with pytest.raises(EzpzError, match=rf"expert_precision = '{asked}' \(a test\): {said}"):
        precision.refuse_precision(asked, backend, "a test", hosts_forward=hosts_forward)
    precision.refuse_precision("host", backend, "a test", hosts_forward=hosts_forward)
