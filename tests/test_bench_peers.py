"""Other projects' layers get the weights as they want them.

transformers runs here where it is installed. ScatterMoE, MegaBlocks and SonicMoE need CUDA: their
places are taken by stand-ins with the interface and the weights' layout that they publish.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import psutil
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ezpz_moe.compute.reference import Case, error_bounds, random_case, relative_error, truth
from ezpz_moe.tools.bench.contender import Contender
from ezpz_moe.tools.bench.peers import PEERS
from ezpz_moe.tools.bench.shapes import Shape

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SMALL = Shape("", 4, 32, 48, 18)
E, D, HIDDEN = 4, 32, 48


def peer(name: str) -> Contender:
    return next(each for each in PEERS if each.name == name)


def check_layer(name: str) -> None:
    """Output, gradient of x, and the gradients of all weights together are the layer's."""
    case = random_case([5, 0, 9, 4], dim=D, hidden_dim=HIDDEN)
    true = truth(case)
    bounds = error_bounds(case, true)
    prepared = peer(name).prepare(case)
    y_RD = prepared.forward()
    gradients = torch.autograd.grad(y_RD, prepared.inputs, case.grad_y_RD)
    assert relative_error(y_RD.detach(), true["y"]) <= bounds["y"]
    assert relative_error(gradients[-1], true["grad_x"]) <= bounds["grad_x"]
    weights = ("grad_w1", "grad_w2", "grad_w3")
    assert sum(each.numel() for each in gradients[:-1]) == 3 * E * D * HIDDEN
    squares = sum(each.double().square().sum() for each in gradients[:-1])
    expected = sum(true[each].square().sum() for each in weights)
    assert abs(squares / expected - 1) <= 2 * sum(bounds[each] for each in weights)


@pytest.mark.parametrize("backend", ["eager", "batched_mm", "grouped_mm"])
def test_transformers_experts(backend: str) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    check_layer(f"transformers_{backend}")


def install(monkeypatch: pytest.MonkeyPatch, **modules: dict[str, Any]) -> None:
    """Put modules with these names into the place of a package's; ``__`` stands for a dot."""
    for name, content in modules.items():
        module = ModuleType(name.replace("__", "."))
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, module.__name__, module)


def by_expert(x_RD: Tensor, experts_R: Tensor, ffn: Callable[[Tensor, int], Tensor]) -> Tensor:
    """``ffn(rows, expert)`` for each row."""
    rows = [ffn(x_RD[r : r + 1], int(e)) for r, e in enumerate(experts_R.flatten())]
    return torch.cat(rows)


class ParallelExperts(nn.Module):
    """ScatterMoE's: weight [E, out, in]."""

    def __init__(self, num_experts: int, input_size: int, output_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, output_size, input_size))


class GLUMLP(nn.Module):
    """ScatterMoE's: of its first product the second half is the gate."""

    def __init__(self, input_size, hidden_size, num_experts, top_k, bias=False, activation=None):
        super().__init__()
        assert not bias
        assert top_k == 1
        self.activation = activation
        self.experts = ParallelExperts(num_experts, input_size, 2 * hidden_size)
        self.output_experts = ParallelExperts(num_experts, hidden_size, input_size)

    def forward(self, x: Tensor, expert_p: Tensor, expert_idxs: Tensor) -> Tensor:
        def ffn(x_1D: Tensor, e: int) -> Tensor:
            up, gate = (x_1D @ self.experts.weight[e].T).chunk(2, dim=-1)
            return (self.activation(gate) * up) @ self.output_experts.weight[e].T

        return by_expert(x, expert_idxs, ffn) * expert_p


def test_scattermoe(monkeypatch) -> None:
    install(monkeypatch, scattermoe={}, scattermoe__mlp={"GLUMLP": GLUMLP})
    check_layer("scattermoe")


@dataclass
class Arguments:
    """Those of MegaBlocks' that are set."""

    hidden_size: int
    ffn_hidden_size: int
    moe_num_experts: int
    moe_top_k: int
    bias: bool
    activation_fn: Callable[[Tensor], Tensor]
    mlp_type: str
    mlp_impl: str
    fp16: bool
    bf16: bool
    device: torch.device


