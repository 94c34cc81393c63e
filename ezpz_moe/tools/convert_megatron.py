"""Read the arguments of Megatron-Core for :mod:`.convert_foreign`.

A YAML file of them, flat or in sections, with keys as they stand in its configs
(``moe_router_topk``) or as flags (``--moe-router-topk``).
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from ezpz_moe.config.foreign_keys import projects
from ezpz_moe.config.job import is_one_of, shown
from ezpz_moe.errors import EzpzError, printable
from ezpz_moe.tools.convert import Change, Conversion
from ezpz_moe.tools.convert_foreign import (
    Foreign,
    converted,
    lines_of,
    note_of,
    number,
)
from ezpz_moe.tools.convert_megatron_router import Routing, as_number

_LOST = {
    "moe_router_force_biased": 'for uneven loads see noise of [router] routing = "balanced"',
    "moe_router_force_load_balancing": "set [debug] moe_force_load_balance in the job",
    "moe_latent_size": "experts work in the model's dimension here",
    "moe_shared_expert_gate": "shared experts have no gate here",
    "mtp_num_layers": "a flavor's model has no layers that predict further tokens",
}
"""Keys with an effect that a flavor cannot have, unless they are off."""
_ONLY: dict[str, tuple[Any, ...]] = {
    "swiglu": (True,),
    "gated_linear_unit": (True,),
    "normalization": ("RMSNorm",),
    "add_bias_linear": (False,),
    "disable_bias_linear": (True,),
    "qk_layernorm": (True,),
    "position_embedding_type": ("rope",),
    "rotary_percent": (1, 1.0),
    "use_rotary_position_embeddings": (True,),
}
"""What torchtitan's models do, by the key that says so."""
_NAMES = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_attention_heads",
    "num_key_value_heads": "num_query_groups",
    "head_dim": "kv_channels",
    "intermediate_size": "ffn_hidden_size",
    "moe_intermediate_size": "moe_ffn_hidden_size",
    "num_experts_per_tok": "moe_router_topk",
    "max_position_embeddings": "max_position_embeddings",
    "q_lora_rank": "q_lora_rank",
    "kv_lora_rank": "kv_lora_rank",
    "qk_nope_head_dim": "qk_head_dim",
    "qk_rope_head_dim": "qk_pos_emb_head_dim",
    "v_head_dim": "v_head_dim",
    "scoring_func": "moe_router_score_function",
    "routed_scaling_factor": "moe_router_topk_scaling_factor",
    "n_group": "moe_router_num_groups",
    "topk_group": "moe_router_group_topk",
}
"""transformers' key -> Megatron's."""
_MADE_OF = {
    "first_k_dense_replace": "moe_layer_freq",
    "mlp_only_layers": "moe_layer_freq",
    "n_shared_experts": "moe_shared_expert_intermediate_size",
    "norm_topk_prob": "moe_router_pre_softmax",
    "tie_word_embeddings": "untie_embeddings_and_output_weights",
}
"""transformers' key -> Megatron's, of another form."""
_EPS = ("layernorm_epsilon", "norm_epsilon")
"""The eps of its norms, as its configs and its flags call it."""
_OF_MLA = {
    "q_lora_rank": 512,
    "kv_lora_rank": 512,
    "qk_head_dim": 128,
    "qk_pos_emb_head_dim": 64,
    "v_head_dim": 128,
    "rope_type": "yarn",
    "rotary_scaling_factor": 40,
    "original_max_position_embeddings": 4096,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 0.0,
}
"""Megatron's defaults with latent attention."""
_DEFAULTS = {
    "moe_router_topk": 2,
    "moe_router_score_function": "softmax",
    "moe_router_topk_scaling_factor": 1.0,
    "moe_router_load_balancing_type": "aux_loss",
    "moe_aux_loss_coeff": 0.0,
    "moe_token_drop_policy": "probs",
    "rotary_base": 10000,
}


