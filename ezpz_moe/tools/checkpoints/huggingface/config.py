"""Which class of transformers computes a model, with which ``config.json``, and what differs.

The rules are those of the modeling files of transformers 5.24. ``tests/test_hf_logits.py`` compares
the logits.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from ezpz_moe.hosts.architecture import Architecture, Attention, Experts, Rope
from ezpz_moe.routing.assignment import ranking_experts

_LATENT_EPS = 1e-6
"""The eps of the latents' norms in DeepseekV2 and DeepseekV3: a constant of the class."""


@dataclass(frozen=True)
class TransformersClass:
    """The class of transformers that comes closest to a model.

    Attributes:
        name: such as "DeepseekV3ForCausalLM".
        config: for ``config.json``, without dtype and special tokens.
        biases: its places for the experts' selection bias -> how many experts; empty if it has
            none.
        differences: what the model computes and the class does not; empty if they agree.
        notes: small deviations that no config can express.
    """

    name: str
    config: dict[str, Any]
    biases: dict[str, int]
    differences: tuple[str, ...]
    notes: tuple[str, ...]


def transformers_class(model: Architecture) -> TransformersClass:
    """Return the class of transformers for a model, and what of the model it does not compute."""
    common = _Common(model)
    if common.attention.latent is None:
        form = _gpt_oss if model.family == "gpt_oss" else _qwen3_moe
    else:
        form = _deepseek_v2 if common.experts.score_func == "softmax" else _deepseek_v3
    return _made(common, form(common), _biases(model) if form is _deepseek_v3 else {})


def dense_classes(model: Architecture) -> tuple[TransformersClass, ...]:
    """Return the classes of the dense models that a model with SwiGLU experts may be made from.

    They have its embeddings, attention and norms. The inner dimension of their FFN is left open.
    """
    layers = tuple(replace(each, dense_hidden=None, experts=None) for each in model.layers)
    common = _Common(replace(model, layers=layers))
    differences = _rope_differences(common.attention.rope)
    if common.attention.latent is None:
        differences += _qwen3_differences(common)
        return (_made(common, ("Qwen3ForCausalLM", "qwen3", _qwen3(common), differences)),)
    v2 = _latent(common.attention)
    v3 = v2 | {"rope_interleave": True}
    return (
        _made(common, ("DeepseekV3ForCausalLM", "deepseek_v3", v3, differences)),
        _made(common, ("DeepseekV2ForCausalLM", "deepseek_v2", v2, differences)),
    )


def _made(common: _Common, form: _Form, biases: dict[str, int] | None = None) -> TransformersClass:
    """Make a class, with what is the same in all configs."""
    name, model_type, config, differences = form
    model = common.model
    return TransformersClass(
        name=name,
        config={
            "architectures": [name],
            "model_type": model_type,
            "vocab_size": model.vocab_size,
            "hidden_size": model.dim,
            "num_hidden_layers": len(model.layers),
            "num_attention_heads": common.attention.heads,
            "num_key_value_heads": common.attention.kv_heads,
            "hidden_act": "silu",
            "max_position_embeddings": common.attention.rope.longest,
            "rms_norm_eps": model.norm_eps,
            "tie_word_embeddings": model.tied,
            **config,
        },
        biases=biases or {},
        differences=(*common.differences(), *differences),
        notes=tuple(_notes(common.attention)),
    )


class _Common:
    """What the layers of a model have in common: transformers' configs have one value for all."""

    def __init__(self, model: Architecture) -> None:
        self.model = model
        self.of_experts = [each.experts for each in model.layers if each.experts is not None]
        # Without the window, which may differ: gpt_oss's config has layer_types for it.
        self.of_attention = [replace(each.attention, window=None) for each in model.layers]
        self.dense_layers = [i for i, each in enumerate(model.layers) if each.experts is None]
        self.dense = [each.dense_hidden for each in model.layers if each.dense_hidden is not None]
        self.windows = [each.attention.window for each in model.layers]

    @property
    def experts(self) -> Experts:
        return self.of_experts[0]

    @property
    def attention(self) -> Attention:
        return self.of_attention[0]

    @property
    def dense_size(self) -> dict[str, int]:
        """The dense FFN's inner dimension, if there is any."""
        return {"intermediate_size": self.dense[0]} if self.dense else {}

    def differences(self) -> Iterator[str]:
        """Yield what differs from layer to layer, and parts that no class has."""
        layers = self.model.layers
        eps = [self.model.norm_eps, *(eps for each in layers for eps in each.norm_eps)]
        for what, values in (
            ("experts or router", self.of_experts),
            ("attention", self.of_attention),
            ("inner dimension of the dense FFN", self.dense),
            ("norm eps", eps),
        ):
            if any(value != values[0] for value in values):
                yield f"its layers differ in {what}"
        yield from (f"it has {part}" for part in self.model.besides)
        if self.model.tied:
            # Their adapters do not convert one parameter at a time; no mixture of experts has it.
            yield "its embedding and its output share their weight"


