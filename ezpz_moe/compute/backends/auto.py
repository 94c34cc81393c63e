"""``auto``: the fastest of the other backends, measured on the run's own rows.

The first call of a layer times every usable backend, forward and backward, on the rows that it
gets. The winner then computes all layers of that size, on all ranks.
:mod:`~ezpz_moe.compute.tuning` says where it is remembered, and :mod:`~ezpz_moe.compute.agreement`
how ranks agree. The question is asked again only when a rank's load changes its class of skew. All
backends save the same for backward, which is why the choice may change between forward and
backward.

If torch's deterministic algorithms are on, nothing is measured and nothing remembered counts: the
first of ``among`` that is usable computes, or without ``among`` the first by name. Two runs then
have the same bits.

Backends that drop tokens are never chosen unless ``among`` names them. With such a backend, the
first choice stays: backward has to drop what forward dropped.

Legend of the suffixes: :mod:`ezpz_moe.compute.contract`.
"""

import logging
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from ezpz_moe.compute import agreement, tuning
from ezpz_moe.compute.autograd import KernelBackend, Kernels, Operators
from ezpz_moe.compute.contract import Backend, counts_of_offsets, counts_on_host
from ezpz_moe.compute.registry import backend_names, get_backend
from ezpz_moe.errors import EzpzError

logger = logging.getLogger(__name__)

# Calls between two looks at the load: each look waits for the device. It is a prime, or every look
# would hit the same layer of a model that has 32 or 64 of one size.
_EVERY = 67
_LOOKS = 5  # the load is their median: one odd batch then changes nothing


@dataclass(frozen=True)
class _Layer:
    """What calls computed by the same backend have in common."""

    product: str
    among: str
    recompute: bool
    device: torch.device
    dtype: torch.dtype
    sizes: tuple[int, int, int]

    @classmethod
    def of(
        cls, product: str, among: str, recompute: bool, rows_RX: Tensor, weights: Tensor
    ) -> "_Layer":
        E, inner, outer = weights.shape
        return cls(product, among, recompute, rows_RX.device, rows_RX.dtype, (E, inner, outer))

    @property
    def candidates(self) -> list[str]:
        """The usable backends to choose from, at least one.

        Raises:
            RuntimeError: none runs here.
        """
        if names := candidates(self.among, self.device, self.dtype, self.sizes[1:]):
            return names
        raise RuntimeError(f"auto: {_none_runs(self.device, self.dtype)}")

    @property
    def question(self) -> tuning.Question:
        return tuning.Question(
            product=self.product,
            candidates=tuple(self.candidates),
            device=tuning.device_name(self.device),
            dtype=str(self.dtype).removeprefix("torch."),
            sizes=self.sizes,
            recompute=self.recompute,
        )


@dataclass
class _Choice:
    """The backend that computes a layer, and what this rank knows of its load.

    Attributes:
        calls: how often forward was called.
        loads: the busiest expert's load over the mean, at the last looks.
        skew: the load's class.
        fastest: by class of skew, as measured by this rank.
        winner: the backend that computes, on all ranks; empty before the first look.
        decisions: how many decisions of the ranks this one knows.
    """

    calls: int = 0
    loads: list[float] = field(default_factory=list)
    skew: int | None = None
    fastest: dict[int, str] = field(default_factory=dict)
    winner: str = ""
    decisions: int = 0

    def look_at(self, counts: list[int]) -> int:
        """Look at the load, and return its class of skew."""
        # Busiest over mean: it decides how much padding costs, and so which backend is fastest.
        now = max(counts) * len(counts) / sum(counts)
        self.loads = [*self.loads, now][-_LOOKS:]
        # median_low returns a load that was seen. The mean of two could be in a class that neither
        # is in.
        return tuning.skew_class(statistics.median_low(self.loads))

    def follow(self, winner: str) -> None:
        """Adopt a decision of the ranks."""
        self.winner = winner
        self.decisions += 1


# Global, because the kernels are functions without an object that could hold state, and layers of
# the same size share a choice.
_CHOICES: dict[_Layer, _Choice] = {}


