"""Find the FFNs of a model's config that every token goes through, and what does not fit them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torchtitan.trainer import Trainer

from ezpz_moe.hosts.titan.override_conflicts import named

_FUSED = "torchtitan.overrides.fused_swiglu.fused_swiglu"


def dense_ffns(model: Any) -> Iterator[tuple[Any, str]]:
    """Yield the holder of every FFN that is not routed, and its name there.

    Not of a vision encoder.
    """
    for layer in (*model.layers, *(getattr(model, "mtp_layers", None) or ())):
        if getattr(layer, "feed_forward", None) is not None:
            yield layer, "feed_forward"
        moe = getattr(layer, "moe", None)
        if getattr(moe, "shared_experts", None) is not None:
            yield moe, "shared_experts"


def ffn_problems(config: Trainer.Config) -> Iterator[str]:
    """Yield settings of a run that do not fit the flavor's FFNs."""
    spec = config.model_spec
    # A flavor with other FFNs than the host's has no adapter.
    if spec is None or spec.state_dict_adapter is not None:
        return
    for key in ("initial_load_in_hf", "last_save_in_hf"):
        if getattr(config.checkpoint, key, False):
            yield (
                f"checkpoint.{key} = true: no class of transformers computes the FFNs of flavor "
                f"{spec.flavor!r}. Set it to false."
            )
    nodes = [getattr(holder, name) for holder, name in dense_ffns(spec.model)]
    is_gated = any(hasattr(node, "gate") for node in nodes)
    if _FUSED in named(config) and (is_gated or any(hasattr(node, "activation") for node in nodes)):
        yield (
            f"override.imports {_FUSED}: it replaces FFNs with a fused SwiGLU, which has neither "
            "the flavor's ffn_activation nor its shared_gate. Remove the override, or these keys."
        )
    par = config.parallelism
    layers = [layer.moe.routed_experts for layer in spec.model.layers if layer.moe is not None]
    if (
        any(hasattr(layer, "descend") for layer in layers)
        and par.tensor_parallel_degree > 1
        and not par.enable_sequence_parallel
    ):
        yield (
            "parallelism.enable_sequence_parallel = false with "
            f"parallelism.tensor_parallel_degree = {par.tensor_parallel_degree} leaves the output "
            "of experts a part of a sum, which would go through ascend (moe_latent_dim) on every "
            "rank. Set it to true."
        )
    if is_gated and par.tensor_parallel_degree > 1 and not par.enable_sequence_parallel:
        yield (
            "parallelism.enable_sequence_parallel = false with "
            f"parallelism.tensor_parallel_degree = {par.tensor_parallel_degree} leaves the output "
            "of shared experts a part of a sum, which their gate cannot multiply. Set it to true."
        )
