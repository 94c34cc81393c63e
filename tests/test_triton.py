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
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from contract_cases import PATTERNS

from ezpz_moe.compute import get_backend

TESTS = Path(__file__).parent
sys.path.append(str(TESTS.parent / "benchmarks"))
CPU = torch.device("cpu")

if find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

# Of the contract's tests these, by file, with what their parameters' names hold. An interpreted
# product takes a second.
SOME_ROUTINGS = "two_uneven or tail_and_empty or no_rows"
CONTRACT = {
    "test_contract.py": {
        "test_ffn_equals_float64": [
            f"triton-cpu and ({SOME_ROUTINGS})",
            "recompute and tail_and_empty",
        ],
        "test_grouped_mm_equals_float64": [
            f"contiguous and ({SOME_ROUTINGS})",
            "view and tail_and_empty",
        ],
        "test_ffn_takes_any_strides": ["triton-1"],
        "test_grouped_mm_takes_any_strides": ["triton-0"],
        "test_counts_and_offsets_take_any_strides": ["triton-cpu"],
        "test_an_expanded_gradient_is_taken": ["triton-cpu"],
        "test_a_rerun_gives_the_same_bits": ["triton-float32"],
        "test_inputs_are_not_changed": ["triton-cpu"],
    },
    "test_contract_autograd.py": {"test_operators_keep_torchs_rules": ["triton and mm_backward"]},
    "test_contract_activations.py": {
        "test_ffn_of_any_activation_equals_float64": ["triton-cpu and (clamped or relu2)"],
        "test_routed_of_any_activation_equals_float64": [
            "triton-cpu and (geglu or reglu or unbiased)",
            "recompute and clamped",
        ],
        "test_nan_stays_with_its_token": ["triton-cpu"],
    },
    "test_contract_routed.py": {
        "test_routed_equals_float64": [
            "triton-cpu and (uneven or half_a_tail or all_cut)",
            "recompute and half_a_tail",
        ],
        "test_nan_stays_with_its_token": ["triton-cpu"],
        "test_routed_takes_any_strides": ["triton-1"],
        "test_an_expanded_gradient_is_taken": ["triton-cpu"],
    },
    "test_contract_routed_autograd.py": {
        "test_backward_takes_whatever_stands_in_saved_rows_of_the_tail": ["triton-cpu"],
        "test_operators_keep_torchs_rules": ["triton-routed_backward"],
    },
    "test_contract_learning.py": {
        "test_frozen_experts_have_gradients_of_zeros": ["triton-routed_with"],
        "test_frozen_parameters_have_no_gradient": ["triton-routed"],
    },
}


def _through_the_interpreter(files: Iterable[str], chosen: str) -> list[tuple[str, str, str]]:
    """File, name and outcome of those tests of ``triton`` that ``-k chosen`` chooses."""
    options = ("-v", "-p", "no:cacheprovider", "-k", f"triton and ({chosen})")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *(str(TESTS / name) for name in files)],
        capture_output=True,
        text=True,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        cwd=TESTS.parent,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return re.findall(r"(\w+\.py)::(test_\w+)\[(?:triton[^\n]*)\] (\w+)", done.stdout)


def test_the_contract_through_the_interpreter() -> None:
    """All of them in one process, which imports torch once."""
    parts = [
        f"{file} and {name} and ({' or '.join(f'({each})' for each in parameters)})"
        for file, tests in CONTRACT.items()
        for name, parameters in tests.items()
    ]
    ran = _through_the_interpreter(CONTRACT, " or ".join(parts))
    assert {(file, name) for file, name, _ in ran} == {
        (file, name) for file, tests in CONTRACT.items() for name in tests
    }
    assert {outcome for *_, outcome in ran} == {"PASSED"}, "none may be skipped"


@pytest.mark.full
@pytest.mark.parametrize("file", ["test_contract.py", "test_contract_routed.py"])
def test_the_contract_through_the_interpreter_with_every_routing(file: str) -> None:
    ran = _through_the_interpreter([file], "equals_float64 and not any_")
    assert len(ran) >= 2 * len(PATTERNS)
    assert {outcome for *_, outcome in ran} == {"PASSED"}


