"""What ``[init]`` may say: the values that the weights of the layers start with."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from ezpz_moe.config.schema import Data


class Init(Data):
    """``[init]``: initial values of the layers' weights. None keeps the host's own.

    Embeddings and the output head keep theirs in any case.
    """

    std: Annotated[float, Field(gt=0, le=1)] | None = None
    experts: Literal["normal", "trunc_normal", "kaiming_uniform"] | None = None
    residual: Literal["depth", "none"] | None = None
