"""What a flavor may say in ``[router.similarity]``; ``routing/similarity.py`` has the formula."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, model_validator

from ezpz_moe.config.schema import Data, mistake


class Similarity(Data):
    """``[router.similarity]``: scores averaged over similar earlier tokens of the same document."""

    # 0: every token's scores are its own.
    strength: Annotated[float, Field(ge=0, le=1)] = 0.0
    # Tokens that a token looks at, itself included: itself alone would change nothing.
    window: Annotated[int, Field(ge=2, le=2**20)] = 64
    # Cosines are divided by it: below this bound their own rounding would decide.
    temperature: Annotated[float, Field(ge=1e-4)] = 0.2

    @model_validator(mode="after")
    def _has_an_effect(self) -> Self:
        default = type(self).model_fields
        changed = [
            f"{key} = {getattr(self, key):g}"
            for key in ("window", "temperature")
            if getattr(self, key) != default[key].default
        ]
        if changed and not self.strength:
            raise mistake(
                f"{' and '.join(changed)} without strength: nothing is averaged. Set strength "
                f"above 0, or remove the rest; what is inherited can be set to window = "
                f"{default['window'].default} and temperature = {default['temperature'].default}"
            )
        return self
