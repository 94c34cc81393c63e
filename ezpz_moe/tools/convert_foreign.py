"""Make a flavor of another project's config, and say what of it the flavor does not compute.

:mod:`.convert_hf` and :mod:`.convert_megatron` read a file and put its model into the words of
transformers, and its router's options into lines of ``[router]`` and ``[balance]``, in our units.
Here the model becomes a flavor: one with sizes for latent attention, or else one of torchtitan's
own models, if that is the same. The flavor is then built and compared with the config, by the rules
with which ``ckpt remap`` compares a ``config.json``.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ezpz_moe.config.flavor_schema import Dimensions
from ezpz_moe.config.flavors import load_flavor
from ezpz_moe.config.foreign_keys import ForeignKey, projects
from ezpz_moe.config.job import shown
from ezpz_moe.config.routing_schema import SCOPES
from ezpz_moe.config.toml_edit import assignment, commented
from ezpz_moe.errors import EzpzError, printable, some
from ezpz_moe.hosts.dcp.paths import CONFIG
from ezpz_moe.hosts.detect import check_host, host
from ezpz_moe.tools.convert import Change, Conversion, write_files

SIZED = ("deepseek_v2", "deepseek_v3", "kimi_k2")
"""Values of ``model_type`` whose models a flavor's own sizes describe."""
BASES = {
    "qwen3_moe": ("qwen3/30B-A3B", "qwen3/235B-A22B"),
    "gpt_oss": ("gpt_oss/20b", "gpt_oss/120b"),
}
"""The host's own models, by the ``model_type`` that transformers computes them with."""
_EPS = "rms_norm_eps"


@dataclass(frozen=True)
class Line:
    """A line of a flavor: ``key`` as "router_top_k" or "balance.aux_loss", and where it is from.

    With ``is_off`` it is commented out.
    """

    key: str
    value: Any
    comment: str = ""
    is_off: bool = False


@dataclass(frozen=True)
class Loss:
    """A balance loss by its key of ``[balance]`` and its scope, in our units.

    With ``is_off`` the other project does not add it.
    """

    name: str
    scope: str
    coefficient: float
    comment: str
    is_off: bool = False


@dataclass(frozen=True)
class Foreign:
    """Another project's config.

    Attributes:
        source: its file.
        project: the project's name.
        config: its model, in the words of transformers.
        names: what the file calls a key of ``config``, where it does so by another name.
        routing: its ``[router]`` and ``[balance]``, and what ranks groups of experts.
        changes: what becomes of each key of the file.
        is_of_class: whether a class of transformers computes the model, so that what no class
            computes is a difference.
    """

    source: Path
    project: str
    config: Mapping[str, Any]
    names: Mapping[str, str]
    routing: tuple[Line, ...]
    changes: tuple[Change, ...]
    is_of_class: bool = True


def converted(foreign: Foreign) -> Conversion:
    """Return the flavor that computes ``foreign``, or why there is none.

    Raises:
        EzpzError: the file lacks a size or has one that no model can have, or the host does not
            take a flavor's ``[balance]``.
    """
    kind = foreign.config.get("model_type")
    if kind in SIZED:
        lines = list(_sizes(foreign))
        text, differences, notes = _tried(foreign, lines)
        text = "".join([commented(f"differs: {each}\n") for each in differences]) + text
        return _made(foreign, text, notes, differences)
    bases = BASES.get(kind, ()) if isinstance(kind, str) else ()
    if not bases:
        known = ", ".join([*SIZED, *BASES])
        return Conversion(
            foreign.changes,
            refusal=f"torchtitan has no model like {kind!r}; ezpz_moe makes flavors of {known}.",
        )
    tried = [(_tried(foreign, [Line("base", base)]), base) for base in bases]
    (text, differences, notes), base = min(tried, key=lambda each: len(each[0][1]))
    if differences:
        return Conversion(
            foreign.changes,
            refusal=f"no model of torchtitan's is this one; the nearest, {base}, differs: "
            f"{some(differences)}.",
        )
    return _made(foreign, text, notes)


