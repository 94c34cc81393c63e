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
from ezpz_moe.tools.convert import Change
from ezpz_moe.tools.convert_foreign import (
    FlavorConversion,
    Foreign,
    Line,
    balance_lines,
    converted,
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


def from_hf(source: Path) -> FlavorConversion:
    """Return the flavor of a ``config.json``, or why there is none.

    Raises:
        EzpzError: the file cannot be read, is no config, or as :func:`.converted`.
    """
    config = _read(source)
    lines = tuple(_routing(source, config))
    project = projects()["hf"]
    rows = {row.key: row for row in project.keys if row.ours}
    changes = []
    for key, value in config.items():
        if key in _ONLY and not is_one_of(_ONLY[key][0], value):
            changes.append(Change(key, value, "dropped", _ONLY[key][1]))
        elif key in rows:
            line = next((each for each in lines if each.key == rows[key].ours), None)
            changes.append(Change(key, value, "kept", f"now {note_of(rows[key], line)}"))
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
    return {printable(key): value for key, value in config.items()}


def _routing(source: Path, config: Mapping[str, Any]) -> Iterator[Line]:
    """Yield the lines of ``[router]`` and ``[balance]``."""
    for key in ("router_jitter_noise", "input_jitter_noise"):
        if noise := number(source, config, key):
            yield Line("router.jitter_noise", noise, key)
    yield from _losses(source, config)
    if config.get("topk_method") == "noaux_tc" or config.get("model_type") == "deepseek_v3":
        yield Line("balance.bias_update", "sign", "the model has a selection bias")
    else:
        yield Line("balance.bias_update", "none", "the model has no selection bias")


def _losses(source: Path, config: Mapping[str, Any]) -> Iterator[Line]:
    if coefficient := number(source, config, "router_aux_loss_coef"):
        top_k = number(source, config, "num_experts_per_tok")
        layers = _moe_layers(source, config)
        factor = "" if config.get("output_router_logits") else "; without output_router_logits"
        comment = (
            f"router_aux_loss_coef = {coefficient:g}, times top-k / MoE layers = "
            f"{top_k:g} / {layers:g}{factor and f'{factor}, transformers does not add it'}"
        )
        yield from balance_lines(coefficient * top_k / layers, "batch", comment)
    if alpha := number(source, config, "aux_loss_alpha"):
        by_sequence = config.get("seq_aux", True)
        scope, comment = "sequence" if by_sequence else "batch", f"aux_loss_alpha = {alpha:g}"
        yield from balance_lines(alpha, scope, comment)
    if z_loss := number(source, config, "router_z_loss_coef"):
        yield Line("balance.z_loss", z_loss, "router_z_loss_coef")


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
