"""Experts in a latent, and scores on their inputs: formulas, what they cost, what is refused.

A layer is compared in float64 with its formula as on a blackboard; what remains is the order of
sums.
"""

import dataclasses
import json

import pytest
import torch
from dialect import SINCE_2026_09
from layer_cases import (
    SMALL,
    D,
    E,
    F,
    K,
    assert_same_results,
    double_tokens,
    flavor,
    said_of_a_changed_run,
    save_as_hf,
)
from router_cases import UPSTREAM, moe_of, router_of, small_model

from ezpz_moe import cli
from ezpz_moe.errors import EzpzError
from ezpz_moe.hosts.accounting import Cost
from ezpz_moe.hosts.counts import counts_at_hand
from ezpz_moe.hosts.detect import host
from ezpz_moe.hosts.titan.models import model_spec
from ezpz_moe.hosts.titan.products_fit import bytes_per_token

Z = 16
LATENT, BEFORE = f"moe_latent_dim = {Z}\n", 'router_scores = "before"\n'
NULL = "[router]\nnull_experts = 2\n"

before_september = pytest.mark.skipif(SINCE_2026_09, reason="its layers have no place for it")


def on_the_blackboard(moe, x_TD, before):
    """The layer's output, expert by expert, with its own router's choices."""
    scores_TK, ids_TK, _ = (each.flatten(0, -2) for each in moe.router(x_TD, moe.expert_bias_E))
    layer, shared = moe.routed_experts, moe.shared_experts
    of, projects = layer.inner_experts, hasattr(layer, "descend")
    x_TZ = x_TD @ layer.descend.weight.T if projects else x_TD
    sum_TZ = torch.zeros_like(x_TZ)
    for expert in range(E):
        score_T1 = (scores_TK * (ids_TK == expert)).sum(-1, keepdim=True)
        of_input, of_output = (score_T1, 1) if before else (1, score_T1)
        rows_TZ = of_input * x_TZ
        g, u = rows_TZ @ of.w1_EFD[expert].T, rows_TZ @ of.w3_EFD[expert].T
        sum_TZ = sum_TZ + of_output * (g / (1 + torch.exp(-g)) * u @ of.w2_EDF[expert].T)
    g = x_TD @ shared.w1.weight.T
    of_shared_TD = (g / (1 + torch.exp(-g)) * (x_TD @ shared.w3.weight.T)) @ shared.w2.weight.T
    return (sum_TZ @ layer.ascend.weight.T if projects else sum_TZ) + of_shared_TD


@before_september
@pytest.mark.parametrize(
    ("keys", "backend", "unit"),
    [
        (LATENT, "for_loop", 2.0**-53),
        (LATENT, "batched_mm_padded", 2.0**-53),
        (f"{LATENT}{NULL}", "for_loop", 2.0**-53),
        # The host's dispatcher combines in float32.
        (f'{LATENT}routed = "composed"\n', "for_loop", 2.0**-24),
        (BEFORE, "grouped_mm_fused", 2.0**-24),
        (f"{BEFORE}{NULL}", "batched_mm_padded", 2.0**-24),
        (f"{LATENT}{BEFORE}", "for_loop", 2.0**-24),
    ],
    ids=lambda value: str(value).replace("\n", " ").strip(),
)
def test_a_layer_is_its_formula(tmp_path, keys, backend, unit):
    computed_in = torch.float64 if unit < 2.0**-50 else torch.float32
    model = small_model(tmp_path, f'{SMALL}compute_backend = "{backend}"\n{keys}')
    if NULL in keys:
        router_of(model)  # which has to know how long a sequence is
    moe = moe_of(model).double()
    moe.routed_experts.inner_experts.computed_in = computed_in
    draw = torch.Generator().manual_seed(2)
    for name, each in moe.named_parameters():
        if "router" not in name:
            each.data = torch.randn(each.shape, generator=draw).double() / each.shape[-1] ** 0.5
    x = double_tokens()
    out_TD = on_the_blackboard(moe, x.flatten(0, -2), BEFORE in keys)
    compared = assert_same_results(moe, out_TD, x, unit)
    assert (LATENT in keys) == ("routed_experts.descend.weight" in compared)


# Sizes --------------------------------------------------------------------------------------------


