"""The selector on torchtitan since September 2026, whose routed experts are two grouped linears.

On another host these do not run.
"""

import copy
from dataclasses import dataclass, fields
from functools import partial
from unittest import mock

import pytest
import torch
from contract_cases import ON_THE_CPU, OTHERS_WITHOUT_DROPS
from quantized_weights import wrap_weights
from torch.utils.checkpoint import checkpoint

from ezpz_moe.compute import backend_names, get_backend
from ezpz_moe.errors import EzpzError
from ezpz_moe.hosts.detect import check_host, host
from ezpz_moe.hosts.titan.base import titan
from ezpz_moe.hosts.titan.v2026_09 import Titan2026_09

check_host()  # before torchtitan is imported: it chooses the device

if type(host()) is not Titan2026_09:
    pytest.skip(
        f"the installed host is {host().name}; make test-hosts HOST=... runs these",
        allow_module_level=True,
    )

from torchtitan.config.override import OverrideConfig, apply_overrides  # noqa: E402
from torchtitan.models import deepseek_v3, gpt_oss, qwen3  # noqa: E402
from torchtitan.models.common.linear import GroupedLinear  # noqa: E402
from torchtitan.models.common.moe import MoE, RoutedExperts  # noqa: E402
from torchtitan.models.common.token_dispatcher import LocalTokenDispatcher  # noqa: E402

experts = titan().experts()
selected = experts.selected

SPECS = {
    "deepseek_v3": lambda: deepseek_v3.model_registry("debugmodel"),
    "qwen3": lambda: qwen3.model_registry("debugmodel_moe"),
    "gpt_oss": lambda: gpt_oss.model_registry("debugmodel"),
}
E, D, F, T, K = 4, 32, 48, 24, 2


class Quantized(GroupedLinear):
    @dataclass(kw_only=True, slots=True)
    class Config(GroupedLinear.Config):
        pass

    def _grouped_mm(self, *, input_RI, weight_EOI, offsets_E):
        raise AssertionError("not reached")


class Fused(RoutedExperts):
    @dataclass(kw_only=True, slots=True)
    class Config(RoutedExperts.Config):
        pass

    def forward(self, *tensors):
        raise AssertionError("not reached")


class Float8(GroupedLinear):
    @dataclass(kw_only=True, slots=True)
    class Config(GroupedLinear.Config):
        pass

    def __init__(self, config):
        super().__init__(config)
        wrap_weights(self, "torch_function")


class OwnForward(GroupedLinear):
    @dataclass(kw_only=True, slots=True)
    class Config(GroupedLinear.Config):
        pass

    def forward(self, *tensors):
        raise AssertionError("not reached")


def experts_config(kind=RoutedExperts, linear=GroupedLinear) -> RoutedExperts.Config:
    init = {"weight": lambda weight: torch.nn.init.normal_(weight, std=D**-0.5)}
    return kind.Config(
        w13=linear.Config(
            group_size=E, in_features=D, out_features=F, num_linears=2, param_init=init
        ),
        w2=linear.Config(group_size=E, in_features=F, out_features=D, param_init=init),
        token_dispatcher=LocalTokenDispatcher.Config(num_experts=E, top_k=K),
    )


def built(config: RoutedExperts.Config) -> RoutedExperts:
    torch.manual_seed(0)
    module = config.build()
    module.init_states()
    return module


def output_and_gradients(config: RoutedExperts.Config) -> list[torch.Tensor]:
    """Of T tokens that never choose expert 1: the output, and gradients of x and both weights."""
    module = built(config)
    noise = torch.Generator().manual_seed(1)
    x_TD = torch.randn(T, D, generator=noise).bfloat16().requires_grad_()
    scores_TK = torch.rand(T, K, generator=noise)
    ids_TK = torch.stack(
        [torch.tensor([0, 2, 3])[torch.randperm(3, generator=noise)[:K]] for _ in range(T)]
    )
    counts_E = torch.bincount(ids_TK.flatten(), minlength=E)
    y_TD = module(x_TD, scores_TK, ids_TK, counts_E)
    y_TD.backward(torch.randn(y_TD.shape, generator=noise).type_as(y_TD))
    return [y_TD.detach(), x_TD.grad, module.w13.weight.grad, module.w2.weight.grad]


@pytest.mark.parametrize("model", SPECS)
def test_both_linears_of_every_moe_layer_are_replaced(model):
    config = SPECS[model]().model
    layers = list(config.traverse(MoE.Config))
    lines = apply_overrides(
        OverrideConfig(imports=[("ezpz_moe.overrides.experts", {"compute_backend": "for_loop"})]),
        config,
    )
    assert len(lines) == len(layers) > 0
    with torch.device("meta"):
        modules = [each for each in config.build().modules() if isinstance(each, RoutedExperts)]
    assert [each.compute_backend for each in modules] == ["for_loop"] * len(layers)
    linears = [linear for each in modules for linear in (each.w13, each.w2)]
    assert {linear._backend for linear in linears} == {get_backend("for_loop")}


@pytest.mark.parametrize("backend", backend_names())
def test_every_field_of_the_host_survives_the_selection(backend):
    config = experts_config()
    config.w13.sharding_config = config.w2.sharding_config = "a sharding"
    ours = selected(config, backend, "a test")
    for before, after in ((config, ours), (config.w13, ours.w13), (config.w2, ours.w2)):
        for field in fields(before):
            if field.name not in ("w13", "w2"):
                assert getattr(after, field.name) == getattr(before, field.name), field.name
    assert (ours.compute_backend, ours.chosen_by) == (backend, "a test")
    assert experts.sizes(ours) == (E, D, F)


