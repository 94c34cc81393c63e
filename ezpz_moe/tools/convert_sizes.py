"""Draft a flavor from the sizes of a model that somebody added to torchtitan 0.2's deepseek_v3.

A fork has its models as Python: ``"9.7B": DeepSeekV3ModelArgs(dim=2048, n_layers=27, ...)``. The
user pastes that, or names the sizes alone: ``dim=2048, n_layers=27``. It is parsed, never run. What
is not among them has the default of 0.2's class, as it would there, and the draft says so.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ezpz_moe.config.flavor_schema import Dimensions
from ezpz_moe.config.job import shown
from ezpz_moe.config.rope_schema import Rope
from ezpz_moe.config.toml_edit import assignment
from ezpz_moe.errors import EzpzError, did_you_mean, printable, short
from ezpz_moe.hosts.titan_0_2.moe_models import NO_SIZES, NOT_EXPRESSED, SIZES

_FORM = 'write --sizes "dim=2048, n_layers=27, ...", or paste the fork\'s DeepSeekV3ModelArgs(...)'
_CHOICES = (
    *("attn_type", "use_flex_attn", "use_grouped_mm"),
    *("load_balance_coeff", "score_before_experts"),
)
_BEYOND = 2**63  # TOML's own bound; also for infinity
_DEFAULT = "torchtitan 0.2's default"


@dataclass(frozen=True)
class Draft:
    """A flavor from a fork's sizes.

    Attributes:
        text: the flavor's TOML, without a comment at its top.
        left_out: fields that have 0.2's default, because no size was given.
        differences: what 0.2 computes for these sizes, and the flavor does not.
    """

    text: str
    left_out: tuple[str, ...]
    differences: tuple[str, ...]


def draft(given: str, *, seq_len: int) -> Draft:
    """Return the flavor of the sizes in ``given``.

    Args:
        given: a fork's Python, or ``key=value`` pairs.
        seq_len: tokens of a sequence of the job, for which 0.2 makes its rotary tables.

    Raises:
        EzpzError: ``given`` is neither, or has a field that no model has.
    """
    sizes = _by_their_names(parsed(given))
    values = {ours: sizes.get(name, default) for name, (ours, default) in SIZES.items()}
    # 0.2 makes its tables as long as the sequence, and scales them only beyond this.
    is_scaled = seq_len > _integer(values["rope.original_seq_len"])
    values["rope.scaling"] = "yarn" if is_scaled else "none"
    values["rope.max_seq_len"] = max(seq_len, _integer(values["rope.max_seq_len"]))
    comments = {ours: _DEFAULT for name, (ours, _) in SIZES.items() if name not in sizes}
    if "score_before_experts" not in sizes:
        comments["router_scores"] = _DEFAULT
    if values["rope.max_seq_len"] == seq_len:
        comments["rope.max_seq_len"] = "the job's training.seq_len"
    left_out = tuple(
        n for n, (_, default) in SIZES.items() if n not in sizes and default is not None
    )
    text = _toml(_choices(sizes) | values, comments)
    return Draft(text, left_out, tuple(_differences(sizes)))


def parsed(given: str) -> dict[str, Any]:
    """Return the keyword arguments in ``given``, those of calls within it among them.

    Raises:
        EzpzError: it is not of this form, or an argument is no plain value.
    """
    text = given.strip().rstrip(",")
    found: dict[str, Any] = {}
    for each in (f"({{{text}}})", f"_({text})"):  # "9.7B": Args(...), or Args(...), or key=value
        try:
            tree = ast.parse(each, mode="eval").body
        # ValueError: a null character; the others: nested too deeply.
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            continue
        nodes = tree.values if isinstance(tree, ast.Dict) else [tree]
        for node in nodes:
            found |= _arguments(node)
        if found:
            return found
    raise EzpzError(f"--sizes {short(printable(given))!r}: has no key=value: {_FORM}.")


def _arguments(node: ast.expr) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if not isinstance(node, ast.Call):
        return found
    for argument in node.args:
        found |= _arguments(argument)
    for keyword in node.keywords:
        if isinstance(keyword.value, ast.Call):
            found |= _arguments(keyword.value)
        elif keyword.arg is not None:
            found[keyword.arg] = _value(keyword.arg, keyword.value)
    return found


def _value(name: str, node: ast.expr) -> Any:
    """Return a number, a string, a truth value or None; also a product, as in ``4096 * 4``."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
        factors = (_value(name, node.left), _value(name, node.right))
        value = factors[0] * factors[1] if all(map(_is_number, factors)) else ...
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        operand = _value(name, node.operand)
        value = -operand if _is_number(operand) else ...
    else:
        value = node.value if isinstance(node, ast.Constant) else ...
    if value is None or isinstance(value, str) or _is_number(value):
        return value
    raise EzpzError(
        f"--sizes: {name} = {short(printable(ast.unparse(node)))!r}: write the number itself."
    )


