"""Whether the ``config.json`` beside safetensors describes the model that they should become."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ezpz_moe.errors import EzpzError
from ezpz_moe.tools.checkpoints.huggingface.config import TransformersClass
from ezpz_moe.tools.checkpoints.huggingface.files import CONFIG, read_config

_DEFAULTS: dict[str, dict[str, Any]] = {
    "deepseek_v2": {"topk_method": "greedy", "routed_scaling_factor": 1.0, "rms_norm_eps": 1e-6},
    "deepseek_v3": {
        "rms_norm_eps": 1e-6,
        "n_group": 8,
        "topk_group": 4,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "num_experts_per_tok": 8,
    },
    "qwen3": {"rms_norm_eps": 1e-6},
    "qwen3_moe": {"norm_topk_prob": False, "num_experts_per_tok": 8, "rms_norm_eps": 1e-6},
    "gpt_oss": {
        "rms_norm_eps": 1e-5,
        "num_experts_per_tok": 4,
        "sliding_window": 128,
        "swiglu_limit": 7.0,
        "swiglu_alpha": 1.702,
    },
}
"""What transformers takes for an absent key that no tensor's name or shape shows."""
_DEFAULT_ROPE = {
    "gpt_oss": {
        "rope_type": "yarn",
        "rope_theta": 150000.0,
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "truncate": False,
    }
}
"""The other classes have plain positions."""
_DEFAULT_THETA = 10000.0
_OTHERWISE = {
    # compared below, in another way; ties with the tensors, by find_tied()
    *("architectures", "model_type", "rms_norm_eps", "rope_parameters", "tie_word_embeddings"),
    # of no consequence for the logits of sequences that both can hold
    *("max_position_embeddings", "num_nextn_predict_layers"),
}


def check_config(folder: Path, form: TransformersClass, model: str) -> list[str]:
    """Check that the ``config.json`` in ``folder`` describes a model that a flavor needs.

    Args:
        form: the model's class of transformers.
        model: the model, in words, for the message.

    Returns:
        What the user should know: small deviations, or that there is nothing to compare.

    Raises:
        EzpzError: it describes another model; it cannot be read; or no class computes this one.
    """
    config = read_config(folder)
    of_config = () if config is None else config_differences(config, form)
    if differences := [*form.differences, *of_config]:
        raise EzpzError(
            f"{folder}: is not {model} (for transformers, {form.name}): {'; '.join(differences)}."
        )
    if config is None:
        return [
            f"There is no {CONFIG}: only names and shapes were compared with the flavor, and not "
            "what they do not show, such as rotary positions."
        ]
    return [*eps_note(config, form), *form.notes]


def config_differences(config: Mapping[str, Any], form: TransformersClass) -> Iterator[str]:
    """Yield what ``config`` says otherwise than the flavor's model.

    An absent key says what transformers takes for it, or nothing if the tensors show it.
    """
    model_type, classes = form.config["model_type"], config.get("architectures")
    is_named = isinstance(classes, list) and form.name in classes
    if not is_named and (found := config.get("model_type")) not in (None, model_type):
        yield f"model_type is {found!r}, not {model_type!r}"
        return  # whose keys have other meanings
    said = {**_DEFAULTS[model_type], **config}
    for key, wanted in form.config.items():
        if key not in _OTHERWISE and key in said and not _same(said[key], wanted):
            yield _difference(key, said[key], wanted, is_default=key not in config)
    yield from _rope_differences(_rope(config, model_type), _rope(form.config, model_type))


def eps_note(config: Mapping[str, Any], form: TransformersClass) -> Iterator[str]:
    """Yield a note if the norms' eps differs: no flavor can change the host's."""
    key, wanted = "rms_norm_eps", form.config["rms_norm_eps"]
    found = config.get(key, _DEFAULTS[form.config["model_type"]][key])
    if not _same(found, wanted):
        absent = "" if key in config else " by default"
        yield f"{CONFIG} has {key} = {found!r}{absent}, torchtitan computes with {wanted}"


def _difference(key: str, found: Any, wanted: Any, *, is_default: bool = False) -> str:
    absent = " by default (the key is absent)" if is_default else ""
    # As a literal: it is a stranger's text, and may hold what a terminal acts on.
    return f"{key} is {found!r}{absent}, the flavor has {wanted}"


def _rope_differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> Iterator[str]:
    kind = "rope_type"  # Of another kind, the rest has other meanings.
    for key in wanted if found[kind] == wanted[kind] else [kind]:
        if not _same(found.get(key), wanted[key]):
            yield _difference(f"rope: {key}", found.get(key), wanted[key])


def _rope(config: Mapping[str, Any], model_type: str) -> dict[str, Any]:
    """Return what rotary positions compute, as transformers does with its defaults."""
    default = _DEFAULT_ROPE.get(model_type, {})
    # rope_scaling and, below, its key `type` are older names, which transformers still reads.
    rope = config.get("rope_parameters") or config.get("rope_scaling") or default
    if not isinstance(rope, dict):
        return {"rope_type": rope}
    theta = rope.get("rope_theta", config.get("rope_theta"))
    if theta is None:
        theta = default.get("rope_theta", _DEFAULT_THETA)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "yarn":
        return {"rope_type": kind, "rope_theta": theta}
    factor, of_scores = rope.get("factor", 1), rope.get("mscale_all_dim") or 0
    # `or` for the betas, as in transformers: null and 0 mean the default there too.
    return {
        "rope_type": kind,
        "rope_theta": theta,
        "factor": factor,
        "beta_fast": rope.get("beta_fast") or 32,
        "beta_slow": rope.get("beta_slow") or 1,
        "original_max_position_embeddings": rope.get("original_max_position_embeddings"),
        "truncate": rope.get("truncate", True),
        "attention_factor": _attention_factor(rope, factor, of_scores),
        "mscale_all_dim": of_scores,
    }


def _attention_factor(rope: Mapping[str, Any], factor: Any, of_scores: Any) -> Any:
    """Return what positions are scaled by; None if it is made of something else than numbers."""
    given, own = rope.get("attention_factor"), rope.get("mscale")
    if given is not None:
        return given
    try:
        if own and of_scores:
            return _mscale(factor, own) / _mscale(factor, of_scores)
        return _mscale(factor, 1)
    except (ArithmeticError, TypeError):
        return None


def _mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1


def _same(found: Any, wanted: Any) -> bool:
    if isinstance(found, int | float) and isinstance(wanted, int | float):
        # An integer may be too large for a float.
        return found == wanted or (abs(found) < 2**53 and math.isclose(found, wanted, rel_tol=1e-9))
    return bool(found == wanted)
