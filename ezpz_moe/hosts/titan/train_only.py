"""Let some experts of a model learn, and keep everything else to the bit: ``[train_only]``.

What learns is said when the model is parallelized, because parameters that are laid out again lose
``requires_grad``. A layer's experts are one stacked parameter, so that of a layer with frozen ones
the stack learns, and its frozen rows are kept by :mod:`.frozen_rows`; a backend of ours computes no
gradient for them. The host's hook that moves selection biases is left out.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torchtitan.models.common.moe import MoE
from torchtitan.protocols.model_spec import ModelSpec
from torchtitan.tools.logging import logger

from ezpz_moe.config.flavors import Flavor
from ezpz_moe.config.train_only import TrainOnly
from ezpz_moe.errors import EzpzError, exit_on_user_error
from ezpz_moe.hosts.titan.base import titan
from ezpz_moe.hosts.titan.frozen_rows import keep_rows, zero_gradients
from ezpz_moe.hosts.titan.routing import route
from ezpz_moe.hosts.titan.selector import Selector
from ezpz_moe.routing.anchor import Anchor


@dataclass(frozen=True)
class Learners:
    """What learns of a model.

    Attributes:
        trained_E: bool by layer, of all its experts; only layers of which any learns.
        router: whether gates learn.
        anchor: coefficient of the loss that keeps tokens with the experts that learn.
        source: who says so, for messages.
    """

    trained_E: Mapping[int, Tensor]
    router: bool
    anchor: float
    source: str


def train_only(spec: ModelSpec, said: TrainOnly, flavor: Flavor) -> Learners:
    """Freeze all but what ``said`` names in the trainer's model and its optimizer, in place.

    Raises:
        EzpzError: the model has no such layer or expert, or the anchor would have no effect.
    """
    learners = _of_model(spec.model, said)
    _refuse_idle_anchor(learners)
    if learners.anchor and not flavor.is_routed:  # else its routers are ours already
        route(spec, flavor)
    spec.parallelize_fn = _freezing(spec.parallelize_fn, learners)
    # In place of the host's, which moves the selection biases and does nothing else.
    spec.post_optimizer_build_fn = functools.partial(_keep, learners)
    return learners


def problems(config: Any) -> Iterator[str]:
    """Yield what the host's config of a job excludes."""
    learners: Learners | None = getattr(config, "learners", None)
    stages = config.parallelism.pipeline_parallel_degree
    if learners is not None and stages > 1:
        yield (
            f"{learners.source} excludes parallelism.pipeline_parallel_degree = {stages}: a stage "
            "in which nothing learns has no backward. Set it to 1: data, tensor and expert "
            "parallelism remain."
        )


def _of_model(model: Any, said: TrainOnly) -> Learners:
    host_experts = titan().experts()
    sizes = {
        number: host_experts.sizes(node).num_experts
        for number, layer in enumerate(model.layers)
        if getattr(layer, "moe", None) is not None
        # Not the router's number, which has zero-computation experts too.
        for _, node, _, _ in layer.moe.traverse(host_experts.HostExperts.Config)
    }
    chosen = said.experts
    if chosen is None:
        chosen = {number: tuple(range(experts)) for number, experts in sizes.items()}
    trained_E = {}
    for number, experts in chosen.items():
        if number not in sizes:
            raise EzpzError(
                f"{said.source} experts: layer {number} has no experts in this model. Those of "
                f"layers {_shown(list(sizes))} may learn."
            )
        if too_high := [expert for expert in experts if expert >= sizes[number]]:
            raise EzpzError(
                f"{said.source} experts: layer {number} has no expert {too_high[0]}: its experts "
                f"are 0 to {sizes[number] - 1}."
            )
        if experts:
            trained_E[number] = torch.zeros(sizes[number], dtype=torch.bool)
            trained_E[number][list(experts)] = True
    return Learners(trained_E, said.router, said.anchor, said.source)