@before_september
def test_parameters_and_flops_are_hand_sums(tmp_path):
    """Of two layers of experts; the host's own count, the basis of its MFU, has them too."""
    found = flavor(tmp_path, f"{SMALL}n_layers = 3\n{LATENT}")
    plain = flavor(tmp_path, f"{SMALL}n_layers = 3\n")
    summary, without = host().summarize(found), host().summarize(plain)
    assert summary == counts_at_hand(found)
    projections = 2 * 2 * D * Z
    assert summary.total - without.total == 2 * E * 3 * F * (Z - D) + projections
    assert summary.active - without.active == 2 * K * 3 * F * (Z - D) + projections
    anatomy = host().anatomy().anatomy(flavor(tmp_path, f"{SMALL}n_layers = 3\n{LATENT}"), 16)
    cost = anatomy.costs["latent projections"]
    assert cost == Cost(parameters=projections, active=projections, forward=2 * projections)
    theirs = host().anatomy().anatomy(flavor(tmp_path, f"{SMALL}n_layers = 3\n"), 16)
    assert anatomy.host_flops - theirs.host_flops == 6 * (summary.active - without.active)


@before_september
def test_what_checkpointing_would_keep_is_narrower(tmp_path):
    """Of every choice: gate, up and the row's output, in bfloat16."""
    built = small_model(tmp_path, f"{SMALL}{LATENT}")
    assert list(bytes_per_token(built)) == [K * (2 * F + Z) * 2]


@before_september
def test_matrices_begin_as_the_hosts_linears_of_their_layer(tmp_path):
    """What writes into the residual stream is scaled by depth: here by 1/sqrt(2(i + 1))."""
    config = model_spec(flavor(tmp_path, f"{SMALL}n_layers = 3\n{LATENT}")).model
    for layer in config.layers[1:]:
        routed, attention = layer.moe.routed_experts, layer.attention
        assert routed.ascend.param_init["weight"].keywords == (
            attention.wo.param_init["weight"].keywords
        )
        assert routed.descend.param_init["weight"].keywords == (
            attention.wkv_a.param_init["weight"].keywords
        )


# What is refused ----------------------------------------------------------------------------------


@before_september
def test_a_base_that_can(tmp_path):
    found = flavor(tmp_path, "moe_latent_dim = 64", UPSTREAM["qwen3"])
    layer = moe_of(host().build_on_meta(found)).routed_experts
    assert layer.inner_experts.w1_EFD.shape[-1] == 64 == layer.ascend.in_features


@pytest.mark.parametrize(
    ("keys", "like", "said"),
    [
        (LATENT, UPSTREAM["gpt_oss"], "torchtitan's routed layer" if SINCE_2026_09 else "(GptOss"),
        (f"{LATENT}[router]\ncopy_experts = 1", 'inherits = "debugmodel"', "add the token itself"),
    ],
)
def test_a_model_that_cannot(tmp_path, keys, like, said):
    with pytest.raises(EzpzError) as refused:
        model_spec(flavor(tmp_path, keys, like))
    assert str(refused.value).startswith(f"{tmp_path / 'mine.toml'}: moe_latent_dim = {Z}: ")
    assert said in str(refused.value)


@pytest.mark.parametrize("value", ["0", "-8", "2.5", '"narrow"'])
def test_a_width_that_is_none(tmp_path, value):
    with pytest.raises(EzpzError, match=r"mine\.toml: moe_latent_dim = "):
        flavor(tmp_path, f"moe_latent_dim = {value}")


def test_a_dense_flavor_has_no_use_for_it(tmp_path):
    with pytest.raises(EzpzError, match="moe_latent_dim"):
        flavor(tmp_path, f"n_dense_layers = 6\n{LATENT}")


def without_sequence_parallelism(config) -> None:
    config.parallelism = dataclasses.replace(
        config.parallelism, tensor_parallel_degree=2, enable_sequence_parallel=False
    )


@before_september
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (without_sequence_parallelism, "would go through ascend (moe_latent_dim) on every rank"),
        (save_as_hf, "no class of transformers computes the FFNs"),
    ],
)
def test_settings_that_it_excludes(tmp_path, monkeypatch, capsys, change, said):
    flavor(tmp_path, f"{SMALL}{LATENT}")
    assert said in said_of_a_changed_run(tmp_path, change, monkeypatch, capsys)


def test_describe_says_what_ranks_exchange(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("EZPZ_MOE_FLAVORS", str(tmp_path))
    keys = f"{SMALL}{LATENT}"
    flavor(tmp_path, keys)
    assert cli.main(["describe", "mine", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["row_width"] == Z
    assert cli.main(["describe", "mine"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert f"has {Z} numbers, {2 * Z} bytes in bfloat16, in place of {2 * D}." in said
