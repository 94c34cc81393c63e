"""Every key of a flavor: its name, type and default from the schemas, what it means from the page.

The last column of these tables is written by people, into the tables themselves.
"""

from __future__ import annotations

import json
import re
import types
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import tables
from pydantic import Discriminator, Tag

from ezpz_moe.config.change_schema import Change
from ezpz_moe.config.flavor_schema import Dimensions, Flavor, Rope
from ezpz_moe.config.init_schema import Init
from ezpz_moe.config.job import allowed
from ezpz_moe.config.keys import Key
from ezpz_moe.config.routing_schema import Balance, Router
from ezpz_moe.config.schedule_schema import Schedule
from ezpz_moe.config.schema import Data
from ezpz_moe.config.similarity_schema import Similarity
from ezpz_moe.config.telemetry_schema import Telemetry

_PLACES = (
    ("docs/reference/flavors.md", "keys"),
    ("docs/reference/flavors.md", "keys of dimensions"),
    ("docs/reference/flavors.md", "keys of change"),
    ("docs/reference/flavors.md", "keys of init"),
    ("docs/reference/routing.md", "keys of router"),
    ("docs/reference/routing.md", "keys of similarity"),
    ("docs/reference/routing.md", "keys of balance"),
    ("docs/reference/metrics.md", "keys of telemetry"),
)
"""Documents and their tables."""

# Not keys of the file, and tables with a table of their own here.
_ELSEWHERE = ("name", "source", "dimensions", "change", "router", "balance", "telemetry", "init")


def made() -> dict[str, dict[str, str]]:
    """Return the tables by document and name."""
    of_schema = {
        "keys": list(_of_flavor()),
        "keys of dimensions": list(_of_dimensions()),
        "keys of change": list(_rows(Change)),
        "keys of init": list(_rows(Init)),
        "keys of router": list(_rows(Router)),
        "keys of similarity": list(_rows(Similarity)),
        "keys of balance": list(_rows(Balance)),
        "keys of telemetry": list(_rows(Telemetry)),
    }
    found: dict[str, dict[str, str]] = {}
    for document, name in _PLACES:
        rows = tables.with_prose(document, name, of_schema[name], ["meaning"])
        found.setdefault(document, {})[name] = tables.markdown(rows)
    return found


def _of_flavor() -> Iterator[dict[str, str]]:
    yield {"key": "`inherits`", "type": "a non-empty string", "default": ""}
    yield from (row for row in _rows(Flavor) if row["key"].strip("`") not in _ELSEWHERE)


def _of_dimensions() -> Iterator[dict[str, str]]:
    yield from (row for row in _rows(Dimensions) if row["key"] != "`rope`")
    yield from _rows(Rope, "rope.")


def _rows(schema: type[Data], table: str = "") -> Iterator[dict[str, str]]:
    for name, field in schema.model_fields.items():
        yield {
            "key": f"`{table}{field.alias or name}`",
            "type": _in_words(field.annotation, *field.metadata),
            "default": "" if field.is_required() else _shown(field.default),
        }


def _in_words(type_: Any, *bounds: Any) -> str:
    """Put a field's type in words; None, which TOML does not have, is left out."""
    if get_origin(type_) is Annotated:
        return _in_words(*get_args(type_), *bounds)
    if get_origin(type_) in (Union, types.UnionType):
        inner, *forms = (each for each in get_args(type_) if each is not type(None))
        # The forms of a value by layer, which the page explains once for all.
        return ", ".join([_in_words(inner, *bounds), *(_form(each) for each in forms)])
    if get_origin(type_) is Literal:
        return " or ".join(f"`{json.dumps(value)}`" for value in get_args(type_))
    if issubclass(type_, Schedule):
        return f"a number {type_._range}, or a schedule"
    if issubclass(type_, Flavor):
        return "the name of a flavor"
    if issubclass(type_, Data):
        return "a table"
    bounds = tuple(each for each in bounds if not isinstance(each, Tag | Discriminator))
    words = allowed(Key(type=Annotated[type_, *bounds] if bounds else type_))
    return re.sub(r"\d{5,}", lambda number: _power(int(number[0])), words)


def _form(type_: Any) -> str:
    """Put a list or a table in words, whose items and keys the page has."""
    (bare, *_) = get_args(type_)
    return "a list" if get_origin(bare) is tuple else "a table"


def _power(number: int) -> str:
    """Write a bound as a power of two, if it is one."""
    exponent = number.bit_length() - 1
    return f"2^{exponent}" if number == 2**exponent else str(number)


def _shown(default: Any) -> str:
    if default is None or (isinstance(default, Data) and not isinstance(default, Schedule)):
        return ""
    if isinstance(default, Schedule):
        default = default.start
    return f"`{json.dumps(default)}`"
