"""Find what a job asks of layers whose experts have other sizes: ranks to share, files to write."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torchtitan.trainer import Trainer

from ezpz_moe.hosts.limits import degree_problems
from ezpz_moe.hosts.titan.base import titan


def layer_problems(config: Trainer.Config) -> Iterator[str]:
    """Yield messages about the experts of single layers, each with its remedy."""
    if config.model_spec is None:
        return
    for check in (_expert_parallel_degree, _hugging_face):
        yield from check(config)


def _experts(config: Trainer.Config) -> dict[str, int]:
    """Return how many experts compute in each layer, by the layer's number."""
    experts = titan().experts()
    nodes = config.model_spec.traverse(experts.HostExperts.Config)
    return {_layer(path): experts.sizes(node).num_experts for path, node, _, _ in nodes}


def _layer(path: str) -> str:
    """Return 3 for "model.layers.3.moe.routed_experts"; the path, if it has no number."""
    return next((part for part in path.split(".") if part.isdigit()), path)


def _expert_parallel_degree(config: Trainer.Config) -> Iterator[str]:
    degree, experts = config.parallelism.expert_parallel_degree, _experts(config)
    if degree > 1 and not experts:
        yield (
            f"parallelism.expert_parallel_degree = {degree}: flavor {config.model_spec.flavor!r} "
            "is dense, so there are no experts to divide. Set it to 1, or leave it out."
        )
    yield from degree_problems(degree, experts, config.model_spec.flavor)


def _hugging_face(config: Trainer.Config) -> Iterator[str]:
    layers = getattr(config.model_spec.model, "layers", ())
    moes = [layer.moe for layer in layers if getattr(layer, "moe", None) is not None]
    experts = titan().experts()
    nodes = config.model_spec.traverse(experts.HostExperts.Config)
    hidden_dims = {experts.sizes(node).hidden_dim for _, node, _, _ in nodes}
    kinds: set[Any] = {(moe.router.num_experts, moe.router.top_k) for moe in moes}
    if len(kinds) <= 1 and len(hidden_dims) <= 1:
        return
    for key in ("initial_load_in_hf", "last_save_in_hf"):
        if config.checkpoint.enable and getattr(config.checkpoint, key):
            yield (
                f"checkpoint.{key} = true: the layers of flavor {config.model_spec.flavor!r} have "
                "experts of different sizes, for which Hugging Face's format has no place and "
                "torchtitan's adapter no rule. Set it to false: torchtitan's own checkpoints hold "
                "such models."
            )
