"""The alerts of a whole run by kind: a run that goes wrong says the same thing many times."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ezpz_moe.telemetry.alerts import Alert, named

_IN_WORDS = {
    "dead": "experts without tokens",
    "rising": "rising load CV",
    "collapse": "router collapse",
}


@dataclass(frozen=True)
class Group:
    """Alerts of one kind with one remedy, in the order of their steps; at least one."""

    alerts: tuple[Alert, ...]

    @property
    def remedy(self) -> str:
        return self.alerts[0].remedy

    @property
    def headline(self) -> str:
        """What kind of alert, how often, and which steps and layers."""
        first, *more = self.alerts
        layers = sorted({layer for alert in self.alerts for layer in alert.layers})
        steps = f"steps {first.step} to {more[-1].step}" if more else f"step {first.step}"
        number = f"{len(self.alerts)} alert{'s' * bool(more)}"
        return f"{_IN_WORDS[first.kind]}: {number}, {steps}, {named('layer', layers)}"

    @property
    def line(self) -> str:
        """The headline, the last alert of several, and the remedy; of a single one, its own."""
        *before, last = self.alerts
        if not before:
            return str(last)
        return f"{self.headline}. The last: {last.found}. Remedy: {self.remedy}."


def grouped(alerts: Iterable[Alert]) -> list[Group]:
    """Group alerts by kind and remedy, in the order of the first of each.

    A resumed run may have other settings, and then other remedies.
    """
    groups: dict[tuple[str, str], list[Alert]] = {}
    for alert in alerts:
        groups.setdefault((alert.kind, alert.remedy), []).append(alert)
    return [Group(tuple(each)) for each in groups.values()]
