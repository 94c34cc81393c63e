"""``ezpz-moe convert --from``: arguments of Megatron-Core become flavors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from convert_from_cases import flavor, hf
from test_hf_config import DEEPSEEK_V3

from ezpz_moe.errors import EzpzError
from ezpz_moe.hosts.detect import presumed_host
from ezpz_moe.hosts.titan.v0_3 import Titan03
from ezpz_moe.tools.convert import Conversion
from ezpz_moe.tools.convert_megatron import from_megatron

pytestmark = pytest.mark.skipif(
    type(presumed_host()) is not Titan03, reason="compares with models of torchtitan 0.3"
)

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


def megatron(folder: Path, arguments: Any) -> Conversion:
    path = folder / "args.yaml"
    path.write_text(yaml.safe_dump(arguments))
    return from_megatron(path)


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


@pytest.mark.parametrize("key", ["layernorm_epsilon", "norm_epsilon"])
def test_a_norms_eps_has_the_name_that_the_file_gives_it(key, tmp_path: Path) -> None:
    conversion = megatron(tmp_path, MEGATRON_QWEN3 | {key: 1e-5})
    assert conversion.notes == (f"args.yaml has {key} = 1e-05, torchtitan computes with 1e-06",)
    fates = {change.key: change.fate for change in conversion.changes}
    assert (fates[key], fates["hidden_size"]) == ("differs", "kept")


def test_the_global_loss_is_divided_by_the_ranks(tmp_path: Path) -> None:
    arguments = MEGATRON_QWEN3 | {"moe_router_load_balancing_type": "global_aux_loss"}
    conversion = megatron(tmp_path, arguments)
    balance = flavor(tmp_path, conversion).balance
    assert (balance.aux_loss, balance.scope) == (0.001 / 8, "global")
    assert "times 1 / data-parallel ranks = 1 / 8" in conversion.text
    fates = {change.key: change.fate for change in conversion.changes}
    assert fates["data_parallel_size"] == "kept"
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


def test_a_model_without_shared_experts(tmp_path: Path) -> None:
    conversion = megatron(tmp_path, MEGATRON_V3 | {"moe_shared_expert_intermediate_size": 0})
    size = flavor(tmp_path, conversion).dimensions
    assert (conversion.differences, conversion.dropped) == ((), [])
    assert size is not None
    assert (size.num_shared_experts, size.shared_width(2048)) == (0, 0)


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
        (DEEPSEEK_V3, "has model_type, as configs of Hugging Face: use --from hf"),
        (
            MEGATRON_V3 | {"moe_expert_capacity_factor": 1, "moe_token_drop_policy": "random"},
            "moe_token_drop_policy = 'random': must be probs or position",
        ),
        (MEGATRON_V3 | {"moe_layer_freq": 2}, "only if its dense layers are the first ones"),
        (MEGATRON_V3 | {"moe_layer_freq": [1, 0]}, "only if its dense layers are the first ones"),
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
