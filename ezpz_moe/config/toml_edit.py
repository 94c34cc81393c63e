"""A TOML file as its statements, so that some can be changed and the others stay as written.

Comments, blank lines and the way that values are written belong to the user; a parsed document has
lost them. tomli does the parsing here too: it is asked where a statement ends.
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
        text: as it stands in the file, with its line end.
        section: the header that it stands under, itself for a header; "" before the first.
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
    """The statements of a valid TOML document; their texts together are the document."""
    section, pending = "", ""
    for line in io.StringIO(text, newline="\n"):  # TOML knows no other line ends than \n and \r\n
        pending += line
        try:
            parsed = tomli.loads(pending)
        except tomli.TOMLDecodeError:
            continue  # a value that goes on in the next line
        if parsed and pending.lstrip().startswith("["):
            section = _header_path(parsed)
        yield Statement(pending if pending.endswith("\n") else f"{pending}\n", section, parsed)
        pending = ""


def commented(text: str) -> str:
    """A statement, or any lines, as a comment."""
    return "".join(f"# {line}" for line in text.splitlines(keepends=True))


def assignment(key: str, value: Any, comment: str = "") -> str:
    """``key = value``, with a comment behind it. The value is a string, a number or a boolean."""
    return f"{key} = {json.dumps(value, ensure_ascii=False)}{comment and f' # {comment}'}\n"


def _header_path(parsed: Any) -> str:
    """``{"a": {"b": {}}}``, which is what ``[a.b]`` says on its own, as ``"a.b"``."""
    names = []
    while parsed:
        table = parsed[-1] if isinstance(parsed, list) else parsed  # [[a]]
        if not table:
            break
        ((name, parsed),) = table.items()
        names.append(name)
    return ".".join(names)
