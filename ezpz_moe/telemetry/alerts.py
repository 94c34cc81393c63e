"""Warnings about a router that goes wrong, each with what the flavor can do about it.

Legend: E = routed experts, N = assignments of a layer in a record.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from ezpz_moe.telemetry.figures import (
    coefficient_of_variation,
    dead_experts,
    effective_experts,
)
from ezpz_moe.telemetry.record import LayerRecord, StepRecord

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

_DEAD = (
    '[balance] aux_loss = 0.01 or bias_update = "sign" pulls tokens back to idle experts, '
    "[router] jitter_noise = 0.01 lets some tokens try them; if they died during warm-up, lower "
    "the learning rate"
)
_RISING = (
    'raise [balance] aux_loss or set bias_update = "sign"; [balance] z_loss = 0.001 keeps the '
    "logits small; a lower learning rate or a longer warm-up slows the router"
)
_COLLAPSE = (
    "go back to a checkpoint from before it; set or raise [balance] aux_loss and z_loss, add "
    "[router] jitter_noise = 0.01, and lower the learning rate"
)


class Alerts:
    """Watches the records of a run in order, with the thresholds in each record.

    An alert is raised once, until it has ended.
    """

    def __init__(self) -> None:
        self._idle_steps: dict[tuple[int, int], int] = {}  # by layer and expert
        self._smoothed_cv: dict[int, float] = {}  # by layer
        self._lowest_cv: dict[int, float] = {}
        self._said: set[tuple[object, ...]] = set()

    def check(self, record: StepRecord) -> list[str]:
        """Return what has gone wrong since the last record, a line per layer and kind of alert."""
        return [
            f"step {record.step}, layer {layer.layer}: {message}"
            for layer in record.layers
            if layer.tokens
            for kind in (self._dead, self._rising, self._collapsed)
            for message in kind(layer, record)
        ]

    def _dead(self, layer: LayerRecord, record: StepRecord) -> Iterator[str]:
        """Report experts without an assignment, each once, on one line with the others."""
        limit, dead = record.thresholds.alert_dead_steps, set(dead_experts(layer.counts_E))
        new = []
        for expert in range(len(layer.counts_E)):
            key = (layer.layer, expert)
            # A record without an assignment means that all its steps had none.
            idle = self._idle_steps.get(key, 0) + record.steps if expert in dead else 0
            self._idle_steps[key] = idle
            if self._begins(("dead", *key), idle >= limit, not idle):
                new.append(expert)
        if new:
            idle = min(self._idle_steps[layer.layer, expert] for expert in new)
            yield (
                f"{_named(new)} of {len(layer.counts_E)} got no tokens for {idle} steps "
                f"([telemetry] alert_dead_steps = {limit}). Remedy: {_DEAD}."
            )

    def _rising(self, layer: LayerRecord, record: StepRecord) -> Iterator[str]:
        """Compare the smoothed CV with its lowest value so far."""
        cv = coefficient_of_variation(layer.counts_E)
        key, rise = layer.layer, record.thresholds.alert_cv_rise
        if math.isnan(cv):
            return
        before = self._smoothed_cv.get(key, cv)
        smoothed = before + SMOOTHING * (cv - before)
        # The lowest of the smoothed values: one lucky record would otherwise set a level that the
        # run never keeps.
        lowest = min(smoothed, self._lowest_cv.get(key, smoothed))
        self._smoothed_cv[key], self._lowest_cv[key] = smoothed, lowest
        # Without the floor, twice a tiny CV would raise an alert about a well balanced layer.
        limit = max(rise * lowest, _floor(layer))
        if self._begins(("cv", key), smoothed > limit, smoothed < limit * (1 - HYSTERESIS)):
            yield (
                f"load CV has risen to {smoothed:.3f}, above {limit:.3f} "
                f"([telemetry] alert_cv_rise = {rise:g} times its lowest, {lowest:.3f}, and at "
                f"least {_floor(layer):.3f}). "
                f"Remedy: {_RISING}."
            )

    def _collapsed(self, layer: LayerRecord, record: StepRecord) -> Iterator[str]:
        """Check the effective number of experts, if there are enough tokens to tell.

        A token chooses k distinct experts, so no load is that of fewer than k: collapse is the way
        from all E of them down to the same k for every token.
        """
        experts, share = len(layer.counts_E), record.thresholds.alert_collapse
        assignments = sum(layer.counts_E)
        # With zero-computation experts, tokens use different numbers of routed experts.
        fewest = assignments / layer.tokens  # k, or the mean number of experts that compute
        if assignments < ENOUGH * experts or fewest >= experts:
            return
        limit = fewest + share * (experts - fewest)
        effective = effective_experts(layer.counts_E)
        over = effective > limit + HYSTERESIS * (experts - limit)
        if self._begins(("collapse", layer.layer), effective < limit, over):
            yield (
                f"router collapse: the load is that of {effective:.1f} of {experts} experts, below "
                f"{limit:.1f} ([telemetry] alert_collapse = {share:g} of those beyond the "
                f"{fewest:.3g} that a token uses). "
                f"Remedy: {_COLLAPSE}."
            )

    def _begins(self, alert: tuple[object, ...], is_bad: bool, is_good: bool) -> bool:
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


def _named(experts: list[int], shown: int = 8) -> str:
    """Return ``expert 2``, or ``experts 2, 7``; after the first few, how many more."""
    names = ", ".join(map(str, experts[:shown]))
    more = f" and {len(experts) - shown} more" if len(experts) > shown else ""
    return f"expert{'s' if len(experts) > 1 else ''} {names}{more}"
