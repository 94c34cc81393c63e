"""What a rank computes in a second, measured while all ranks of the run compute the same.

Figures are those of forward and backward together, as a training step has them. The slowest rank
counts: a step waits for it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ezpz_moe.compute import backend_names
from ezpz_moe.compute.reference import random_case
from ezpz_moe.hosts.backends import HOST_PATH
from ezpz_moe.hosts.precision import HOSTS_CAST
from ezpz_moe.tools.bench.contender import Contender, Prepared
from ezpz_moe.tools.bench.contenders import backends
from ezpz_moe.tools.bench.shapes import Shape
from ezpz_moe.tools.calibration.asked import Layer

Work = Callable[[], object]

_BUDGET = 0.25
"""Seconds that one figure may take, beside the first run, which warms up."""
_MOST, _FEWEST = 20, 3
_SLOW = 3.0
"""Seconds of one run after which larger ones are not tried."""
_ROWS = (8, 32, 128, 512)
"""Of an expert."""
_EXPERTS = 8
"""At most so many are measured: a backend's share of the peak hardly depends on their number."""


class Seconds(Protocol):
    """Returns how long a piece of work takes, of all ranks the slowest one's median."""

    def __call__(self, work: Work, after: Work | None = None) -> float:
        """Measure ``work``; each time ``after`` comes first, and does not count."""


def seconds_of(device: torch.device, *, together: bool = True) -> Seconds:
    """Return a clock for work on a device.

    Args:
        device: the rank's.
        together: whether all ranks work at the same time, and agree on what they have measured.
    """

    def once(work: Work, after: Work | None) -> float:
        if after is not None:
            after()
        synchronize(device)
        start = time.perf_counter()
        work()
        synchronize(device)
        return time.perf_counter() - start

    def agreed(value: float) -> float:
        return slowest(value, device) if together else value

    def measured(work: Work, after: Work | None = None) -> float:
        work()
        if together:
            dist.barrier()
        first = agreed(once(work, after))
        if first > _SLOW:
            return first
        repeats = max(_FEWEST, min(_MOST, int(_BUDGET / first)))
        return agreed(statistics.median(once(work, after) for _ in range(repeats)))

    return measured


def slowest(value: float, device: torch.device) -> float:
    """Return the largest of the ranks' values."""
    values = torch.tensor([value], dtype=torch.float64, device=device)
    dist.all_reduce(values, dist.ReduceOp.MAX)
    return values.item()


def synchronize(device: torch.device) -> None:
    """Wait for a device; a CPU has always finished."""
    if device.type != "cpu":
        torch.accelerator.synchronize()


def products(
    clock: Seconds, device: torch.device, dtype: torch.dtype, largest: float
) -> Mapping[float, float]:
    """Return FLOP/s of linear layers, by the FLOPs of one product's forward.

    Each has as many outputs as inputs, and twice as many rows.
    """
    found = {}
    width = 64
    while True:
        flops = 4.0 * width**3
        x_TD = _normal((2 * width, width), device, dtype)
        weight_DD = _normal((width, width), device, dtype)
        took = clock(_forward_and_backward(F.linear, x_TD, weight_DD))
        found[flops] = 3 * flops / took
        if flops > largest or took > _SLOW or width >= 16384:
            return found
        width *= 2


def attention(clock: Seconds, device: torch.device, dtype: torch.dtype, seq_len: int) -> float:
    """Return FLOP/s of causal attention, of which half of the scores counts: 8 heads of 64."""
    heads, dim = 8, 64
    query, key, value = (_normal((1, heads, seq_len, dim), device, dtype) for _ in range(3))

    attend = partial(F.scaled_dot_product_attention, is_causal=True)
    took = clock(_forward_and_backward(attend, query, key, value))
    return 3 * 2 * heads * 2 * dim * seq_len * (seq_len + 1) / 2 / took


def experts(
    clock: Seconds, device: torch.device, dtype: torch.dtype, layer: Layer
) -> Iterator[tuple[str, dict[float, float]]]:
    """Yield every backend that can run here and drops nothing: FLOP/s by the rows of an expert.

    Not ``auto``, which is always one of the others. The host's own path keeps the host's own dtype.
    """
    number = min(layer.num_experts, _EXPERTS)
    for each in backends([name for name in backend_names() if name != "auto"]):
        shape = Shape("", number, layer.dim, layer.hidden_dim, number * _ROWS[0])
        computed = getattr(torch, HOSTS_CAST) if each.name == HOST_PATH else dtype
        if not each.may_drop and not each.reasons_against(device, computed, shape):
            yield each.name, dict(_of_backend(clock, each, device, computed, number, layer))


def _of_backend(
    clock: Seconds,
    backend: Contender,
    device: torch.device,
    dtype: torch.dtype,
    number: int,
    layer: Layer,
) -> Iterator[tuple[float, float]]:
    for rows in _ROWS:
        case = random_case(
            [rows] * number, dim=layer.dim, hidden_dim=layer.hidden_dim, dtype=dtype, device=device
        )
        took = clock(partial(_layer_step, backend.prepare(case), case.grad_y_RD))
        yield float(rows), 18 * number * rows * layer.dim * layer.hidden_dim / took
        if took > _SLOW:
            return


def _layer_step(prepared: Prepared, grad_y_RD: Tensor) -> None:
    torch.autograd.grad(prepared.forward(), prepared.inputs, grad_y_RD)


def bandwidth(clock: Seconds, device: torch.device) -> float:
    """Return bytes in a second that a copy of 64 MB reads and writes."""
    source, target = (torch.ones(16_000_000, device=device) for _ in range(2))
    return 2 * source.numel() * source.element_size() / clock(partial(target.copy_, source))


def alone(clock: Seconds, device: torch.device, dtype: torch.dtype) -> float:
    """Return how many times faster a rank is while all others wait; at least 1."""
    x_TD, weight_DD = (_normal((512, 512), device, dtype) for _ in range(2))
    work = _forward_and_backward(F.linear, x_TD, weight_DD)
    together = clock(work)
    dist.barrier()
    by_itself = seconds_of(device, together=False)(work) if dist.get_rank() == 0 else 0.0
    return max(1.0, together / slowest(by_itself, device))


def overlap(clock: Seconds, device: torch.device, dtype: torch.dtype) -> float:
    """Return which share of the shorter of the two hides if ranks compute and gather at once."""
    x_TD, weight_DD = (_normal((1024, 1024), device, dtype) for _ in range(2))
    shard = torch.zeros(2**20, device=device)
    whole = torch.zeros(2**20 * dist.get_world_size(), device=device)
    compute = _forward_and_backward(F.linear, x_TD, weight_DD)

    def gather() -> dist.Work:
        return dist.all_gather_into_tensor(whole, shard, async_op=True)

    def both() -> None:
        running = gather()
        compute()
        running.wait()

    computing, gathering = clock(compute), clock(lambda: gather().wait())
    hidden = computing + gathering - clock(both)
    return max(0.0, min(1.0, hidden / min(computing, gathering)))


def _forward_and_backward(function: Callable[..., Tensor], *inputs: Tensor) -> Work:
    leaves = [each.requires_grad_() for each in inputs]
    grad = torch.ones_like(function(*leaves))
    return lambda: torch.autograd.grad(function(*leaves), leaves, grad)


def _normal(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, device=device, dtype=dtype)
