"""What is wrong with a flavor's file, in a line for each key: pydantic's errors in our words."""

from __future__ import annotations

import reprlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic_core import ErrorDetails

from ezpz_moe.config.change_schema import Change
from ezpz_moe.config.flavor_schema import Dimensions, Flavor
from ezpz_moe.config.foreign_keys import meaning
from ezpz_moe.config.init_schema import Init
from ezpz_moe.config.layer_sizes import FORMS
from ezpz_moe.config.rope_schema import Rope
from ezpz_moe.config.routing_schema import SCOPES, Balance, Losses, Router
from ezpz_moe.config.schedule_schema import Schedule
from ezpz_moe.config.schema import Data
from ezpz_moe.config.similarity_schema import Similarity
from ezpz_moe.config.telemetry_schema import Telemetry
from ezpz_moe.errors import did_you_mean

DIMENSION_KEYS = frozenset(Dimensions.model_fields)
TABLES: dict[str, type[Data]] = {
    "rope": Rope,
    "change": Change,
    "init": Init,
    "router": Router,
    "router.similarity": Similarity,
    "balance": Balance,
    **{f"balance.{scope}": Losses for scope in SCOPES},
    "telemetry": Telemetry,
}
# What a file may say at its top. Name and source come from the file itself, and the dimensions
# stand there one by one, not in a table.
FLAVOR_KEYS = (
    DIMENSION_KEYS | {"inherits"} | (Flavor.model_fields.keys() - {"name", "source", "dimensions"})
)


def messages(
    errors: Sequence[ErrorDetails], path: Path, origin: Mapping[str, Path]
) -> Iterator[str]:
    """Yield a line per wrong key, with the file that sets it, and one for all missing keys.

    Args:
        errors: pydantic's.
        path: the flavor's file.
        origin: the file that set each key.
    """
    missing = []
    for error in errors:
        # Flavor has the dimensions in a model of their own; the file has their keys at its top.
        # pydantic also names the form of a value that may be a number, a list or a table.
        places = [str(place) for place in error["loc"] if place not in FORMS]
        key = ".".join(places).removeprefix("dimensions").removeprefix(".")
        # A schedule is set as a whole: its inner keys come from the file that sets the schedule.
        parts = key.split(".")
        whole = (".".join(parts[:end]) for end in range(len(parts), 0, -1))
        file = next((origin[each] for each in whole if each in origin), path)
        if error["type"] == "missing" and error["loc"][0] in ("router", "balance"):
            schedule, _, inner = key.rpartition(".")
            yield f"{file}: {schedule}: the key {inner} is missing; a schedule must be complete."
        elif error["type"] == "missing":
            missing.append(key)
        elif error["type"] == "extra_forbidden":
            table, _, name = key.rpartition(".")
            known = table if table in TABLES else table.partition(".")[0]
            meant = meaning(name, _table_keys(known), homes(name))
            yield f"{file}: unknown key {key!r}.{meant}"
        # Several keys do not fit together, so there is no single value to show.
        elif error["type"] == "mistake" and (not key or key in TABLES):
            of_dimensions = error["loc"] == ("dimensions",)
            where = "the dimensions do not fit together:" if of_dimensions else f"[{key}]"
            yield f"{file}: {where} {error['msg']}." if error["loc"] else f"{file}: {error['msg']}."
        else:
            yield f"{file}: {key} = {quoted(error['input'])}: {_expectation(error)}"
    if missing:
        yield (
            f"{path}: missing keys: {', '.join(missing)}. Set them, inherit them "
            '(inherits = "16B") or name an upstream model (base = "qwen3/30B-A3B").'
        )


def _table_keys(table: str) -> list[str]:
    fields = TABLES[table].model_fields.items()
    return [*(field.alias or name for name, field in fields), *Schedule.model_fields]


def homes(name: str) -> list[str]:
    """Return where a flavor may have the key: the right one in the wrong place is a common slip."""
    tables = [f"in [{table}]" for table, data in TABLES.items() if name in data.model_fields]
    return [*(["at the top of the file"] if name in FLAVOR_KEYS else []), *tables]


def _expectation(error: ErrorDetails) -> str:
    if error["type"] == "model_type":
        return "should be a table."
    text = error["msg"].replace("Input should", "should").rstrip(".")
    if error["type"] == "literal_error" and isinstance(error["input"], str):
        # pydantic lists the choices only as text: 'a', 'b' or 'c'.
        allowed = error["ctx"]["expected"].replace(" or ", ", ").replace("'", "").split(", ")
        return f"{text}.{did_you_mean(error['input'], allowed)}"
    # Some messages of ours end in a hint, which is a question.
    return text if text.endswith("?") else f"{text}."


def quoted(value: Any) -> str:
    """Return a value as a message quotes it, cut where it is long."""
    try:
        return reprlib.repr(value)
    except ValueError:  # Python refuses to print an integer of more than 4300 digits
        return "a huge number"
