"""What a caller of the kernels meets: errors that name the argument, and light imports."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from contract_cases import INSTALLED, over_backends

from ezpz_moe import compute
from ezpz_moe.compute import Backend, get_backend

E, D, F, R = 3, 16, 32, 8
COUNTS = torch.tensor([4, 0, 3])


def _arguments() -> dict[str, torch.Tensor]:
    return {
        "w1_EFD": torch.zeros(E, F, D),
        "w2_EDF": torch.zeros(E, D, F),
        "w3_EFD": torch.zeros(E, F, D),
        "x_RD": torch.zeros(R, D),
        "num_tokens_per_expert_E": COUNTS,
    }


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"x_RD": torch.zeros(R, 2, D)}, ValueError, r"^x must have 2 dimensions"),
        ({"x_RD": torch.zeros(R, D + 1)}, ValueError, r"^x has shape \(8, 17\)"),
        ({"x_RD": torch.zeros(R, D).bfloat16()}, TypeError, r"^x is torch.bfloat16, but w1 is"),
        ({"x_RD": torch.zeros(R, D, device="meta")}, ValueError, r"^x is on meta, but w1 is on"),
        ({"w1_EFD": torch.zeros(F, D)}, ValueError, r"^w1 must have 3 dimensions"),
        ({"w2_EDF": torch.zeros(E, F, D)}, ValueError, r"^w2 has shape \(3, 32, 16\)"),
        ({"w2_EDF": torch.zeros(E, D, F).half()}, TypeError, r"^w2 is torch.float16, but w1 is"),
        ({"w3_EFD": torch.zeros(E, D, F)}, ValueError, r"^w3 has shape \(3, 16, 32\)"),
        ({"w3_EFD": torch.zeros(E + 1, F, D)}, ValueError, r"^w3 has shape"),
        ({"w3_EFD": torch.zeros(E, F, D).double()}, TypeError, r"^w3 is torch.float64, but w1 is"),
        (
            {"num_tokens_per_expert_E": COUNTS.float()},
            TypeError,
            r"^num_tokens_per_expert must be int32 or int64, not torch.float32",
        ),
        (
            {"num_tokens_per_expert_E": torch.ones(E + 1, dtype=torch.int64)},
            ValueError,
            r"^num_tokens_per_expert has 4 entries, but the weights have 3 experts",
        ),
        (
            {"num_tokens_per_expert_E": COUNTS.unsqueeze(0)},
            ValueError,
            r"^num_tokens_per_expert must have 1 dimensions",
        ),
        (
            {"num_tokens_per_expert_E": torch.tensor([4, 0, 5])},
            ValueError,
            r"^num_tokens_per_expert sums to 9, but there are only 8 rows",
        ),
        (
            {"num_tokens_per_expert_E": torch.tensor([4, -1, 3])},
            ValueError,
            r"^num_tokens_per_expert has a negative count",
        ),
    ],
)
@over_backends
def test_ffn_names_the_wrong_argument(name: str, wrong: dict, error, message: str) -> None:
    with pytest.raises(error, match=message):
        get_backend(name).ffn(**(_arguments() | wrong))


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"A_RK": torch.zeros(D)}, ValueError, r"^A_RK must have 2 dimensions"),
        ({"B_EKN": torch.zeros(D, F)}, ValueError, r"^B_EKN must have 3 dimensions"),
        (
            {"B_EKN": torch.zeros(E, D + 1, F)},
            ValueError,
            r"^B_EKN has K = 17, but A_RK has",
        ),
        (
            {"B_EKN": torch.zeros(E, D, F).half()},
            TypeError,
            r"^B_EKN is torch.float16, but A_RK",
        ),
        ({"offs_E": torch.tensor([4, 4, 7.0])}, TypeError, r"^offs_E must be int32 or int64"),
        ({"offs_E": torch.tensor([4, 7])}, ValueError, r"^offs_E has 2 entries"),
        (
            {"offs_E": torch.tensor([4, 4, 9])},
            ValueError,
            r"^offs_E ends at 9, but A_RK has",
        ),
        ({"offs_E": torch.tensor([4, 3, 7])}, ValueError, r"^offs_E must start .* never fall"),
        ({"offs_E": torch.tensor([-1, 3, 7])}, ValueError, r"^offs_E must start at or above 0"),
    ],
)
@over_backends
def test_grouped_mm_names_the_wrong_argument(name: str, wrong: dict, error, message: str) -> None:
    arguments = {
        "A_RK": torch.zeros(R, D),
        "B_EKN": torch.zeros(E, D, F),
        "offs_E": torch.tensor([4, 4, 7]),
    }
    with pytest.raises(error, match=message):
        get_backend(name).grouped_mm(**(arguments | wrong))


@pytest.mark.parametrize("name", INSTALLED)
def test_every_backend_describes_itself(name: str) -> None:
    backend = get_backend(name)
    assert isinstance(backend, Backend)
    assert backend.name == name
    assert backend.summary
    flags = (backend.host_syncs, backend.static_shapes, backend.drops_tokens)
    assert all(isinstance(flag, bool) for flag in flags)


@pytest.mark.parametrize("name", ["for_loop", "grouped_mm", "batched_mm_padded"])
def test_the_public_functions_are_the_backends(name: str) -> None:
    """``compute.for_loop(w1, w2, w3, x, counts)``: the argument order that people know."""
    generator = torch.Generator().manual_seed(0)
    w1, w2, w3, x = (
        torch.randn(shape, generator=generator)
        for shape in ((E, F, D), (E, D, F), (E, F, D), (R, D))
    )
    y = getattr(compute, name)(w1, w2, w3, x, COUNTS)
    assert torch.equal(y, get_backend(name).ffn(w1, w2, w3, x, COUNTS))
    first = torch.nn.functional.silu(x[:4] @ w1[0].T) * (x[:4] @ w3[0].T) @ w2[0].T
    torch.testing.assert_close(y[:4], first)


@over_backends
def test_why_not_collects_reasons(name: str) -> None:
    backend = get_backend(name)
    assert "floating-point" in backend.why_not(torch.device("cpu"), torch.int32)[0]
    (reason,) = backend.why_not(torch.device("hpu"), torch.float32)
    assert "hpu" in reason
    assert "choose another device" in reason


def test_grouped_mm_tells_every_dimension_that_does_not_fit() -> None:
    backend = get_backend("grouped_mm")
    reasons = backend.why_not(torch.device("cpu"), torch.bfloat16, dims=(12, 64, 9, 12))
    assert len(reasons) == 2
    assert "12 x torch.bfloat16" in reasons[0]
    assert "9 x torch.bfloat16" in reasons[1]


def _modules_after(statement: str) -> set[str]:
    """Top-level modules that a fresh interpreter holds after ``statement``."""
    program = f"{statement}\nimport sys\nprint(*sorted(sys.modules))"
    output = subprocess.check_output([sys.executable, "-c", program], text=True)
    return {module.partition(".")[0] for module in output.split()}


def test_compute_imports_torch_and_no_trainer() -> None:
    modules = _modules_after(
        "from ezpz_moe.compute import backend_names, get_backend\n"
        "[get_backend(name) for name in backend_names()]"
    )
    assert "torch" in modules
    assert "torchtitan" not in modules


@pytest.mark.parametrize(
    "module",
    [
        "ezpz_moe",
        "ezpz_moe.compute.names",
        "ezpz_moe.cli",
        "ezpz_moe.config.flavors",
        "ezpz_moe.config.job",
    ],
)
def test_the_front_imports_no_torch(module: str) -> None:
    assert not {"torch", "torchtitan"} & _modules_after(f"import {module}")
