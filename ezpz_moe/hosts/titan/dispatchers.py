"""What the host's token dispatchers can do, and what they ask of a run.

The host says the latter only while it builds the run. The standard dispatcher, all-to-all, runs
everywhere. The others have kernels of their own.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from typing import Any

from torchtitan.distributed.activation_checkpoint import FullAC
from torchtitan.models.common.token_dispatcher import (
    DeepEPTokenDispatcher,
    HybridEPTokenDispatcher,
    LocalTokenDispatcher,
    MinimalAsyncEPTokenDispatcher,
    update_ep_token_dispatcher_config,
)
from torchtitan.tools import utils
from torchtitan.trainer import Trainer

from ezpz_moe.config.routing_schema import Router
from ezpz_moe.errors import EzpzError

_NAMES: Mapping[type, str] = {
    DeepEPTokenDispatcher: "deepep",
    HybridEPTokenDispatcher: "hybridep",
    MinimalAsyncEPTokenDispatcher: "minimal_async_ep",
}
# A version of the package may have one of the two.
OF_DEEP_EP = {"deepep": "ElasticBuffer", "hybridep": "HybridEPBuffer"}
"""Dispatcher -> the class of that package that it needs."""
SORTING = ("LocalTokenDispatcher", "AllToAllTokenDispatcher")
"""Those that sort assignments, so that some can be cut off; others send a fixed number of them."""
_REMEDY = 'Leave it out, or set it to "standard".'


def dispatcher_problems(config: Trainer.Config) -> Iterator[str]:
    """Yield why the settings exclude the run's token dispatcher."""
    name = _dispatcher(config)
    if name is None:
        return
    if config.parallelism.expert_parallel_degree == 1:
        yield (
            f"{_key(name)} sends tokens between ranks, but parallelism.expert_parallel_degree = 1. "
            f"{_REMEDY}"
        )
        return
    if name == "minimal_async_ep" and not isinstance(config.activation_checkpoint, FullAC.Config):
        yield (
            f"{_key(name)} needs all activations to be recomputed. Set [activation_checkpoint] "
            'mode = "full".'
        )
        return
    try:
        # The host's own check, which also fills in the configs: those of a copy.
        update_ep_token_dispatcher_config(copy.deepcopy(config.model_spec.model), config)
    except ValueError as error:
        yield f"{_key(name)}: torchtitan refuses it: {error}"


def dispatcher_machine_problems(config: Trainer.Config) -> Iterator[str]:
    """Yield why the run's token dispatcher cannot run on this machine."""
    name = _dispatcher(config)
    if name is not None and (why := _why_not_here(name)):
        yield f"{_key(name)} {why} {_REMEDY}"


def refuse_dispatcher_of_config(config: Trainer.Config) -> None:
    """Refuse a config of the host's whose token dispatcher cannot run on this machine.

    Raises:
        EzpzError: the dispatcher has no kernels here, or lacks its package.
    """
    name = _dispatcher(config)
    if name is not None and (why := _why_not_here(name)):
        raise EzpzError(
            f'--config: the token dispatcher of its model, "{name}", {why} Choose a config whose '
            "dispatcher is the standard one."
        )


def _why_not_here(name: str) -> str | None:
    """Return what this machine lacks for a dispatcher, as the end of a sentence; or None."""
    if utils.device_type != "cuda":
        return f"has kernels for CUDA alone; this is {utils.device_type}."
    if (needed := OF_DEEP_EP.get(name)) and not _has_deep_ep(needed):
        return (
            f"needs the package deep_ep with its {needed}, which cannot be imported here. Install "
            "it from https://github.com/deepseek-ai/DeepEP. Or:"
        )
    return None


def _dispatcher(config: Trainer.Config) -> str | None:
    """Return the name of a dispatcher other than the standard one, or None."""
    if config.model_spec is None:
        return None
    nodes = config.model_spec.traverse(LocalTokenDispatcher.Config)
    owners = (type(node)._owner for _, node, _, _ in nodes)
    # All layers have the same.
    return next((name for owner in owners for kind, name in _NAMES.items() if owner is kind), None)


def _has_deep_ep(name: str) -> bool:
    if find_spec("deep_ep") is None:
        return False
    try:
        return hasattr(importlib.import_module("deep_ep"), name)
    except (ImportError, OSError):  # a library of it that does not load
        return False


def _key(name: str) -> str:
    return f'parallelism.expert_parallel_comm_backend = "{name}"'


def host_class(dispatcher: Any) -> str:
    """Return the name of the host's class that a dispatcher's config is made from."""
    # The dispatcher may already be a subclass of ours, with a name that nobody wrote in a job.
    classes = type(dispatcher)._owner.mro()
    return next(each.__name__ for each in classes if each.__module__.startswith("torchtitan."))


def cuts_padding(dispatcher: Any, settings: Router) -> bool:
    """Return whether padding goes to no expert: asked for, or possible and not asked against."""
    if not settings.masks_padding or settings.dispatch_padding is True:
        return False
    return settings.dispatch_padding is False or host_class(dispatcher) in SORTING
