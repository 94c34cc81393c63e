"""The selector on torchtitan 0.3: what it relies on in the host, and what it leaves alone."""

import contextlib
import copy
import subprocess
import sys
from dataclasses import dataclass, fields
from inspect import Parameter, signature
from unittest import mock

import pytest
import torch
from contract_cases import OTHERS_WITHOUT_DROPS

from ezpz_moe.errors import EzpzError
from ezpz_moe.hosts.detect import check_host, host

check_host()

from torchtitan.config.override import OverrideConfig, apply_overrides  # noqa: E402
from torchtitan.models import deepseek_v3, gpt_oss, llama3, qwen3  # noqa: E402
from torchtitan.models.common.moe import GroupedExperts, MoE, RoutedExperts  # noqa: E402
from torchtitan.models.gpt_oss.moe import GptOssGroupedExperts  # noqa: E402

from ezpz_moe.compute import backend_names, get_backend  # noqa: E402
from ezpz_moe.hosts.titan.experts import selected  # noqa: E402
from ezpz_moe.hosts.titan.selector import select_backend  # noqa: E402

SPECS = {
    "deepseek_v3": lambda: deepseek_v3.model_registry("debugmodel"),
    "qwen3": lambda: qwen3.model_registry("debugmodel_moe"),
    "gpt_oss": lambda: gpt_oss.model_registry("debugmodel"),
}
COUNTS = torch.tensor([5, 0, 11, 16])


def experts_config(kind: type[GroupedExperts], **fields_) -> GroupedExperts.Config:
    shapes = dict.fromkeys(_parameter_names(kind), torch.nn.init.normal_)
    return kind.Config(dim=32, hidden_dim=48, num_experts=4, param_init=shapes, **fields_)


def _parameter_names(kind: type[GroupedExperts]) -> list[str]:
    with torch.device("meta"):
        return list(kind.Config(dim=1, hidden_dim=1, num_experts=1).build().state_dict())


def built(config: GroupedExperts.Config, seed: int = 0) -> GroupedExperts:
    torch.manual_seed(seed)
    experts = config.build()
    experts.init_states()
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter *= parameter.shape[-1] ** -0.5
    return experts


def test_the_host_has_the_seam_that_we_replace():
    parameters = signature(GroupedExperts._grouped_mm).parameters
    assert list(parameters) == ["self", "A", "B_t", "offs"]
    assert {p.kind for name, p in parameters.items() if name != "self"} == {Parameter.KEYWORD_ONLY}


def test_the_host_has_the_fields_that_we_copy():
    names = {field.name for field in fields(GroupedExperts.Config)}
    assert {"dim", "hidden_dim", "num_experts", "param_init", "sharding_config"} <= names


@pytest.mark.parametrize("kind", [GroupedExperts, GptOssGroupedExperts])
def test_every_field_of_the_host_survives_the_selection(kind):
    config = experts_config(kind, sharding_config="a sharding")
    ours = selected(config, "for_loop", "a test")
    for field in fields(config):
        assert getattr(ours, field.name) == getattr(config, field.name), field.name
    assert (ours.compute_backend, ours.chosen_by) == ("for_loop", "a test")
    assert type(ours).__qualname__ != type(config).__qualname__


@pytest.mark.parametrize("model", SPECS)
def test_one_node_is_replaced_for_each_moe_layer(model):
    config = SPECS[model]().model
    layers = list(config.traverse(MoE.Config))
    assert select_backend(config, "for_loop", "a test") == len(layers) > 0
    with torch.device("meta"):
        modules = [m for m in config.build().modules() if isinstance(m, GroupedExperts)]
    assert [module.compute_backend for module in modules] == ["for_loop"] * len(layers)


@pytest.mark.parametrize("backend", backend_names())
@pytest.mark.parametrize("kind", [GroupedExperts, GptOssGroupedExperts])
def test_state_dict_and_initial_values_are_the_hosts(kind, backend):
    config = experts_config(kind)
    theirs, ours = built(config).state_dict(), built(selected(config, backend, "")).state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("kind", [GroupedExperts, GptOssGroupedExperts])
def test_grouped_mm_is_the_hosts_path_bit_for_bit(kind):
    config = experts_config(kind)
    for theirs, ours in zip(*_outputs(config, "grouped_mm"), strict=True):
        assert torch.equal(theirs, ours)


@pytest.mark.parametrize("backend", OTHERS_WITHOUT_DROPS)
@pytest.mark.parametrize("kind", [GroupedExperts, GptOssGroupedExperts])
def test_the_chosen_backend_is_the_one_that_runs(kind, backend):
    """And through the entry point that fits: the whole FFN, or the seam twice for gpt_oss."""
    ours = built(selected(experts_config(kind), backend, "")).bfloat16()
    with (
        counting_calls(get_backend(backend)) as calls,
        mock.patch.object(GroupedExperts, "_grouped_mm") as host_product,
    ):
        ours(torch.randn(32, 32, dtype=torch.bfloat16), COUNTS)
    whole, seam = {GroupedExperts: (1, 0), GptOssGroupedExperts: (0, 2)}[kind]
    assert (calls["ffn"].call_count, calls["grouped_mm"].call_count) == (whole, seam)
    host_product.assert_not_called()


