"""The configs of well-known checkpoints, as they are published, against the host's own sizes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ezpz_moe.config.flavors import load_flavor
from ezpz_moe.hosts.detect import host, presumed_host
from ezpz_moe.hosts.titan.v0_3 import Titan03
from ezpz_moe.tools.checkpoints.huggingface import differences
from ezpz_moe.tools.checkpoints.huggingface.config import TransformersClass, transformers_class
from ezpz_moe.tools.checkpoints.huggingface.differences import config_differences, eps_note

pytestmark = pytest.mark.skipif(
    type(presumed_host()) is not Titan03, reason="reads models of torchtitan 0.3"
)

DEEPSEEK_V3 = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "attention_bias": False,
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "moe_intermediate_size": 2048,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "v_head_dim": 128,
    "vocab_size": 129280,
}
DEEPSEEK_V2_LITE = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "hidden_size": 2048,
    "n_group": 1,
    "n_routed_experts": 64,
    "norm_topk_prob": False,
    "q_lora_rank": None,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 0.707,
        "mscale_all_dim": 0.707,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 1.0,
    "topk_group": 1,
    "topk_method": "greedy",
}
GPT_OSS_20B = {
    "architectures": ["GptOssForCausalLM"],
    "model_type": "gpt_oss",
    "attention_bias": True,
    "head_dim": 64,
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "layer_types": ["sliding_attention", "full_attention"] * 12,
    "num_attention_heads": 64,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 24,
    "num_key_value_heads": 8,
    "num_local_experts": 32,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "rope_type": "yarn",
        "truncate": False,
    },
    "rope_theta": 150000,
    "sliding_window": 128,
    "swiglu_limit": 7.0,
    "vocab_size": 201088,
}
QWEN3_30B_A3B = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "attention_bias": False,
    "decoder_sparse_step": 1,
    "head_dim": 128,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "mlp_only_layers": [],
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}


def form(base: str, folder: Path) -> TransformersClass:
    (folder / "own.toml").write_text(f'base = "{base}"\n')
    architecture = host().architecture(load_flavor("own", near=folder))
    assert architecture is not None
    return transformers_class(architecture)


@pytest.mark.parametrize(
    ("base", "config"),
    [
        ("deepseek_v3/671B", DEEPSEEK_V3),
        ("gpt_oss/20b", GPT_OSS_20B),
        ("qwen3/30B-A3B", QWEN3_30B_A3B),
    ],
)
def test_a_published_config_is_that_of_the_hosts_size(base, config, tmp_path) -> None:
    found = form(base, tmp_path)
    assert found.name == config["architectures"][0]
    assert found.differences == ()
    assert list(config_differences(config, found)) == []
    is_deepseek = base.startswith("deepseek")
    assert len(list(eps_note(config, found))) == is_deepseek


@pytest.mark.parametrize(
    ("base", "config", "change", "difference"),
    [
        ("deepseek_v3/671B", DEEPSEEK_V3, {"rope_theta": 1e6}, "rope: rope_theta is 1000000.0"),
        ("deepseek_v3/671B", DEEPSEEK_V3, {"n_group": 4}, "n_group is 4, the flavor has 8"),
        ("gpt_oss/20b", GPT_OSS_20B, {"sliding_window": 64}, "sliding_window is 64"),
        ("qwen3/30B-A3B", QWEN3_30B_A3B, {"head_dim": 64}, "head_dim is 64"),
        (
            "gpt_oss/20b",
            GPT_OSS_20B,
            {"rope_scaling": GPT_OSS_20B["rope_scaling"] | {"attention_factor": 1.0}},
            "rope: attention_factor is 1.0",
        ),
        # The published size scales scores by another mscale than torchtitan's 16B.
        ("deepseek_v3/16B", DEEPSEEK_V2_LITE, {}, "rope: mscale_all_dim is 0.707"),
    ],
)
def test_what_differs_is_named(base, config, change, difference, tmp_path) -> None:
    (found,) = config_differences(config | change, form(base, tmp_path))
    assert difference in found


@pytest.mark.parametrize(
    ("base", "config", "absent", "difference"),
    [
        # The class would normalize no weights and scale by nothing.
        ("qwen3/30B-A3B", QWEN3_30B_A3B, ["norm_topk_prob"], "norm_topk_prob is False by default"),
        ("qwen3/30B-A3B", QWEN3_30B_A3B, ["rope_theta"], "rope: rope_theta is 10000.0"),
        ("deepseek_v3/671B", DEEPSEEK_V3, ["rope_theta", "rope_scaling"], "rope_type is 'default'"),
        ("deepseek_v3/671B", DEEPSEEK_V3, ["n_group", "topk_group", "norm_topk_prob"], None),
        ("gpt_oss/20b", GPT_OSS_20B, ["rope_theta", "rope_scaling", "sliding_window"], None),
    ],
)
def test_an_absent_key_is_the_default_of_transformers(
    base, config, absent, difference, tmp_path
) -> None:
    rest = {key: value for key, value in config.items() if key not in absent}
    found = list(config_differences(rest, form(base, tmp_path)))
    assert [difference in each for each in found] == [True] if difference else not found


def test_the_defaults_are_those_of_transformers() -> None:
    from transformers import AutoConfig

    for model_type, defaults in differences._DEFAULTS.items():
        default = AutoConfig.for_model(model_type).to_dict()
        assert {key: default[key] for key in defaults} == defaults
        rope = differences._rope(default, model_type)
        assert differences._rope({}, model_type) == rope


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"architectures": 5, "model_type": "x\x1b[2J"}, r"model_type is 'x\x1b[2J'"),
        ({"architectures": "notDeepseekV3ForCausalLM", "model_type": "llama"}, "is 'llama'"),
        ({"rope_scaling": "linear"}, "rope: rope_type is 'linear', the flavor has yarn"),
        ({"rope_scaling": ["yarn"]}, "rope: rope_type is ['yarn']"),
        ({"rope_scaling": {"type": "yarn", "factor": "x"}}, "rope: factor is 'x'"),
        ({"rope_scaling": {"type": "yarn", "factor": None}}, "rope: factor is None"),
        (
            {"rope_scaling": {"type": "yarn", "factor": 3, "mscale": 1, "mscale_all_dim": "x"}},
            "rope: mscale_all_dim is 'x'",
        ),
        ({"routed_scaling_factor": 10**400}, "routed_scaling_factor is 1000"),
        ({"hidden_act": "a\nb"}, r"hidden_act is 'a\nb'"),
    ],
)
def test_a_damaged_config_differs_and_stays_on_one_line(change, difference, tmp_path) -> None:
    found = list(config_differences(DEEPSEEK_V3 | change, form("deepseek_v3/671B", tmp_path)))
    assert any(difference in each for each in found)
    assert all(each.isprintable() for each in found)


def test_groups_of_a_softmax_router_have_no_class(tmp_path) -> None:
    (difference,) = form("deepseek_v3/236B", tmp_path).differences
    assert "3 of 8 groups" in difference


def test_the_text_model_of_kimi_is_that_of_deepseek_v3(tmp_path) -> None:
    found: Any = form("kimi_k2_7/moonlight-16B-A3B", tmp_path)
    assert (found.name, found.differences) == ("DeepseekV3ForCausalLM", ())


def test_an_unknown_family_is_refused(tmp_path) -> None:
    with pytest.raises(Exception, match="knows no class of transformers"):
        form("qwen3_5/debugmodel_moe", tmp_path)
