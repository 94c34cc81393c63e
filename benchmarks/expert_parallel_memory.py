"""What a routed layer keeps, sends and takes under expert parallelism: four ways of combining.

    python benchmarks/expert_parallel_memory.py
    python benchmarks/expert_parallel_memory.py --ranks 4 --layers olmoe --turns 40

Processes over gloo, one layer in bfloat16, uniform random routing. The ways:

host        torchtitan's layer: experts, dispatch and combination
experts     its dispatch and combination around our experts
no copy     the same, but the weighting keeps the experts' output in its own dtype
scores      the scores travel with the rows, and weight the hidden rows; nothing is kept of outputs
token       what we train with: a token goes once to each rank, with its choices and scores

Kept is what autograd saves on one rank, without weights and inputs. Sent is what leaves a rank in
forward and backward. Time is that of forward and backward: medians of interleaved turns, each
begun together, as shares of the host's.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import tyro
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ezpz_moe.hosts.detect import check_host

LAYERS = {  # experts, experts of a token, dim, hidden dim: a quarter or half of the models' widths
    "olmoe": (64, 8, 512, 256),
    "qwen3": (128, 8, 512, 192),
    "v2_lite": (64, 6, 1024, 704),
    "10B_2B": (36, 3, 1024, 704),
    "mixtral": (8, 2, 1024, 3584),
}
Layer = Literal["olmoe", "qwen3", "v2_lite", "10B_2B", "mixtral"]
Way = Callable[..., Tensor]


@dataclass(frozen=True)
class Arguments:
    """What a routed layer keeps, sends and takes under expert parallelism."""

    ranks: int = 2
    layers: tuple[Layer, ...] = ("olmoe", "qwen3", "v2_lite", "10B_2B", "mixtral")
    tokens: int = 1024
    """Of each rank."""
    turns: int = 20


@dataclass(frozen=True)
class Measured:
    kept: int
    sent: int
    seconds: tuple[float, ...]


class WeightedWithoutCopy(torch.autograd.Function):
    """Rows times scores, as the host computes them; keeps the rows as they are."""

    @staticmethod
    def forward(ctx: Any, y_ND: Tensor, score_N: Tensor) -> Tensor:
        ctx.save_for_backward(y_ND, score_N)
        return torch.empty_like(y_ND).copy_(y_ND * score_N.unsqueeze(1))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        y_ND, score_N = ctx.saved_tensors
        grad_score_N = torch.empty_like(score_N)
        slices = (each.split(256) for each in (grads[0], y_ND, grad_score_N))
        for grad, y, out in zip(*slices, strict=True):
            torch.sum(grad.float().mul_(y), 1, out=out)
        return (grads[0] * score_N.unsqueeze(1)).to(y_ND.dtype), grad_score_N


class Sent(TorchDispatchMode):
    """Counts the bytes that all-to-all sends to other ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops._c10d_functional.all_to_all_single.default:
            rows, _, splits, _ = args
            others = sum(splits) - splits[dist.get_rank()]
            self.nbytes += others * rows[:1].nbytes if sum(splits) else 0
        return func(*args, **(kwargs or {}))


def without_copy(layer: Any, x: Tensor, scores: Tensor, ids: Tensor, counts: Tensor) -> Tensor:
    dispatcher, x_TD = layer.token_dispatcher, x.flatten(0, -2)
    tokens = (x_TD, scores.flatten(0, -2), ids.flatten(0, -2), counts)
    rows, counts_e, metadata = dispatcher.dispatch(*tokens)
    y_ND = returned(dispatcher, layer.inner_experts(rows, counts_e), metadata)
    weighted_ND = WeightedWithoutCopy.apply(y_ND, metadata.topk_scores_experts_sorted_N)
    return combined(weighted_ND, metadata, x_TD).view(x.shape)


def scores_travel(layer: Any, x: Tensor, scores: Tensor, ids: Tensor, counts: Tensor) -> Tensor:
    from ezpz_moe.hosts.titan.routed_experts import Choices

    dispatcher, x_TD = layer.token_dispatcher, x.flatten(0, -2)
    tokens = (x_TD, scores.flatten(0, -2), ids.flatten(0, -2), counts)
    rows, counts_e, metadata = dispatcher.dispatch(*tokens)
    score_N1 = metadata.topk_scores_experts_sorted_N.unsqueeze(1)
    score_R1 = dispatcher._dispatch_token_exchange(
        score_N1, dispatcher.ep_mesh.get_group(), metadata.output_splits, metadata.input_splits
    )[metadata.permuted_indices]
    expert_R = torch.arange(len(counts_e)).repeat_interleave(counts_e, output_size=len(rows))
    choices = Choices(score_R1, expert_R.unsqueeze(1), len(rows))
    y_RD = layer.inner_experts(rows, counts_e, choices=choices)
    return combined(returned(dispatcher, y_RD, metadata), metadata, x_TD).view(x.shape)


def returned(dispatcher: Any, y_RD: Tensor, metadata: Any) -> Tensor:
    y_RD = dispatcher._unpermute(y_RD, metadata.input_shape, metadata.permuted_indices)
    splits = (metadata.input_splits, metadata.output_splits)
    return dispatcher._combine_token_exchange(y_RD, dispatcher.ep_mesh.get_group(), *splits)


