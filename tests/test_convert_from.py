"""``ezpz-moe convert --from``: configs of other projects become flavors with our units."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_hf_config import DEEPSEEK_V2_LITE, DEEPSEEK_V3, GPT_OSS_20B, QWEN3_30B_A3B

from ezpz_moe import cli
from ezpz_moe.config.flavor_schema import Flavor
from ezpz_moe.config.flavors import load_flavor
from ezpz_moe.errors import EzpzError
from ezpz_moe.hosts.detect import presumed_host
from ezpz_moe.hosts.titan.v0_3 import Titan03
from ezpz_moe.tools import convert_foreign
from ezpz_moe.tools.convert_foreign import FlavorConversion, write
from ezpz_moe.tools.convert_hf import from_hf
from ezpz_moe.tools.convert_megatron import from_megatron

pytestmark = pytest.mark.skipif(
    type(presumed_host()) is not Titan03, reason="compares with models of torchtitan 0.3"
)

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
MEGATRON_V3: dict[str, Any] = {
    "num_layers": 61,
    "hidden_size": 7168,
    "ffn_hidden_size": 18432,
    "num_attention_heads": 128,
    "max_position_embeddings": 163840,
    "vocab_size": 129280,
    "multi_latent_attention": True,
    "q_lora_rank": 1536,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "num_experts": 256,
    "moe_layer_freq": "([0]*3+[1]*58)",
    "moe_ffn_hidden_size": 2048,
    "moe_shared_expert_intermediate_size": 2048,
    "moe_router_load_balancing_type": "seq_aux_loss",
    "moe_aux_loss_coeff": 1e-4,
    "moe_router_topk": 8,
    "moe_router_num_groups": 8,
    "moe_router_group_topk": 4,
    "moe_router_score_function": "sigmoid",
    "moe_router_topk_scaling_factor": 2.5,
    "moe_router_enable_expert_bias": True,
    "moe_router_bias_update_rate": 2e-3,
    "moe_router_dtype": "fp32",
    "lr": 1e-4,
}
MEGATRON_QWEN3 = {
    "num_layers": 48,
    "hidden_size": 2048,
    "ffn_hidden_size": 6144,
    "num_attention_heads": 32,
    "num_query_groups": 4,
    "kv_channels": 128,
    "qk_layernorm": True,
    "vocab_size": 151936,
    "rotary_base": 1000000,
    "num_moe_experts": 128,
    "moe_ffn_hidden_size": 768,
    "moe_router_topk": 8,
    "moe_aux_loss_coeff": 0.001,
    "data_parallel_size": 8,
}


def hf(folder: Path, config: Any) -> FlavorConversion:
    path = folder / "config.json"
    path.write_text(json.dumps(config))
    return from_hf(path)


def megatron(folder: Path, arguments: Any) -> FlavorConversion:
    path = folder / "args.yaml"
    path.write_text(yaml.safe_dump(arguments))
    return from_megatron(path)


def flavor(folder: Path, conversion: FlavorConversion) -> Flavor:
    (path,) = write(conversion, folder / "converted.toml")
    found = load_flavor("converted", near=folder)
    path.unlink()
    return found


# Hugging Face -------------------------------------------------------------------------------------


def test_deepseek_v3_is_the_hosts_671b(tmp_path: Path) -> None:
    conversion = hf(tmp_path, DEEPSEEK_V3)
    found, shipped = flavor(tmp_path, conversion), load_flavor("671B")
    assert conversion.differences == ()
    assert found.dimensions is not None
    rope = found.dimensions.rope.model_copy(update={"max_seq_len": 16384})
    assert found.dimensions.model_copy(update={"vocab_size": 256128, "rope": rope}) == (
        shipped.dimensions
    )
    assert (found.balance.aux_loss, found.balance.bias_update) == (0, "sign")
    # The published model also predicts one token more.
    assert conversion.dropped == ["num_nextn_predict_layers"]


def test_the_loss_of_deepseek_v2_is_ours_by_sequence(tmp_path: Path) -> None:
    conversion = hf(tmp_path, V2_LITE)
    balance = flavor(tmp_path, conversion).balance
    assert (balance.aux_loss, balance.scope, balance.bias_update) == (0.001, "sequence", "none")
    assert (conversion.differences, conversion.dropped) == ((), [])
    by_batch = flavor(tmp_path, hf(tmp_path, V2_LITE | {"seq_aux": False})).balance
    assert by_batch.scope == "batch"


def test_kimi_k2_is_a_deepseek_v3_without_groups(tmp_path: Path) -> None:
    conversion = hf(tmp_path, KIMI_K2)
    found = flavor(tmp_path, conversion)
    assert (conversion.differences, conversion.dropped) == ((), [])
    assert found.dimensions is not None
    assert found.dimensions.router_num_expert_groups is None
    assert (found.dimensions.router_route_scale, found.dimensions.rope.theta) == (2.827, 5e4)
    assert (found.balance.aux_loss, found.balance.bias_update) == (0.001, "sign")


@pytest.mark.parametrize(
    ("method", "groups", "score"),
    [
        ("group_limited_greedy", (8, 3), "max"),
        ("greedy", (None, None), "top2_sum"),
        (None, (None, None), "top2_sum"),
    ],
)
def test_the_groups_of_deepseek_v2_are_ranked_by_their_best_expert(
    method, groups, score, tmp_path
) -> None:
    """Its class has groups with one method alone, and that is not its default."""
    config = {key: value for key, value in V2.items() if key != "topk_method"}
    conversion = hf(tmp_path, config | ({"topk_method": method} if method else {}))
    found = flavor(tmp_path, conversion)
    assert (conversion.differences, conversion.dropped) == ((), [])
    assert found.dimensions is not None
    assert groups == (
        found.dimensions.router_num_expert_groups,
        found.dimensions.router_num_limited_groups,
    )
    assert found.router_group_score == score
    (said,) = (each for each in conversion.changes if each.key == "n_group")
    assert (said.value, said.fate) == (8, "kept" if groups[0] else "needless")
    notes = [each.note for each in conversion.changes if each.key == "topk_method"]
    assert any('router_group_score = "max"' in each for each in notes) == (score == "max")


def test_what_differs_is_said_in_the_file(tmp_path: Path) -> None:
    conversion = hf(tmp_path, V2 | {"norm_topk_prob": True})
    assert "# differs: its router normalizes the weights of softmax" in conversion.text
    assert len(conversion.differences) == 1


@pytest.mark.parametrize(
    ("config", "base", "aux_loss", "factor"),
    [
        (QWEN3, "qwen3/30B-A3B", 0.001 * 8 / 48, "top-k / MoE layers = 8 / 48"),
        (GPT_OSS, "gpt_oss/20b", 0.9 * 4 / 24, "top-k / MoE layers = 4 / 24"),
    ],
)
def test_transformers_loss_is_in_our_units(config, base, aux_loss, factor, tmp_path) -> None:
    conversion = hf(tmp_path, config | {"output_router_logits": True})
    found = flavor(tmp_path, conversion)
    assert found.base == base
    assert found.balance.aux_loss == pytest.approx(aux_loss, rel=1e-15)
    assert (found.balance.scope, found.balance.bias_update) == ("batch", "none")
    (line,) = (line for line in conversion.text.splitlines() if line.startswith("aux_loss"))
    assert line.endswith(factor)


@pytest.mark.parametrize("said", [{}, {"output_router_logits": False}])
def test_a_loss_that_transformers_does_not_add_is_commented_out(said, tmp_path) -> None:
    config = {key: value for key, value in QWEN3.items() if key != "output_router_logits"}
    conversion = hf(tmp_path, config | said | {"router_z_loss_coef": 0.001})
    assert not flavor(tmp_path, conversion).balance.has_losses
    assert "# aux_loss = 0.00016666666666666666 # router_aux_loss_coef" in conversion.text
    assert "8 / 48; off: transformers adds it only with output_rout" in conversion.text
    assert "# z_loss = 0.001 # router_z_loss_coef; off: " in conversion.text
    assert '# scope = "batch"' in conversion.text
    (loss,) = (each for each in conversion.changes if each.key == "router_aux_loss_coef")
    assert "[balance] aux_loss = 0.00016666666666666666, commented out (" in loss.note


def test_of_two_coefficients_of_one_loss_the_file_must_choose(tmp_path: Path) -> None:
    both = V2_LITE | {"router_aux_loss_coef": 0.001}
    assert flavor(tmp_path, hf(tmp_path, both)).balance.aux_loss == 0.001
    with pytest.raises(EzpzError, match="are both the balance loss, in other units"):
        hf(tmp_path, both | {"output_router_logits": True})


def test_the_page_shows_what_is_written(tmp_path: Path) -> None:
    page = Path(__file__).parent.parent / "docs" / "moving.md"
    assert hf(tmp_path, QWEN3).text in page.read_text()


def test_the_default_configs_of_transformers_have_no_unknown_key(tmp_path: Path) -> None:
    from transformers import AutoConfig

    for config in ({**V2_LITE}, {"model_type": "deepseek_v3"}, QWEN3, {"model_type": "gpt_oss"}):
        whole = AutoConfig.for_model(**config).to_dict()
        conversion = hf(tmp_path, whole)
        unknown = [each.key for each in conversion.changes if "does not know" in each.note]
        assert not unknown, config["model_type"]
    assert 'base = "gpt_oss/120b"' in conversion.text  # the defaults of its class


def test_a_model_that_torchtitan_does_not_have(tmp_path: Path, capsys) -> None:
    conversion = hf(tmp_path, MIXTRAL)
    assert "torchtitan has no model like 'mixtral'" in conversion.refusal
    # Its loss in our units is still in the report.
    (loss,) = (each for each in conversion.changes if each.key == "router_aux_loss_coef")
    assert "[balance] aux_loss = 0.00125 " in loss.note
    with pytest.raises(EzpzError, match="was not written: torchtitan has no model like"):
        write(conversion, tmp_path / "mine.toml")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_experts": 64}, "the nearest, qwen3/30B-A3B, differs: num_experts is 64"),
        ({"model_type": 3}, "no model like 3"),
        ({"model_type": "qwen3_next"}, "no model like 'qwen3_next'"),
    ],
)
def test_a_size_that_torchtitan_does_not_have(change, said, tmp_path) -> None:
    assert said in hf(tmp_path, QWEN3 | change).refusal


def test_what_a_flavor_cannot_have_is_dropped(tmp_path: Path) -> None:
    changed = V2_LITE | {"moe_layer_freq": 2, "attention_dropout": 0.1, "my_router_trick": 3}
    assert set(hf(tmp_path, changed).dropped) == {
        "moe_layer_freq",
        "my_router_trick",
        "attention_dropout",
    }


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ([1], "is not a config"),
        ({"hidden_size": 8}, "is not a config of Hugging Face"),
        (
            V2_LITE | {"n_shared_experts": 0},
            "config.json: n_shared_experts = 0: models with latent",
        ),
        (V2_LITE | {"kv_lora_rank": None}, "config.json: lacks kv_lora_rank."),
        (V2_LITE | {"hidden_size": "wide"}, "config.json: dim = 'wide': should be a valid integer"),
        (V2_LITE | {"aux_loss_alpha": -1}, "aux_loss_alpha = -1: must be a number >= 0."),
        (V2_LITE | {"hidden_size": {}}, "hidden_size must be a single value"),
        (V2_LITE | {"rope_theta": "large"}, "rope_theta = 'large': must be a number >= 0."),
        (V2_LITE | {"rope_scaling": {"type": "yarn", "factor": []}}, "factor = []: must be"),
        (QWEN3 | {"router_aux_loss_coef": "much"}, "router_aux_loss_coef = 'much': must be"),
        (QWEN3 | {"num_hidden_layers": 0}, "no layer has experts"),
    ],
)
def test_a_config_that_cannot_be_read(config, said, tmp_path) -> None:
    with pytest.raises(EzpzError) as error:
        hf(tmp_path, config)
    assert said in str(error.value)


# Megatron-Core ------------------------------------------------------------------------------------


def flags(arguments: dict[str, Any]) -> dict[str, Any]:
    return {"MODEL_ARGS": {f"--{key.replace('_', '-')}": arguments[key] for key in arguments}}


def sections(arguments: dict[str, Any]) -> dict[str, Any]:
    return {"language_model": arguments, "model_parallel": {"lr": arguments["lr"]}}


@pytest.mark.parametrize("form", [dict, flags, sections])
def test_megatrons_arguments_in_every_form(form, tmp_path) -> None:
    conversion = megatron(tmp_path, form(MEGATRON_V3))
    found, from_hf_ = flavor(tmp_path, conversion), flavor(tmp_path, hf(tmp_path, DEEPSEEK_V3))
    assert (conversion.differences, conversion.dropped) == ((), [])
    assert found.dimensions == from_hf_.dimensions
    balance = found.balance
    assert (balance.aux_loss, balance.scope, balance.bias_update) == (1e-4, "sequence", "sign")
    assert balance.bias_rate is not None
    assert balance.bias_rate.start == 2e-3
    assert found.router.gate_precision == "float32"


def test_megatrons_qwen3_is_the_hosts(tmp_path: Path) -> None:
    found = flavor(tmp_path, megatron(tmp_path, MEGATRON_QWEN3))
    assert found.base == "qwen3/30B-A3B"
    assert (found.balance.aux_loss, found.balance.scope) == (0.001, "batch")
    assert found.balance.bias_update == "none"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_query_groups": 8}, "num_query_groups is 8"),
        ({"moe_router_pre_softmax": True}, "moe_router_pre_softmax is False"),
        ({"moe_router_score_function": "sigmoid"}, "no model like 'qwen3_moe with sigmoid scores'"),
        ({"moe_shared_expert_intermediate_size": 768}, "with moe_shared_expert_intermediate_size"),
    ],
)
def test_another_model_of_megatrons_is_refused(change, said, tmp_path) -> None:
    assert said in megatron(tmp_path, MEGATRON_QWEN3 | change).refusal


def test_the_global_loss_is_divided_by_the_ranks(tmp_path: Path) -> None:
    arguments = MEGATRON_QWEN3 | {"moe_router_load_balancing_type": "global_aux_loss"}
    conversion = megatron(tmp_path, arguments)
    balance = flavor(tmp_path, conversion).balance
    assert (balance.aux_loss, balance.scope) == (0.001 / 8, "global")
    assert "times 1 / data-parallel ranks = 1 / 8" in conversion.text
    del arguments["data_parallel_size"]
    with pytest.raises(EzpzError, match="data_parallel_size: N"):
        megatron(tmp_path, arguments)


@pytest.mark.parametrize(
    ("types", "coefficients"),
    [
        (["seq_aux_loss", "global_aux_loss", "aux_loss"], [1e-4, 8e-2, 0]),
        (["seq_aux_loss", "global_aux_loss", "seq_aux_loss"], [1e-4, 8e-2, 1]),
        ("seq_aux_loss global_aux_loss", "1e-4 8e-2"),  # as on a command line
    ],
)
def test_several_losses_have_their_scopes(types, coefficients, tmp_path) -> None:
    """Megatron takes the first coefficient where a type stands there twice."""
    several = {"moe_router_load_balancing_type": types, "moe_aux_loss_coeff": coefficients}
    conversion = megatron(tmp_path, MEGATRON_QWEN3 | several | {"moe_z_loss_coeff": 1e-3})
    balance = flavor(tmp_path, conversion).balance
    assert balance.of_scopes == {
        "sequence": {"aux_loss": 1e-4},
        "batch": {"z_loss": 1e-3},
        "global": {"aux_loss": 1e-2},
    }
    assert conversion.dropped == []
    (said,) = (each.note for each in conversion.changes if each.key == "moe_aux_loss_coeff")
    assert "[balance.sequence] aux_loss = 0.0001 (" in said
    assert "and [balance.global] aux_loss = 0.01 (" in said


def test_as_many_coefficients_as_losses(tmp_path: Path) -> None:
    with pytest.raises(EzpzError, match="has 2 values, moe_router_load_balancing_type 1"):
        megatron(tmp_path, MEGATRON_QWEN3 | {"moe_aux_loss_coeff": [1e-4, 1e-2]})


def test_sinkhorn_z_loss_and_jitter(tmp_path: Path) -> None:
    change = {"moe_router_load_balancing_type": "sinkhorn", "moe_aux_loss_coeff": 0}
    change |= {"moe_z_loss_coeff": 1e-3, "moe_input_jitter_eps": 0.02}
    found = flavor(tmp_path, megatron(tmp_path, MEGATRON_QWEN3 | change))
    assert (found.router.routing, found.router.jitter_noise) == ("sinkhorn", 0.02)
    assert (found.balance.aux_loss, found.balance.z_loss) == (0, 1e-3)
    assert found.balance.scope == "batch"  # a mean over tokens


@pytest.mark.parametrize(
    ("change", "score", "lost"),
    [
        ({}, "top2_sum", []),  # 8 experts in 4 groups
        ({"moe_router_topk": 4}, "topk_sum", []),
        ({"moe_router_topk": 4, "moe_router_score_function": "softmax"}, "topk_sum", []),
        ({"moe_router_score_function": "softmax", "moe_router_pre_softmax": True}, "top2_sum", []),
        # By the sum of two logits.
        ({"moe_router_score_function": "softmax"}, "top2_sum", ["moe_router_group_topk"]),
    ],
)
def test_megatrons_groups_are_ranked_by_as_many_experts(change, score, lost, tmp_path) -> None:
    arguments = MEGATRON_V3 | {"moe_router_enable_expert_bias": False} | change
    conversion = megatron(tmp_path, arguments)
    found = flavor(tmp_path, conversion)
    assert found.router_group_score == score
    assert (conversion.differences, conversion.dropped) == ((), lost)


def test_megatrons_choices_are_counted_by_the_scores(tmp_path: Path) -> None:
    """It is our default with a selection bias. Without one, groups make a difference."""
    unbiased = MEGATRON_V3 | {"moe_router_enable_expert_bias": False}
    for arguments, choice in (
        (MEGATRON_V3, None),
        (unbiased, "scores"),
        (unbiased | {"moe_aux_loss_coeff": 0, "moe_z_loss_coeff": 1e-3}, None),
        (unbiased | {"moe_router_num_groups": None, "moe_router_group_topk": None}, None),
    ):
        balance = flavor(tmp_path, megatron(tmp_path, arguments)).balance
        assert balance.aux_loss_choice == choice


@pytest.mark.parametrize(
    ("change", "factor", "drop"),
    [
        ({"moe_expert_capacity_factor": 1.5}, 1.5, "probability"),
        (
            {"moe_expert_capacity_factor": 1.5, "moe_token_drop_policy": "position"},
            1.5,
            "last",
        ),
        ({"moe_expert_capacity_factor": -1, "moe_token_drop_policy": "position"}, 0, "last"),
        ({"moe_expert_capacity_factor": None}, 0, "last"),
    ],
)
def test_megatrons_capacity(change, factor, drop, tmp_path) -> None:
    conversion = megatron(tmp_path, MEGATRON_QWEN3 | change)
    balance = flavor(tmp_path, conversion).balance
    assert (balance.capacity_factor, balance.drop) == (factor, drop)
    assert conversion.dropped == []


def test_scores_of_sqrtsoftplus(tmp_path: Path) -> None:
    change = {"moe_router_score_function": "sqrtsoftplus"}
    conversion = megatron(tmp_path, MEGATRON_V3 | change)
    found = flavor(tmp_path, conversion)
    assert (conversion.differences, conversion.dropped) == ((), [])
    assert found.dimensions is not None
    assert found.dimensions.router_score_func == "sqrtsoftplus"
    assert found.balance.bias_update == "sign"


def test_what_of_megatrons_arguments_changes_little_or_nothing(tmp_path: Path) -> None:
    """Its norms do differ from those of torchtitan's Qwen3 by default."""
    conversion = megatron(tmp_path, MEGATRON_QWEN3 | {"moe_router_fusion": True})
    assert conversion.dropped == []
    assert conversion.notes == (
        "args.yaml has norm_epsilon = 1e-05, torchtitan computes with 1e-06",
    )
    assert megatron(tmp_path, MEGATRON_QWEN3 | {"norm_epsilon": 1e-6}).notes == ()