def from_megatron(source: Path) -> Conversion:
    """Return the flavor of a file of Megatron's arguments, or why there is none.

    Raises:
        EzpzError: the file cannot be read, is not YAML, has a key twice, or as :func:`.converted`.
    """
    try:
        said = dict(_flat(source, _read(source)))
    except RecursionError:
        raise EzpzError(f"{source}: a section holds itself.") from None
    if "model_type" in said:
        raise EzpzError(f"{source}: has model_type, as configs of Hugging Face: use --from hf.")
    is_mla = said.get("multi_latent_attention") is True
    values = {**_DEFAULTS, **(_OF_MLA if is_mla else {}), **said}
    routing = Routing(source, values)
    config = _config(source, values, routing.experts_that_rank, is_mla=is_mla)
    changes = tuple(_change(key, value, routing) for key, value in said.items())
    experts = "num_experts" if "num_experts" in said else "num_moe_experts"
    eps = next((key for key in _EPS if key in said), _EPS[-1])
    names = {**_NAMES, **_MADE_OF, "n_routed_experts": experts, "num_experts": experts}
    names["rms_norm_eps"] = eps
    lines = tuple(routing.lines)
    return converted(
        Foreign(source, "Megatron-Core", config, names, lines, changes, is_of_class=False)
    )


# The file -----------------------------------------------------------------------------------------


def _read(source: Path) -> Mapping[str, Any]:
    try:
        document = yaml.safe_load(source.read_bytes())
    except OSError as error:
        raise EzpzError(f"{source}: cannot be read: {error.strerror}.") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise EzpzError(f"{source}: is not YAML: {_one_line(error)}.") from error
    if not isinstance(document, dict):
        raise EzpzError(f"{source}: holds no arguments: it must be keys with values.")
    return document


def _one_line(error: Exception) -> str:
    return printable(" ".join(str(error).split()))