def _made(
    foreign: Foreign, text: str, notes: tuple[str, ...], differences: tuple[str, ...] = ()
) -> Conversion:
    """Return the flavor; a note stands in its file too, and its key is not called kept."""
    eps = foreign.names.get(_EPS, _EPS) if notes else ""
    changes = (
        replace(each, fate="differs", note="no flavor can set it") if each.key == eps else each
        for each in foreign.changes
    )
    text = "".join([commented(f"note: {each}\n") for each in notes]) + text
    head = f"# From {foreign.source.name} of {foreign.project}, by ezpz-moe convert.\n"
    return Conversion(tuple(changes), head + text, differences=differences, notes=notes)


def write(conversion: Conversion, new: Path) -> list[Path]:
    """Write the flavor, and return its path.

    Raises:
        EzpzError: there is no such flavor, or its file exists or cannot be written.
    """
    if conversion.refusal:
        raise EzpzError(f"{new} was not written: {conversion.refusal}")
    if new.suffix != ".toml":
        raise EzpzError(f"{new}: a flavor's name must end in .toml.")
    return write_files({new: conversion.text}, new)


def balance_lines(losses: Iterable[Loss]) -> Iterator[Line]:
    """Yield the lines of balance losses, none for a coefficient of 0.

    Losses of several scopes stand in a table for each.
    """
    losses = [each for each in losses if each.coefficient]
    scopes = {each.scope for each in losses}
    for each in losses:
        key = each.name if len(scopes) == 1 else f"{each.scope}.{each.name}"
        yield Line(f"balance.{key}", each.coefficient, each.comment, each.is_off)
    if len(scopes) == 1:
        is_off = all(each.is_off for each in losses)
        yield Line("balance.scope", scopes.pop(), is_off=is_off)


def number(source: Path, values: Mapping[str, Any], key: str, default: float = 0) -> float:
    """Return a number of a file; null means the default.

    Raises:
        EzpzError: it is something else.
    """
    value = values.get(key)
    if value is None:
        return default
    # bool is a subclass of int.
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 2**53:
        raise EzpzError(f"{source}: {key} = {printable(repr(value))}: must be a number >= 0.")
    return value


# The model ----------------------------------------------------------------------------------------


def _sizes(foreign: Foreign) -> Iterator[Line]:
    """Yield the lines of a model with latent attention."""
    config = foreign.config
    absent: list[str] = []
    rows = {row.ours: row for row in _size_rows()}
    defaults = {"q_lora_rank": 0, "router_score_func": _score_func(config)}
    yield Line("inherits", "_mla")
    for key, row in rows.items():
        if key.startswith("router_num_") and (config.get("n_group") or 1) == 1:
            continue  # one group of all experts is no limit
        theirs, value = foreign.names.get(row.key, row.key), config.get(row.key)
        value = defaults.get(key) if value is None else value
        if value is None:
            absent.append(theirs)
        elif isinstance(value, list | dict):
            raise EzpzError(f"{foreign.source}: {theirs} must be a single value.")
        yield Line(key, value, theirs if theirs != key else "")
    longest = "max_position_embeddings"
    if config.get(longest) is None:
        absent.append(foreign.names.get(longest, longest))
    if absent:
        raise EzpzError(f"{foreign.source}: lacks {', '.join(absent)}.")
    yield from _rope(foreign)


def _size_rows() -> list[ForeignKey]:
    """Return the rows that give a flavor's dimensions."""
    others = ("num_experts", "num_local_experts")  # other families' names for n_routed_experts
    rows = [row for row in projects()["hf"].keys if row.ours in Dimensions.model_fields]
    return [row for row in rows if row.key not in others]


def _score_func(config: Mapping[str, Any]) -> str:
    return "softmax" if config.get("model_type") == "deepseek_v2" else "sigmoid"


