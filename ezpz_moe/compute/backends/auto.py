"""``auto``: the fastest of the other backends, measured on the run's own rows.

The first call of a layer times every usable backend, forward and backward, on the rows that it
gets. The winner then computes all layers of that size, on all ranks.
:mod:`~ezpz_moe.compute.choosing` has the rules, :mod:`~ezpz_moe.compute.tuning` says where the
choice is remembered, and :mod:`~ezpz_moe.compute.agreement` how ranks agree. The question is asked
again only when a rank's load changes its class of skew. All backends save the same for backward,
which is why the choice may change between forward and backward.

A routed layer is a question of its own.

If torch's deterministic algorithms are on, nothing is measured and nothing remembered counts: the
first of ``among`` that is usable computes, or without ``among`` the first by name. Two runs then
have the same bits.

Backends that drop tokens are never chosen unless ``among`` names them. With such a backend, the
first choice stays: backward has to drop what forward dropped.

Legend of the suffixes: :mod:`ezpz_moe.compute.contract`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ezpz_moe.compute.autograd import KernelBackend, Kernels, Operators
from ezpz_moe.compute.choosing import (
    AUTO,
    Choice,
    Layer,
    candidates,
    drop_tokens,
    kernel_backend,
    look,
    none_runs,
    take_the_first,
)
from ezpz_moe.compute.contract import Backend, counts_of_offsets, counts_on_host
from ezpz_moe.compute.registry import get_backend
from ezpz_moe.errors import EzpzError

# Calls between two looks at the load: each look waits for the device. It is a prime, or every look
# would hit the same layer of a model that has 32 or 64 of one size.
_EVERY = 67

# Global, because the kernels are functions without an object that could hold state, and layers of
# the same size share a choice.
_CHOICES: dict[Layer, Choice] = {}


def forget() -> None:
    """Start as in a new process: the next call of each layer looks at its load, and asks."""
    _CHOICES.clear()


def _chosen(layer: Layer) -> KernelBackend:
    """Return the backend that computes now; any backend while there were no rows to choose by."""
    choice = _CHOICES.get(layer)
    return kernel_backend(choice.winner if choice and choice.winner else layer.candidates[0])


def _forward(
    layer: Layer,
    counts_of: Callable[[Tensor, int], list[int]],
    counts_E: Tensor,
    rows: int,
    inputs: tuple[Any, ...],
    kept: tuple[Tensor | None, ...],
    last: tuple[torch.dtype | str, ...] = (),
) -> Any:
    """Run forward by the fastest backend. Timing takes the output itself for a gradient.

    Args:
        counts_of: reads the counts, or offsets, in ``counts_E``.
        rows: R, tail rows included.
        inputs: what the kernel takes.
        kept: what its backward takes of them.
        last: what backward takes after all else.
    """

    def one_pass(backend: KernelBackend) -> None:
        # compute() runs the plain kernels: no autograd graph is built, and nothing is kept between
        # turns.
        outputs = backend.compute(layer.product, *inputs)
        out, *saved = (outputs,) if isinstance(outputs, Tensor) else outputs
        if saved and layer.recompute:
            # Time what backward will really do, which is to compute gate and up again.
            saved = [None, None, *saved[2:]]
        backend.compute(f"{layer.product}_backward", out, *kept, *saved, *last)

    choice = _CHOICES.setdefault(layer, Choice())
    # A choice that may drop tokens is made once: backward must drop what forward dropped.
    look_again = choice.calls % _EVERY == 0 and not drop_tokens(layer.candidates)
    if torch.are_deterministic_algorithms_enabled():
        take_the_first(layer, choice)
    elif look_again or not choice.winner:
        counts = counts_of(counts_E, rows)
        if any(counts):  # without rows there is nothing to time
            look(layer, choice, counts, rows, one_pass)
    choice.calls += 1
    return _chosen(layer).compute(layer.product, *inputs)


def _mm(A_RK: Tensor, B_EKN: Tensor, offs_E: Tensor, among: str, recompute: bool) -> Tensor:
    layer = Layer.of("mm", among, recompute, B_EKN, A_RK.dtype)
    inputs = (A_RK, B_EKN, offs_E)
    return _forward(layer, counts_of_offsets, offs_E, A_RK.shape[0], inputs, inputs)


def _mm_backward(
    grad_C_RN: Tensor, A_RK: Tensor, B_EKN: Tensor, offs_E: Tensor, among: str, recompute: bool
) -> tuple[Tensor, Tensor]:
    backend = _chosen(Layer.of("mm", among, recompute, B_EKN, A_RK.dtype))
    return backend.compute("mm_backward", grad_C_RN, A_RK, B_EKN, offs_E)


def _ffn_in_words(activation: str, b1_EF: Tensor | None) -> str:
    return activation if b1_EF is None else f"{activation} with biases"


def _ffn(
    w1_EFD: Tensor,
    w2_EDF: Tensor,
    w3_EFD: Tensor | None,
    b1_EF: Tensor | None,
    b2_ED: Tensor | None,
    b3_EF: Tensor | None,
    x_RD: Tensor,
    counts_E: Tensor,
    trained_E: Tensor | None,
    activation: str,
    among: str,
    recompute: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    parameters = (w1_EFD, w2_EDF, w3_EFD, b1_EF, b2_ED, b3_EF)
    ffn = _ffn_in_words(activation, b1_EF)
    layer = Layer.of("ffn", among, recompute, w1_EFD, x_RD.dtype, ffn)
    kept, last = (*parameters, x_RD, counts_E, trained_E), (activation,)
    return _forward(layer, counts_on_host, counts_E, len(x_RD), (*kept, *last), kept, last)


def _ffn_backward(
    grad_y_RD: Tensor,
    w1_EFD: Tensor,
    w2_EDF: Tensor,
    w3_EFD: Tensor | None,
    b1_EF: Tensor | None,
    b2_ED: Tensor | None,
    b3_EF: Tensor | None,
    x_RD: Tensor,
    counts_E: Tensor,
    trained_E: Tensor | None,
    gate_RF: Tensor | None,
    up_RF: Tensor | None,
    activation: str,
    among: str,
    recompute: bool,
) -> list[Tensor]:
    parameters = (w1_EFD, w2_EDF, w3_EFD, b1_EF, b2_ED, b3_EF)
    ffn = _ffn_in_words(activation, b1_EF)
    layer = Layer.of("ffn", among, recompute, w1_EFD, x_RD.dtype, ffn)
    inputs = (*parameters, x_RD, counts_E, trained_E, gate_RF, up_RF, activation)
    return _chosen(layer).compute("ffn_backward", grad_y_RD, *inputs)


def _routed(
    w1_EFD: Tensor,
    w2_EDF: Tensor,
    w3_EFD: Tensor | None,
    b1_EF: Tensor | None,
    b2_ED: Tensor | None,
    b3_EF: Tensor | None,
    x_TD: Tensor,
    scores_TK: Tensor,
    ids_TK: Tensor,
    counts_E: Tensor,
    trained_E: Tensor | None,
    num_rows: int,
    dtype: torch.dtype,
    activation: str,
    among: str,
    recompute: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    parameters = (w1_EFD, w2_EDF, w3_EFD, b1_EF, b2_ED, b3_EF)
    ffn = _ffn_in_words(activation, b1_EF)
    layer = Layer.of("routed", among, recompute, w1_EFD, dtype, ffn)
    tokens, last = (*parameters, x_TD, scores_TK), (dtype, activation)
    kept = (*tokens, counts_E, trained_E)
    inputs = (*tokens, ids_TK, counts_E, trained_E, num_rows, *last)
    return _forward(layer, counts_on_host, counts_E, num_rows, inputs, kept, last)


def _routed_backward(
    grad_out_TD: Tensor,
    w1_EFD: Tensor,
    w2_EDF: Tensor,
    w3_EFD: Tensor | None,
    b1_EF: Tensor | None,
    b2_ED: Tensor | None,
    b3_EF: Tensor | None,
    x_TD: Tensor,
    scores_TK: Tensor,
    counts_E: Tensor,
    trained_E: Tensor | None,
    gate_RF: Tensor | None,
    up_RF: Tensor | None,
    order_R: Tensor,
    dtype: torch.dtype,
    activation: str,
    among: str,
    recompute: bool,
) -> list[Tensor]:
    parameters = (w1_EFD, w2_EDF, w3_EFD, b1_EF, b2_ED, b3_EF)
    ffn = _ffn_in_words(activation, b1_EF)
    layer = Layer.of("routed", among, recompute, w1_EFD, dtype, ffn)
    kept = (*parameters, x_TD, scores_TK, counts_E, trained_E, gate_RF, up_RF, order_R)
    return _chosen(layer).compute("routed_backward", grad_out_TD, *kept, dtype, activation)


@dataclass(frozen=True)
class Auto(KernelBackend):
    """The fastest of the other backends. See the module's text.

    Attributes:
        among: the backends to choose from, separated by spaces; if empty, all that drop no tokens.
    """

    name = AUTO
    summary = "the fastest of the others, measured on the run's own rows"
    host_syncs = True
    static_shapes = False
    operators = Operators(
        AUTO, Kernels(_mm, _mm_backward, _ffn, _ffn_backward, _routed, _routed_backward)
    )

    among: str = ""

    def __post_init__(self) -> None:
        asked = f"compute_backend 'auto(among={self.among!r})'"
        for name in self.among.split():
            try:
                backend = None if name == self.name else get_backend(name)
            except EzpzError as error:
                raise EzpzError(f"{asked}: {error}") from error
            if not isinstance(backend, KernelBackend):
                raise EzpzError(
                    f"{asked}: {name} cannot be chosen, because it has no kernels of its own. "
                    f"Name others, or leave among out."
                )
            if backend.recompute:
                raise EzpzError(
                    f"{asked}: every choice saves the same for backward, so the option belongs to "
                    "auto. Write auto(recompute=true, among=...)."
                )

    @property
    def drops_tokens(self) -> bool:  # type: ignore[override]
        """Whether ``among`` names a backend that drops tokens, which then may be chosen."""
        return drop_tokens(self.among.split())

    @property
    def lossless(self) -> Backend:
        """Auto over those that drop nothing; if all drop, the first one's lossless form."""
        names = self.among.split()
        kept = [name for name in names if not get_backend(name).drops_tokens]
        if names and not kept:
            return get_backend(names[0]).lossless
        return replace(self, among=" ".join(kept))

    def rows_used(self, num_tokens_per_expert_E: Tensor, num_rows: int) -> Tensor | None:
        """Return what the chosen backend makes of these counts; None before the first choice."""
        asked = (self.among, self.recompute, num_tokens_per_expert_E.shape[0])
        # Telemetry does not know the layer's sizes, so any layer with these options answers for
        # all.
        for layer, choice in _CHOICES.items():
            if choice.winner and (layer.among, layer.recompute, layer.sizes[0]) == asked:
                used_2 = kernel_backend(choice.winner).rows_used(num_tokens_per_expert_E, num_rows)
                given = num_tokens_per_expert_E.sum(dtype=torch.int64)
                return torch.stack([given, torch.zeros_like(given)]) if used_2 is None else used_2
        return None

    @property
    def chosen(self) -> tuple[str, ...]:
        """The winners of the layers with these options; none before the first choice."""
        winners = {
            choice.winner: None
            for layer, choice in _CHOICES.items()
            if choice.winner and (layer.among, layer.recompute) == (self.among, self.recompute)
        }
        return tuple(winners)

    @property
    def kernel_options(self) -> tuple[str, bool]:
        return (self.among, self.recompute)

    def _why_not(self, device: torch.device, dtype: torch.dtype, dims: Sequence[int]) -> list[str]:
        if candidates(self.among, device, dtype, tuple(dims)):
            return []
        return [none_runs(device, dtype)]


BACKEND = Auto()