_Form = tuple[str, str, dict[str, Any], list[str]]
"""Name, model_type, config and differences."""


def _deepseek_v2(common: _Common) -> _Form:
    experts = common.experts
    differences = _deepseek_differences(common)
    best = _ranking_experts(experts)
    differences += _group_differences(experts, "DeepseekV2 chooses them by the best one", 1)
    differences += _when(
        experts.route_norm, "its router normalizes the weights of softmax, DeepseekV2 does not"
    )
    differences += _when(
        common.model.dim % common.attention.heads > 0,
        f"DeepseekV2 refuses a dim ({common.model.dim}) that is not a multiple of its "
        f"{common.attention.heads} heads",
    )
    config = {
        **_deepseek(common),
        "topk_method": "group_limited_greedy" if best == 1 else "greedy",
        "mlp_bias": False,
    }
    if best == 1:
        config |= {"n_group": experts.groups, "topk_group": experts.limited_groups}
    return "DeepseekV2ForCausalLM", "deepseek_v2", config, differences


def _deepseek_v3(common: _Common) -> _Form:
    experts = common.experts
    config = {
        **_deepseek(common),
        # One group of all experts limits nothing.
        "n_group": experts.groups or 1,
        "topk_group": experts.limited_groups or 1,
        "norm_topk_prob": experts.route_norm,
        "rope_interleave": True,
        "num_nextn_predict_layers": 0,
    }
    differences = _deepseek_differences(common)
    differences += _group_differences(experts, "DeepseekV3 chooses them by the two best", 2)
    return "DeepseekV3ForCausalLM", "deepseek_v3", config, differences


def _ranking_experts(experts: Experts) -> int:
    """Return how many of its best experts a group is ranked by, 0 without a limit to groups."""
    groups, limited = experts.groups, experts.limited_groups
    if groups is None or limited is None or groups == limited:
        return 0
    size = experts.number // groups
    return ranking_experts(experts.group_score, top_k=experts.top_k, limited=limited, size=size)


def _group_differences(experts: Experts, theirs: str, as_theirs: int) -> list[str]:
    best = _ranking_experts(experts)
    by = {1: "best expert", 2: "two best experts"}.get(best, f"{best} best experts")
    return _when(
        best not in (0, as_theirs),
        f"a token's experts lie in {experts.limited_groups} of {experts.groups} groups, chosen by "
        f"their {by}; {theirs}",
    )


def _deepseek(common: _Common) -> dict[str, Any]:
    experts = common.experts
    return {
        **common.dense_size,
        "first_k_dense_replace": len(common.dense_layers),
        "moe_intermediate_size": experts.hidden,
        "num_experts_per_tok": experts.top_k,
        "n_routed_experts": experts.number,
        "n_shared_experts": experts.shared_hidden // experts.hidden,
        "routed_scaling_factor": experts.route_scale,
        **_latent(common.attention),
    }


def _latent(attention: Attention) -> dict[str, Any]:
    latent = attention.latent
    assert latent is not None
    # The class scales the scores by its square, and positions by attention_factor, unless it is
    # given. The host scales the scores alone.
    mscale = {"mscale": latent.mscale, "mscale_all_dim": latent.mscale}
    return {
        "q_lora_rank": latent.q_lora_rank or None,  # none is 0 in the host
        "kv_lora_rank": latent.kv_lora_rank,
        "qk_nope_head_dim": latent.qk_nope_head_dim,
        "qk_rope_head_dim": latent.qk_rope_head_dim,
        "v_head_dim": latent.v_head_dim,
        "attention_bias": False,
        "rope_parameters": _rope(attention.rope, 1.0, mscale),
    }


def _deepseek_differences(common: _Common) -> list[str]:
    experts = common.experts
    return [
        *_rope_differences(common.attention.rope),
        *_when(
            experts.shared_hidden == 0,
            "it has no shared experts",
        ),
        *_when(
            experts.shared_hidden % experts.hidden > 0,
            f"its shared experts have {experts.shared_hidden} inner dimensions, which is not a "
            f"multiple of an expert's {experts.hidden}",
        ),
        *_when(
            common.dense_layers != list(range(len(common.dense_layers))),
            "its dense layers are not the first ones",
        ),
    ]