FIRST_PROGRAM = """
import torch
from ezpz_moe.compute.backends.triton import kernels
R, K, N = 25, 32, 48
A, B, offs = torch.ones(R, K), torch.ones(2, K, N), torch.tensor([5, 20])
outputs = [torch.full((R, N), -1.0) for _ in range(6)]
of_rows, of_weights, sizes = A.stride(), B.stride(), (2, R, 32, K, N)
rows, common = (offs, offs), {"TOP_K": 0, "BLOCK_E": 4}
ffn = {"GATED": True, "ACTIVATION": "swiglu"}
kernels.multiply[(1,)](
    A, B, A, B, A, *rows, A, outputs[0], *sizes, *of_rows, *of_weights, *of_rows, *of_weights, N, 1,
    SECOND=False, BIASED=False, **common,
)
kernels.gate_and_up[(1,)](
    A, B, B, A, A, *rows, A, *outputs[:3], *sizes, *of_rows, *(K * N, 1, N) * 2, HIDDEN_TOO=True,
    BIASED=False, **ffn, **common,
)
kernels.hidden_gradients[(1,)](
    A, B, outputs[0], outputs[1], *rows, A, *outputs[3:], A, *sizes, *of_rows, *of_weights,
    PART=32, **ffn, **common,
)
for output in outputs:
    print((output != -1).any(1).nonzero().flatten().tolist())
"""

WHERE_IT_IS_RIGHT = """
import torch
from ezpz_moe.compute import get_backend
for dtype in (torch.float32, torch.float16, torch.bfloat16):
    print(*get_backend("triton").why_not(torch.device("cpu"), dtype))
"""
WIDE_TILES = """
import torch
from ezpz_moe.compute import get_backend
from ezpz_moe.compute.backends.triton import kernels, tuning

E, D, F, T, K = 2, 16, 272, 7, 2  # three tiles of columns
for kernel in (kernels.gate_and_up, kernels.hidden_gradients):
    kernel.configs = [tuning._config(16, 128, 16, 1, 1)]
torch.use_deterministic_algorithms(True)  # new memory then holds NaN
draw = torch.Generator().manual_seed(0)
shapes = (E, F, D), (E, D, F), (E, F, D), (T, D), (T, K), (T, D)
*inputs, grad = [torch.randn(shape, generator=draw) for shape in shapes]
ids = torch.randint(0, E, (T, K), generator=draw)

def errors(name, dtype):
    given = [each.to(dtype).requires_grad_() for each in inputs]
    out = get_backend(name).routed(*given, ids, torch.bincount(ids.flatten(), minlength=E))
    return out, *torch.autograd.grad(out, given, grad.to(dtype))

true = errors("for_loop", torch.float64)
for name in ("triton", "for_loop"):
    results = errors(name, torch.float32)
    print(*(((a - b).norm() / b.norm()).item() for a, b in zip(results, true)))
"""


# The last one changes the kernels of its process.
PROGRAMS = (FIRST_PROGRAM, WHERE_IT_IS_RIGHT, WIDE_TILES)


@pytest.fixture(scope="module")
def printed() -> dict[str, list[str]]:
    """Lines that each program prints, one after the other in a process that interprets."""
    code = "print('of the next')\n".join(PROGRAMS)
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    output = subprocess.check_output([sys.executable, "-c", code], text=True, env=environment)
    parts = output.split("of the next\n")
    return {each: part.splitlines() for each, part in zip(PROGRAMS, parts, strict=True)}


def test_a_program_writes_rows_of_its_expert_alone(printed: dict[str, list[str]]) -> None:
    """On a GPU programs run at once: rows of the next expert are not there to be written twice."""
    assert printed[FIRST_PROGRAM] == ["[0, 1, 2, 3, 4]"] * 6


def test_the_interpreter_is_usable_where_it_is_right(printed: dict[str, list[str]]) -> None:
    *usable, reason = printed[WHERE_IT_IS_RIGHT]
    assert usable == ["", ""]
    assert "wrong bfloat16 products" in reason


