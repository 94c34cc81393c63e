"""A TOML file as its statements: some can be changed while the others stay as written.

Comments, blank lines and the way values are written belong to the user; parsing a document loses
them. tomli still does the parsing here: it tells where a statement ends.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import tomli


@dataclass(frozen=True)
class Statement:
    """A header, an assignment, or a line that is blank or a comment.

    Attributes:
        text: as it stands in the file, with its line ending.
        section: the header above it, or itself for a header; "" before the first.
        parsed: what it says on its own.
    """

    text: str
    section: str
    parsed: Mapping[str, Any]

    @property
    def is_header(self) -> bool:
        return bool(self.parsed) and self.text.lstrip().startswith("[")

    @property
    def is_assignment(self) -> bool:
        return bool(self.parsed) and not self.is_header

    @property
    def is_comment(self) -> bool:
        return self.text.lstrip().startswith("#")


def statements(text: str) -> Iterator[Statement]:
    """Split a valid TOML document into statements; joined, their texts are the document."""
    section, pending = "", ""
    for line in io.StringIO(text, newline="\n"):  # TOML ends lines only with \n or \r\n
        pending += line
        try:
            # Quadratic in the lines of one value, which are few; a parser of our own would have to
            # know all of TOML.
            parsed = tomli.loads(pending)
        except tomli.TOMLDecodeError:
            continue  # the value continues on the next line
        if parsed and pending.lstrip().startswith("["):
            section = _header_path(parsed)
        # The last line of a file may lack its end, and something may be written after it.
        yield Statement(pending if pending.endswith("\n") else f"{pending}\n", section, parsed)
        pending = ""


def commented(text: str) -> str:
    """Turn a statement, or any lines, into a comment."""
    return "".join(f"# {line}" for line in text.splitlines(keepends=True))


def assignment(key: str, value: Any, comment: str = "") -> str:
    """Write ``key = value`` and a comment. The value is a string, a number, a boolean or a list."""
    # All of these are written alike in JSON and TOML.
    return f"{key} = {json.dumps(value, ensure_ascii=False)}{comment and f' # {comment}'}\n"


def _header_path(parsed: Any) -> str:
    """Return "a.b" for ``{"a": {"b": {}}}``, which is what ``[a.b]`` parses to on its own."""
    names = []
    while parsed:
        table = parsed[-1] if isinstance(parsed, list) else parsed  # [[a]]
        if not table:
            break
        ((name, parsed),) = table.items()
        names.append(name)
    return ".".join(names)
