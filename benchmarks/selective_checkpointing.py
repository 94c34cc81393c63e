"""What it is worth that selective checkpointing keeps what the experts multiplied.

    python benchmarks/selective_checkpointing.py
    python benchmarks/selective_checkpointing.py --dtype bfloat16 --layers olmoe qwen3_30b

The routed layer (dispatch, experts, combination) under torchtitan's ``SelectiveAC``, forward and
backward: torchtitan's own dispatcher and ``torch._grouped_mm`` under its own policy, and
``for_loop`` as one node, which is kept or computed again. They take turns; medians, and how many
times as fast as the first. "kept" is what the node adds to what the policy keeps.

float32, the default, is for CPUs that emulate bfloat16: torchtitan's experts compute in bfloat16
alone, so that "stock" is a copy of their forward without its casts. Legend:
:mod:`ezpz_moe.compute.contract`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from turns import medians

from ezpz_moe.cli import display
from ezpz_moe.compute import get_backend
from ezpz_moe.hosts.detect import check_host
from ezpz_moe.tools.bench.shapes import MODELS

check_host()

import torch.nn.functional as F  # noqa: E402
from torchtitan.distributed.activation_checkpoint import SelectiveAC  # noqa: E402
from torchtitan.models.common.token_dispatcher import LocalTokenDispatcher  # noqa: E402

from ezpz_moe.hosts.titan.activation_checkpointing import (  # noqa: E402
    SelectiveACKeepingProducts,
)

TOKENS = 1024
SCALES = {"olmoe": 4, "qwen3_30b": 4, "deepseek_v2_lite": 2, "10b_2b": 2, "mixtral": 4}
STOCK, AGAIN, KEPT = "stock", "one node, again", "one node, kept"


class Weights(nn.Module):
    def __init__(self, E: int, D: int, hidden: int, dtype: torch.dtype) -> None:
        super().__init__()
        for name, shape in {"w1": (hidden, D), "w2": (D, hidden), "w3": (hidden, D)}.items():
            weight = torch.randn(E, *shape).mul_(0.03).to(dtype)
            self.register_parameter(name, nn.Parameter(weight))


class Layer(nn.Module):
    """The routed layer, with weights that several share."""

    def __init__(self, weights: Weights) -> None:
        super().__init__()
        self.weights = weights


class Stock(Layer):
    """torchtitan's dispatcher, and its experts without their casts."""

    def forward(self, x_TD: Tensor, scores_TK: Tensor, ids_TK: Tensor, counts_E: Tensor) -> Tensor:
        E, K = len(counts_E), ids_TK.shape[1]
        dispatcher = LocalTokenDispatcher(LocalTokenDispatcher.Config(num_experts=E, top_k=K))
        x_RD, counts_E, metadata = dispatcher.dispatch(x_TD, scores_TK, ids_TK, counts_E)
        offs_E = torch.cumsum(counts_E, 0, dtype=torch.int32)

        def product(A_RK: Tensor, w_ENK: Tensor) -> Tensor:
            return torch._grouped_mm(A_RK, w_ENK.transpose(1, 2), offs=offs_E)

        w = self.weights
        y_RD = product(F.silu(product(x_RD, w.w1)) * product(x_RD, w.w3), w.w2)
        return dispatcher.combine(y_RD, metadata, x_TD)


class OneNode(Layer):
    def forward(self, *inputs: Tensor) -> Tensor:
        w = self.weights
        return get_backend("for_loop").routed(w.w1, w.w2, w.w3, *inputs)


def compare(name: str, dtype: torch.dtype) -> dict[str, str]:
    """Time one layer, and return its row of the table."""
    torch.manual_seed(0)
    model, scale = MODELS[name], SCALES[name]
    E, K, D, hidden = model.E, model.K, model.D // scale, model.F // scale
    weights = Weights(E, D, hidden, dtype)
    x_TD = torch.randn(TOKENS, D).to(dtype).requires_grad_()
    ids_TK = torch.rand(TOKENS, E).topk(K).indices
    scores_TK = torch.rand(TOKENS, K).requires_grad_()
    counts_E = torch.bincount(ids_TK.flatten(), minlength=E)
    grad_TD = torch.randn(TOKENS, D).to(dtype)

    def gradients(layer: nn.Module) -> tuple[Tensor, ...]:
        out_TD = layer(x_TD, scores_TK, ids_TK, counts_E)
        return torch.autograd.grad(out_TD, (x_TD, scores_TK, *weights.parameters()), grad_TD)

    policies = {
        STOCK: (SelectiveAC.Config(), Stock),
        AGAIN: (SelectiveACKeepingProducts.Config(experts="recompute"), OneNode),
        KEPT: (SelectiveACKeepingProducts.Config(), OneNode),
    }
    timed: dict[str, Callable[[], tuple[Tensor, ...]]] = {
        each: partial(gradients, policy.build()._wrap_block(layer(weights)))
        for each, (policy, layer) in policies.items()
    }
    pairs = list(zip(timed[KEPT](), timed[STOCK](), strict=True))
    error = max(float((ours - host).norm() / host.norm()) for ours, host in pairs)
    found = medians(timed)
    R = TOKENS * K
    kept = (TOKENS * D + 2 * R * hidden) * dtype.itemsize + R * torch.int64.itemsize
    return {
        "layer": f"{name}/{scale}",
        **{f"{each}, ms": f"{ms:.1f}" for each, ms in found.items()},
        "again, x stock": f"{found[STOCK] / found[AGAIN]:.2f}",
        "kept, x stock": f"{found[STOCK] / found[KEPT]:.2f}",
        "kept, MiB": f"{kept / 2**20:.1f}",
        "gradients differ by": f"{error:.0e}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", nargs="+", choices=SCALES, default=[*SCALES])
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    arguments = parser.parse_args()
    rows = [compare(name, getattr(torch, arguments.dtype)) for name in arguments.layers]
    title = f"{TOKENS} tokens, {arguments.dtype}, {torch.get_num_threads()} threads"
    display.print_table(rows, title=title)


if __name__ == "__main__":
    main()
