"""List torchtitan 0.2's mixture-of-experts models, each as the flavor file that is the same model.

The keys are those of a flavor file (docs/reference/flavors.md). Every flavor names its attention,
because torchtitan 0.2 and 0.3 choose different ones. For deepseek_v3 it names the shipped size with
the same dimensions, and 0.2's vocabulary. The other models are torchtitan 0.3's own.
Pure data: this file imports neither torch nor torchtitan.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ezpz_moe.config.job import DENSE_MODELS as _WITHOUT_EXPERTS

SIZED = "deepseek_v3"
"""The model that a flavor's own sizes describe; of the others, 0.3's own are all there is."""

MOE_MODELS: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    SIZED: {
        "debugmodel": {"inherits": "debugmodel", "attention": "sdpa"},
        "debugmodel_flex_attn": {"inherits": "debugmodel", "attention": "flex"},
        "16B": {"inherits": "16B", "attention": "flex", "vocab_size": 102400},
        "236B": {"inherits": "236B", "attention": "flex", "vocab_size": 102400},
        "671B": {"inherits": "671B", "attention": "flex", "vocab_size": 129280},
    },
    "qwen3": {
        "debugmodel_moe": {"base": "qwen3/debugmodel_moe", "attention": "sdpa"},
        "30B-A3B": {"base": "qwen3/30B-A3B", "attention": "sdpa"},
        "235B-A22B": {"base": "qwen3/235B-A22B", "attention": "sdpa"},
    },
    "gpt_oss": {
        "debugmodel": {"base": "gpt_oss/debugmodel", "attention": "flex"},
        "20b": {"base": "gpt_oss/20b", "attention": "flex"},
        "120b": {"base": "gpt_oss/120b", "attention": "flex"},
    },
    "llama4": {},  # nothing after torchtitan 0.2 has it
}
"""Model -> flavor -> the keys of a flavor file."""

DENSE_MODELS: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(_WITHOUT_EXPERTS, ()),
    "qwen3": ("debugmodel", "0.6B", "1.7B", "4B", "8B", "14B", "32B"),
}
"""Model -> its flavors without experts; () for all."""

GONE_MODELS = ("llama", "llama2", "llama3-siglip2", "llama3_simple_fsdp", "vlm")
"""Dense models of torchtitan 0.2, or of the releases before, that 0.3 does not have."""

TRANSFORMERS_MODELS = ("transformers_backend", "transformers_modeling_backend")
"""Experiments whose model ``[hf_transformers] model`` names. Names in no table are a fork's."""

MODULES: Mapping[str, str] = {"llama3_ft": "torchft.llama3"}
"""What ``--module`` of 0.3 calls a model that has another name there."""

LONGEST: Mapping[str, int] = {
    "qwen3/debugmodel_moe": 4096,
    "qwen3/30B-A3B": 40960,
    "qwen3/235B-A22B": 40960,
    "gpt_oss/debugmodel": 131072,
    "gpt_oss/20b": 131072,
    "gpt_oss/120b": 131072,
}
"""Positions of the RoPE of 0.3's own models. 0.2 makes one as long as the sequence."""

DIFFERENCES: Mapping[str, str] = {
    "gpt_oss/debugmodel": "its vocabulary has 2048 entries in torchtitan 0.3, 201088 in 0.2",
}
"""What a flavor cannot express."""

YARN_BEYOND = 4096
"""Torchtitan 0.2 turns off deepseek_v3's YaRN and mscale up to this ``training.seq_len``."""

SIZES: Mapping[str, tuple[str, Any]] = {
    "vocab_size": ("vocab_size", 102400),
    "dim": ("dim", 2048),
    "n_layers": ("n_layers", 27),
    "n_dense_layers": ("n_dense_layers", 1),
    "n_heads": ("n_heads", 16),
    "inter_dim": ("dense_hidden_dim", 10944),
    "q_lora_rank": ("q_lora_rank", 0),
    "kv_lora_rank": ("kv_lora_rank", 512),
    "qk_nope_head_dim": ("qk_nope_head_dim", 128),
    "qk_rope_head_dim": ("qk_rope_head_dim", 64),
    "v_head_dim": ("v_head_dim", 128),
    "mscale": ("mscale", 1.0),
    "num_experts": ("num_experts", 8),
    "num_shared_experts": ("num_shared_experts", 1),
    "moe_inter_dim": ("moe_hidden_dim", 1408),
    "top_k": ("router_top_k", 1),
    "num_expert_groups": ("router_num_expert_groups", None),
    "num_limited_groups": ("router_num_limited_groups", None),
    "score_func": ("router_score_func", "sigmoid"),
    "route_norm": ("router_route_norm", False),
    "route_scale": ("router_route_scale", 1.0),
    "rope_theta": ("rope.theta", 10000.0),
    "max_seq_len": ("rope.max_seq_len", 16384),
    "rope_factor": ("rope.rope_factor", 40.0),
    "beta_fast": ("rope.beta_fast", 32.0),
    "beta_slow": ("rope.beta_slow", 1.0),
    "original_seq_len": ("rope.original_seq_len", 4096),
}
"""0.2's ``DeepSeekV3ModelArgs`` and ``MoEArgs``: field -> a flavor's key, and the default."""

NOT_EXPRESSED: Mapping[str, tuple[Any, Any, str]] = {
    "gate_bias": (False, False, "the routers have a bias (gate_bias), 0.3's deepseek_v3 has none"),
    "norm_eps": (1e-5, 1e-5, "norm_eps is 1e-05 in 0.3's deepseek_v3"),
}
"""Fields that no flavor has: 0.2's default, the one value that 0.3 computes, and what differs with
any other."""

NO_SIZES = frozenset(
    {
        "max_batch_size",
        "attn_mask_type",
        "depth_init",
        "dtype",
        "expert_parallel_comm_backend",
        "moe_impl",
        "_debug_force_load_balance",
        "eos_id",
    }
)
"""Fields that say nothing about the model, or that a job decides."""
