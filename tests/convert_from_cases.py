"""Configs of other projects, and turning one into a flavor: for tests/test_convert_from_*.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from test_hf_config import DEEPSEEK_V2_LITE, DEEPSEEK_V3, GPT_OSS_20B, QWEN3_30B_A3B

from ezpz_moe.config.flavor_schema import Flavor
from ezpz_moe.config.flavors import load_flavor
from ezpz_moe.tools.convert import Conversion
from ezpz_moe.tools.convert_foreign import write
from ezpz_moe.tools.convert_hf import from_hf

SIZES_V2 = {
    "first_k_dense_replace": 1,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "moe_layer_freq": 1,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "scoring_func": "softmax",
    "aux_loss_alpha": 0.001,
    "seq_aux": True,
    "v_head_dim": 128,
    "vocab_size": 102400,
}
V2_LITE = DEEPSEEK_V2_LITE | SIZES_V2
V2_LITE |= {"num_hidden_layers": 27, "num_attention_heads": 16, "num_key_value_heads": 16}
V2_LITE |= {"intermediate_size": 10944, "moe_intermediate_size": 1408}
V2 = V2_LITE | {
    "hidden_size": 5120,
    "intermediate_size": 12288,
    "moe_intermediate_size": 1536,
    "n_group": 8,
    "n_routed_experts": 160,
    "num_attention_heads": 128,
    "num_hidden_layers": 60,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
    "routed_scaling_factor": 16.0,
    "topk_group": 3,
    "topk_method": "group_limited_greedy",
}
KIMI_K2 = DEEPSEEK_V3 | {
    "model_type": "kimi_k2",
    "aux_loss_alpha": 0.001,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 131072,
    "n_group": 1,
    "n_routed_experts": 384,
    "num_attention_heads": 64,
    "num_key_value_heads": 64,
    "num_nextn_predict_layers": 0,
    "rope_scaling": DEEPSEEK_V3["rope_scaling"]
    | {"beta_fast": 1.0, "beta_slow": 1.0, "factor": 32},
    "rope_theta": 50000.0,
    "routed_scaling_factor": 2.827,
    "seq_aux": True,
    "topk_group": 1,
    "vocab_size": 163840,
}
QWEN3 = QWEN3_30B_A3B | {"router_aux_loss_coef": 0.001, "output_router_logits": False}
GPT_OSS = GPT_OSS_20B | {"router_aux_loss_coef": 0.9}
MIXTRAL = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "num_experts_per_tok": 2,
    "num_hidden_layers": 32,
    "num_local_experts": 8,
    "router_aux_loss_coef": 0.02,
    "output_router_logits": True,
}


def hf(folder: Path, config: Any) -> Conversion:
    path = folder / "config.json"
    path.write_text(json.dumps(config))
    return from_hf(path)


def flavor(folder: Path, conversion: Conversion) -> Flavor:
    (path,) = write(conversion, folder / "converted.toml")
    found = load_flavor("converted", near=folder)
    path.unlink()
    return found
