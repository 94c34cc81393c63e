"""Routed experts of torchtitan 0.2 with a selectable backend.

The host names ``GroupedExperts`` inside its ``MoE`` and offers no door there. The experts of the
finished model are therefore replaced on the meta device, by a subclass with the same parameters
under the same names: a checkpoint fits every backend.

Backends compute in bfloat16, like the host's grouped path and like the binding to 0.3. One flavor
then trains with the same precision on every device and host, unless the flavor or the CPU wants
float32 (:mod:`ezpz_moe.hosts.precision`). With the host's default mixed precision, its own for-loop
computes in bfloat16 too. Only with ``mixed_precision_param = "float32"`` does it not.
Legend of the suffixes: :mod:`ezpz_moe.compute.contract`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn
from torchtitan.models.moe import MoE
from torchtitan.models.moe.moe import GroupedExperts
from torchtitan.tools import utils
from torchtitan.tools.logging import logger

from ezpz_moe.compute import get_backend
from ezpz_moe.config.flavor_schema import Routed
from ezpz_moe.errors import EzpzError
from ezpz_moe.hosts.backends import (
    HOST_PATH,
    ExpertComputeBackend,
    drops_warning,
    layer_in_words,
)
from ezpz_moe.hosts.local import local
from ezpz_moe.hosts.plain import wrapper_in
from ezpz_moe.hosts.precision import HOSTS_CAST, in_words
from ezpz_moe.routing.counters import ROWS, count_rows

REPORTED = "is logged with the loss, and is moe/drop_rate among the metrics"
"""Where the run reports the share of dropped tokens."""


class EzpzGroupedExperts(GroupedExperts):
    """``GroupedExperts`` with its FFN computed by ``compute_backend``.

    Raises:
        EzpzError: unknown backend.
    """

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        num_experts: int,
        use_grouped_mm: bool,
        compute_backend: ExpertComputeBackend = HOST_PATH,
        computed_in: str = HOSTS_CAST,
    ):
        super().__init__(dim, hidden_dim, num_experts, use_grouped_mm)
        self.compute_backend = compute_backend
        self._dtype = getattr(torch, computed_in)
        backend = get_backend(compute_backend)
        self._backend = None if compute_backend == HOST_PATH else backend
        self._drops = backend.drops_tokens
        # Not a buffer: expert parallelism turns buffers into DTensors.
        self.rows_3: torch.Tensor | None = None
        """Adds up ``routing.counters.ROWS`` in training, for a backend that drops tokens."""

    def forward(self, x: torch.Tensor, num_tokens_per_expert: torch.Tensor) -> torch.Tensor:
        """Compute the expert FFN of the rows routed to the local experts.

        Args:
            x: [R, D], rows sorted by expert, possibly with tail rows.
            num_tokens_per_expert: [E], counts of the local experts in any integer dtype.

        Returns:
            [R, D] in x's dtype. Device syncs: those of the backend.
        """
        if self._backend is None:
            return super().forward(x, num_tokens_per_expert)
        if self._drops and self.training:
            self._count(x, num_tokens_per_expert)
        weights = (self.w1, self.w2, self.w3)
        # As the host does: DTensors cannot express the dynamic shapes of expert parallelism.
        w1_EFD, w2_EDF, w3_EFD = (local(weight).to(self._dtype) for weight in weights)
        x_RD = x.to(self._dtype)
        y_RD = self._backend.ffn(w1_EFD, w2_EDF, w3_EFD, x_RD, num_tokens_per_expert)
        return y_RD.type_as(x)

    def _count(self, x: torch.Tensor, num_tokens_per_expert: torch.Tensor) -> None:
        # Made on first use: the module is built on the meta device, and to_empty would not know it.
        if self.rows_3 is None:
            self.rows_3 = torch.zeros(len(ROWS), dtype=torch.int64, device=x.device)
        count_rows(self.rows_3, num_tokens_per_expert, x.shape[0], self.compute_backend)


def select_backend(
    model: nn.Module,
    backend: ExpertComputeBackend,
    chosen_by: str,
    computed_in: str = HOSTS_CAST,
    routed: Routed = "one_node",
) -> int:
    """Replace the experts of every MoE layer of ``model``, in place, and log it.

    With the host's own path, experts other than SwiGLU (gpt_oss) stay as they are. ``routed`` is
    the flavor's; whatever it is, the host dispatches and combines.

    Returns:
        The number of experts modules in the model: one per MoE layer.

    Raises:
        EzpzError: unknown backend, the model has no routed experts, or has some that another
            backend cannot compute.
    """
    path = get_backend(backend).summary
    layers = list(_moe_layers(model))
    if not layers:
        raise EzpzError(
            f"compute_backend {backend!r} ({chosen_by}): the model has no routed experts, so "
            f"there is nothing to compute. Choose a Mixture-of-Experts model."
        )
    for moe in layers:
        # Not isinstance: a subclass has a forward of its own, which ours would replace.
        if type(moe.experts) is GroupedExperts:
            moe.experts = _with_backend(moe.experts, backend, computed_in)
        elif backend != HOST_PATH:
            raise EzpzError(
                f"compute_backend {backend!r} ({chosen_by}): torchtitan 0.2's "
                f"{type(moe.experts).__name__} is not a SwiGLU and calls torch._grouped_mm inside "
                "a function, where no other backend can replace it. Use "
                f"compute_backend = {HOST_PATH!r}, or torchtitan 0.3."
            )
    if backend == HOST_PATH:
        # One layer tells: the host sets it from the model's arguments, for all of them.
        grouped = layers[0].experts.use_grouped_mm
        path = "the host's own path: " + ("torch._grouped_mm" if grouped else "its for-loop")
    dtype = in_words(computed_in, backend, utils.device_type, is_forward_ours=True)
    # The for-loop casts nothing, so no single dtype describes it.
    dtype = "" if path.endswith("its for-loop") else f" in {dtype}"
    why = (
        "asked for"
        if routed == "composed"
        else "torchtitan 0.2 dispatches in its MoE, before the experts"
    )
    logger.info(
        f"ezpz_moe: compute_backend {backend} ({path}) on {utils.device_type}{dtype} "
        f"for {len(layers)} MoE layers; {chosen_by}{layer_in_words(backend, why)}"
    )
    if get_backend(backend).drops_tokens:
        logger.warning(f"ezpz_moe: {drops_warning(backend, REPORTED)}")
    return len(layers)


def refuse_what_came_later(model: nn.Module, backend: ExpertComputeBackend, chosen_by: str) -> None:
    """Refuse a model whose experts were taken over after ``backend`` was selected.

    Called when its weights are made: by then the host's converters have had the model.

    Raises:
        EzpzError: the weights are wrapped (quantization), or other experts are in their place.
    """
    if backend == HOST_PATH:
        return  # quantization then works as the host made it
    ours = [each for each in model.modules() if isinstance(each, EzpzGroupedExperts)]
    wrapper = next(filter(None, map(wrapper_in, ours)), None)
    if wrapper or len(ours) < len(list(_moe_layers(model))):
        why = f"their weights are {wrapper}" if wrapper else "other experts are in their place"
        raise EzpzError(
            f"compute_backend {backend!r} ({chosen_by}): a converter computes the experts' "
            f"products itself ({why}). Remove it from model.converters, or use compute_backend = "
            f"{HOST_PATH!r}."
        )


def _moe_layers(model: nn.Module) -> Iterator[MoE]:
    return (module for module in model.modules() if isinstance(module, MoE))


def _with_backend(
    experts: GroupedExperts, backend: ExpertComputeBackend, computed_in: str
) -> EzpzGroupedExperts:
    E, F, D = experts.w1.shape
    # The replaced weights are on the meta device and have no values: the host initialises these.
    with experts.w1.device:
        selected = EzpzGroupedExperts(D, F, E, experts.use_grouped_mm, backend, computed_in)
    return selected.to(experts.w1.dtype)
