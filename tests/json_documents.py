"""The objects that ``--json`` prints, as docs/reference/json.md has them."""

from __future__ import annotations

import re
from pathlib import Path

PAGE = Path(__file__).parent.parent / "docs" / "reference" / "json.md"
_ROW = re.compile(r"^\| `([^`]+)` \| (.*) \|$", re.MULTILINE)


def documented() -> dict[str, set[str]]:
    """The keys of each command's object."""
    rows = _ROW.findall(PAGE.read_text())
    return {command: set(re.findall(r"`([^`]+)`", keys)) for command, keys in rows}
