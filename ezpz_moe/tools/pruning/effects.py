"""What changes for a token that chose none of the removed experts, and why."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ezpz_moe.config.flavors import Flavor


def changes(flavor: Flavor, router: Any, *, has_bias: bool, is_merged: bool) -> Iterator[str]:
    """Yield why such a token may choose other experts than before, or weigh its own otherwise.

    Nothing: it has the same experts with the same weights, apart from rounding. So it is with
    scores of which each depends on its own logit alone, and with softmax over the chosen ones.

    Args:
        flavor: of the model.
        router: the host's, of one of its layers.
        has_bias: whether a bias for the choice differs from zero.
        is_merged: whether experts that stay have others added to them.
    """
    if is_merged:
        yield "experts that stay have others added to them"
    is_softmax = router.score_func == "softmax"
    if is_softmax and not router.route_norm:
        yield (
            "the scores are a softmax over all experts and not normalized (router_route_norm = "
            "false), so those that are left weigh more"
        )
    if is_softmax and has_bias:
        yield (
            "selection biases are added to scores of a softmax, which grow with fewer experts, "
            "and another one may win"
        )
    if router.num_expert_groups is not None:
        yield "a group of experts may have lost what it was chosen for"
    settings = flavor.router
    if settings.activation == "relu_rmsnorm":
        yield 'activation = "relu_rmsnorm" divides by the root mean square over all experts'
    if settings.gating_residual:
        yield "a router sees the logits of the layer before, of which some are gone"
    if settings.routing == "balanced":
        yield 'routing = "balanced" takes experts in turn, and there are fewer'
