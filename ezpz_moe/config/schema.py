"""What the tables of a flavor have in common."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict
from pydantic_core import PydanticCustomError


class Data(BaseModel):
    """Read-only data of exact types, without keys that it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    def to_dict(self) -> dict[str, Any]:
        """As plain values: the host's configs, which hold such data, are written to logs."""
        return self.model_dump(mode="json")


def mistake(message: str) -> PydanticCustomError:
    """An error whose text is ours alone."""
    return PydanticCustomError("mistake", "{message}", {"message": message})
