"""Select a backend for the experts: the part that all hosts since torchtitan 0.3 share.

``experts.py`` of each generation says which class of the host gets the selector, and how a backend
replaces its products.
"""

from collections import Counter
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torchtitan.protocols.module import Module
from torchtitan.tools.logging import logger

from ezpz_moe.compute import get_backend
from ezpz_moe.config.flavor_schema import Activation, ExpertPrecision, Routed
from ezpz_moe.errors import EzpzError, exit_on_user_error
from ezpz_moe.hosts.backends import (
    HOST_PATH,
    ExpertComputeBackend,
    drops_warning,
    layer_in_words,
)
from ezpz_moe.hosts.precision import HOSTS_CAST, in_words
from ezpz_moe.hosts.titan.base import titan
from ezpz_moe.hosts.titan.seam import refuse_what_came_later
from ezpz_moe.routing.counters import count_rows

REPORTED = "is drop_rate in telemetry.jsonl and moe/drop_rate among the metrics"
"""Where the run reports the share of dropped tokens."""


class RowCounts(Module):
    """Counts the rows that a layer's experts were given, and what their backend did with them.

    It is a module of its own, because the host asks how each buffer beside the experts' weights is
    sharded. ``rows_3`` adds up ``routing.counters.ROWS`` while ``on`` is true: in a run with
    telemetry.
    """

    rows_3: torch.Tensor

    def __init__(self, compute_backend: ExpertComputeBackend):
        super().__init__()
        self.compute_backend = compute_backend
        self.on = False
        # Not persistent: a checkpoint must have the same keys as the host's own model.
        self.register_buffer("rows_3", torch.zeros(3, dtype=torch.int64), persistent=False)

    def _init_self_buffers(self, *, buffer_device: torch.device | None = None) -> None:
        self.rows_3 = torch.zeros_like(self.rows_3, device=buffer_device or self.rows_3.device)

    def forward(self, num_rows: int, num_tokens_per_expert_E: torch.Tensor) -> None:
        # Validation is not one of the steps that telemetry reports.
        if self.on and self.training:
            count_rows(self.rows_3, num_tokens_per_expert_E, num_rows, self.compute_backend)


class Selector(Module):
    """Mixin before a class of the host: holds the chosen backend, or None for the host's own path.

    ``row_counts`` exists only for a backend that pads or drops. ``computed_in`` is the products'
    dtype. ``is_one_node`` tells whether the backend dispatches and combines too. ``trained_E`` says
    which of the rank's experts learn, if not all do.
    """

    trained_E: torch.Tensor | None = None
    activation: Activation = "swiglu"  # of experts with another one it is set beside the choice

    def _choose(self, config) -> None:
        self.compute_backend, self._chosen_by = config.compute_backend, config.chosen_by
        backend = get_backend(self.compute_backend)  # an unknown name is an error right here
        self._backend = None if self.compute_backend == HOST_PATH else backend
        self.is_one_node = self._backend is not None and config.why_composed is None
        self.computed_in = getattr(torch, getattr(config, "computed_in", HOSTS_CAST))
        counted = backend.pads or backend.drops_tokens
        self.row_counts = RowCounts(self.compute_backend) if counted else None
        _choices_not_logged[self._choice(config)] += 1

    def _choice(self, config) -> "_Choice":
        """Return what the log says. Without ``computed_in``, the forward is the host's."""
        dtype = getattr(config, "computed_in", None)
        return _Choice(
            self.compute_backend,
            config.chosen_by,
            dtype or HOSTS_CAST,
            dtype is None,
            config.why_composed,
            self._formula(config),
        )

    def _formula(self, config) -> str:
        """Return what these experts compute, in words; empty if it is what the host's compute."""
        return ""

    def _count(self, num_rows: int, num_tokens_per_expert_E: torch.Tensor) -> None:
        if self.row_counts is not None:
            self.row_counts(num_rows, num_tokens_per_expert_E)

    def _init_self_parameters(self) -> None:
        super()._init_self_parameters()
        if self._backend is not None:
            with exit_on_user_error():
                refuse_what_came_later(self, self.compute_backend, self._chosen_by)
        # Here and not in __init__: there the weights are on the meta device, and layers are missing
        # from the count.
        _log_choices(next(self.parameters()).device)


