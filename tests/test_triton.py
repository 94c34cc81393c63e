"""The ``triton`` backend without a GPU: its numbers through Triton's interpreter, and that every
kernel compiles for the GPUs that it is written for. On a GPU ``test_contract.py`` runs it.

The interpreter has to be chosen before triton is imported, so that the contract's tests run in a
process of their own; a part of them, because every program of a kernel is interpreted anew.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from contract_cases import PATTERNS

from ezpz_moe.compute import get_backend

TESTS = Path(__file__).parent
CPU = torch.device("cpu")

if find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

# Of the contract's tests these, with what their parameters' names hold. An interpreted product
# takes a second.
SOME_ROUTINGS = "two_uneven or tail_and_empty or no_rows"
CONTRACT = {
    "test_swiglu_equals_float64": [
        f"triton-cpu and ({SOME_ROUTINGS})",
        "recompute and tail_and_empty",
    ],
    "test_grouped_mm_equals_float64": [
        f"contiguous and ({SOME_ROUTINGS})",
        "view and tail_and_empty",
    ],
    "test_swiglu_takes_any_strides": ["triton-1"],
    "test_grouped_mm_takes_any_strides": ["triton-0"],
    "test_counts_and_offsets_take_any_strides": ["triton-cpu"],
    "test_an_expanded_gradient_is_taken": ["triton-cpu"],
    "test_a_rerun_gives_the_same_bits": ["triton-float32"],
    "test_inputs_are_not_changed": ["triton-cpu"],
    "test_operators_keep_torchs_rules": ["triton and mm_backward"],
}


def _through_the_interpreter(chosen: str) -> list[tuple[str, str]]:
    """Names and outcomes of the contract's tests of ``triton`` that ``-k chosen`` chooses."""
    files = [str(TESTS / name) for name in ("test_contract.py", "test_contract_autograd.py")]
    options = ("-v", "-p", "no:cacheprovider", "-k", f"triton and ({chosen})")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *files],
        capture_output=True,
        text=True,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        cwd=TESTS.parent,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return re.findall(r"::(test_\w+)\[(?:triton[^\n]*)\] (\w+)", done.stdout)


def test_the_contract_through_the_interpreter() -> None:
    ran = _through_the_interpreter(
        " or ".join(
            f"{name} and ({' or '.join(f'({each})' for each in parameters)})"
            for name, parameters in CONTRACT.items()
        )
    )
    assert {name for name, _ in ran} == CONTRACT.keys()
    assert {outcome for _, outcome in ran} == {"PASSED"}, "none may be skipped"


