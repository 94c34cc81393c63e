"""A model of the host's with other sizes: every node agrees, and its values start as the host's."""

import json
from pathlib import Path
from typing import Any

import pytest
from test_models import leaves

from ezpz_moe.config.flavors import load_flavor
from ezpz_moe.errors import EzpzError
from ezpz_moe.hosts.detect import check_host

check_host()  # before torchtitan is imported: it chooses the device

from torchtitan.models import deepseek_v3, gpt_oss  # noqa: E402
from torchtitan.models.common.moe import MoE  # noqa: E402

from ezpz_moe.config.change_schema import Change  # noqa: E402
from ezpz_moe.config.flavor_schema import Dimensions, Flavor  # noqa: E402
from ezpz_moe.hosts.counts import counts_at_hand  # noqa: E402
from ezpz_moe.hosts.titan.anatomy import anatomy  # noqa: E402
from ezpz_moe.hosts.titan.models import host_spec, model_spec, what_changes_nothing  # noqa: E402
from ezpz_moe.hosts.titan.parameters import summarize  # noqa: E402

DEEPSEEK_16B = """
n_layers = 27
vocab_size = 102400
dim = 2048
moe_hidden_dim = 1408
dense_hidden_dim = 10944
num_experts = 64
router_top_k = 6
"""
GPT_OSS_20B = """
n_layers = 24
vocab_size = 201088
dim = 2880
num_experts = 32
"""


def changed(folder: Path, base: str, change: str) -> Flavor:
    (folder / "mine.toml").write_text(f'base = "{base}"\n[change]\n{change}\n')
    return load_flavor("mine", near=folder)


@pytest.mark.parametrize(
    ("base", "change", "registry", "same"),
    [
        ("deepseek_v3/debugmodel", DEEPSEEK_16B, deepseek_v3, "16B"),
        ("gpt_oss/debugmodel", GPT_OSS_20B, gpt_oss, "20b"),
    ],
)
def test_a_small_model_of_the_hosts_becomes_its_large_one(
    base: str, change: str, registry: Any, same: str, tmp_path: Path
) -> None:
    """Node by node, with every initial value: of more layers, another width, more experts."""
    ours = dict(leaves(host_spec(changed(tmp_path, base, change)).model))
    assert ours == dict(leaves(registry.model_registry(same).model))


def test_a_large_model_becomes_the_small_one(tmp_path: Path) -> None:
    change = "n_layers=4\nvocab_size=2048\ndim=256\nnum_experts=8"
    ours = dict(leaves(host_spec(changed(tmp_path, "gpt_oss/20b", change)).model))
    assert ours == dict(leaves(gpt_oss.model_registry("debugmodel").model))


QWEN3 = {
    "vocab_size": 512,
    "dim": 64,
    "n_layers": 3,
    "num_experts": 6,
    "router_top_k": 2,
    "moe_hidden_dim": 40,
    "router_bias": True,
}


def as_toml(values: dict[str, Any]) -> str:
    return "\n".join(f"{key} = {json.dumps(value)}" for key, value in values.items())


def test_parameters_and_flops_are_those_of_the_sizes(tmp_path: Path) -> None:
    """By hand: qwen3 has 16 heads and 8 of keys, of 128, and the debug model's head is its own."""
    flavor = changed(tmp_path, "qwen3/debugmodel_moe", as_toml(QWEN3))
    V, D, L, E, K, F = (QWEN3[key] for key in list(QWEN3)[:6])
    projections, gate, expert = D * (16 + 2 * 8) * 128 + 16 * 128 * D, (D + 1) * E, 3 * D * F
    norms = 2 * D + 2 * 128
    tied = host_spec(flavor).model.enable_weight_tying
    total = V * D * (2 - tied) + D + L * (projections + gate + E * expert + norms)
    counted = summarize(flavor)
    assert counted.total == total
    assert counted.active == total - L * (E - K) * expert
    assert (counted.dim, counted.n_layers, counted.num_experts) == (D, L, E)
    assert (counted.top_k, counted.expert_hidden_dim) == (K, F)
    scores = L * 2 * 16 * 2 * 128 * (32 + 1) / 2  # each of 32 tokens sees itself and those before
    products = L * (projections + D * E + K * expert) + V * D
    assert anatomy(flavor, 32).total.forward == 2 * products + scores