class GroupedGLU(nn.Module):
    """MegaBlocks': three weights [E F, D], the last one not transposed."""

    def __init__(self, args: Arguments) -> None:
        super().__init__()
        assert (args.mlp_type, args.mlp_impl, args.bias) == ("glu", "grouped", False)
        self.args = args
        rows = args.moe_num_experts * args.ffn_hidden_size
        for name in ("w1", "v1", "w2"):
            setattr(self, name, nn.Parameter(torch.empty(rows, args.hidden_size)))

    def forward(self, x: Tensor, tokens_per_expert: Tensor) -> Tensor:
        w1, v1, w2 = (
            each.view(self.args.moe_num_experts, -1, self.args.hidden_size)
            for each in (self.w1, self.v1, self.w2)
        )

        def ffn(x_1D: Tensor, e: int) -> Tensor:
            return (self.args.activation_fn(x_1D @ w1[e].T) * (x_1D @ v1[e].T)) @ w2[e]

        experts_R = torch.repeat_interleave(torch.arange(len(w1)), tokens_per_expert)
        return by_expert(x, experts_R, ffn)


def test_megablocks(monkeypatch) -> None:
    install(
        monkeypatch,
        megablocks={},
        megablocks__layers={},
        megablocks__layers__arguments={"Arguments": Arguments},
        megablocks__layers__glu={"GroupedGLU": GroupedGLU},
    )
    check_layer("megablocks")


def moe_general_routing_inputs(
    x: Tensor,
    router_scores: Tensor,
    token_indices: Tensor,
    expert_indices: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    E: int,
    activation_type: str,
    is_inference_mode_enabled: bool = False,
) -> tuple[Tensor, Tensor]:
    """SonicMoE's: w1 [2 F, D, E] with gate and up in turns, w2 [D, F, E]."""
    assert activation_type == "swiglu"
    assert b1 is None
    assert b2 is None
    assert w1.shape[2] == w2.shape[2] == E
    assert w1.permute(2, 0, 1).is_contiguous()
    assert token_indices.dtype == expert_indices.dtype == torch.int32

    def ffn(x_1D: Tensor, e: int) -> Tensor:
        gate_up = x_1D @ w1[:, :, e].T
        return (F.silu(gate_up[:, ::2]) * gate_up[:, 1::2]) @ w2[:, :, e].T

    y = by_expert(x[token_indices], expert_indices, ffn) * router_scores.unsqueeze(1)
    return y, torch.bincount(expert_indices, minlength=E)


def test_sonicmoe(monkeypatch) -> None:
    install(
        monkeypatch,
        sonicmoe={},
        sonicmoe__enums={"ActivationType": type("ActivationType", (), {"SWIGLU": "swiglu"})},
        sonicmoe__functional={"moe_general_routing_inputs": moe_general_routing_inputs},
    )
    check_layer("sonicmoe")


@pytest.mark.parametrize("name", ["scattermoe", "megablocks", "sonicmoe"])
def test_what_is_not_installed_says_how_to_install_it(name: str, monkeypatch) -> None:
    monkeypatch.setattr("ezpz_moe.tools.bench.peers.util.find_spec", lambda module: None)
    reasons = peer(name).why_not(CPU, torch.float32, SMALL)
    assert len(reasons) == 3, "not installed, no GPU, another dtype"
    assert "pip install" in reasons[0]
    assert "--device cuda" in reasons[1]
    assert "--dtype bfloat16" in reasons[2]


def test_what_is_installed_is_usable_on_its_device(monkeypatch) -> None:
    monkeypatch.setattr("ezpz_moe.tools.bench.peers.util.find_spec", lambda module: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    usable = {
        each.name
        for each in PEERS
        if each.name != "transformers_batched_mm" and not each.why_not(CUDA, torch.bfloat16, SMALL)
    }
    assert usable == {"transformers_eager", "transformers_grouped_mm", "scattermoe", "megablocks"}


def test_batched_mm_of_transformers_is_refused_where_its_copies_do_not_fit(monkeypatch) -> None:
    monkeypatch.setattr("ezpz_moe.tools.bench.peers.util.find_spec", lambda module: object())
    why_not = peer("transformers_batched_mm").why_not
    needed = 2 * 3 * SMALL.R * SMALL.D * SMALL.F * 2  # weights of every row, and their gradients
    free = type("Free", (), {"available": 2 * needed})
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    assert why_not(CPU, torch.bfloat16, SMALL) == []
    (reason,) = why_not(CPU, torch.float32, SMALL)
    assert "smaller shape" in reason


def test_peers_know_the_expert_of_each_row() -> None:
    from ezpz_moe.tools.bench.peers import expert_of_rows

    case: Case = random_case([2, 0, 3], dim=4, hidden_dim=4)
    assert expert_of_rows(case).tolist() == [0, 0, 2, 2, 2]