def test_a_tile_that_is_wider_than_what_is_stored_at_once(printed: dict[str, list[str]]) -> None:
    """On GPUs all tiles are, but not those that are interpreted."""
    found, plain = ([float(word) for word in line.split()] for line in printed[WIDE_TILES])
    assert len(found) == 6
    for ours, loops in zip(found, plain, strict=True):
        assert ours <= 2 * loops + 1e-6


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


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Let Triton think that the process has a GPU of a kind."""
    import triton
    from triton_tiles import TARGETS, OnlyCompiles

    # Triton's own reset_active() needs a GPU.
    monkeypatch.setattr(triton.runtime.driver, "_active", None)
    return lambda name: triton.runtime.driver.set_active(OnlyCompiles(TARGETS[name].gpu))


@compiled_only
@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_is_tuned_by_bucket_not_by_rows(name: str) -> None:
    """R changes with every step: tuning by it would time every step anew."""
    from ezpz_moe.compute.backends.triton import kernels

    tuner = getattr(kernels, name)
    assert {"E", "K", "N", "R_BUCKET", "TOP_K"} <= set(tuner.keys)
    assert "R" not in tuner.keys
    assert tuner.cache_results


def _timed(name: str, dtype: torch.dtype, rows: int) -> list:
    from ezpz_moe.compute.backends.triton import kernels

    tuner = getattr(kernels, name)
    tuner.nargs = {"A": torch.empty(0, dtype=dtype), "R_BUCKET": rows, "K": 2048, "N": 1024}
    return tuner.prune_configs({})


@compiled_only
@pytest.mark.parametrize("name", KERNELS)
def test_what_is_timed(
    name: str, gpu: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu("sm90")
    # Without a GPU's driver the question itself is an error.
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert len(_timed(name, torch.bfloat16, 64)) == 1
    half, full = _timed(name, torch.bfloat16, 32768), _timed(name, torch.float32, 32768)
    assert len(half) > 1
    assert len(full) > 1
    assert not [config for config in half if config in full]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.warns(UserWarning, match="compute the layer once before capturing"):
        assert _timed(name, torch.bfloat16, 32768) == half[:1]


@compiled_only
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_where_bits_have_to_be_the_same_no_tile_is_timed(
    dtype: torch.dtype, gpu: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another tile sums in another order: a time, or a file of times, would change the bits."""
    gpu("sm80")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    *larger, smallest = _timed("multiply", dtype, 2**16)
    assert larger
    torch.use_deterministic_algorithms(True)
    try:
        assert _timed("multiply", dtype, 2**16) == [smallest]
    finally:
        torch.use_deterministic_algorithms(False)


@compiled_only
@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize(
    "target",
    ["sm80", "gfx942", *(pytest.param(each, marks=pytest.mark.full) for each in ("sm90", "sm100"))],
)
def test_the_largest_tiles_of_every_kernel_suit_the_gpu(
    name: str, target: str, gpu: Callable[[str], None], tmp_path: Path, monkeypatch
) -> None:
    """In machine code: products on the tensor cores, nothing spilled, enough shared memory.

    ``benchmarks/triton_tiles.py`` compiles the other choices and launches.
    """
    import triton
    import triton_tiles

    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    launch = next(each for each in triton_tiles.launches(torch.bfloat16) if name in each.name)
    there = triton_tiles.TARGETS[target]
    compiled = launch.compiled(launch.choices(there)[0], there)
    text = compiled.asm["amdgcn" if target == "gfx942" else "ptx"]
    assert {"sm80": "mma.sync", "sm90": "wgmma.mma_async", "sm100": "tcgen05.mma"}.get(
        target, "v_mfma"
    ) in text
    assert triton_tiles.wrong(triton_tiles.needs(compiled), there) == []


def test_what_a_choice_may_not_be() -> None:
    from triton_tiles import TARGETS, Needs, wrong

    at_most = Needs(registers=255, spilled=0, shared=64 * 1024, tensor=0)
    assert wrong(at_most, TARGETS["gfx942"]) == []
    spills, does_not_fit = wrong(Needs(255, 8, 64 * 1024 + 1, 0), TARGETS["gfx942"])
    assert spills == "spills 8 bytes"
    assert "64 KiB" in does_not_fit
