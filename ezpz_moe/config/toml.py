"""Reading TOML files, with an error that says why one cannot be read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tomli

from ezpz_moe.errors import EzpzError, did_you_mean


def read_toml(path: Path) -> dict[str, Any]:
    """Read the document in ``path``.

    Raises:
        EzpzError: the file is missing, a folder, unreadable, not UTF-8 or not TOML; the last two
            come with line and column.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        # A misspelt name is the usual reason, and the file that was meant lies in the same folder.
        near = did_you_mean(path.name, [file.name for file in path.parent.glob("*.toml")])
        raise EzpzError(f"{path}: there is no such file.{near}") from None
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
    except (ValueError, RecursionError) as error:  # a number of 5000 digits, 500 nested lists
        raise EzpzError(f"{path}: is not valid TOML: {error}.") from error