def test_the_shipped_counts_are_those_of_one_change(tmp_path: Path) -> None:
    assert counts_at_hand(changed(tmp_path, "qwen3/30B-A3B", "num_experts = 64")) is None
    like = load_flavor("mixtral_8x7B_like")
    assert counts_at_hand(like) == summarize(like)


def test_more_layers_go_on_with_the_pattern(tmp_path: Path) -> None:
    """gpt_oss has a window in every second layer, deepseek_v3 experts in all but the first."""
    layers = host_spec(changed(tmp_path, "gpt_oss/debugmodel", "n_layers = 7")).model.layers
    windows = [each.attention.sliding_window_size for each in layers]
    assert windows == [128, None, 128, None, 128, None, 128]
    change = "n_layers = 8\nn_dense_layers = 3"
    layers = host_spec(changed(tmp_path, "deepseek_v3/debugmodel", change)).model.layers
    assert [each.moe is None for each in layers] == [True] * 3 + [False] * 5
    assert len({id(each.attention) for each in layers}) == 8, "each layer has nodes of its own"


def test_qwen3s_outputs_shrink_with_the_number_of_layers(tmp_path: Path) -> None:
    for change, layers in (("n_layers = 2", 2), ("n_layers = 50", 50)):
        model = host_spec(changed(tmp_path, "qwen3/debugmodel_moe", change)).model
        for layer in model.layers:
            expected = 0.02 / (2 * layers) ** 0.5
            assert layer.attention.wo.param_init["weight"].keywords["std"] == expected
            experts = layer.moe.routed_experts.inner_experts.param_init
            assert [experts[name].keywords["std"] for name in experts] == [0.02, expected, 0.02]


def test_scores_and_shared_experts_reach_every_layer(tmp_path: Path) -> None:
    scores = {
        "num_experts": 12,
        "num_shared_experts": 3,
        "moe_hidden_dim": 32,
        "router_score_func": "sigmoid",
        "router_route_scale": 2.5,
        "router_route_norm": True,
        "router_num_expert_groups": 4,
        "router_num_limited_groups": 2,
    }
    flavor = changed(tmp_path, "deepseek_v3/debugmodel", as_toml(scores))
    for _, moe, _, _ in host_spec(flavor).model.traverse(MoE.Config):
        router, shared = moe.router, moe.shared_experts
        assert (router.score_func, router.route_scale, router.route_norm) == ("sigmoid", 2.5, True)
        assert (router.num_expert_groups, router.num_limited_groups) == (4, 2)
        assert (shared.w1.out_features, shared.w2.in_features, shared.w3.out_features) == (96,) * 3
    assert not flavor.is_routed, "the host's own router computes it"


def test_scores_that_the_host_lacks_are_ours(tmp_path: Path) -> None:
    change = 'router_score_func = "sqrtsoftplus"'
    flavor = changed(tmp_path, "qwen3/debugmodel_moe", change)
    routers = [m.router for _, m, _, _ in model_spec(flavor).model.traverse(MoE.Config)]
    assert {(type(each).__module__, each.score_func) for each in routers} == {
        ("ezpz_moe.hosts.titan.router", "sqrtsoftplus")
    }


def test_what_the_base_has_already_is_said(tmp_path: Path) -> None:
    flavor = changed(tmp_path, "qwen3/debugmodel_moe", "num_experts = 64\nn_layers = 3")
    said = what_changes_nothing(flavor)
    assert said is not None
    assert "[change] num_experts = 64 has no effect" in said
    assert "n_layers" not in said
    assert what_changes_nothing(changed(tmp_path, "qwen3/debugmodel_moe", "dim = 64")) is None


