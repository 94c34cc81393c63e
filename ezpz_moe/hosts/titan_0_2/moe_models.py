"""List torchtitan 0.2's mixture-of-experts models, each as the flavor file that is the same model.

The keys are those of a flavor file (docs/reference/flavors.md). Every flavor names its attention,
because torchtitan 0.2 and 0.3 choose different ones. For deepseek_v3 it names the shipped size with
the same dimensions, and 0.2's vocabulary. The other models are torchtitan 0.3's own.
Pure data: this file imports neither torch nor torchtitan.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

MOE_MODELS: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "deepseek_v3": {
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

DIFFERENCES: Mapping[str, str] = {
    "gpt_oss/debugmodel": "its vocabulary has 2048 entries in torchtitan 0.3, 201088 in 0.2",
}
"""What a flavor cannot express."""

YARN_BEYOND = 4096
"""Torchtitan 0.2 turns off deepseek_v3's YaRN and mscale up to this ``training.seq_len``."""