@pytest.mark.parametrize("backend", OTHERS_WITHOUT_DROPS)
@pytest.mark.parametrize("kind", [GroupedExperts, GptOssGroupedExperts])
def test_other_backends_agree_with_the_host(kind, backend):
    """Two bfloat16 computations of one value differ by a rounding of each on every product."""
    products = {GroupedExperts: 3, GptOssGroupedExperts: 2}[kind]
    for theirs, ours in zip(*_outputs(experts_config(kind), backend), strict=True):
        difference = (ours.double() - theirs.double()).norm() / theirs.double().norm()
        assert difference <= 2 * products * 2.0**-8


def _outputs(config: GroupedExperts.Config, backend: str):
    """(output, gradients of x and of all parameters) of the host's experts and of ours."""
    results = []
    for each in (config, selected(config, backend, "")):
        experts = built(each).bfloat16()
        x_RD = torch.randn(32, 32, generator=torch.Generator().manual_seed(1)).bfloat16()
        x_RD.requires_grad_()
        y_RD = experts(x_RD, COUNTS)
        y_RD.backward(torch.ones_like(y_RD) + y_RD.detach())
        results.append([y_RD.detach(), x_RD.grad, *(p.grad for p in experts.parameters())])
    return results


@contextlib.contextmanager
def counting_calls(backend):
    """How often each entry point of ``backend`` is called; it still computes."""
    with contextlib.ExitStack() as patches:
        yield {
            name: patches.enter_context(
                mock.patch.object(type(backend), name, mock.Mock(wraps=getattr(backend, name)))
            )
            for name in ("ffn", "grouped_mm")
        }


def test_a_copied_model_keeps_its_backend():
    ours = built(selected(experts_config(GroupedExperts), "for_loop", ""))
    assert copy.deepcopy(ours)._backend is ours._backend


def test_a_dense_model_is_refused():
    with pytest.raises(EzpzError, match="no routed experts"):
        select_backend(llama3.model_registry("debugmodel").model, "for_loop", "a test")


def test_an_unknown_backend_is_refused_with_the_nearest_name():
    with pytest.raises(EzpzError, match=r"'for_lop'.*Did you mean 'for_loop'"):
        selected(experts_config(GroupedExperts), "for_lop", "a test")


def test_experts_whose_seam_is_taken_are_refused():
    class Quantized(GroupedExperts):
        @dataclass(kw_only=True, slots=True)
        class Config(GroupedExperts.Config):
            pass

        def _grouped_mm(self, *, A, B_t, offs):
            raise AssertionError("not reached")

    with pytest.raises(EzpzError, match=r"Quantized.*quantiz"):
        selected(Quantized.Config(dim=32, hidden_dim=48, num_experts=4), "for_loop", "a test")


def test_without_the_seam_the_hosts_own_path_and_whole_ffns_are_left(monkeypatch):
    """As after a sync that moved it; doctor says so in these words."""
    monkeypatch.delattr(GroupedExperts, "_grouped_mm")
    gpt_oss = experts_config(GptOssGroupedExperts)
    assert selected(gpt_oss, "grouped_mm", "a test").compute_backend == "grouped_mm"
    assert selected(experts_config(GroupedExperts), "for_loop", "a test")
    with pytest.raises(EzpzError, match=r"no GroupedExperts._grouped_mm, .* Use 'grouped_mm'"):
        selected(gpt_oss, "for_loop", "a test")
    moved = [line for line in host().relied_on if line.thing.endswith("._grouped_mm")]
    assert ["the seam moved" in line.if_broken for line in moved] == [True]
    assert moved[0].why_broken() == "GroupedExperts has no _grouped_mm"
    check_host()  # which refuses what nothing can be trained without


def test_a_second_selection_is_refused():
    once = selected(experts_config(GroupedExperts), "for_loop", "the first")
    with pytest.raises(EzpzError, match=r"twice: the first .*the second"):
        selected(once, "batched_mm_padded", "the second")


def overrides(name: str, kwargs: dict, root) -> list[str]:
    """Apply one of our overrides as the host does."""
    return apply_overrides(OverrideConfig(imports=[(f"ezpz_moe.overrides.{name}", kwargs)]), root)


