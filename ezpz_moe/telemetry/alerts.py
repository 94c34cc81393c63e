"""Warnings about routers that go wrong, each with what the flavor can do about it.

Legend: E = routed experts, N = assignments of a layer in a record.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ezpz_moe.telemetry.figures import (
    coefficient_of_variation,
    dead_experts,
    effective_experts,
)
from ezpz_moe.telemetry.record import LayerRecord, StepRecord
from ezpz_moe.telemetry.remedies import remedy
from ezpz_moe.telemetry.watched import Alert as Alert
from ezpz_moe.telemetry.watched import Watched

# The CV's running mean gives a new record this weight: a trend over some five records counts, a
# spike in one does not.
SMOOTHING = 0.2
# No alert below this CV. For a small CV the entropy is ln E - CV**2 / 2, so exp(entropy) / E is
# still 0.97 here: the layer uses its experts, however much the CV has risen.
CV_FLOOR = 0.25
# Even random routing has a CV of sqrt((E - 1) / N) (binomial counts). Less than three times that
# may be chance.
CHANCE = 3.0
# N assignments reach at most N of the E experts, and random ones lower the entropy by (E - 1) / 2N
# (Miller-Madow): with fewer than 4 per expert the figure says more about the batch than the router.
ENOUGH = 4
# An alert ends when the figure is past its threshold by this share of the way to the even load.
# Otherwise a figure near the threshold would be reported again and again.
HYSTERESIS = 0.1


@dataclass(frozen=True)
class _Found:
    """A layer in which something goes wrong.

    Attributes:
        value: how bad it is, for the worst of several; lower is worse.
        what: what is said of the layer.
    """

    layer: int
    value: float
    what: str


class Alerts:
    """Watches the records of a run in order, with the thresholds and settings in each record.

    An alert is raised once, until it has ended, and not before the learning rate has warmed up.
    """

    def __init__(self) -> None:
        self._idle_steps: dict[int, dict[int, int]] = {}  # by layer, of the experts that are idle
        self._smoothed_cv: dict[int, float] = {}  # by layer
        self._lowest_cv: dict[int, float] = {}
        self._said: set[tuple[str | int, ...]] = set()

    @property
    def watched(self) -> Watched:
        """What is known after the last record."""
        idle = {layer: dict(steps) for layer, steps in self._idle_steps.items() if steps}
        said = tuple(sorted(self._said, key=repr))
        return Watched(idle, dict(self._smoothed_cv), dict(self._lowest_cv), said)

    def _go_on_from(self, watched: Watched) -> None:
        self._idle_steps = {layer: dict(steps) for layer, steps in watched.idle_steps.items()}
        self._smoothed_cv = dict(watched.smoothed_cv)
        self._lowest_cv = dict(watched.lowest_cv)
        self._said = set(watched.said)

    def check(self, record: StepRecord) -> list[str]:
        """Return what has gone wrong since the last record, a line for each kind of alert."""
        return list(map(str, self.raised(record)))

    def raised(self, record: StepRecord) -> list[Alert]:
        """Return the same as alerts, at most one of each kind for every record in it."""
        if record.merged:
            self._go_on_from(record.merged.watched)
            return list(record.merged.alerts)
        kinds = {"dead": self._dead, "rising": self._rising, "collapse": self._collapsed}
        alerts = []
        for kind, find in kinds.items():
            layers = [layer for layer in record.layers if layer.tokens]
            if found := [each for layer in layers if (each := find(layer, record))]:
                has_bias = any(layer.bias_norm is not None for layer in layers)
                advice = remedy(kind, record.settings, record.warmup_steps, has_bias=has_bias)
                numbers = tuple(each.layer for each in found)
                said = f"step {record.step}, {_in_words(found)}"
                alerts.append(Alert(kind, record.step, numbers, said, advice))
        return alerts

    def _dead(self, layer: LayerRecord, record: StepRecord) -> _Found | None:
        """Find experts without an assignment, each once."""
        limit, number = record.thresholds.alert_dead_steps, layer.layer
        before = self._idle_steps.get(number, {})
        # A record without an assignment means that all its steps had none.
        idle = {e: before.get(e, 0) + record.steps for e in dead_experts(layer.counts_E)}
        self._idle_steps[number] = idle
        self._said -= {("dead", number, expert) for expert in before.keys() - idle.keys()}
        is_late = not _warms_up(record)
        new = [
            expert
            for expert, steps in idle.items()
            if self._begins(("dead", number, expert), is_late and steps >= limit, False)
        ]
        if not new:
            return None
        return _Found(
            layer.layer,
            -len(new),
            f"{named('expert', new)} of {len(layer.counts_E)} got no tokens for "
            f"{min(idle[expert] for expert in new)} steps "
            f"([telemetry] alert_dead_steps = {limit})",
        )

    def _rising(self, layer: LayerRecord, record: StepRecord) -> _Found | None:
        """Compare the smoothed CV with its lowest value since the warm-up."""
        cv = coefficient_of_variation(layer.counts_E)
        key, rise = layer.layer, record.thresholds.alert_cv_rise
        if math.isnan(cv):
            return None
        before = self._smoothed_cv.get(key, cv)
        smoothed = self._smoothed_cv[key] = before + SMOOTHING * (cv - before)
        if _warms_up(record):  # a router that has not learnt spreads tokens more evenly
            return None
        # The lowest of the smoothed values: one lucky record would otherwise set a level that the
        # run never keeps.
        lowest = self._lowest_cv[key] = min(smoothed, self._lowest_cv.get(key, smoothed))
        # Without the floor, twice a tiny CV would raise an alert about a well balanced layer.
        limit = max(rise * lowest, _floor(layer))
        if not self._begins(("cv", key), smoothed > limit, smoothed < limit * (1 - HYSTERESIS)):
            return None
        return _Found(
            layer.layer,
            -smoothed,
            f"load CV has risen to {smoothed:.3f}, above {limit:.3f} "
            f"([telemetry] alert_cv_rise = {rise:g} times its lowest, {lowest:.3f}, and at "
            f"least {_floor(layer):.3f})",
        )

    def _collapsed(self, layer: LayerRecord, record: StepRecord) -> _Found | None:
        """Check the effective number of experts, if there are enough tokens to tell.

        A token chooses k distinct experts, so no load is that of fewer than k: collapse is the way
        from all E of them down to the same k for every token.
        """
        experts, share = len(layer.counts_E), record.thresholds.alert_collapse
        assignments = sum(layer.counts_E)
        # With zero-computation experts, tokens use different numbers of routed experts.
        fewest = assignments / layer.tokens  # k, or the mean number of experts that compute
        if assignments < ENOUGH * experts or fewest >= experts or _warms_up(record):
            return None
        limit = fewest + share * (experts - fewest)
        effective = effective_experts(layer.counts_E)
        over = effective > limit + HYSTERESIS * (experts - limit)
        if not self._begins(("collapse", layer.layer), effective < limit, over):
            return None
        return _Found(
            layer.layer,
            effective / experts,
            f"router collapse: the load is that of {effective:.1f} of {experts} experts, below "
            f"{limit:.1f} ([telemetry] alert_collapse = {share:g} of those beyond the "
            f"{fewest:.3g} that a token uses)",
        )

    def _begins(self, alert: tuple[str | int, ...], is_bad: bool, is_good: bool) -> bool:
        """Return whether to raise the alert now; between bad and good its state does not change."""
        # is_good is stricter than not is_bad (HYSTERESIS).
        if is_good:
            self._said.discard(alert)
        if not is_bad or alert in self._said:
            return False
        self._said.add(alert)
        return True


def _floor(layer: LayerRecord) -> float:
    chance = math.sqrt((len(layer.counts_E) - 1) / sum(layer.counts_E))
    return max(CV_FLOOR, CHANCE * chance)


def _warms_up(record: StepRecord) -> bool:
    """Return whether the learning rate still rises: what a router does then says little of it."""
    return record.step <= record.warmup_steps


def _in_words(found: list[_Found]) -> str:
    """Return the layers, and what is said of the worst, the first of several."""
    worst = min(found, key=lambda each: each.value)
    layers = named("layer", [each.layer for each in found])
    if len(found) == 1:
        return f"{layers}: {worst.what}"
    return f"{layers}, of which layer {worst.layer} is the worst: {worst.what}"


def named(noun: str, numbers: list[int], shown: int = 8) -> str:
    """Return ``expert 2``, or ``experts 2, 7``; after the first few, how many more."""
    names = ", ".join(map(str, numbers[:shown]))
    more = f" and {len(numbers) - shown} more" if len(numbers) > shown else ""
    return f"{noun}{'s' if len(numbers) > 1 else ''} {names}{more}"
