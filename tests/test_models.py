"""A flavor becomes the host's model: dimensions, attention, experts, and its parameter counts."""

import dataclasses
import importlib
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from absent_packages import GATED_DELTA_NET, IMAGES, stand_in
from flavor_files import SMALL, in_turn

from ezpz_moe.config.flavors import load_flavor
from ezpz_moe.errors import EzpzError
from ezpz_moe.hosts.detect import check_host
from ezpz_moe.hosts.titan.base import titan

check_host()  # before torchtitan is imported: it chooses the device

from torchtitan.models import deepseek_v3  # noqa: E402
from torchtitan.models.common.attention import BaseAttention, FlexAttention  # noqa: E402
from torchtitan.models.common.moe import GroupedExperts, MoE  # noqa: E402
from torchtitan.models.common.token_dispatcher import (  # noqa: E402
    AllToAllTokenDispatcher,
    LocalTokenDispatcher,
    MinimalAsyncEPTokenDispatcher,
)

from ezpz_moe.config.flavor_schema import Dimensions, Flavor, Rope  # noqa: E402
from ezpz_moe.hosts.titan.models import host_spec, model_spec, what_differs  # noqa: E402
from ezpz_moe.hosts.titan.parameters import summarize  # noqa: E402

UPSTREAM_SIZES = ("debugmodel", "16B", "236B", "671B")
BASES = ("qwen3_debugmodel", "qwen3_30B_A3B", "gpt_oss_debugmodel", "gpt_oss_20b")


def some_of(sizes: Iterable[str]) -> list[Any]:
    """Of the large ones that with most to go wrong: groups of experts, and queries of low rank."""
    short = (*SMALL, "236B")
    return [s if s in short else pytest.param(s, marks=pytest.mark.full) for s in sizes]


def build(config: Any) -> torch.nn.Module:
    """The model without memory."""
    with torch.device("meta"):
        return config.build()


