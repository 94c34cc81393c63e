"""Read a ``config.json`` of Hugging Face for :mod:`.convert_foreign`.

transformers' balance loss is sum over experts of E f P, with f in choices of a token, which add up
to top-k, and one f and P for all layers together; it is added once. Ours has f as a share of the
choices, and is added for each layer: so top-k / MoE layers times their coefficient is the same loss
where the layers are alike (``tests/test_peers_formulas.py``).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ezpz_moe.config.foreign_keys import projects
from ezpz_moe.config.job import is_one_of
from ezpz_moe.errors import EzpzError, printable
from ezpz_moe.tools.convert import Change, Conversion
from ezpz_moe.tools.convert_foreign import (
    Foreign,
    Line,
    Loss,
    balance_lines,
    converted,
    lines_of,
    note_of,
    number,
)

_ONLY: dict[str, tuple[tuple[Any, ...], str]] = {
    "moe_layer_freq": ((1,), "every layer after the first dense ones has experts here"),
    "num_nextn_predict_layers": (
        (0, None),
        "a flavor's model has no layers that predict further tokens",
    ),
    "attention_dropout": ((0, 0.0, None), "torchtitan's attention has no dropout"),
    "hidden_dropout": ((0, 0.0, None), "torchtitan's layers have no dropout"),
    "resid_pdrop": ((0, 0.0, None), "torchtitan's layers have no dropout"),
}
"""Values without effect, and why another is lost."""
_BY_BEST = "group_limited_greedy"
"""``topk_method`` of DeepSeek-V2: groups ranked by their best expert."""


def from_hf(source: Path) -> Conversion:
    """Return the flavor of a ``config.json``, or why there is none.

    Raises:
        EzpzError: the file cannot be read, is no config, or as :func:`.converted`.
    """
    said = _read(source)
    has_groups = said.get("model_type") != "deepseek_v2" or said.get("topk_method") == _BY_BEST
    config = said if has_groups else said | {"n_group": 1}
    lines = tuple(_routing(source, config))
    project = projects()["hf"]
    rows = {row.key: row for row in project.keys if row.ours}
    changes = []
    for key, value in said.items():
        if key in ("n_group", "topk_group") and not has_groups:
            changes.append(
                Change(key, value, "needless", f"read with topk_method {_BY_BEST} alone")
            )
        elif key in _ONLY and not is_one_of(_ONLY[key][0], value):
            changes.append(Change(key, value, "dropped", _ONLY[key][1]))
        elif key in rows:
            note = note_of(rows[key], lines_of(rows[key], lines))
            changes.append(Change(key, value, "kept", f"now {note}"))
        elif key in project.compared:
            changes.append(Change(key, value, "kept", "compared with the flavor's model"))
        elif key in project.needless or key in _ONLY:
            changes.append(Change(key, value, "needless", "a flavor needs no such key"))
        else:
            changes.append(Change(key, value, "dropped", "ezpz_moe does not know this key"))
    return converted(Foreign(source, "Hugging Face", config, {}, lines, tuple(changes)))


def _read(source: Path) -> dict[str, Any]:
    try:
        config = json.loads(source.read_bytes())
    except OSError as error:
        raise EzpzError(f"{source}: cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError too
        raise EzpzError(f"{source}: is not JSON: {error}.") from error
    if not isinstance(config, dict):
        raise EzpzError(f"{source}: is not a config: it holds a list or a single value.")
    if "model_type" not in config:
        raise EzpzError(f"{source}: is not a config of Hugging Face: it lacks model_type.")
    return {printable(key): value for key, value in config.items()}


def _routing(source: Path, config: Mapping[str, Any]) -> Iterator[Line]:
    """Yield the lines of ``[router]`` and ``[balance]``, and what ranks groups of experts."""
    if config.get("topk_method") == _BY_BEST and (config.get("n_group") or 1) != 1:
        yield Line("router_group_score", "max", "topk_method")
    for key in ("router_jitter_noise", "input_jitter_noise"):
        if noise := number(source, config, key):
            yield Line("router.jitter_noise", noise, key)
    yield from balance_lines(_losses(source, config))
    if config.get("topk_method") == "noaux_tc" or config.get("model_type") == "deepseek_v3":
        yield Line("balance.bias_update", "sign", "the model has a selection bias")
    else:
        yield Line("balance.bias_update", "none", "the model has no selection bias")


def _losses(source: Path, config: Mapping[str, Any]) -> Iterator[Loss]:
    is_off = not config.get("output_router_logits")
    off = "; off: transformers adds it only with output_router_logits = true" if is_off else ""
    alpha = number(source, config, "aux_loss_alpha")
    scope = "sequence" if config.get("seq_aux", True) else "batch"
    if coefficient := number(source, config, "router_aux_loss_coef"):
        if alpha and not is_off:
            raise EzpzError(
                f"{source}: router_aux_loss_coef and aux_loss_alpha are both the balance loss, in "
                "other units. Remove the one that the model was not trained with."
            )
        top_k = number(source, config, "num_experts_per_tok")
        layers = _moe_layers(source, config)
        comment = (
            f"router_aux_loss_coef = {coefficient:g}, times top-k / MoE layers = "
            f"{top_k:g} / {layers:g}{off}"
        )
        in_our_units = coefficient * top_k / layers
        if not alpha:
            yield Loss("aux_loss", "batch", in_our_units, comment, is_off)
    yield Loss("aux_loss", scope, alpha, f"aux_loss_alpha = {alpha:g}")
    z_loss = number(source, config, "router_z_loss_coef")
    yield Loss("z_loss", "batch", z_loss, f"router_z_loss_coef{off}", is_off)


def _moe_layers(source: Path, config: Mapping[str, Any]) -> float:
    """Return how many layers have experts."""
    layers, step = (
        number(source, config, key, default)
        for key, default in (("num_hidden_layers", 0), ("decoder_sparse_step", 1))
    )
    dense = config.get("mlp_only_layers") or []
    dense = len(dense) if isinstance(dense, list) else 0
    dense += number(source, config, "first_k_dense_replace")
    found = layers // max(step, 1) - dense
    if found < 1:
        raise EzpzError(f"{source}: num_hidden_layers = {layers:g}: no layer has experts.")
    return found
