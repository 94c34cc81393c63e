"""What a flavor's router does that no class of transformers computes."""

from __future__ import annotations

from collections.abc import Iterator

from ezpz_moe.config.flavors import Flavor
from ezpz_moe.routing.balance import value_at


def router_differences(flavor: Flavor, step: int | None) -> Iterator[str]:
    """Yield what a flavor's router changes at inference. No class computes any of it.

    Jitter, noise, padding and the plan of sinkhorn are for training alone.

    Args:
        flavor: the model's.
        step: where a scheduled temperature is; None if it is not known.
    """
    router, size = flavor.router, flavor.dimensions or flavor.change
    if size and size.router_score_func == "sqrtsoftplus":
        yield f'router_score_func = "{size.router_score_func}"'
    if router.routing == "balanced":
        yield 'router.routing = "balanced" chooses experts without looking at the token'
    if router.routing == "relu":
        yield 'router.routing = "relu" uses as many experts as have a score'
    if router.activation != "identity":
        yield f'router.activation = "{router.activation}"'
    if strength := router.similarity.strength:
        yield f"router.similarity.strength = {strength:g}"
    if router.learned_scale:
        yield "router.learned_scale = true is a weight of the gate"
    schedule = router.temperature
    if step is None and not schedule.is_constant:
        yield (
            f"router.temperature moves from {schedule.start:g} to {schedule.end:g}, and the step "
            "is not known (the folder of a model without training state must be called step-N)"
        )
    elif (temperature := value_at(schedule, step or 0)) != 1:
        yield f"router.temperature is {temperature:g}" + (f" at step {step}" if step else "")
    for key in ("null_experts", "copy_experts", "constant_experts"):
        if number := getattr(router, key):
            yield f"router.{key} = {number}"
    if router.gating_residual:
        yield "router.gating_residual = true"
