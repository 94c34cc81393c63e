"""Whether the ``config.json`` beside safetensors describes the model that they should become."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from ezpz_moe.tools.checkpoints.huggingface.config import TransformersClass
from ezpz_moe.tools.checkpoints.huggingface.files import CONFIG

_OTHERWISE = {
    # compared below, in another way
    *("architectures", "model_type", "rms_norm_eps", "rope_parameters"),
    # of no consequence for the logits of sequences that both can hold
    *("max_position_embeddings", "num_nextn_predict_layers"),
}


def config_differences(config: Mapping[str, Any], form: TransformersClass) -> Iterator[str]:
    """Yield what ``config`` says otherwise than the flavor's model. An absent key says nothing."""
    if form.name not in (config.get("architectures") or ()):
        wanted = form.config["model_type"]
        if (found := config.get("model_type")) not in (None, wanted):
            yield f"model_type is {found}, the flavor's model is a {wanted}"
            return  # whose keys have other meanings
    for key, wanted in form.config.items():
        if key not in _OTHERWISE and key in config and not _same(config[key], wanted):
            yield f"{key} is {config[key]}, the flavor has {wanted}"
    found_rope, wanted_rope = _rope(config), _rope(form.config)
    if found_rope is not None and wanted_rope is not None:
        for key, wanted in wanted_rope.items():
            if not _same(found := found_rope.get(key), wanted):
                yield f"rope: {key} is {found}, the flavor has {wanted}"


def eps_note(config: Mapping[str, Any], form: TransformersClass) -> Iterator[str]:
    """Yield a note if the norms' eps differs: no flavor can change the host's."""
    found, wanted = config.get("rms_norm_eps"), form.config["rms_norm_eps"]
    if found is not None and not _same(found, wanted):
        yield f"{CONFIG} has rms_norm_eps = {found}, torchtitan computes with {wanted}"


def _rope(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return what rotary positions compute, as transformers does with its defaults."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = rope.get("rope_theta", config.get("rope_theta"))
    if theta is None:
        return None
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "yarn":
        return {"rope_type": kind, "rope_theta": theta}
    factor, of_scores = rope.get("factor", 1), rope.get("mscale_all_dim") or 0
    given, own = rope.get("attention_factor"), rope.get("mscale")
    if given is None and own and of_scores:
        given = _mscale(factor, own) / _mscale(factor, of_scores)
    return {
        "rope_type": kind,
        "rope_theta": theta,
        "factor": factor,
        "beta_fast": rope.get("beta_fast") or 32,
        "beta_slow": rope.get("beta_slow") or 1,
        "original_max_position_embeddings": rope.get("original_max_position_embeddings"),
        "truncate": rope.get("truncate", True),
        "attention_factor": _mscale(factor, 1) if given is None else given,
        "mscale_all_dim": of_scores,
    }


def _mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1


def _same(found: Any, wanted: Any) -> bool:
    if isinstance(found, int | float) and isinstance(wanted, int | float):
        return math.isclose(found, wanted, rel_tol=1e-9)
    return bool(found == wanted)
