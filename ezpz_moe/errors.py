"""A user's mistake as one message: what is wrong, where, and what to do.

Everything that a user can get wrong raises :class:`EzpzError`. Library callers catch it like any
exception. Where the command line or the host enters this package, :func:`exit_on_user_error` turns
it into one printed message and exit code 2.
"""

from __future__ import annotations

import contextlib
import difflib
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence

EXIT_CODE = 2
DEBUG_VARIABLE = "EZPZ_MOE_DEBUG"


_LONGEST_WORD = 400  # characters; a path may have that many
_LONGEST_LINE = 4000  # lists of what is known stay whole


class EzpzError(Exception):
    """A mistake that the user can fix. ``str(error)`` is the whole message.

    What it quotes of a file or a command line is escaped and shortened here, whoever quotes it.
    """

    def __init__(self, message: str) -> None:
        super().__init__("\n".join(_readable(line) for line in message.split("\n")))


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return `` Did you mean 'x'?`` for the nearest of ``known``, or the empty string."""
    near = nearest(name, known)
    return f" Did you mean {near!r}?" if near else ""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return the one of ``known`` that ``name`` may be a slip for, or the empty string.

    Options are compared without their dashes, and files of TOML without their suffix, which all of
    them have in common.
    """
    candidates = {_own_letters(candidate): candidate for candidate in known}
    near = difflib.get_close_matches(_own_letters(name), candidates, n=1, cutoff=0.6)
    return candidates[near[0]] if near else ""


def _own_letters(name: str) -> str:
    return name.lower().lstrip("-").removesuffix(".toml")


def some(names: Sequence[str]) -> str:
    """List up to three of the names, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} others" if names[3:] else "")


def printable(text: str) -> str:
    """Escape what a terminal would act on; libraries quote a damaged file in their messages."""
    return "".join(each if each.isprintable() else ascii(each)[1:-1] for each in text)


def short(text: str, length: int = 60) -> str:
    """Return the text, or its beginning and end if it is longer."""
    return text if len(text) <= length else f"{text[: length - 20]}...{text[-17:]}"


def _readable(line: str) -> str:
    words = re.sub(
        rf"\S{{{_LONGEST_WORD + 1},}}", lambda word: short(word[0], _LONGEST_WORD), printable(line)
    )
    return short(words, _LONGEST_LINE)


@contextlib.contextmanager
def exit_on_user_error() -> Iterator[None]:
    """Print an :class:`EzpzError` once per node and exit with code 2.

    Every rank meets the same mistake, so only local rank 0 prints. With ``EZPZ_MOE_DEBUG=1``,
    which ``--debug`` sets, the exception propagates with its traceback.
    """
    try:
        yield
    except EzpzError as error:
        if os.environ.get(DEBUG_VARIABLE) == "1":
            raise
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"ezpz-moe: error: {error}", file=sys.stderr, flush=True)
        raise SystemExit(EXIT_CODE) from None