@cache
def with_selector(host_class: type[Module], selector: type[Selector]) -> type[Module]:
    """Return ``host_class`` with ``selector`` before it, and ``compute_backend`` in its config."""

    # Cached above: layers of one class would otherwise get a new class each.
    class Selected(selector, host_class):  # type: ignore[misc, valid-type]
        @dataclass(kw_only=True, slots=True)
        class Config(host_class.Config):  # type: ignore[name-defined]
            compute_backend: ExpertComputeBackend = HOST_PATH
            chosen_by: str = "default"
            why_composed: str | None = None

        def __init__(self, config: Config):
            super().__init__(config)
            self._choose(config)

    Selected.__name__ = Selected.__qualname__ = f"Ezpz{host_class.__name__}"
    return Selected


def select_backend(
    model_config,
    backend: ExpertComputeBackend,
    chosen_by: str,
    expert_precision: ExpertPrecision | None = None,
    routed: Routed = "one_node",
) -> int:
    """Replace every routed-experts node below ``model_config``, in place.

    Returns:
        The number of nodes that were replaced: one per MoE layer.

    Raises:
        EzpzError: as the ``selected_layer`` of the host's binding, or the model has no routed
            experts.
    """
    experts = titan().experts()
    nodes = list(model_config.traverse(experts.HostLayer.Config))
    if not nodes:
        raise EzpzError(
            f"compute_backend {backend!r} ({chosen_by}): the model has no routed experts, so "
            f"there is nothing to compute. Choose a Mixture-of-Experts model."
        )
    for _, config, parent, attribute in nodes:
        layer = experts.selected_layer(config, backend, chosen_by, expert_precision, routed)
        setattr(parent, attribute, layer)
    return len(nodes)


def selectable(config: Any, backend: ExpertComputeBackend, chosen_by: str) -> Any:
    """Return the class of the host that ``config`` builds.

    Raises:
        EzpzError: unknown backend; the experts have a selector already.
    """
    get_backend(backend)
    host_class = type(config)._owner
    if issubclass(host_class, Selector):
        raise EzpzError(
            f"compute_backend is selected twice: {config.chosen_by} asks for "
            f"{config.compute_backend!r}, and {chosen_by} for {backend!r}. Remove one of them."
        )
    return host_class


class _Choice(NamedTuple):
    backend: ExpertComputeBackend
    chosen_by: str
    dtype: str
    is_hosts_forward: bool
    why_composed: str | None
    formula: str


_choices_not_logged: Counter[_Choice] = Counter()


def _path(backend: ExpertComputeBackend, formula: str) -> str:
    if backend != HOST_PATH:
        return get_backend(backend).summary
    if formula:
        return "composed of the host's products, as its experts have no such FFN"
    return "the host's own path"


def _log_choices(device: torch.device) -> None:
    """Log one line per choice and run, when the first experts get their weights.

    All layers are built before any is initialized: by then the count is complete, and the device is
    the one that trains. Nothing is logged in forward, which the host compiles with fullgraph=True.
    """
    for choice, layers in _choices_not_logged.items():
        backend, chosen_by, dtype, is_hosts, why_composed, formula = choice
        chosen = get_backend(backend)
        path = _path(backend, formula)
        precision = in_words(dtype, backend, device.type, is_forward_ours=not is_hosts)
        logger.info(
            f"ezpz_moe: compute_backend {backend} ({path}) on {device.type} in {precision} "
            f"for {layers} MoE layers{f' of {formula}' if formula else ''}; {chosen_by}"
            f"{layer_in_words(backend, why_composed)}"
        )
        if chosen.drops_tokens:
            logger.warning(f"ezpz_moe: {drops_warning(backend, REPORTED)}")
    # The remaining layers of this model log nothing, and a second trainer starts its own count.
    _choices_not_logged.clear()