def test_a_change_is_inherited_key_by_key(tmp_path: Path) -> None:
    (tmp_path / "parent.toml").write_text(
        'base = "qwen3/debugmodel_moe"\n[change]\nnum_experts = 16\ndim = 64\n'
    )
    (tmp_path / "child.toml").write_text('inherits = "parent"\n[change]\ndim = 128\n')
    child = load_flavor("child", near=tmp_path).change
    assert child is not None
    assert child.values == {"num_experts": 16, "dim": 128}


def test_an_empty_change_is_refused_whatever_it_inherits(tmp_path: Path) -> None:
    """Its keys were lost, or stand above it."""
    changed(tmp_path, "qwen3/debugmodel_moe", "num_experts = 16")
    (tmp_path / "child.toml").write_text('inherits = "mine"\n[change]\n')
    with pytest.raises(EzpzError, match=r"child\.toml: \[change\] is empty, .* or remove it\.$"):
        load_flavor("child", near=tmp_path)


QWEN3_BASE, DEEPSEEK = "qwen3/debugmodel_moe", "deepseek_v3/debugmodel"


@pytest.mark.parametrize(
    ("base", "change", "message"),
    [
        (
            QWEN3_BASE,
            "num_expert = 4",
            "unknown key 'change.num_expert'. Did you mean 'num_experts'?",
        ),
        (QWEN3_BASE, "", "[change] is empty, so nothing differs from the base. Set a key"),
        (QWEN3_BASE, "n_heads = 4", "[change] n_heads cannot be changed"),
        (QWEN3_BASE, "num_experts = 0", "change.num_experts = 0: should be greater than"),
        (QWEN3_BASE, "router_top_k = 65", "router_top_k (65) must not exceed num_experts (64)"),
        (QWEN3_BASE, "num_experts = 7", "router_top_k (8) must not exceed num_experts (7)"),
        (QWEN3_BASE, "dense_hidden_dim = 8", "no layer of this model has a dense FFN. Remove it"),
        (QWEN3_BASE, "num_shared_experts = 1", "no layer of this model has a shared expert"),
        (QWEN3_BASE, "n_dense_layers = 1", "there is no dense one to copy"),
        (QWEN3_BASE, "router_num_expert_groups = 8", "must be set together"),
        (DEEPSEEK, "n_layers = 1", "n_dense_layers (1) must be less than n_layers (1)"),
        ("deepseek_v3/671B", "num_experts = 250", "must be a multiple of router_num_expert_groups"),
        (
            "deepseek_v3/671B",
            "num_experts = 8",
            "write num_experts and router_num_expert_groups both",
        ),
        ("kimi_k2_7/debugmodel", "dim = 64", "vision encoder ends in the base's. Remove it"),
    ],
)
def test_what_a_base_cannot_be_is_refused_in_one_line(
    base: str, change: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(EzpzError) as error:
        host_spec(changed(tmp_path, base, change))
    assert message in str(error.value)
    assert str(error.value).startswith(f"{tmp_path / 'mine.toml'}: ")
    assert "\n" not in str(error.value)


def test_no_key_of_sizes_is_sent_from_the_table_to_the_top_and_back(tmp_path: Path) -> None:
    """A base takes the key in [change], or it is said there, and at the top, that it takes none."""
    for key in Dimensions.model_fields.keys() - Change.model_fields.keys() - {"rope"}:
        with pytest.raises(EzpzError, match=rf"\[change\] {key} cannot be changed: .* Remove it"):
            changed(tmp_path, DEEPSEEK, f"{key} = 1")
        (tmp_path / "mine.toml").write_text(f'base = "{DEEPSEEK}"\n{key} = 1\n')
        with pytest.raises(EzpzError, match=rf"ignored: {key} \(mine.toml\). Remove either"):
            load_flavor("mine", near=tmp_path)


def test_change_without_a_base_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text('inherits = "16B"\n[change]\nnum_experts = 8\n')
    with pytest.raises(EzpzError, match="there is no base: the keys of a model's own sizes"):
        load_flavor("mine", near=tmp_path)
