"""Reading TOML files, with an error that says why one cannot be read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tomli

from ezpz_moe.errors import EzpzError, nearest, short

_INTEGERS = range(-(2**63), 2**63)
"""What TOML's integers are."""


def read_toml(path: Path) -> dict[str, Any]:
    """Read the document in ``path``.

    Raises:
        EzpzError: the file is missing, a folder, unreadable, not UTF-8 or not TOML; the last two
            come with line and column. An integer has more than 64 bits.
    """
    document = _parsed(path)
    if key := _huge_integer(document):
        raise EzpzError(
            f"{path}: is not valid TOML: {short(key)}: the integer there is too large: those of "
            "TOML have 64 bits."
        )
    return document


def _huge_integer(value: Any, key: str = "") -> str | None:
    """Return the dotted key of the first integer that TOML does not have; tomli takes any."""
    if isinstance(value, int):
        return None if value in _INTEGERS else key
    items = value.items() if isinstance(value, dict) else ()
    inner = [(f"{key}.{name}" if key else name, each) for name, each in items]
    inner += [(key, each) for each in value] if isinstance(value, list) else []
    return next((found for name, each in inner if (found := _huge_integer(each, name))), None)


def _parsed(path: Path) -> dict[str, Any]:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        # A misspelt name is the usual reason, and the file that was meant lies in the same folder.
        near = nearest(path.name, [file.name for file in path.parent.glob("*.toml")])
        meant = f" Did you mean {str(path.with_name(near))!r}?" if near else ""
        raise EzpzError(f"{path}: there is no such file.{meant}") from None
    except IsADirectoryError:
        raise EzpzError(f"{path}: is a folder, not a TOML file.") from None
    except (OSError, ValueError) as error:  # ValueError: a null character in the path
        raise EzpzError(f"{str(path)!r}: cannot be read: {error}.") from error
    try:
        # utf-8-sig also accepts the byte order mark that some Windows editors write.
        return tomli.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        column = error.start - data.rfind(b"\n", 0, error.start)
        raise EzpzError(
            f"{path}: is not UTF-8 text (at line {line}, column {column}). Save it as UTF-8."
        ) from None
    except tomli.TOMLDecodeError as error:
        raise EzpzError(
            f"{path}: is not valid TOML: {error.msg} (at line {error.lineno}, "
            f"column {error.colno})."
        ) from error
    except RecursionError as error:
        raise EzpzError(f"{path}: is not valid TOML: lists or tables nest too deeply.") from error
    except ValueError as error:  # Python reads no number of more than 4300 digits
        raise EzpzError(
            f"{path}: is not valid TOML: an integer in it has thousands of digits; those of TOML "
            "have 64 bits."
        ) from error