def leaves(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every value of a tree of configs with its path; initializers as what they compute."""
    if isinstance(node, partial):
        yield path, (node.func, node.args, sorted(node.keywords.items()))
    elif isinstance(node, dict):
        for key, value in node.items():
            yield from leaves(value, f"{path}.{key}")
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from leaves(value, f"{path}.{index}")
    elif dataclasses.is_dataclass(node):
        yield path, type(node)
        for field in dataclasses.fields(node):
            yield from leaves(getattr(node, field.name), f"{path}.{field.name}")
    elif "<locals>" in getattr(node, "__qualname__", ""):
        yield path, node.__qualname__  # a function made anew for each config
    else:
        yield path, node


def flavor_from(folder: Path, text: str) -> Flavor:
    (folder / "mine.toml").write_text(text)
    return load_flavor("mine", near=folder)


@pytest.mark.parametrize("name", in_turn())
def test_every_flavor_builds_with_its_experts_and_attention(name: str) -> None:
    flavor = load_flavor(name)
    config = model_spec(flavor).model
    moes = [module for module in build(config).modules() if isinstance(module, MoE)]
    size = flavor.dimensions
    expected = len(config.layers if size is None else size.moe_layer_numbers)
    assert len(moes) == expected
    experts = [node for _, node, _, _ in config.traverse(GroupedExperts.Config)]
    assert [node.compute_backend for node in experts] == [flavor.compute_backend] * expected
    assert {name in node.chosen_by for node in experts} == {True}
    attentions = [node.inner_attention for _, node, _, _ in config.traverse(BaseAttention.Config)]
    assert len(attentions) == len(config.layers)
    if flavor.attention == "sdpa":
        (of_the_host,) = {
            type(titan().causal_attention(node))
            for _, node, _, _ in config.traverse(BaseAttention.Config)
        }
        assert {type(attention) for attention in attentions} == {of_the_host}
    elif flavor.attention == "flex":
        assert {type(attention) for attention in attentions} == {FlexAttention.Config}


@pytest.mark.parametrize("size", UPSTREAM_SIZES)
def test_upstreams_sizes_are_upstreams_in_everything_but_the_vocabulary(size: str) -> None:
    flavor = load_flavor(size)
    assert flavor.dimensions is not None
    vocabulary = {
        ".vocab_size": flavor.dimensions.vocab_size,
        ".tok_embeddings.num_embeddings": flavor.dimensions.vocab_size,
        ".lm_head.out_features": flavor.dimensions.vocab_size,
    }
    upstream = dict(leaves(deepseek_v3.model_registry(size, attn_backend="flex").model))
    assert dict(leaves(host_spec(flavor).model)) == upstream | vocabulary


@pytest.mark.parametrize("size", some_of(UPSTREAM_SIZES))
def test_checkpoints_have_upstreams_keys_and_shapes(size: str) -> None:
    flavor = load_flavor(f"{size}_sdpa_for_loop")
    ours = build(model_spec(flavor).model).state_dict()
    upstream = build(deepseek_v3.model_registry(size).model).state_dict()
    assert list(ours) == list(upstream)
    differing = {key for key in ours if ours[key].shape != upstream[key].shape}
    same_vocabulary = size == "debugmodel"
    assert differing == (set() if same_vocabulary else {"tok_embeddings.weight", "lm_head.weight"})


GROUPS = {"router_num_expert_groups": 4, "router_num_limited_groups": 2}
OTHER_VALUES: dict[str, Any] = {
    "moe_layers": "all",
    "q_lora_rank": 8,
    "shared_hidden_dim": 300,
    "shared_gate": True,
    "router_top_k": 2,
    "router_score_func": "sigmoid",
    "router_route_norm": True,
    "router_bias": True,
    "router_num_expert_groups": 2,
    "router_num_limited_groups": 3,
    "rope.scaling": "none",
}


@pytest.mark.parametrize(
    "key",
    [key for key in Dimensions.model_fields if key != "rope"]
    + [f"rope.{key}" for key in Rope.model_fields],
)
def test_every_dimension_reaches_the_model(key: str) -> None:
    values = load_flavor("debugmodel").model_dump()
    values["dimensions"] |= GROUPS
    if key == "shared_hidden_dim":  # it stands in the place of their number
        values["dimensions"] |= {"num_shared_experts": None, key: 200}
    before = Flavor.model_validate(values)
    table = values["dimensions"]["rope"] if key.startswith("rope.") else values["dimensions"]
    name = key.removeprefix("rope.")
    table[name] = OTHER_VALUES[key] if key in OTHER_VALUES else table[name] * 2
    if key == "moe_layers":
        table["n_dense_layers"] = None  # one of the two
    after = Flavor.model_validate(values)
    assert dict(leaves(model_spec(before).model)) != dict(leaves(model_spec(after).model))


def test_the_spec_is_the_hosts_under_our_name() -> None:
    spec, upstream = model_spec(load_flavor("2B_sdpa")), deepseek_v3.model_registry("debugmodel")
    assert (spec.name, spec.flavor) == ("ezpz_moe", "2B_sdpa")
    for field in dataclasses.fields(spec):
        if field.name not in {"name", "flavor", "model"}:
            assert getattr(spec, field.name) is getattr(upstream, field.name)


@pytest.mark.parametrize("name", ["debugmodel", "qwen3_debugmodel", "gpt_oss_debugmodel"])
def test_the_dispatcher_of_the_job_is_used(name: str) -> None:
    flavor = load_flavor(name)

    def dispatchers(**options: str) -> set[type]:
        config = host_spec(flavor, **options).model
        return {type(node) for _, node, _, _ in config.traverse(LocalTokenDispatcher.Config)}

    assert dispatchers() == {AllToAllTokenDispatcher.Config}
    other = dispatchers(moe_comm_backend="minimal_async_ep")
    assert other == {MinimalAsyncEPTokenDispatcher.Config}


# Upstream's models --------------------------------------------------------------------------------


def test_a_base_is_upstreams_model_unchanged() -> None:
    from torchtitan.models import qwen3

    spec = host_spec(load_flavor("qwen3_30B_A3B"))
    upstream = qwen3.model_registry("30B-A3B")
    ours, theirs = dict(leaves(spec.model)), dict(leaves(upstream.model))
    assert {path: value for path, value in ours.items() if value != theirs.get(path)} == {}
    assert ours.keys() == theirs.keys()
    assert (spec.name, spec.flavor) == ("qwen3", "qwen3_30B_A3B")
    assert spec.state_dict_adapter is upstream.state_dict_adapter


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ("qwen4/30B-A3B", "no model module 'qwen4'. Did you mean 'qwen3'?"),
        ("qwen3/30B-A3", "qwen3 has no flavor '30B-A3'. Did you mean '30B-A3B'? It has debugmodel"),
        ("gpt_oss/20B", "Did you mean '20b'?"),
        (
            "deepseek_v3/debugmodel_mtp",
            "no such model, but a config deepseek_v3_debugmodel_mtp: its loss or other settings "
            "differ too. Train that: `--module deepseek_v3 --config deepseek_v3_debugmodel_mtp "
            '--override.imports \'ezpz_moe.overrides.experts={"compute_backend": "grouped_mm"}\'',
        ),
        ("qwen3/8B", "this model is dense"),
        ("llama3/8B", "this model is dense"),
        ("common/8B", "common is not a model"),
    ],
)
def test_a_base_that_upstream_does_not_have(tmp_path: Path, base: str, message: str) -> None:
    flavor = flavor_from(tmp_path, f'base = "{base}"')
    with pytest.raises(EzpzError) as error:
        model_spec(flavor, moe_comm_backend="minimal_async_ep")
    assert message in str(error.value)
    assert f"{tmp_path / 'mine.toml'}: base = '{base}'" in str(error.value)


@pytest.fixture
def without_fla(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether it is installed or not."""

    def refuse(name: str) -> None:
        raise ModuleNotFoundError("No module named 'fla'")

    monkeypatch.setattr(importlib, "import_module", refuse)


def test_a_base_whose_requirements_are_not_installed(tmp_path: Path, without_fla: None) -> None:
    flavor = flavor_from(tmp_path, 'base = "kimi_k2_7/debugmodel"')
    with pytest.raises(EzpzError, match=r"mine\.toml: .* cannot be imported here: .*fla.*Install"):
        host_spec(flavor)


def test_nobody_installs_what_a_refused_model_needs(tmp_path: Path, without_fla: None) -> None:
    flavor = flavor_from(tmp_path, 'base = "qwen3_5/35B-A3B"')
    with pytest.raises(EzpzError, match="takes images with its text") as error:
        model_spec(flavor)
    said = str(error.value)
    assert "`--module qwen3_5 --config qwen35_35b_a3b --override.imports" in said
    assert said.endswith("`. That needs what is not installed here: No module named 'fla'.")
    assert "Install" not in said


@pytest.mark.parametrize(
    ("base", "config"),
    [
        ("qwen3_5/debugmodel_moe", "qwen35_debugmodel_moe"),
        pytest.param("qwen3_5/35B-A3B", "qwen35_35b_a3b", marks=pytest.mark.full),
    ],
)
def test_a_model_that_cannot_do_without_images_is_refused(tmp_path, base, config) -> None:
    """Its forward would stop the first step: a job's text brings no images."""
    with stand_in(*GATED_DELTA_NET, *IMAGES):
        with pytest.raises(EzpzError, match="takes images with its text") as error:
            model_spec(flavor_from(tmp_path, f'base = "{base}"\ncompute_backend = "for_loop"'))
        assert host_spec(load_flavor("mine", near=tmp_path)), "it can still be described"
    command = f"`--module qwen3_5 --config {config} --override.imports 'ezpz_moe.overrides.experts"
    assert command in str(error.value)
    assert '{"compute_backend": "for_loop"}' in str(error.value)


@pytest.mark.parametrize(
    ("base", "said"),
    [
        ("debugmodel", "kimi_k2_5_debugmodel (DistMuon, AdamW); text trains the language part"),
        pytest.param(
            "moonlight-16B-A3B", "moonlight_16b_a3b (DistMuon, AdamW)", marks=pytest.mark.full
        ),
    ],
)
def test_what_a_job_trains_of_a_model_that_can_see(tmp_path, base, said) -> None:
    flavor = flavor_from(tmp_path, f'base = "kimi_k2_7/{base}"')
    spec = model_spec(flavor)
    with stand_in(*IMAGES):
        line = what_differs(flavor, spec)
    assert line is not None
    assert said in line
    assert ("vision" in line) == (base == "debugmodel")


@pytest.mark.parametrize("name", ["debugmodel", "qwen3_debugmodel"])
def test_of_a_model_of_text_nothing_differs(name: str) -> None:
    assert what_differs(load_flavor(name), model_spec(load_flavor(name))) is None


def test_without_the_hosts_loader_of_images_nobody_knows_its_optimizers(
    tmp_path, monkeypatch
) -> None:
    flavor = flavor_from(tmp_path, 'base = "kimi_k2_7/debugmodel"')
    spec = model_spec(flavor)
    monkeypatch.setattr(importlib, "import_module", mock.Mock(side_effect=ImportError))
    line = what_differs(flavor, spec)
    assert line is not None
    assert "that of torchtitan's kimi_k2_5_debugmodel; text trains the language part" in line


def test_what_the_host_refuses_is_said_with_the_flavor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchtitan.tools.utils.has_cuda_capability", lambda *_: False)
    for name in ("16B_flex_flash", "qwen3_debugmodel_flex_flash"):
        with pytest.raises(EzpzError, match=rf"{name}.*flex_flash.*only supported on Hopper"):
            host_spec(load_flavor(name))
    with pytest.raises(EzpzError, match=r"16B\.toml.*dispatcher 'carrier_pigeon'"):
        host_spec(load_flavor("16B"), moe_comm_backend="carrier_pigeon")


# Counts -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", some_of([*UPSTREAM_SIZES, *BASES, "small"]))
def test_counts_are_the_hosts(name: str) -> None:
    flavor = load_flavor(name)
    config = host_spec(flavor).model
    # Without attention's own term, which seq_len 0 makes zero, the host's FLOPs are 6 per active
    # parameter that is multiplied with; the input embedding is looked up, not multiplied.
    total, flops = config.get_nparams_and_flops(build(config), 0)
    model = summarize(flavor)
    assert (model.total, model.active) == (total, flops // 6 + model.embedding)
    assert model.embedding == config.vocab_size * config.dim


def test_a_summary_says_what_the_table_shows() -> None:
    summary = summarize(load_flavor("236B_sdpa_for_loop"))
    sizes = (summary.dim, summary.n_layers, summary.num_experts, summary.top_k)
    assert (*sizes, summary.expert_hidden_dim) == (5120, 60, 160, 6, 1536)
    assert summary is summarize(load_flavor("236B"))
