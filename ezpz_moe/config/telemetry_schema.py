"""What a flavor may say in its table ``[telemetry]``, and a job, but for ``dump``.

docs/guides/telemetry.md says what each key does; the functions are in :mod:`ezpz_moe.telemetry`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from ezpz_moe.config.schema import Data, Steps, mistake

Detail = Literal["brief", "per_layer", "per_expert"]
Rise = Annotated[float, Field(gt=1)]
Share = Annotated[float, Field(gt=0, lt=1)]
NumberOfPairs = Annotated[int, Field(ge=0, le=2**16)]


class AlertThresholds(Data):
    """When a run warns about its routers. Every record repeats them for later readers."""

    alert_dead_steps: Steps = 100
    alert_cv_rise: Rise = 2.0
    alert_collapse: Share = 0.25


Kept = Literal["ids", "probabilities"]


class Dump(Data):
    """``dump``: the steps whose routing is written token by token, and what of it.

    Nothing is written if there is nothing in ``what``. A dump counts as one value, as a schedule
    does.
    """

    every: Steps
    # Not strict, or a list would not be a tuple.
    what: Annotated[tuple[Kept, ...], Field(strict=False)]

    @model_validator(mode="before")
    @classmethod
    def _is_whole(cls, value: object) -> object:
        # Without this, the message would name one of the keys, or tuples, which TOML does not have.
        is_whole = (
            isinstance(value, dict)
            and value.keys() == {"every", "what"}
            and isinstance(value["what"], list | tuple)
        )
        if is_whole or isinstance(value, cls):
            return value
        raise mistake(
            'should be a table of every and what, such as { every = 1000, what = ["ids"] }'
        )


class Telemetry(AlertThresholds):
    """``[telemetry]``: what a run reports about its experts."""

    # Not set: as often as the trainer logs.
    every: Steps | None = None
    detail: Detail = "brief"
    images: bool = True
    # Of each layer, so many are in a record.
    pairs: NumberOfPairs = 0
    dump: Dump | None = None

    @property
    def dumped(self) -> Dump | None:
        """What is dumped, if anything is."""
        return self.dump if self.dump and self.dump.what else None

    @property
    def cadences(self) -> dict[str, int]:
        """Of what happens only when the trainer logs: steps by key, as far as they are set."""
        steps = {"every": self.every, "dump.every": self.dumped and self.dumped.every}
        return {key: every for key, every in steps.items() if every}

    @property
    def thresholds(self) -> AlertThresholds:
        """The alerts' thresholds on their own."""
        names = AlertThresholds.model_fields
        return AlertThresholds(**{name: getattr(self, name) for name in names})
