"""Tell ``ezpz-moe upcycle`` what it has to know about a flavor's model."""

from __future__ import annotations

from torchtitan.models.common.moe import MoE

from ezpz_moe.config.dense_flavors import refuse_dense
from ezpz_moe.config.flavors import Flavor
from ezpz_moe.errors import EzpzError
from ezpz_moe.hosts.titan.base import titan
from ezpz_moe.hosts.titan.parameters import build_on_meta
from ezpz_moe.hosts.upcycling_target import PARTS, Layer, Target

_INNER = "routed_experts.inner_experts"
_EXPERTS = {"w1": f"{_INNER}.w1_EFD", "w2": f"{_INNER}.w2_EDF", "w3": f"{_INNER}.w3_EFD"}
_ZEROS = {
    *("expert_bias_E", "router.gate.bias", "router.gate.residual.weight"),
    "shared_experts.gate.weight",
}


def target(flavor: Flavor) -> Target:
    """Return the flavor's model and its layers with experts.

    Raises:
        EzpzError: the host cannot build it, or its experts are not a SwiGLU FFN without biases.
    """
    refuse_dense(flavor, "to fill")
    if flavor.computes_otherwise:
        raise EzpzError(
            f"{flavor.source}: expert_activation, expert_bias, moe_latent_dim, router_scores or "
            "ffn_activation makes this another FFN than the dense model's. Upcycle to a flavor "
            "without them."
        )
    model = build_on_meta(flavor)
    tensors = model.state_dict()
    moes = {name: each for name, each in model.named_modules() if isinstance(each, MoE)}
    return Target(
        flavor=flavor,
        tensors=tensors,
        layers=tuple(_layer(flavor, name, moe, tensors) for name, moe in moes.items()),
        generation=titan().checkpoint_names,
    )


def _layer(flavor: Flavor, name: str, moe: MoE, tensors: dict) -> Layer:
    block = name.rpartition(".")[0]
    own = {key.removeprefix(f"{name}."): key for key in tensors if key.startswith(f"{name}.")}
    routed = {key for key in own if key.startswith("routed_experts.")}
    # Exactly these: an extra bias or a fused weight has no counterpart in the dense FFN.
    if routed != set(_EXPERTS.values()):
        raise EzpzError(
            f"{flavor.source}: {name} has experts of {', '.join(sorted(routed))}: a dense FFN can "
            "only be copied to a SwiGLU FFN without biases, with one tensor per weight."
        )
    parts = {part: own.pop(key) for part, key in _EXPERTS.items()}
    shared = {p: own.pop(key) for p in PARTS if (key := f"shared_experts.{p}.weight") in own}
    gate = own.pop("router.gate.weight")
    # Everything known has been popped. Guessing a value for the rest could change the function that
    # upcycling has to preserve.
    if unknown := own.keys() - _ZEROS:
        raise EzpzError(
            f"{flavor.source}: {name} has {', '.join(sorted(unknown))}, and ezpz_moe does not know "
            "what these should be in an upcycled model."
        )
    router = moe.router
    return Layer(
        name=block,
        dense={part: f"{block}.feed_forward.{part}.weight" for part in PARTS},
        experts=parts,
        shared=shared,
        gate=gate,
        zeros=tuple(own.values()),
        num_experts=router.num_experts,
        top_k=router.top_k,
        score_func=router.score_func,
        route_norm=router.route_norm,
        route_scale=router.route_scale,
        num_groups=router.num_expert_groups,
    )
