"""How ``auto`` chooses: who may compute a layer, what each rank knows of its load, when it asks.

:mod:`.backends.auto` says what follows from it, :mod:`.tuning` measures, and :mod:`.agreement`
makes ranks agree.

Legend of the suffixes: :mod:`ezpz_moe.compute.contract`.
"""

import logging
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, partial

import torch
from torch import Tensor

from ezpz_moe.compute import agreement, tuning
from ezpz_moe.compute.autograd import KernelBackend
from ezpz_moe.compute.registry import backend_names, get_backend
from ezpz_moe.errors import EzpzError

logger = logging.getLogger(__name__)

AUTO = "auto"
"""The name of the backend that chooses."""

_LOOKS = 5  # the load is their median: one odd batch then changes nothing


@dataclass(frozen=True)
class Layer:
    """What calls computed by the same backend have in common. ``ffn``: see :class:`.Question`."""

    product: str
    among: str
    recompute: bool
    device: torch.device
    dtype: torch.dtype
    sizes: tuple[int, int, int]
    ffn: str = ""

    @classmethod
    def of(
        cls,
        product: str,
        among: str,
        recompute: bool,
        weights: Tensor,
        dtype: torch.dtype,
        ffn: str = "",
    ) -> "Layer":
        """``dtype``: what rows are computed in, which weights need not be."""
        E, inner, outer = weights.shape
        return cls(product, among, recompute, weights.device, dtype, (E, inner, outer), ffn)

    @property
    def candidates(self) -> list[str]:
        """The usable backends to choose from, at least one.

        Raises:
            RuntimeError: none runs here.
        """
        if names := candidates(self.among, self.device, self.dtype, self.sizes[1:]):
            return names
        raise RuntimeError(f"auto: {none_runs(self.device, self.dtype)}")

    @property
    def question(self) -> tuning.Question:
        return tuning.Question(
            product=self.product,
            candidates=tuple(self.candidates),
            device=tuning.device_name(self.device),
            dtype=str(self.dtype).removeprefix("torch."),
            sizes=self.sizes,
            recompute=self.recompute,
            ffn=self.ffn,
        )


@dataclass
class Choice:
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
            backend = None if name == AUTO else get_backend(name)
        except EzpzError:  # a package that does not load affects only its own backend
            continue
        if not isinstance(backend, KernelBackend) or (backend.drops_tokens and not named):
            continue
        if not backend.why_not(device, dtype, dims=dims):
            found.append(name)
    return found


def none_runs(device: torch.device, dtype: torch.dtype) -> str:
    """Return why there is nothing to choose from."""
    return (
        f"none of the backends to choose from runs on {device.type} in {dtype}: add for_loop to "
        f"`among`, or leave it out"
    )


def kernel_backend(name: str) -> KernelBackend:
    """Return one of the :func:`candidates`."""
    backend = get_backend(name)
    assert isinstance(backend, KernelBackend)  # candidates() names no others
    return backend


def drop_tokens(names: Sequence[str]) -> bool:
    """Return whether any of these backends drops tokens."""
    return any(get_backend(name).drops_tokens for name in names)


def take_the_first(layer: Layer, choice: Choice) -> None:
    """Choose without a clock: the same on every rank, in every run."""
    first = layer.candidates[0]
    if choice.winner != first:
        choice.winner = first
        logger.info(
            f"ezpz_moe: auto: {first} for {layer.question} (the first of "
            f"{' '.join(layer.candidates)}: deterministic algorithms are on, so nothing is timed)"
        )


def look(
    layer: Layer,
    choice: Choice,
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
        runs = {name: partial(one_pass, kernel_backend(name)) for name in question.candidates}
        # Powers of two: under expert parallelism R changes with every step, but which backend is
        # fastest hardly does.
        situation = tuning.Situation(question, _up_to(rows), choice.skew)
        choice.fastest[choice.skew] = tuning.fastest(situation, runs, layer.device)
    if choice.fastest[choice.skew] != choice.winner:
        _propose(question, choice, choice.fastest[choice.skew])


def _follow_others(question: tuning.Question, choice: Choice) -> None:
    """Take over what other ranks have decided since the last look."""
    for winner in agreement.decisions(question, choice.decisions):
        choice.follow(winner)
        logger.info(f"ezpz_moe: auto: {winner} for {question} (measured by another rank)")


def _propose(question: tuning.Question, choice: Choice, own: str) -> None:
    """Decide for ``own`` on all ranks, unless another rank has just decided otherwise."""
    choice.follow(agreement.decide(question, choice.decisions, own))
    if choice.winner != own:
        logger.info(f"ezpz_moe: auto: {choice.winner} instead (another rank was first)")


def _up_to(rows: int) -> int:
    """Round ``rows`` up to a power of two."""
    return 1 << (rows - 1).bit_length()
