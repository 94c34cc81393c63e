"""What commands share: their arguments' types, and the host to look at configs with."""

from __future__ import annotations

import logging
from collections.abc import Callable
from types import ModuleType
from typing import Annotated, Literal

from tyro.conf import Positional, arg

DType = Literal["bfloat16", "float32", "float16", "float64"]
Device = Annotated[str | None, arg(metavar="DEVICE")]
Config = Annotated[Positional[str], arg(metavar="FLAVOR|JOB.toml")]


def import_host() -> Callable[[str], ModuleType]:
    """The host's binding, to look at configs. What the host remarks on them is for training."""
    from ezpz_moe.hosts import binding, check_host

    check_host()
    logging.getLogger().setLevel(logging.ERROR)  # the host logs on the root logger
    return binding