@pytest.mark.parametrize("model", SPECS)
def test_door_2_replaces_every_moe_layer(model):
    spec = SPECS[model]()
    lines = overrides("experts", {"compute_backend": "for_loop"}, spec.model)
    assert len(lines) == len(list(spec.model.traverse(MoE.Config)))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"compute_backend": "for_lop"}, "Did you mean 'for_loop'"),
        ({"compute_backnd": "for_loop"}, "unknown key 'compute_backnd'. Did you mean"),
        ({}, "compute_backend is missing"),
        (
            {"compute_backend": "for_loop", "expert_precision": "fp32"},
            "expert_precision = 'fp32': should be one of host, bfloat16, float32",
        ),
        (
            {"compute_backend": "grouped_mm", "expert_precision": "float32"},
            "cannot be combined with compute_backend 'grouped_mm'",
        ),
        (
            {"compute_backend": "for_loop", "routed": "one node"},
            "routed = 'one node': should be one of one_node, composed",
        ),
    ],
)
def test_door_2_refuses_with_one_message_and_exit_code_2(kwargs, message, capsys):
    with pytest.raises(SystemExit) as stop:
        overrides("experts", kwargs, SPECS["qwen3"]().model)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("asked", "dtype"),
    [(None, torch.bfloat16), ("bfloat16", torch.bfloat16), ("float32", torch.float32)],
)
def test_door_2_has_the_experts_compute_in_what_it_asks_for(asked, dtype):
    config = SPECS["qwen3"]().model
    overrides("experts", {"compute_backend": "for_loop", "expert_precision": asked}, config)
    experts = built(next(config.traverse(GroupedExperts.Config))[1])
    with mock.patch.object(type(experts._backend), "ffn", autospec=True) as ffn:
        ffn.side_effect = lambda backend, w1, w2, w3, x, counts, **formula: x
        experts(torch.ones(4, experts.w1_EFD.shape[2]), torch.ones(experts.num_experts).long())
    assert {each.dtype for each in ffn.call_args.args[1:5]} == {dtype}


@pytest.mark.parametrize(
    ("model", "asked", "made"),
    [
        ("qwen3", {}, "EzpzRoutedExperts"),
        ("qwen3", {"routed": "composed"}, "RoutedExperts"),
        ("gpt_oss", {}, "RoutedExperts"),
    ],
)
def test_door_2_makes_routed_layers_one_node_unless_asked_not_to(model, asked, made):
    config = SPECS[model]().model
    overrides("experts", {"compute_backend": "for_loop", **asked}, config)
    layers = [type(node)._owner.__name__ for _, node, _, _ in config.traverse(RoutedExperts.Config)]
    assert set(layers) == {made}


@pytest.mark.parametrize(
    ("cpu", "param", "warnings"),
    [("float32", "bfloat16", 1), ("float32", "float32", 0), ("float32,bfloat16", "bfloat16", 0)],
)
def test_door_2_warns_once_that_training_is_emulated(cpu_with, monkeypatch, cpu, param, warnings):
    from torchtitan.models.deepseek_v3.config_registry import deepseek_v3_debugmodel

    from ezpz_moe.hosts.titan import overrides as door

    cpu_with(cpu)
    said = []
    monkeypatch.setattr(door.logger, "warning", said.append)
    door._warn_once.cache_clear()
    config = deepseek_v3_debugmodel()
    config.training.mixed_precision_param = param
    overrides("experts", {"compute_backend": "for_loop"}, config)
    said = [line for line in said if line.startswith("ezpz_moe: ")]
    assert len(said) == warnings
    assert all("--training.mixed-precision-param float32" in line for line in said)


def test_door_2_turns_cuda_graphs_off_for_a_backend_with_host_syncs(monkeypatch):
    from torchtitan.models.deepseek_v3.config_registry import deepseek_v3_debugmodel

    module = "ezpz_moe.hosts.titan.overrides"
    monkeypatch.setattr(
        f"{module}.captures_cuda_graphs", lambda config: not config.training.disable_cuda_graphs
    )
    config = deepseek_v3_debugmodel()
    overrides("experts", {"compute_backend": "grouped_mm"}, config)
    assert not config.training.disable_cuda_graphs
    config = deepseek_v3_debugmodel()
    overrides("experts", {"compute_backend": "for_loop"}, config)
    assert config.training.disable_cuda_graphs


def test_door_2_and_the_hosts_fused_experts_are_a_conflict():
    config = SPECS["deepseek_v3"]().model
    both = OverrideConfig(
        imports=[
            ("ezpz_moe.overrides.experts", {"compute_backend": "for_loop"}),
            "torchtitan.overrides.fused_swiglu.fused_grouped_experts",
        ]
    )
    with pytest.raises(ValueError, match="an ancestor of"):
        apply_overrides(both, config)


def test_a_broken_import_in_the_plugin_surfaces_through_the_host():
    """The host takes an ImportError in a config registry for "no such module"."""
    code = """
import sys
sys.modules["psutil"] = None  # what a missing dependency looks like
from torchtitan.config import ConfigManager
ConfigManager().parse_args(["--module", "ezpz_moe", "--config", "debugmodel_sdpa"])
"""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert result.returncode == 2, result.stderr
    assert "psutil" in result.stderr
    assert "Traceback" not in result.stderr