def _qwen3_moe(common: _Common) -> _Form:
    experts = common.experts
    differences = [
        *_grouped_query_differences(common),
        *_qwen3_differences(common),
        *_when(experts.swiglu_limit is not None, "its experts clamp their activation"),
    ]
    config = {
        **_qwen3(common),
        **common.dense_size,
        "mlp_only_layers": common.dense_layers,
        "decoder_sparse_step": 1,  # all layers have experts, but for mlp_only_layers
        "moe_intermediate_size": experts.hidden,
        "num_experts": experts.number,
        "num_experts_per_tok": experts.top_k,
        "norm_topk_prob": experts.route_norm,
    }
    return "Qwen3MoeForCausalLM", "qwen3_moe", config, differences


def _qwen3(common: _Common) -> dict[str, Any]:
    return {
        "head_dim": common.attention.head_dim,
        "attention_bias": False,
        "use_sliding_window": False,
        "rope_parameters": _rope(common.attention.rope, 1.0),
    }


def _qwen3_differences(common: _Common) -> list[str]:
    return [
        *_when(
            common.attention.norm_eps != (common.model.norm_eps,),
            "queries and keys are normalized in another way",
        ),
        *_when(common.windows != [None] * len(common.windows), "attention has a window"),
    ]


def _gpt_oss(common: _Common) -> _Form:
    experts, rope = common.experts, common.attention.rope
    windows = {window for window in common.windows if window is not None}
    differences = [
        *_grouped_query_differences(common),
        *_when(not experts.route_norm, "its router does not normalize the chosen experts' weights"),
        *_when(bool(common.dense_layers), "some of its layers are dense"),
        *_when(len(windows) > 1, f"attention has windows of {sorted(windows)} tokens"),
        *_when(experts.swiglu_limit is None, "its experts do not clamp their activation"),
    ]
    # The class scales queries and keys by this, and the host their product by its square.
    factor = 0.1 * math.log(rope.factor) + 1 if rope.is_scaled else 1.0
    config = {
        "head_dim": common.attention.head_dim,
        "intermediate_size": experts.hidden,
        "num_local_experts": experts.number,
        "num_experts_per_tok": experts.top_k,
        "attention_bias": True,
        "sliding_window": max(windows, default=None),
        "layer_types": [
            "full_attention" if window is None else "sliding_attention" for window in common.windows
        ],
        "swiglu_alpha": 1.702,  # a constant of the host's
        "swiglu_limit": experts.swiglu_limit,
        "rope_parameters": _rope(rope, factor),
    }
    return "GptOssForCausalLM", "gpt_oss", config, differences


def _grouped_query_differences(common: _Common) -> list[str]:
    experts = common.experts
    return [
        *_rope_differences(common.attention.rope),
        *_when(experts.score_func != "softmax", f"its router's scores are {experts.score_func}"),
        *_when(experts.groups is not None, f"its experts are in {experts.groups} groups"),
        *_when(experts.route_scale != 1, f"its router scales weights by {experts.route_scale:g}"),
        *_when(experts.shared_hidden > 0, "it has shared experts"),
    ]


def _biases(model: Architecture) -> dict[str, int]:
    return {
        f"model.layers.{number}.mlp.gate.e_score_correction_bias": layer.experts.number
        for number, layer in enumerate(model.layers)
        if layer.experts is not None
    }


def _rope(rope: Rope, attention_factor: float, mscale: dict[str, float] | None = None) -> dict:
    if not rope.is_scaled:
        return {"rope_type": "default", "rope_theta": rope.theta}
    return {
        "rope_type": "yarn",
        "rope_theta": rope.theta,
        "factor": float(rope.factor),
        "beta_fast": float(rope.beta_fast),
        "beta_slow": float(rope.beta_slow),
        "original_max_position_embeddings": rope.original,
        "truncate": rope.truncate,
        "attention_factor": attention_factor,
        **(mscale or {}),
    }


def _rope_differences(rope: Rope) -> list[str]:
    return _when(rope.is_scaled and rope.scaling != "yarn", f'rope.scaling = "{rope.scaling}"')


def _notes(attention: Attention) -> Iterable[str]:
    eps = {eps for eps in attention.norm_eps if eps != _LATENT_EPS}
    if attention.latent is not None and eps:
        yield (
            f"transformers normalizes attention's latents with an eps of {_LATENT_EPS:g} whatever "
            f"the config says, torchtitan with {max(eps):g}"
        )


def _when(holds: bool, difference: str) -> list[str]:
    return [difference] if holds else []