def combined(rows_ND: Tensor, metadata: Any, x_TD: Tensor) -> Tensor:
    from torchtitan.ops.scatter_add import deterministic_scatter_add

    index_ND = metadata.token_indices_experts_sorted_N.unsqueeze(1).expand(-1, x_TD.shape[1])
    return deterministic_scatter_add(torch.zeros_like(x_TD), index_ND, rows_ND)


def ways_of(mesh: Any, sizes: tuple[int, ...]) -> dict[str, Way]:
    from torchtitan.models.common.moe import GroupedExperts, RoutedExperts
    from torchtitan.models.common.token_dispatcher import AllToAllTokenDispatcher

    from ezpz_moe.hosts.titan.experts import selected_layer

    E, K, D, F = sizes
    config = RoutedExperts.Config(
        inner_experts=GroupedExperts.Config(dim=D, hidden_dim=F, num_experts=E // mesh.size()),
        token_dispatcher=AllToAllTokenDispatcher.Config(num_experts=E, top_k=K),
    )

    def built(backend: str, routed: Literal["one_node", "composed"]) -> Any:
        layer = selected_layer(config, backend, "benchmark", None, routed).build().bfloat16()
        layer.token_dispatcher.wire_meshes(ep_mesh=mesh)
        torch.manual_seed(mesh.get_local_rank())
        for weight_EXY in layer.parameters():
            torch.nn.init.normal_(weight_EXY, std=weight_EXY.shape[-1] ** -0.5)
        return layer

    ours = built("for_loop", "composed")
    return {
        "host": built("grouped_mm", "composed"),
        "experts": ours,
        "no copy": lambda *inputs: without_copy(ours, *inputs),
        "scores": lambda *inputs: scores_travel(ours, *inputs),
        "token": built("for_loop", "one_node"),
    }


def inputs_of(sizes: tuple[int, ...], tokens: int) -> list[Tensor]:
    E, K, D, _ = sizes
    torch.manual_seed(100 + dist.get_rank())
    x = torch.randn(1, tokens, D).bfloat16().requires_grad_()
    scores, ids = torch.rand(1, tokens, E).topk(K)
    return [x, scores.requires_grad_(), ids, torch.bincount(ids.flatten(), minlength=E)]


def kept_by(way: Way, inputs: list[Tensor], weights: set[int]) -> int:
    """Bytes of the storages that autograd saves, without weights and inputs."""
    saved: dict[int, Any] = {}
    given = weights | {each.untyped_storage().data_ptr() for each in inputs}

    def pack(tensor: Tensor) -> Tensor:
        # What a collective returns is a wrapper around what it receives.
        storage = getattr(tensor, "elem", tensor).untyped_storage()
        saved[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = way(*inputs)
        del out
    return sum(each.nbytes() for at, each in saved.items() if at not in given)


def measured(ways: dict[str, Way], inputs: list[Tensor], turns: int) -> dict[str, Measured]:
    weights = {
        weight.untyped_storage().data_ptr()
        for way in ways.values()
        for weight in getattr(way, "parameters", tuple)()
    }
    grad = torch.randn_like(inputs[0])

    def step(way: Way) -> None:
        dist.barrier()
        way(*inputs).backward(grad)

    seconds: dict[str, list[float]] = {name: [] for name in ways}
    order = deque(ways)
    for _ in range(turns + 1):
        for name in order:
            start = time.perf_counter()
            step(ways[name])
            seconds[name].append(time.perf_counter() - start)
        order.rotate()
    result = {}
    for name, way in ways.items():
        with Sent() as sent:
            step(way)
        kept = kept_by(way, inputs, weights)
        result[name] = Measured(kept, sent.nbytes, tuple(seconds[name][1:]))
    return result


def of_rank(rank: int, arguments: Arguments, store: str) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(arguments.ranks), "LOCAL_RANK": str(rank)}
    check_host()  # before torchtitan is imported: it chooses the device
    from torchtitan.distributed.utils import set_spmd_backend

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=arguments.ranks
    )
    set_spmd_backend("partial_dtensor")  # the host's only one over gloo
    mesh = dist.init_device_mesh("cpu", (arguments.ranks,), mesh_dim_names=("ep",))
    for name in arguments.layers:
        results = measured(
            ways_of(mesh, LAYERS[name]), inputs_of(LAYERS[name], arguments.tokens), arguments.turns
        )
        if rank == 0:
            show(name, results)
    dist.barrier()
    dist.destroy_process_group()


def show(layer: str, results: dict[str, Measured]) -> None:
    host = results["host"]
    for name, each in results.items():
        ratios = [a / b for a, b in zip(each.seconds, host.seconds, strict=True)]
        print(
            f"{layer:8} {name:8} kept {each.kept / 2**20:6.1f} MiB {each.kept / host.kept:.2f} | "
            f"sent {each.sent / 2**20:6.1f} MiB {each.sent / host.sent:.2f} | "
            f"{1e3 * statistics.median(each.seconds):6.0f} ms {statistics.median(ratios):.2f}",
            flush=True,
        )


def main(arguments: Arguments) -> None:
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(of_rank, (arguments, str(Path(folder, "store"))), arguments.ranks)


if __name__ == "__main__":
    main(tyro.cli(Arguments))