def _flat(source: Path, document: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield every key with its value; sections have no meaning to Megatron."""
    seen: dict[str, Any] = {}
    for key, value in _leaves(document):
        name = printable(str(key)).lstrip("-").replace("-", "_")
        if name in seen and seen[name] != value:
            raise EzpzError(
                f"{source}: {name} stands there twice, with "
                f"{printable(repr(seen[name]))} and {printable(repr(value))}."
            )
        if name not in seen:
            seen[name] = value
            yield name, as_number(value)


def _leaves(document: Mapping[str, Any]) -> Iterator[tuple[Any, Any]]:
    for key, value in document.items():
        if isinstance(value, dict):
            yield from _leaves(value)
        else:
            yield key, value


def _change(key: str, value: Any, routing: Routing) -> Change:
    if key in _LOST and value not in (None, False, 0):
        return Change(key, value, "dropped", _LOST[key])
    if key in _ONLY:
        fits = is_one_of(_ONLY[key], value)
        note = f"torchtitan's model is that of {key} = {shown(_ONLY[key][0])}"
        return Change(key, value, "kept" if fits else "dropped", note)
    if why := routing.lost.get(key):
        return Change(key, value, "dropped", why)
    if why := routing.used.get(key):
        return Change(key, value, "kept", why)
    project = projects()["megatron"]
    row = next((row for row in project.keys if row.key == key), None)
    lines = lines_of(row, routing.lines) if row else []
    if row is not None and (lines or row.is_size):
        return Change(key, value, "kept", f"now {note_of(row, lines)}")
    if row is not None:
        return Change(key, value, "needless", f"see {row.place} here" if row.ours else row.note)
    if key in project.compared or key in _OF_MLA:
        return Change(key, value, "kept", "compared with the flavor's model")
    if key in project.needless:
        return Change(key, value, "needless", "changes how it is computed, and not what")
    if key.startswith("moe_router_") and value not in (None, False):
        return Change(key, value, "dropped", "ezpz_moe does not know this key")
    return Change(key, value, "needless", "says nothing of the model or its router")


# The model, in the words of transformers ----------------------------------------------------------


def _config(
    source: Path, values: Mapping[str, Any], experts_that_rank: int, *, is_mla: bool
) -> dict[str, Any]:
    config = {theirs: values[ours] for theirs, ours in _NAMES.items() if ours in values}
    experts = values.get("num_experts", values.get("num_moe_experts"))
    if not experts:
        raise EzpzError(f"{source}: num_experts is not set: the model has no experts.")
    if is_mla and not values.get("vocab_size"):
        raise EzpzError(
            f"{source}: lacks vocab_size: Megatron takes it from the tokenizer. Add it, "
            "vocab_size: N."
        )
    config.setdefault("moe_intermediate_size", values.get("ffn_hidden_size"))
    score, top_k = values["moe_router_score_function"], values["moe_router_topk"]
    dense = _dense_layers(source, values)
    # Softmax over the chosen logits is softmax over all, divided by the sum of the chosen.
    is_normalized = not values.get("moe_router_pre_softmax") if score == "softmax" else top_k != 1
    config |= {
        "norm_topk_prob": is_normalized,
        "tie_word_embeddings": not values.get("untie_embeddings_and_output_weights", True),
        "rms_norm_eps": next((values[key] for key in _EPS if key in values), 1e-5),
    }
    if not is_mla:
        return config | {
            "model_type": _grouped_query_type(values),
            "num_experts": experts,
            "mlp_only_layers": list(range(dense)),
            "rope_theta": values["rotary_base"],
        }
    shared = number(source, values, "moe_shared_expert_intermediate_size")
    hidden = number(source, config, "moe_intermediate_size")
    return config | {
        "model_type": "deepseek_v2" if score == "softmax" else "deepseek_v3",
        "n_routed_experts": experts,
        "n_shared_experts": int(shared // hidden) if hidden else 0,
        "first_k_dense_replace": dense,
        "n_group": values["moe_router_num_groups"] if experts_that_rank else 1,
        "topk_method": "group_limited_greedy" if experts_that_rank == 1 else "greedy",
        "topk_group": values.get("moe_router_group_topk") or 1,
        "rope_theta": values["rotary_base"],
        "rope_scaling": _rope(values),
    }


def _grouped_query_type(values: Mapping[str, Any]) -> str:
    """Return the ``model_type`` of a model without latent attention."""
    # The class that computes torchtitan's Qwen3, and has none of these, is not asked about them.
    keys = ("moe_router_num_groups", "moe_shared_expert_intermediate_size")
    others = [key for key in keys if values.get(key)]
    if values["moe_router_score_function"] != "softmax":
        others.append(f"{values['moe_router_score_function']} scores")
    if values["moe_router_topk_scaling_factor"] not in (None, 1):
        others.append("moe_router_topk_scaling_factor")
    return "qwen3_moe" + (f" with {' and '.join(others)}" if others else "")


def _rope(values: Mapping[str, Any]) -> dict[str, Any] | None:
    if values["rope_type"] != "yarn":
        return None
    keys = ("original_max_position_embeddings", "beta_fast", "beta_slow", "mscale")
    return {
        "type": "yarn",
        "factor": values["rotary_scaling_factor"],
        "mscale_all_dim": values["mscale_all_dim"],
        **{key: values[key] for key in keys},
    }


def _dense_layers(source: Path, values: Mapping[str, Any]) -> int:
    """Return how many layers come first and are dense."""
    pattern = values.get("moe_layer_freq", 1)
    if isinstance(pattern, str):
        pattern = _evaluated(source, pattern)
    if pattern == 1:
        return 0
    dense = pattern.index(1) if isinstance(pattern, list) and 1 in pattern else 0
    if not isinstance(pattern, list) or 0 in pattern[dense:]:
        raise EzpzError(
            f"{source}: moe_layer_freq = {printable(repr(pattern))}: a model is converted only if "
            "its dense layers are the first ones. Others are a flavor with moe_layers, which you "
            "have to write."
        )
    return dense


def _evaluated(source: Path, text: str) -> Any:
    """Return what an expression of lists such as "[0]*3+[1]*58" makes."""
    try:
        return _value(ast.parse(text, mode="eval").body)
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        raise EzpzError(
            f"{source}: moe_layer_freq = {printable(repr(text))}: must be a number, a list of 0 "
            "and 1, or a sum of such lists times numbers."
        ) from None


def _value(node: ast.expr) -> Any:
    match node:
        case ast.Constant(value=int() as number_) if 0 <= number_ < 1024:
            return number_
        case ast.List(elts=items):
            return [_value(item) for item in items]
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return _value(left) + _value(right)
        case ast.BinOp(left=ast.List() as left, op=ast.Mult(), right=ast.Constant() as right):
            return _value(left) * _value(right)
    raise ValueError
