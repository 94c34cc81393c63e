"""Activation checkpointing that keeps what the routed experts should not compute again.

**The router's choices.** A recomputed score can differ from the first in its last bit, because
kernels may be fused or sums ordered differently. A token close to a tie would then go to another
expert in backward than in forward. Its gradients would belong to something that was never computed,
and with expert parallelism the run could crash. For this reason the host's selective checkpointing
saves what topk chose. Here its full checkpointing does the same, which costs K int64 per token and
layer.

**The experts' products.** The host's selective checkpointing saves what is expensive to compute
again, by a list of operators. It knows neither our operators nor ``torch._grouped_mm``, so that
backward multiplies three of the nine products of a layer a second time. Here they are on the list.
"""

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.checkpoint import create_selective_checkpoint_contexts
from torchtitan.config.override import derive
from torchtitan.distributed.activation_checkpoint import FullAC, SelectiveAC

from ezpz_moe.compute import backend_names, get_backend
from ezpz_moe.errors import EzpzError
from ezpz_moe.hosts.titan.products_fit import saved_or_not

_CHOICES = [torch.ops.aten.topk.default]

_FORWARD = ("mm", "ffn", "ffn_output", "routed", "routed_output")
"""What follows a backend's name in those of its operators (:class:`.autograd.Operators`)."""


class FullACKeepingChoices(FullAC):
    """``FullAC`` that recomputes everything except the router's choices."""

    @dataclass(kw_only=True, slots=True)
    class Config(FullAC.Config):
        pass

    def _wrap_block(
        self, module: torch.nn.Module, *, base_fqn: str | None = None
    ) -> torch.nn.Module:
        # The host's own call plus context_fn: the host has no hook that would add only that.
        return checkpoint_wrapper(
            module,
            context_fn=functools.partial(create_selective_checkpoint_contexts, _CHOICES),
            preserve_rng_state=self.config.preserve_rng_state,
            determinism_check=self.config.determinism_check,
            # The host's own value, which its config has no field for.
            early_stop=False,
            debug=self.config.debug,
        )


class SelectiveACKeepingProducts(SelectiveAC):
    """``SelectiveAC`` that keeps what the experts' products returned, too."""

    @dataclass(kw_only=True, slots=True)
    class Config(SelectiveAC.Config):
        experts: Literal["save", "recompute"] | None = None
        """Whether to keep them, or to compute them again in backward as the host does.

        None, if nobody has said: they are kept, unless a run has found that they do not fit.
        """

    def get_save_ops(self) -> set[Any]:
        """Return the operators whose results are kept: the host's list, and the products."""
        ops = super().get_save_ops()
        return ops if self.config.experts == "recompute" else ops | expert_products()


def expert_products() -> set[Any]:
    """Return the operators that compute routed experts forward, of every installed backend."""
    # The backend `grouped_mm` is the host's own path, and its product torch's.
    found = {torch.ops.aten._grouped_mm.default}
    for backend in backend_names():
        # Loading registers its operators; one that does not load computes nothing either.
        with contextlib.suppress(EzpzError):
            get_backend(backend)
        names = (f"{backend}_{kernel}" for kernel in _FORWARD)
        found |= {getattr(torch.ops.ezpz_moe, name).default for name in names if _exists(name)}
    return found


def _exists(operator: str) -> bool:
    return hasattr(torch.ops.ezpz_moe, operator)


def keeping_choices(policy: Any) -> Any:
    """Return the policy with the choices kept, if the host's own would make them again."""
    # Not isinstance: a subclass wraps blocks in its own way, which we must not drop.
    if type(policy) is FullAC.Config:
        return derive(policy, FullACKeepingChoices.Config)
    return policy


def keeping_products(policy: Any) -> Any:
    """Return the policy with the products kept, if it is the host's own selective one."""
    # Not isinstance: a subclass has a list of its own, or is ours and has been told.
    if type(policy) is SelectiveAC.Config:
        return derive(policy, SelectiveACKeepingProducts.Config)
    return policy


def products_kept(parallelize_fn: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``parallelize_fn``, with the experts' products kept by selective checkpointing.

    If nobody has said whether to keep them, they are if they fit (:mod:`.products_fit`).
    """

    @functools.wraps(parallelize_fn)
    def parallelize(model: torch.nn.Module, *, ac_config: Any, **others: Any) -> Any:
        # Here, because the flags of the command line may still change the policy until now.
        policy = keeping_products(ac_config)
        if isinstance(policy, SelectiveACKeepingProducts.Config) and policy.experts is None:
            found = saved_or_not(model, others.get("training"), others.get("parallelism"))
            policy = derive(policy, type(policy), experts=found)
        return parallelize_fn(model, ac_config=policy, **others)

    return parallelize