def _rope(foreign: Foreign) -> Iterator[Line]:
    """Yield ``mscale`` and the lines of ``[rope]``."""
    config = foreign.config
    # Two names for the same, of transformers 5 and before.
    found = config.get("rope_parameters") or config.get("rope_scaling") or {}
    rope = found if isinstance(found, dict) else {}
    longest = config.get("max_position_embeddings")
    is_yarn = rope.get("rope_type", rope.get("type")) == "yarn"

    def said(key: str, default: float) -> float:
        return float(number(foreign.source, rope, key) or default)

    theta = number(foreign.source, config, "rope_theta") or 1e4
    yield Line("mscale", said("mscale_all_dim", 0) if is_yarn else 1.0)
    yield Line("rope.theta", said("rope_theta", theta))
    yield Line("rope.max_seq_len", longest, "max_position_embeddings")
    yield Line("rope.scaling", "yarn" if is_yarn else "none")
    yield Line("rope.rope_factor", said("factor", 1) if is_yarn else 1.0)
    yield Line("rope.beta_fast", said("beta_fast", 32))
    yield Line("rope.beta_slow", said("beta_slow", 1))
    yield Line("rope.original_seq_len", rope.get("original_max_position_embeddings") or longest)


def _tried(foreign: Foreign, lines: Sequence[Line]) -> tuple[str, tuple[str, ...], tuple[str, ...]]:
    """Return a flavor's text, what its model computes otherwise than the config, and notes."""
    # Only now, for they import torch: most mistakes in the file are reported before.
    from ezpz_moe.tools.checkpoints.huggingface.config import transformers_class
    from ezpz_moe.tools.checkpoints.huggingface.differences import config_differences, eps_note

    text = _toml([*lines, *foreign.routing])
    check_host()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "converted.toml")
        file.write_text(text, encoding="utf-8")
        try:
            architecture = host().architecture(load_flavor("converted", near=Path(folder)))
        except EzpzError as error:
            message = str(error).replace(str(file.resolve()), str(foreign.source))
            raise EzpzError(f"{message} (as a flavor)") from error
    if architecture is None:
        raise EzpzError("convert --from needs torchtitan 0.3 or later: 0.2 takes no [balance].")
    form = transformers_class(architecture)
    of_class = form.differences if foreign.is_of_class else ()
    found = [*of_class, *config_differences(foreign.config, form)]
    differences = tuple(_in_their_words(each, foreign.names) for each in found)
    notes = tuple(_of_their_file(each, foreign) for each in eps_note(foreign.config, form))
    return text, differences, notes


def _of_their_file(note: str, foreign: Foreign) -> str:
    return note.replace(CONFIG, foreign.source.name).replace(_EPS, foreign.names.get(_EPS, _EPS))


def _in_their_words(difference: str, names: Mapping[str, str]) -> str:
    key, of, rest = difference.partition(" is ")
    return f"{names.get(key, key)}{of}{rest}"


# The file -----------------------------------------------------------------------------------------


def _toml(lines: Iterable[Line]) -> str:
    """Write the lines, with their tables last."""
    tables: dict[str, list[str]] = {"": []}
    for line in lines:
        table, _, key = line.key.rpartition(".")
        text = assignment(key, line.value, line.comment)
        tables.setdefault(table, []).append(commented(text) if line.is_off else text)
    top = tables.pop("")
    in_order = sorted(
        tables, key=lambda table: table.count(".")
    )  # [balance] before [balance.batch]
    return "".join([*top, *(f"\n[{table}]\n{''.join(tables[table])}" for table in in_order)])


def lines_of(row: ForeignKey, lines: Iterable[Line]) -> list[Line]:
    """Return the lines that a key has become; of losses of several scopes, one in each table."""
    lines = list(lines)
    table, _, name = row.ours.rpartition(".")
    keys = {row.ours}
    if table == "balance" and row.ours not in {line.key for line in lines}:
        loss = "aux_loss" if name == "scope" else name
        keys = {f"balance.{scope}.{loss}" for scope in SCOPES}
    return [line for line in lines if line.key in keys or line.comment == row.key]


def note_of(row: ForeignKey, lines: Sequence[Line]) -> str:
    """Return what a report says of a key that has a row in the table of foreign keys."""
    return " and ".join(_said(row, line) for line in lines) or row.place


def _said(row: ForeignKey, line: Line) -> str:
    comment = f" ({line.comment})" if line.comment not in ("", row.key) else ""
    off = ", commented out" if line.is_off else ""
    return f"{replace(row, ours=line.key).place} = {shown(line.value)}{off}{comment}"
