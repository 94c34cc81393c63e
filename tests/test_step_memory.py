"""``benchmarks/step_memory.py``: what a step's memory is made of when it is the most."""

import sys
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))

from step_memory import (
    BACKWARD,
    FORWARD,
    FREED,
    GATHERED,
    REDUCED,
    Allocation,
    at_the_peak,
    composition,
    kind_of,
)

MiB = 2**20


def test_a_block_is_of_the_kind_that_takes_it_and_is_given_back_to():
    backward = ("autograd::engine::evaluate_function: Mm",)
    steps = [
        ((), 1, 10),
        (("FSDP::all_gather (layers.0)",), 2, 7),
        ((), 9, -2),  # was there before the step
        (("aten::mm",), 3, 20),
        ((), 2, -7),
        (backward, 2, 4),  # the address again
        ((*backward, "FSDP::post_backward_reduce (layers.0)"), 4, 30),
        ((), 3, -20),
    ]
    taken = [Allocation(when, at, size, within) for when, (within, at, size) in enumerate(steps)]
    peak, highest = at_the_peak(taken)
    assert dict(peak) == {FORWARD: 30, GATHERED: 0, FREED: -2, BACKWARD: 4, REDUCED: 30}
    assert dict(highest) == {FORWARD: 30, GATHERED: 7, FREED: 0, BACKWARD: 4, REDUCED: 30}


def test_what_backward_gathers_is_still_gathered():
    inside = ("autograd::engine::evaluate_function: Mm", "FSDP::all_gather (layers.0)")
    assert kind_of(inside) == GATHERED


def test_a_real_step_is_weighed_until_the_optimizer():
    """Forward makes three MiB: a sine, an exponential, their product. Adam's two are left out."""
    weight = torch.nn.Parameter(torch.zeros(MiB // 4))
    weight.grad = torch.zeros_like(weight)
    optimizer = torch.optim.Adam([weight])

    def step():
        (weight.exp() * weight.sin()).sum().backward()
        optimizer.step()

    _, highest = composition(step)
    assert 3 * MiB <= highest[FORWARD] < 3.1 * MiB
    assert MiB <= highest[BACKWARD]