def _is_number(value: Any) -> bool:
    """Return whether it is one that a size could be; True and False are numbers of Python's."""
    return isinstance(value, int | float) and abs(value) < _BEYOND


def _by_their_names(found: Mapping[str, Any]) -> dict[str, Any]:
    """Return the sizes by 0.2's names; they may also stand under a flavor's own.

    Raises:
        EzpzError: no model of torchtitan 0.2's has such a field.
    """
    theirs = {ours.rpartition(".")[2]: name for name, (ours, _) in SIZES.items()}
    known = {*SIZES, *theirs, *NOT_EXPRESSED, *_CHOICES, *NO_SIZES}
    for name in found:
        if name not in known:
            raise EzpzError(
                f"--sizes: {printable(name)} = {shown(found[name])}: torchtitan 0.2's deepseek_v3 "
                f"has no such size.{did_you_mean(name, known)}"
            )
    return {name if name in SIZES else theirs.get(name, name): v for name, v in found.items()}


def _integer(value: Any) -> int:
    """Return a length; what is none is reported with the flavor, as every wrong size is."""
    return value if isinstance(value, int) and not isinstance(value, bool) else 0


def _choices(sizes: Mapping[str, Any]) -> dict[str, Any]:
    """Return how the model is computed, and its selection bias, as keys of a flavor."""
    is_flex = sizes.get("use_flex_attn", False)  # before 0.2.2
    chosen = {"attention": sizes.get("attn_type", "flex" if is_flex else "sdpa")}
    if sizes.get("use_grouped_mm") is False:
        chosen["compute_backend"] = "for_loop"
    if sizes.get("score_before_experts", True):
        chosen["router_scores"] = "before"
    rate = sizes.get("load_balance_coeff", 1e-3)  # torchtitan's own
    if rate is None:
        chosen["balance.bias_update"] = "none"
    elif rate != 1e-3:
        chosen |= {"balance.bias_update": "sign", "balance.bias_rate": rate}
    return chosen


def _differences(sizes: Mapping[str, Any]) -> Iterator[str]:
    for name, (default, computed, difference) in NOT_EXPRESSED.items():
        if sizes.get(name, default) != computed:
            yield difference + ("" if name in sizes else f"; {_DEFAULT}, as --sizes leave it out")


def _toml(values: Mapping[str, Any], comments: Mapping[str, str]) -> str:
    """Write a flavor, its tables last; a key whose value is None stays out."""
    tables: dict[str, str] = {"": ""}
    for key, value in values.items():
        if value is not None:
            table, _, name = key.rpartition(".")
            value = float(value) if _is_float(table, name) and type(value) is int else value
            line = assignment(name, value, comments.get(key, ""))
            tables[table] = tables.get(table, f"\n[{table}]\n") + line
    return "".join(tables.values())


def _is_float(table: str, name: str) -> bool:
    """Return whether Python's 40 has to be TOML's 40.0."""
    fields = (Rope if table == "rope" else Dimensions).model_fields
    return name in fields and fields[name].annotation is float
