"""The words behind the flags of a command line: whose they are, and whether a flag reads them.

What a flag takes is told in tyro's words: ``INT``, ``{None}|FLOAT``, ``{full,none}``, ``FILE``;
nothing for a switch.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from ezpz_moe.config.job import is_slip
from ezpz_moe.errors import did_you_mean, printable, short

_NEGATIVE_NUMBER = re.compile(r"-\d+|-\d*\.\d+|-\d+\.?\d*[eE][+-]?\d+")
_IN_WORDS = {"INT": "an integer", "FLOAT": "a number", "PATH": "a path", "STR": "a text"}
_READERS: Mapping[str, type] = {"INT": int, "FLOAT": float}


@dataclass
class Given:
    """A flag with the words behind it, or words that no flag precedes."""

    name: str
    values: list[str]


def given(words: Sequence[str]) -> Iterator[Given]:
    """Split a command line where a flag begins."""
    each: Given | None = None
    for word in words:
        if word.startswith("-") and not _NEGATIVE_NUMBER.fullmatch(word) and word != "-":
            if each:
                yield each
            name, equals, value = word.partition("=")
            each = Given(name, [value] if equals else [])
        elif each:
            each.values.append(word)
        else:
            each = Given("", [word])
    if each:
        yield each


def needs_a_value(name: str, type_: str) -> str:
    """Return the message for a flag without its value."""
    return f"{short(printable(name))}: needs a value, {_in_words(type_)}."


def wrong_value(name: str, value: str, type_: str) -> str:
    """Return the message for a value that a flag does not read; empty if it reads it.

    Args:
        name: the flag as the user wrote it; empty for a word without a flag.
        value: what was given.
        type_: what the flag takes. Where it names no values and no number, all is read.
    """
    if _reads(type_, value):
        return ""
    choices = {choice for each in _alternatives(type_) for choice in _choices(each)} - {"None"}
    # All are listed: of several that are as near, such as cpu and npu, none is proposed.
    near = did_you_mean(value, (each for each in choices if is_slip(value, each)))
    said = f"{short(printable(name))} {short(printable(value))}".lstrip()
    return f"{said}: must be {_in_words(type_)}.{near}"


def _reads(type_: str, value: str) -> bool:
    for each in _alternatives(type_):
        if choices := _choices(each):
            if value in choices:
                return True
        elif each in _READERS:
            try:
                _READERS[each](value)
            except ValueError:
                continue
            return True
        else:
            return True
    return False


def _alternatives(type_: str) -> list[str]:
    """Split ``{None}|INT``."""
    return type_.split("|")


def _choices(type_: str) -> list[str]:
    return type_[1:-1].split(",") if re.fullmatch(r"\{[^{}\[\]]*\}", type_) else []


def _in_words(type_: str) -> str:
    words: list[str] = []
    for each in _alternatives(type_):
        choices = _choices(each)
        one_of = f"one of {', '.join(choices)}" if len(choices) > 1 else "".join(choices)
        words.append(one_of or _IN_WORDS.get(each, each))
    return " or ".join(words)