def forget() -> None:
    """Start as in a new process: the next call of each layer looks at its load, and asks."""
    _CHOICES.clear()


# Asked at every call of every layer. The answer cannot change within a process.
@cache
def candidates(
    among: str, device: torch.device, dtype: torch.dtype, dims: tuple[int, ...] = ()
) -> list[str]:
    """Return the usable backends to choose from: those in ``among``, or all that drop no tokens."""
    named = among.split()
    found = []
    for name in named or backend_names():
        try:
            backend = None if name == Auto.name else get_backend(name)
        except EzpzError:  # a package that does not load affects only its own backend
            continue
        if not isinstance(backend, KernelBackend) or (backend.drops_tokens and not named):
            continue
        if not backend.why_not(device, dtype, dims=dims):
            found.append(name)
    return found


def _none_runs(device: torch.device, dtype: torch.dtype) -> str:
    return (
        f"none of the backends to choose from runs on {device.type} in {dtype}: add for_loop to "
        f"`among`, or leave it out"
    )


def _kernels(name: str) -> KernelBackend:
    backend = get_backend(name)
    assert isinstance(backend, KernelBackend)  # candidates() names no others
    return backend


def _drop_tokens(names: Sequence[str]) -> bool:
    return any(get_backend(name).drops_tokens for name in names)


def _chosen(layer: _Layer) -> KernelBackend:
    """Return the backend that computes now; any backend while there were no rows to choose by."""
    choice = _CHOICES.get(layer)
    return _kernels(choice.winner if choice and choice.winner else layer.candidates[0])


def _take_the_first(layer: _Layer, choice: _Choice) -> None:
    """Choose without a clock: the same on every rank, in every run."""
    first = layer.candidates[0]
    if choice.winner != first:
        choice.winner = first
        logger.info(
            f"ezpz_moe: auto: {first} for {layer.question} (the first of "
            f"{' '.join(layer.candidates)}: deterministic algorithms are on, so nothing is timed)"
        )


def _look(
    layer: _Layer,
    choice: _Choice,
    counts: list[int],
    rows: int,
    one_pass: Callable[[KernelBackend], object],
) -> None:
    """Look at the load of a layer, and switch its backend if another one suits the load better.

    Decisions of other ranks come first, because they bind this one. Nothing more happens if the
    load's class is the same as before, or if this is the first look and a winner is known already.
    Otherwise measure, once for each class, and propose the fastest to all ranks.
    """
    question = layer.question
    _follow_others(question, choice)
    skew_before, choice.skew = choice.skew, choice.look_at(counts)
    # Nothing to ask: the class is unchanged, or other ranks chose before this rank's first look.
    is_answered = skew_before is None and choice.winner
    if choice.skew == skew_before or is_answered:
        return
    # Measure each class once: a load that swings between two classes must not time them each time.
    if choice.skew not in choice.fastest:
        runs = {name: partial(one_pass, _kernels(name)) for name in question.candidates}
        # Powers of two: under expert parallelism R changes with every step, but which backend is
        # fastest hardly does.
        situation = tuning.Situation(question, _up_to(rows), choice.skew)
        choice.fastest[choice.skew] = tuning.fastest(situation, runs, layer.device)
    if choice.fastest[choice.skew] != choice.winner:
        _propose(question, choice, choice.fastest[choice.skew])


def _follow_others(question: tuning.Question, choice: _Choice) -> None:
    """Take over what other ranks have decided since the last look."""
    for winner in agreement.decisions(question, choice.decisions):
        choice.follow(winner)
        logger.info(f"ezpz_moe: auto: {winner} for {question} (measured by another rank)")


def _propose(question: tuning.Question, choice: _Choice, own: str) -> None:
    """Decide for ``own`` on all ranks, unless another rank has just decided otherwise."""
    choice.follow(agreement.decide(question, choice.decisions, own))
    if choice.winner != own:
        logger.info(f"ezpz_moe: auto: {choice.winner} instead (another rank was first)")


def _up_to(rows: int) -> int:
    """Round ``rows`` up to a power of two."""
    return 1 << (rows - 1).bit_length()