@pytest.mark.full
def test_the_contract_through_the_interpreter_with_every_routing() -> None:
    ran = _through_the_interpreter("equals_float64 and not any_layer")
    assert len(ran) == (2 + 2) * len(PATTERNS)
    assert {outcome for _, outcome in ran} == {"PASSED"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_where_bits_have_to_be_the_same_no_tile_is_timed(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another tile sums in another order: a time, or a file of times, would change the bits."""
    from ezpz_moe.compute.backends.triton import tuning

    # Without a GPU's driver the question itself is an error.
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    configs = [tuning._SMALL, *tuning._ONE_SUM, *tuning._FLOAT32]
    large = {"R_BUCKET": 2**16, "K": 2**11, "N": 2**11, "a": torch.empty(0, dtype=dtype)}
    assert len(tuning._to_time(configs, large)) > 1
    torch.use_deterministic_algorithms(True)
    try:
        (only,) = tuning._to_time(configs, large)
    finally:
        torch.use_deterministic_algorithms(False)
    assert (only in tuning._FLOAT32) == (dtype == torch.float32)


FIRST_PROGRAM = """
import torch
from ezpz_moe.compute.backends.triton import kernels
R, K, N = 25, 32, 48
A, B, offs = torch.ones(R, K), torch.ones(2, K, N), torch.tensor([5, 20])
outputs = [torch.full((R, N), -1.0) for _ in range(6)]
of_rows, of_weights, sizes = A.stride(), B.stride(), (2, R, 32, K, N)
common = {"BLOCK_E": 4}
kernels.multiply[(1,)](
    A, B, A, B, offs, outputs[0], *sizes, *of_rows, *of_weights, *of_rows, *of_weights, N, 1,
    SECOND=False, **common,
)
kernels.gate_and_up[(1,)](
    A, B, B, offs, *outputs[:3], *sizes, *of_rows, *(K * N, 1, N) * 2, HIDDEN_TOO=True, **common
)
kernels.hidden_gradients[(1,)](
    A, B, outputs[0], outputs[1], offs, *outputs[3:], *sizes, *of_rows, *of_weights, **common
)
for output in outputs:
    print((output != -1).any(1).nonzero().flatten().tolist())
"""


def test_a_program_writes_rows_of_its_expert_alone() -> None:
    """On a GPU programs run at once: rows of the next expert are not there to be written twice."""
    output = subprocess.check_output(
        [sys.executable, "-c", FIRST_PROGRAM], text=True, env=os.environ | {"TRITON_INTERPRET": "1"}
    )
    assert output.splitlines() == ["[0, 1, 2, 3, 4]"] * 6


def test_the_interpreter_is_usable_where_it_is_right() -> None:
    program = (
        "import torch; from ezpz_moe.compute import get_backend\n"
        "for dtype in (torch.float32, torch.float16, torch.bfloat16):\n"
        "    print(*get_backend('triton').why_not(torch.device('cpu'), dtype))"
    )
    output = subprocess.check_output(
        [sys.executable, "-c", program], text=True, env=os.environ | {"TRITON_INTERPRET": "1"}
    )
    assert output.splitlines()[:2] == ["", ""]
    assert "wrong bfloat16 products" in output.splitlines()[2]


def test_every_reason_against_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    backend = get_backend("triton")
    assert backend.why_not(torch.device("meta"), torch.bfloat16) == []
    place, dtype = backend.why_not(CPU, torch.float64)
    assert "TRITON_INTERPRET=1" in place
    assert "not in torch.float64" in dtype
    (elsewhere,) = backend._why_not(torch.device("xpu"), torch.bfloat16, ())
    assert "CUDA and ROCm, not for xpu" in elsewhere
    monkeypatch.setattr("ezpz_moe.compute.backends.triton.find_spec", lambda name: None)
    (missing,) = backend.why_not(CPU, torch.float32)
    assert "Triton is not installed" in missing


def test_a_gpu_of_a_process_that_interprets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    (reason,) = get_backend("triton")._why_not(torch.device("cuda"), torch.float32, ())
    assert "unset it" in reason


def test_a_gpu_without_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    backend = get_backend("triton")
    (reason,) = backend._why_not(torch.device("cuda"), torch.bfloat16, ())
    assert "no bfloat16" in reason
    assert backend._why_not(torch.device("cuda"), torch.float16, ()) == []


def test_triton_is_imported_with_the_first_product() -> None:
    program = (
        "import sys; from ezpz_moe.compute import get_backend; get_backend('triton')\n"
        "print('triton' in sys.modules)"
    )
    output = subprocess.check_output([sys.executable, "-c", program], text=True)
    assert output.strip() == "False"


compiled_only = pytest.mark.skipif(
    "TRITON_INTERPRET" in os.environ, reason="about compiled kernels; TRITON_INTERPRET is set"
)
KERNELS = ("multiply", "gate_and_up", "hidden_gradients", "weight_gradient")


@compiled_only
@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_is_tuned_by_bucket_not_by_rows(name: str) -> None:
    """R changes with every step: tuning by it would time every step anew."""
    from ezpz_moe.compute.backends.triton import kernels

    tuner = getattr(kernels, name)
    assert {"E", "K", "N", "R_BUCKET"} <= set(tuner.keys)
    assert "R" not in tuner.keys
    assert tuner.cache_results


@compiled_only
def test_what_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    from ezpz_moe.compute.backends.triton import kernels

    def timed(dtype: torch.dtype, rows: int) -> list:
        tuner = kernels.multiply
        sizes = {"R_BUCKET": rows, "K": 2048, "N": 1024}
        tuner.nargs = {"A": torch.empty(0, dtype=dtype), **sizes}
        return tuner.prune_configs({})

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert len(timed(torch.bfloat16, 64)) == 1
    half, full = timed(torch.bfloat16, 32768), timed(torch.float32, 32768)
    assert len(half) > 1
    assert len(full) > 1
    assert not [config for config in half if config in full]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.warns(UserWarning, match="compute the layer once before capturing"):
        assert timed(torch.bfloat16, 32768) == half[:1]


TARGETS = {"sm80": ("cuda", 80, 32), "sm90": ("cuda", 90, 32), "gfx942": ("hip", "gfx942", 64)}


def _compiled(name: str, target: tuple, folder: Path, monkeypatch: pytest.MonkeyPatch):
    """The kernel as it is compiled for contiguous bfloat16 tensors; on Hopper with large tiles."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from ezpz_moe.compute.backends.triton import kernels

    monkeypatch.setattr(triton.knobs.cache, "dir", str(folder))
    tuner = getattr(kernels, name)
    config = tuner.configs[1 if target[1] == 90 else 0]
    given = {"EVEN_K": True, "SECOND": True, "HIDDEN_TOO": True, "BLOCK_E": 128} | config.kwargs
    kernel = tuner.base_fn.__globals__[name]
    while not isinstance(kernel, triton.JITFunction):
        kernel = kernel.fn
    one = {"a_k", "b_n", "a2_k", "b2_n", "c_n", "x_k", "w1_k", "w3_k", "dy_k", "w2_n", "l_k"}
    constants = {
        p.name: given[p.name] if p.is_constexpr else 1
        for p in kernel.params
        if p.is_constexpr or p.name in one | {"r_n", "g_n"}
    }
    signature = {
        p.name: "constexpr" if p.name in constants
        else "*i64" if p.name == "offs"
        else "i32" if p.name in ("E", "R", "R_BUCKET", "K", "N") or p.name.islower()
        else "*bf16"
        for p in kernel.params
    }  # fmt: skip
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    return triton.compile(source, target=GPUTarget(*target), options=options)


@compiled_only
@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("target", ["sm80", pytest.param("sm90", marks=pytest.mark.full), "gfx942"])
def test_every_kernel_compiles_for_gpus(
    name: str, target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To machine code, with products on the tensor cores, within the memory of a multiprocessor."""
    compiled = _compiled(name, TARGETS[target], tmp_path, monkeypatch)
    text = compiled.asm["amdgcn" if target == "gfx942" else "ptx"]
    assert {"sm80": "mma.sync", "sm90": "wgmma.mma_async", "gfx942": "v_mfma"}[target] in text
    assert compiled.metadata.shared <= {"sm80": 163, "sm90": 227, "gfx942": 64}[target] * 1024
