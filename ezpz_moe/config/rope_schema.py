"""What a flavor may say of its rotary positions."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from ezpz_moe.config.schema import Data, Tokens

_Positive = Annotated[float, Field(gt=0)]


class Rope(Data):
    """Rotary positions: the arguments of the host's ``ComplexRoPE``, except ``dim``."""

    theta: Annotated[float, Field(gt=1)]
    max_seq_len: Tokens
    scaling: Literal["none", "yarn"]
    rope_factor: Annotated[float, Field(ge=1)]
    beta_fast: _Positive
    beta_slow: _Positive
    original_seq_len: Tokens


class Longest(Data):
    """What a flavor with ``base`` may say of its RoPE: how far it reaches.

    Its frequencies stay the host's. Only positions that the host's own model has no table for are
    added, so shorter sequences are the same model.
    """

    max_seq_len: Tokens
