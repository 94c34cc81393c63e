"""The folder for what the plugin can afford to lose. Imports neither torch nor the host."""

from __future__ import annotations

import os
from pathlib import Path

from platformdirs import user_cache_path

CACHE_VARIABLE = "EZPZ_MOE_CACHE"


def cache_root() -> Path:
    """Return the user's cache folder, or what :data:`CACHE_VARIABLE` names. It may not exist."""
    named = os.environ.get(CACHE_VARIABLE)
    return Path(named).expanduser() if named else user_cache_path("ezpz_moe")
