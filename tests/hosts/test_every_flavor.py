"""Every flavor becomes a model of the installed host: its experts, its sizes, upstream's keys."""

from typing import Any

import pytest
from dialect import EXPERTS
from flavor_files import in_turn
from torch import nn

from ezpz_moe.config.flavor_schema import Dimensions
from ezpz_moe.config.flavors import load_flavor
from ezpz_moe.errors import EzpzError
from ezpz_moe.hosts.detect import check_host, host
from ezpz_moe.hosts.installed import host_name
from ezpz_moe.hosts.titan_0_2.v0_2 import Titan02
from ezpz_moe.tools.checkpoints.names import TITAN_0_2 as TITAN_0_2_NAMES
from ezpz_moe.tools.checkpoints.names import generation_of

check_host()  # before torchtitan is imported: it chooses the device

ON_0_2 = type(host()) is Titan02
SIZES = ("debugmodel", "500M", "2B", "4B", "7B", "10B_2B", "small", "16B", "236B", "671B")


def why_refused(name: str) -> str:
    """Part of the refusal of a flavor that this host cannot build; empty for all others."""
    if ON_0_2 and "_like" in name:
        return "need torchtitan 0.3"
    if ON_0_2 and name.startswith("gpt_oss"):
        if host_name() == "0.2.1":
            return "torchtitan has no model module 'gpt_oss'"
        if "sdpa" in name:
            return "gpt_oss supports only flex attention"
        if load_flavor(name).compute_backend != "grouped_mm":
            return "GptOssGroupedExperts is not a SwiGLU"
    return ""


def modules(model: nn.Module, class_name: str) -> list[Any]:
    """Those of the host's classes whose name ends so; they stand elsewhere on every host."""
    return [
        module
        for module in model.modules()
        if any(base.__name__.endswith(class_name) for base in type(module).__mro__)
    ]


@pytest.mark.parametrize("name", in_turn(shift=2))
def test_every_flavor_builds_with_its_backend(name):
    flavor = load_flavor(name)
    build = host().build_on_meta
    if expected := why_refused(name):
        with pytest.raises(EzpzError) as refusal:
            build(flavor)
        assert expected in str(refusal.value)
        return
    model = build(flavor)
    experts = modules(model, EXPERTS)
    assert len(experts) == len(modules(model, "MoE")) > 0
    backends = {getattr(module, "compute_backend", "the host's") for module in experts}
    untouched = ON_0_2 and name.startswith("gpt_oss")
    assert backends == {"the host's" if untouched else flavor.compute_backend}
    if size := flavor.dimensions:
        assert len(experts) == len(size.moe_layer_numbers)


def total_and_active(size: Dimensions) -> tuple[int, int]:
    """Parameters by the architecture's definition, DeepSeek-V2 and V3; no bias is a parameter."""
    head_dim = size.qk_nope_head_dim + size.qk_rope_head_dim
    query = size.n_heads * head_dim * (size.q_lora_rank or size.dim)
    query += size.q_lora_rank * (size.dim + 1)  # the low rank's projection and norm
    key_value = size.dim * (size.kv_lora_rank + size.qk_rope_head_dim) + size.kv_lora_rank
    key_value += size.kv_lora_rank * size.n_heads * (size.qk_nope_head_dim + size.v_head_dim)
    attention = query + key_value + size.n_heads * size.v_head_dim * size.dim
    expert = 3 * size.dim * size.moe_hidden_dim
    outside = size.n_layers * (attention + 2 * size.dim) + size.dim + 2 * size.vocab_size * size.dim
    outside += size.n_dense_layers * 3 * size.dim * size.dense_hidden_dim
    n_moe = size.n_layers - size.n_dense_layers
    outside += n_moe * (size.num_experts * size.dim + size.num_shared_experts * expert)
    return (
        outside + n_moe * size.num_experts * expert,
        outside + n_moe * size.router_top_k * expert,
    )


@pytest.mark.parametrize("name", SIZES)
def test_every_size_has_the_parameters_of_its_architecture(name):
    flavor = load_flavor(name)
    assert flavor.dimensions is not None
    model = host().summarize(flavor)
    assert (model.total, model.active) == total_and_active(flavor.dimensions)
    assert model.embedding == flavor.dimensions.vocab_size * flavor.dimensions.dim


def test_checkpoints_have_the_keys_that_are_relied_on():
    found = host().build_on_meta(load_flavor("debugmodel")).state_dict()
    assert set(host().state_dict_keys) <= found.keys()
    names = TITAN_0_2_NAMES if ON_0_2 else host().checkpoint_names
    assert generation_of(found) == names