@pytest.mark.parametrize("backend", backend_names())
def test_state_dict_and_initial_values_are_the_hosts(backend):
    config = experts_config()
    host, ours = built(config).state_dict(), built(selected(config, backend, "")).state_dict()
    assert list(ours) == list(host) == ["w13.weight", "w2.weight"]
    assert all(torch.equal(ours[name], host[name]) for name in host)


def test_grouped_mm_leaves_the_hosts_linears_alone():
    config = experts_config()
    ours = selected(config, "grouped_mm", "")
    assert (ours.w13, ours.w2) == (config.w13, config.w2)
    for mine, hosts in zip(output_and_gradients(ours), output_and_gradients(config), strict=True):
        assert torch.equal(mine, hosts)


@pytest.mark.parametrize("backend", OTHERS_WITHOUT_DROPS)
def test_the_chosen_backend_is_the_one_that_runs(backend):
    """Once for gate and up together, and once for the projection down."""
    chosen = get_backend(backend)
    with (
        mock.patch.object(type(chosen), "grouped_mm", mock.Mock(wraps=chosen.grouped_mm)) as ours,
        mock.patch.object(GroupedLinear, "_grouped_mm") as host_product,
    ):
        output_and_gradients(selected(experts_config(), backend, ""))
    widths = [call.args[1].shape for call in ours.call_args_list]
    assert widths == [(E, D, 2 * F), (E, F, D)]
    host_product.assert_not_called()


@pytest.mark.parametrize("backend", OTHERS_WITHOUT_DROPS)
def test_other_backends_agree_with_the_host(backend):
    """Two bfloat16 computations of one value differ by a rounding of each on every product."""
    config = experts_config()
    both = output_and_gradients(selected(config, backend, "")), output_and_gradients(config)
    for ours, theirs in zip(*both, strict=True):
        assert (ours.double() - theirs.double()).norm() <= 2 * 2 * 2.0**-8 * theirs.double().norm()
    for weight in both[0][2:]:
        assert not weight[1].any()  # the expert without tokens


@pytest.mark.parametrize("backend", ON_THE_CPU)
def test_four_tensors_of_the_hidden_size_are_saved_for_backward(backend):
    """Gate and up (in one storage), silu(gate), and what goes into the projection down."""
    saved: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.shape == (T * K, F):
            storage = tensor.untyped_storage()
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output_and_gradients(selected(experts_config(), backend, ""))
    assert sum(saved.values()) == 4 * T * K * F * torch.bfloat16.itemsize


FORWARDS = {
    "plain": lambda module: module,
    "recomputed": lambda module: partial(checkpoint, module, use_reentrant=False),
    "compiled": lambda module: torch.compile(module, backend="aot_eager", fullgraph=True),
    "copied": copy.deepcopy,
}


@pytest.mark.parametrize("name", FORWARDS)
def test_rows_are_counted_once_where_they_are_computed(name):
    """Tokens given, rows computed, tokens dropped."""
    torch.compiler.reset()
    module = built(selected(experts_config(), "batched_mm_capacity(capacity_factor=1.0)", ""))
    module.row_counts.on = True
    forward = FORWARDS[name](module)
    counted = forward if name == "copied" else module
    ids_TK = torch.tensor([[0, 2]] * 20 + [[0, 3]] * 4)  # 24, 0, 20 and 4 rows, of which 12 fit
    scores_TK, counts_E = torch.ones(T, K), torch.bincount(ids_TK.flatten(), minlength=E)
    x_TD = torch.randn(T, D).bfloat16().requires_grad_()
    for times in (1, 2):
        forward(x_TD, scores_TK, ids_TK, counts_E).sum().backward()
        rows = [48, E * 12, 12 + 8]
        assert counted.row_counts.rows_3.tolist() == [times * each for each in rows]
    if name == "copied":
        assert not module.row_counts.rows_3.any()


def test_without_the_seam_the_hosts_own_path_is_left(monkeypatch):
    monkeypatch.delattr(GroupedLinear, "_grouped_mm")
    assert selected(experts_config(), "grouped_mm", "a test").compute_backend == "grouped_mm"
    with pytest.raises(EzpzError, match=r"no GroupedLinear._grouped_mm, .* Use 'grouped_mm'"):
        selected(experts_config(), "for_loop", "a test")
    check_host()  # which refuses what nothing can be trained without


def test_a_copied_model_keeps_its_backend():
    ours = built(selected(experts_config(), "for_loop", ""))
    assert copy.deepcopy(ours).w13._backend is ours.w13._backend


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (experts_config(linear=Quantized), r"Quantized computes .*quantiz"),
        (experts_config(linear=Float8), r"Float8 computes .*quantiz.* its weights are Wrapped"),
        (experts_config(linear=OwnForward), r"OwnForward has a forward of its own"),
        (experts_config(kind=Fused), r"Fused has a forward of its own"),
        (selected(experts_config(), "for_loop", "the first"), r"twice: the first .*a test"),
    ],
    ids=["quantized", "wrapped weights", "a linear's forward", "another forward", "twice"],
)
def test_what_a_backend_cannot_take_part_in_is_refused(config, message):
    with pytest.raises(EzpzError, match=message):
        selected(config, "batched_mm_padded", "a test")


def test_weights_that_are_wrapped_after_the_selection_stop_the_run(capsys):
    module = selected(experts_config(), "for_loop", "a test").build()
    wrap_weights(module, "torch_function")
    with pytest.raises(SystemExit, match="2"):
        module.init_states()
    assert "computes the experts' products itself" in capsys.readouterr().err