def test_numbers_that_yaml_takes_for_text(tmp_path: Path) -> None:
    path = tmp_path / "args.yaml"
    arguments = MEGATRON_QWEN3 | {"moe_aux_loss_coeff": None, "moe_router_topk": None}
    text = yaml.safe_dump({key: each for key, each in arguments.items() if each is not None})
    path.write_text(f'{text}moe_aux_loss_coeff: 1e-3\nmoe_router_topk: "8"\n')
    assert flavor(tmp_path, from_megatron(path)).balance.aux_loss == 1e-3


@pytest.mark.parametrize(
    ("change", "lost"),
    [
        ({"mtp_num_layers": 1}, "mtp_num_layers"),
        ({"swiglu": False}, "swiglu"),
        ({"normalization": "LayerNorm"}, "normalization"),
        ({"moe_router_load_balancing_type": "quantile"}, "moe_router_load_balancing_type"),
        ({"moe_router_new_trick": True}, "moe_router_new_trick"),
    ],
)
def test_what_is_lost_of_megatrons_arguments(change, lost, tmp_path) -> None:
    assert megatron(tmp_path, MEGATRON_V3 | change).dropped == [lost]


@pytest.mark.parametrize(
    ("pattern", "dense"), [(1, 0), ([0, 1, 1], 1), ("[0]*2+[1]*3", 2), ("[1]*4", 0), ("[0, 1]", 1)]
)
def test_the_first_layers_are_dense(pattern, dense, tmp_path) -> None:
    conversion = megatron(tmp_path, MEGATRON_V3 | {"moe_layer_freq": pattern})
    assert f"n_dense_layers = {dense} # moe_layer_freq" in conversion.text


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([1], "holds no arguments"),
        (MEGATRON_V3 | {"moe_ffn_hidden_size": "2k"}, "moe_intermediate_size = '2k': must be"),
        (MEGATRON_V3 | {"num_experts": None}, "num_experts is not set"),
        (MEGATRON_V3 | {"vocab_size": None}, "Megatron takes it from the tokenizer"),
        (MEGATRON_V3 | {"max_position_embeddings": None}, "lacks max_position_embeddings."),
        (MEGATRON_V3 | {"moe_shared_expert_intermediate_size": 0}, "intermediate_size = 0: models"),
        (DEEPSEEK_V3, "has model_type, as configs of Hugging Face: use --from hf"),
        (
            MEGATRON_V3 | {"moe_expert_capacity_factor": 1, "moe_token_drop_policy": "random"},
            "moe_token_drop_policy = 'random': must be probs or position",
        ),
        (MEGATRON_V3 | {"moe_layer_freq": 2}, "the dense layers are the first ones"),
        (MEGATRON_V3 | {"moe_layer_freq": [1, 0]}, "the dense layers are the first ones"),
        (MEGATRON_V3 | {"moe_layer_freq": "__import__('os')"}, "must be a number, a list of 0"),
        (MEGATRON_V3 | {"moe_layer_freq": "[0]*9999999999"}, "must be a number, a list of 0"),
        (
            {"a": MEGATRON_V3, "b": {"--moe-router-topk": 6}},
            "moe_router_topk stands there twice, with 8 and 6",
        ),
    ],
)
def test_arguments_that_cannot_be_read(arguments, said, tmp_path) -> None:
    with pytest.raises(EzpzError) as error:
        megatron(tmp_path, arguments)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("text", "said"), [("a: &a {b: *a}", "a section holds itself"), ("a: [", "is not YAML: while")]
)
def test_a_file_that_is_no_set_of_arguments(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "args.yaml"
    path.write_text(text)
    with pytest.raises(EzpzError, match=said):
        from_megatron(path)


# Files and exit codes -----------------------------------------------------------------------------


def test_the_command_reports_writes_and_counts_what_is_lost(tmp_path: Path, capsys) -> None:
    old, new = tmp_path / "config.json", tmp_path / "mine.toml"
    old.write_text(json.dumps(QWEN3))
    assert cli.main(["convert", "--from", "hf", str(old), str(new)]) == 0
    output = capsys.readouterr().out
    assert f"{new} written" in output
    assert "kept: now router_top_k" in output
    assert load_flavor("mine", near=tmp_path).base == "qwen3/30B-A3B"
    old.write_text(json.dumps(V2 | {"norm_topk_prob": True}))
    assert cli.main(["convert", "--from", "hf", str(old)]) == 1
    output = capsys.readouterr().out
    assert "differs: " in output
    assert "note: config.json has rms_norm_eps = 1e-06" in output
    assert "num_experts = 160 # n_routed_experts" in output


@pytest.mark.parametrize(
    ("text", "new", "said"),
    [
        ("{", "mine.toml", "config.json: is not JSON"),
        (json.dumps(QWEN3), "mine.txt", "a flavor's name must end in .toml"),
        (json.dumps(QWEN3), "there.toml", "there.toml already exists"),
        (json.dumps(QWEN3), "nowhere/mine.toml", "cannot be written"),
    ],
)
def test_nothing_is_written_or_overwritten(text, new, said, tmp_path, capsys) -> None:
    (tmp_path / "there.toml").write_text("# mine\n")
    old = tmp_path / "config.json"
    old.write_text(text)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["convert", "--from", "hf", str(old), str(tmp_path / new)])
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err
    assert {file.name for file in tmp_path.iterdir()} == {"config.json", "there.toml"}
    assert (tmp_path / "there.toml").read_text() == "# mine\n"


def test_a_host_that_takes_no_balance_is_refused(tmp_path: Path, monkeypatch) -> None:
    class Older:
        def architecture(self, flavor: Flavor) -> None:
            return None

    monkeypatch.setattr(convert_foreign, "host", Older)
    with pytest.raises(EzpzError, match=r"needs torchtitan 0\.3 or later"):
        hf(tmp_path, V2_LITE)


def test_a_file_that_is_not_there_and_two_modes_at_once(tmp_path: Path, capsys) -> None:
    for arguments, said in (
        (["--from", "megatron", str(tmp_path / "no.yaml")], "no.yaml: cannot be read: No such"),
        (["--from", "hf", "--lint", "a.sh"], "--lint reads scripts, and --from a config"),
    ):
        with pytest.raises(SystemExit):
            cli.main(["convert", *arguments])
        assert said in capsys.readouterr().err
