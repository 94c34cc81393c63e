"""The base class of a flavor's tables, and what they share."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field
from pydantic_core import PydanticCustomError

# Far above any use: the bound keeps a typing mistake from becoming a run that never ends.
Steps = Annotated[int, Field(ge=1, le=2**40)]
"""A number of steps of a training, or of another iteration."""

# Far above any model, yet low enough that no tensor's size overflows.
Width = Annotated[int, Field(ge=1, le=2**20)]
"""A dimension of a model."""

Tokens = Annotated[int, Field(ge=1, le=2**24)]
"""A number of tokens of a sequence, or of a vocabulary."""


class Data(BaseModel):
    """Read-only data of exact types that rejects unknown keys."""

    # Strict, because TOML has types: "1" for 1 is a mistake. No extra keys: a misspelt one would
    # have no effect. No inf and nan, which TOML can write: no setting here has a use for them.
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    def to_dict(self) -> dict[str, Any]:
        """Convert to plain values: the host's configs hold such data and are written to logs."""
        return self.model_dump(mode="json")


def mistake(message: str) -> PydanticCustomError:
    """Return a validation error whose text is entirely ours."""
    # Through a placeholder: the first text is a template, in which braces of the message would be
    # fields.
    return PydanticCustomError("mistake", "{message}", {"message": message})
