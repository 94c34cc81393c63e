"""Values that move during training: numbers, or tables of a start, an end and steps."""

from __future__ import annotations

import math
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from ezpz_moe.config.schema import Data, Steps, mistake

_Positive = Annotated[float, Field(gt=0)]
_NotNegative = Annotated[float, Field(ge=0)]


class Schedule(Data):
    """A value that moves from ``start`` to ``end`` within ``steps``, and then stays there.

    A plain number stands for a value that does not move. A schedule counts as one value: a flavor
    that inherits it may replace it, but not a part of it.
    """

    _range: ClassVar[str] = "above 0"

    start: _Positive
    end: _Positive
    steps: Steps
    shape: Literal["linear", "exponential", "cosine"] = "linear"

    @model_validator(mode="before")
    @classmethod
    def _may_be_a_number(cls, value: object) -> object:
        if isinstance(value, dict | cls):
            return value
        if (
            # bool is a subclass of int: without this, true would pass as 1.
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not cls._is_in_range(value)
        ):
            raise mistake(f"should be a number {cls._range}, or a table of start, end and steps")
        # One step, as in the fields' defaults: with another number, a 1 in the file would not equal
        # the default 1.
        return {"start": value, "end": value, "steps": 1}

    @classmethod
    def _is_in_range(cls, value: float) -> bool:
        return 0 < value < math.inf

    @property
    def is_constant(self) -> bool:
        return self.start == self.end


class Rate(Schedule):
    """A schedule that may begin or end at 0, where nothing moves."""

    _range: ClassVar[str] = "of at least 0"

    start: _NotNegative
    end: _NotNegative

    @classmethod
    def _is_in_range(cls, value: float) -> bool:
        return 0 <= value < math.inf

    @model_validator(mode="after")
    def _reaches_its_end(self) -> Self:
        if self.shape == "exponential" and not self.is_constant and 0 in (self.start, self.end):
            raise mistake(
                'shape = "exponential" multiplies by the same factor in every step, so it neither '
                'leaves 0 nor reaches it. Choose "linear" or "cosine"'
            )
        return self