def _refuse_idle_anchor(learners: Learners) -> None:
    if not learners.anchor:
        return
    anchored = [each for each in learners.trained_E.values() if not each.all()]
    # With frozen gates only what comes before a layer moves its scores.
    if not anchored or (len(learners.trained_E) == 1 and not learners.router):
        why = "all experts learn" if not anchored else "nothing before these experts learns"
        raise EzpzError(
            f"{learners.source} anchor = {learners.anchor:g} has no effect: {why}. Remove it, or "
            "set router = true and name some experts of a layer."
        )


def _shown(numbers: list[int]) -> str:
    """Return numbers in words, shortened where they follow one another."""
    if len(numbers) > 2 and numbers == list(range(numbers[0], numbers[-1] + 1)):
        return f"{numbers[0]} to {numbers[-1]}"
    return ", ".join(map(str, numbers))


def _freezing(cut: Callable[..., Any], learners: Learners) -> Callable[..., Any]:
    @functools.wraps(cut)
    def parallelize(model: nn.Module, *, parallel_dims: Any, **more: Any) -> Any:
        model = cut(model, parallel_dims=parallel_dims, **more)
        with exit_on_user_error():
            _freeze(model, learners, parallel_dims)
        return model

    return parallelize


def _freeze(model: Any, learners: Learners, parallel_dims: Any) -> None:
    could_learn = {id(each) for each in model.parameters() if each.requires_grad}
    model.requires_grad_(False)
    for number, moe in _layers(model):
        if learners.router:
            for parameter in moe.router.gate.parameters():
                parameter.requires_grad_(id(parameter) in could_learn)
        if number in learners.trained_E:
            _train_some(moe, learners.trained_E[number], parallel_dims)
            if learners.anchor and not learners.trained_E[number].all():
                moe.router.anchor = Anchor(learners.trained_E[number], learners.anchor)
    if not any(each.requires_grad for each in model.parameters()):
        raise EzpzError(f"{learners.source}: nothing would learn: this model's gates are frozen.")
    logger.info(f"ezpz_moe: {_in_words(learners)}")


def _layers(model: Any) -> Iterator[tuple[int, MoE]]:
    for name, block in model.layers.items():
        if getattr(block, "moe_enabled", False):
            yield int(name), block.moe


def _train_some(moe: MoE, trained_E: Tensor, parallel_dims: Any) -> None:
    experts = _experts(moe)
    for parameter in experts.parameters(recurse=False):
        parameter.requires_grad_(True)
    if not trained_E.all():
        mesh = parallel_dims.get_optional_mesh("ep")
        rank, ranks = (mesh.get_local_rank(), mesh.size()) if mesh is not None else (0, 1)
        experts.trained_E = trained_E.chunk(ranks)[rank].clone()


def _experts(moe: MoE) -> Selector:
    (experts,) = (each for each in moe.modules() if isinstance(each, Selector))
    return experts


def _keep(
    learners: Learners, optimizers: Any, model_parts: list[nn.Module], parallel_dims: Any
) -> None:
    """Keep frozen rows: a ``post_optimizer_build_fn`` of the host's.

    Only now: parameters that were made on the meta device are others by now, without hooks.
    """
    for part in model_parts:
        for number, moe in _layers(part):
            trained_E = learners.trained_E.get(number)
            if trained_E is not None and not trained_E.all():
                for parameter in _experts(moe).parameters(recurse=False):
                    zero_gradients(parameter, trained_E)
    with exit_on_user_error():
        for optimizer in optimizers:
            keep_rows(optimizer)


def _in_words(learners: Learners) -> str:
    """Return what learns, for the log."""
    of_layers = []
    for number, trained_E in learners.trained_E.items():
        experts = "all" if trained_E.all() else _shown(trained_E.nonzero().flatten().tolist())
        of_layers.append(f"layer {number}: {experts}")
    who = [f"experts ({'; '.join(of_layers)})"] if of_layers else []
    who += ["the gates of all layers"] if learners.router else []
    return f"{learners.source}: only {' and '.join(who)} learn; everything else keeps its bits"
