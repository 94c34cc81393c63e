"""What the alerts of a run know of the records that they have seen."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Alert:
    """What has gone wrong at a step, in one line as ``str()``.

    Attributes:
        kind: ``"dead"``, ``"rising"`` or ``"collapse"``.
        layers: the numbers of those in which it has.
        found: step, layers and figures, in words.
        remedy: what to do about it.
    """

    kind: str
    step: int
    layers: tuple[int, ...]
    found: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.found}. Remedy: {self.remedy}."


@dataclass(frozen=True)
class Watched:
    """What :class:`.Alerts` remembers between two records, by number of the layer.

    Attributes:
        idle_steps: for how many steps each expert without an assignment has had none.
        smoothed_cv: the running mean of the CV.
        lowest_cv: its lowest value since the warm-up.
        said: the alerts that are raised and have not ended.
    """

    idle_steps: dict[int, dict[int, int]]
    smoothed_cv: dict[int, float]
    lowest_cv: dict[int, float]
    said: tuple[tuple[str | int, ...], ...]


@dataclass(frozen=True)
class Merged:
    """What a record keeps of those that were merged into it.

    Attributes:
        records: how many they were.
        alerts: those that they raised one by one.
        watched: what was known after the last of them.
    """

    records: int
    alerts: tuple[Alert, ...]
    watched: Watched
