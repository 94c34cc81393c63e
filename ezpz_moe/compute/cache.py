"""The folder where the plugin keeps what it may lose. Nothing here imports torch or the host."""

from __future__ import annotations

import os
from pathlib import Path

from platformdirs import user_cache_path

CACHE_VARIABLE = "EZPZ_MOE_CACHE"


def cache_root() -> Path:
    """The user's, or what :data:`CACHE_VARIABLE` names; it need not be there yet."""
    named = os.environ.get(CACHE_VARIABLE)
    return Path(named).expanduser() if named else user_cache_path("ezpz_moe")