def _forward(
    layer: _Layer, rows: int, counts_of: Callable[[Tensor, int], list[int]], *inputs: Tensor
) -> Any:
    """Run forward by the fastest backend. Timing takes the output itself for a gradient."""

    def one_pass(backend: KernelBackend) -> None:
        # compute() runs the plain kernels: no autograd graph is built, and nothing is kept between
        # turns.
        outputs = backend.compute(layer.product, *inputs)
        if isinstance(outputs, Tensor):
            backend.compute(f"{layer.product}_backward", outputs, *inputs)
        else:
            y_RD, *saved = outputs
            if layer.recompute:
                # Time what backward will really do, which is to compute gate and up again.
                saved = [None for _ in saved]
            backend.compute(f"{layer.product}_backward", y_RD, *inputs, *saved)

    choice = _CHOICES.setdefault(layer, _Choice())
    # A choice that may drop tokens is made once: backward must drop what forward dropped.
    look_again = choice.calls % _EVERY == 0 and not _drop_tokens(layer.candidates)
    if torch.are_deterministic_algorithms_enabled():
        _take_the_first(layer, choice)
    elif look_again or not choice.winner:
        counts = counts_of(inputs[-1], rows)
        if any(counts):  # without rows there is nothing to time
            _look(layer, choice, counts, rows, one_pass)
    choice.calls += 1
    return _chosen(layer).compute(layer.product, *inputs)


def _mm(A_RK: Tensor, B_EKN: Tensor, offs_E: Tensor, among: str, recompute: bool) -> Tensor:
    layer = _Layer.of("mm", among, recompute, A_RK, B_EKN)
    return _forward(layer, A_RK.shape[0], counts_of_offsets, A_RK, B_EKN, offs_E)


def _mm_backward(
    grad_C_RN: Tensor, A_RK: Tensor, B_EKN: Tensor, offs_E: Tensor, among: str, recompute: bool
) -> tuple[Tensor, Tensor]:
    backend = _chosen(_Layer.of("mm", among, recompute, A_RK, B_EKN))
    return backend.compute("mm_backward", grad_C_RN, A_RK, B_EKN, offs_E)


def _swiglu(
    w1_EFD: Tensor,
    w2_EDF: Tensor,
    w3_EFD: Tensor,
    x_RD: Tensor,
    num_tokens_per_expert_E: Tensor,
    among: str,
    recompute: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    layer = _Layer.of("swiglu", among, recompute, x_RD, w1_EFD)
    inputs = (w1_EFD, w2_EDF, w3_EFD, x_RD, num_tokens_per_expert_E)
    return _forward(layer, x_RD.shape[0], counts_on_host, *inputs)


def _swiglu_backward(
    grad_y_RD: Tensor,
    w1_EFD: Tensor,
    w2_EDF: Tensor,
    w3_EFD: Tensor,
    x_RD: Tensor,
    num_tokens_per_expert_E: Tensor,
    gate_RF: Tensor | None,
    up_RF: Tensor | None,
    among: str,
    recompute: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    backend = _chosen(_Layer.of("swiglu", among, recompute, x_RD, w1_EFD))
    inputs = (w1_EFD, w2_EDF, w3_EFD, x_RD, num_tokens_per_expert_E)
    return backend.compute("swiglu_backward", grad_y_RD, *inputs, gate_RF, up_RF)


@dataclass(frozen=True)
class Auto(KernelBackend):
    """The fastest of the other backends. See the module's text.

    Attributes:
        among: the backends to choose from, separated by spaces; if empty, all that drop no tokens.
    """

    name = "auto"
    summary = "the fastest of the others, measured on the run's own rows"
    host_syncs = True
    static_shapes = False
    operators = Operators("auto", Kernels(_mm, _mm_backward, _swiglu, _swiglu_backward))

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
        return _drop_tokens(self.among.split())

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
                used_2 = _kernels(choice.winner).rows_used(num_tokens_per_expert_E, num_rows)
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
        return [_none_runs(device, dtype)]


BACKEND = Auto()
