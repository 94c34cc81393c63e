"""What the tables of a flavor have in common."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict
from pydantic_core import PydanticCustomError


class Data(BaseModel):
    """Read-only data of exact types, without keys that it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


def mistake(message: str) -> PydanticCustomError:
    """An error whose text is ours alone."""
    return PydanticCustomError("mistake", "{message}", {"message": message})
