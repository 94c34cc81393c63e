"""Keep the frozen rows of stacked parameters while an optimizer moves the others.

Of a frozen row the gradient is zero, before the trainer clips; its moments are zeroed when they are
loaded; and it does not decay: the optimizer's decay is applied to the other rows beforehand. Rows
are found by their place in the whole parameter, however it is sharded.

Legend of the suffixes: E = experts of a parameter's shard, X = whatever follows.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from ezpz_moe.errors import EzpzError
from ezpz_moe.hosts.local import local

_LEARNS = "_ezpz_moe_learns_EX"
"""Attribute of a parameter with frozen rows: which rows of this rank's shard learn."""


def zero_gradients(parameter: nn.Parameter, trained_E: Tensor) -> None:
    """Let only some rows of a parameter have a gradient, from the next backward on.

    Args:
        parameter: a stack with a row for each expert, or a shard of one.
        trained_E: bool, of all experts.
    """
    learns_EX = _rows_of_shard(parameter, trained_E)
    setattr(parameter, _LEARNS, learns_EX)

    def zero(accumulated: Tensor) -> None:
        if accumulated.grad is not None:
            gradient_EX = local(accumulated.grad)
            # A fill, not a product: NaN * 0 is NaN.
            gradient_EX.masked_fill_(~learns_EX.to(gradient_EX.device), 0)

    parameter.register_post_accumulate_grad_hook(zero)


def keep_rows(optimizer: torch.optim.Optimizer) -> None:
    """Let an optimizer keep the rows that :func:`zero_gradients` froze, from its next step on.

    Raises:
        EzpzError: it moves what has no gradient.
    """
    parameters = (each for group in optimizer.param_groups for each in group["params"])
    if any(hasattr(each, _LEARNS) for each in parameters):
        _refuse_if_restless(optimizer)
        _Keeper(optimizer)


def _rows_of_shard(parameter: Tensor, trained_E: Tensor) -> Tensor:
    """Return learns_E1..., bool: which rows of this rank's shard learn."""
    first, rows = 0, parameter.shape[0]
    if isinstance(parameter, DTensor):
        sizes, offsets = compute_local_shape_and_global_offset(
            parameter.shape, parameter.device_mesh, parameter.placements
        )
        # The offset of an empty shard lies beyond the end.
        first, rows = min(offsets[0], len(trained_E)), sizes[0]
    elif rows != len(trained_E):
        raise EzpzError(
            f"[train_only]: a parameter of {len(trained_E)} experts has {rows} rows on this rank, "
            "and nothing says which. Train with one rank."
        )
    return trained_E[first : first + rows].view(-1, *(1,) * (parameter.dim() - 1))


# --- the optimizer --------------------------------------------------------------------------------


def _refuse_if_restless(optimizer: torch.optim.Optimizer) -> None:
    """Refuse an optimizer that moves weights whose gradient is and was zero.

    Raises:
        EzpzError: it does, or it cannot be tried.
    """
    name = type(optimizer).__name__
    known = inspect.signature(type(optimizer)).parameters
    settings = {key: value for key, value in optimizer.defaults.items() if key in known}
    tried = nn.Parameter(torch.linspace(-1, 1, 8))
    before = tried.detach().clone()
    try:
        twin = type(optimizer)([tried], **settings | {"lr": 0.1, "weight_decay": 0.0})
        for _ in range(2):
            tried.grad = torch.zeros_like(tried)
            twin.step()
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        raise EzpzError(
            f"[train_only]: whether {name} leaves weights without gradient alone cannot be tried "
            f"({error}). Use AdamW."
        ) from error
    if not torch.equal(tried.detach(), before):
        raise EzpzError(
            f"[train_only]: {name} moves weights that have no gradient, so frozen experts would "
            "change. Use AdamW."
        )


def _set_apart(optimizer: torch.optim.Optimizer) -> None:
    """Give parameters with frozen rows a group of their own, with the same settings, in place."""
    groups = []
    for group in optimizer.param_groups:
        names = group.get("param_names", [None] * len(group["params"]))
        pairs = list(zip(group["params"], names, strict=True))
        for has_frozen in (False, True):
            part = [pair for pair in pairs if hasattr(pair[0], _LEARNS) == has_frozen]
            if part:
                parameters, part_names = map(list, zip(*part, strict=True))
                named = {"param_names": part_names} if "param_names" in group else {}
                groups.append({**group, "params": parameters, **named})
    optimizer.param_groups[:] = groups


class _Keeper:
    """Hooks of one optimizer, around its steps and after loading."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        _set_apart(optimizer)
        self.decays: list[float] = []
        optimizer.register_step_pre_hook(self._decay)
        optimizer.register_step_post_hook(self._give_back)
        optimizer.register_load_state_dict_post_hook(_forget_moments)

    @torch.no_grad()
    def _decay(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Decay the rows that learn as the optimizer would, and let it decay none."""
        self.decays = []
        for group in _apart(optimizer):
            self.decays.append(group["weight_decay"])
            for parameter in group["params"] if group["weight_decay"] else ():
                if parameter.grad is not None:
                    _decay_rows(parameter, group)
            group["weight_decay"] = 0.0

    def _give_back(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for group, decay in zip(_apart(optimizer), self.decays, strict=True):
            group["weight_decay"] = decay


def _decay_rows(parameter: nn.Parameter, group: dict[str, Any]) -> None:
    weights_EX, decay = local(parameter), group["weight_decay"]
    learns_EX = getattr(parameter, _LEARNS).to(weights_EX.device)
    if group.get("decoupled_weight_decay", False):
        # A product with 1 has the bits that were there.
        weights_EX.mul_(torch.where(learns_EX, 1 - group["lr"] * decay, 1.0))
    else:
        local(parameter.grad).add_(torch.where(learns_EX, decay * weights_EX, 0.0))


def _forget_moments(optimizer: torch.optim.Optimizer) -> None:
    """Zero what an optimizer remembers of frozen rows: a run in which they learned left it."""
    for group in _apart(optimizer):
        for parameter in group["params"]:
            for remembered in optimizer.state[parameter].values():
                if isinstance(remembered, Tensor) and remembered.shape == parameter.shape:
                    rows_EX = local(remembered)
                    learns_EX = getattr(parameter, _LEARNS).to(rows_EX.device)
                    rows_EX.masked_fill_(~learns_EX, 0)


def _apart(optimizer: torch.optim.Optimizer) -> Iterator[dict[str, Any]]:
    """Yield the groups of parameters with frozen rows."""
    return (group for group in optimizer.param_groups if hasattr(group["params"][0], _LEARNS))
