"""A routed layer as one node: what it computes, keeps for backward, and when it stays composed.

The yardstick of numerics is the host's own layer, whose products are in bfloat16: ours may err by
twice as much, measured against a plain loop in float64.
"""

import logging
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from contract_cases import OTHERS_WITHOUT_DROPS
from dialect import ON_0_2, SINCE_2026_08, SINCE_2026_09

if ON_0_2 or SINCE_2026_09:
    pytest.skip("this host's routed layers stay composed", allow_module_level=True)

from router_cases import B, L, flat, moe_of, router_of, tokens
from torch import nn
from torch.utils.checkpoint import checkpoint
from torchtitan.models.common.moe import GroupedExperts, RoutedExperts
from torchtitan.models.common.token_dispatcher import AllToAllTokenDispatcher, LocalTokenDispatcher
from torchtitan.models.gpt_oss.moe import GptOssGroupedExperts

from ezpz_moe.compute.contract import Backend
from ezpz_moe.compute.reference import relative_error
from ezpz_moe.hosts.titan import routed_experts
from ezpz_moe.hosts.titan.experts import selected_layer
from ezpz_moe.hosts.titan.routed_experts import why_composed

E, K, D, F, T = 8, 3, 32, 48, 40
FLOAT32_FOR_LOOP = 'compute_backend = "for_loop"\nexpert_precision = "float32"\n'
HAS_KERNEL = [
    name for name in OTHERS_WITHOUT_DROPS if name not in ("auto", "triton")
]  # of those that run on a CPU


class OwnDispatcher(LocalTokenDispatcher):
    @dataclass(kw_only=True, slots=True)
    class Config(LocalTokenDispatcher.Config):
        pass

    def _local_reorder(self, *tensors):
        raise AssertionError("not reached")


class OwnForward(RoutedExperts):
    @dataclass(kw_only=True, slots=True)
    class Config(RoutedExperts.Config):
        pass

    def forward(self, *tensors):
        raise AssertionError("not reached")


def layer_config(
    layer=RoutedExperts, experts=GroupedExperts, dispatcher=AllToAllTokenDispatcher
) -> RoutedExperts.Config:
    names = ("w1_EFD", "w2_EDF", "w3_EFD")
    init = dict.fromkeys(names, lambda w_EXY: nn.init.normal_(w_EXY, std=w_EXY.shape[-1] ** -0.5))
    return layer.Config(
        inner_experts=experts.Config(dim=D, hidden_dim=F, num_experts=E, param_init=init),
        token_dispatcher=dispatcher.Config(num_experts=E, top_k=K),
    )


def built(config: RoutedExperts.Config) -> RoutedExperts:
    torch.manual_seed(0)
    layer = config.build()
    layer.init_states()
    return layer


def inputs(dtype: torch.dtype) -> list[torch.Tensor]:
    """x, scores, ids and counts of T tokens, as this host shapes them; none chooses expert 1."""
    draw = torch.Generator().manual_seed(1)
    x_TD = torch.randn(T, D, generator=draw).to(dtype)
    scores_TK = torch.rand(T, K, generator=draw).to(dtype)
    of_rank = torch.rand(T, E - 1, generator=draw).argsort(-1)[:, :K]
    ids_TK = torch.tensor([0, *range(2, E)])[of_rank]
    counts_E = torch.bincount(ids_TK.flatten(), minlength=E)
    leading = (T,) if SINCE_2026_08 else (2, T // 2)
    return [*(each.view(*leading, -1) for each in (x_TD, scores_TK, ids_TK)), counts_E]


class InFloat64(RoutedExperts):
    """The truth, as on a blackboard; the host's layer would combine in float32."""

    @dataclass(kw_only=True, slots=True)
    class Config(RoutedExperts.Config):
        pass

    def forward(self, x, scores, ids, counts_E):
        x_TD, scores_TK, ids_TK = (each.flatten(0, -2) for each in (x, scores, ids))
        experts, out_TD = self.inner_experts, torch.zeros_like(x_TD)
        weights = (experts.w1_EFD.unbind(), experts.w2_EDF.unbind(), experts.w3_EFD.unbind())
        for expert, (w1_FD, w2_DF, w3_FD) in enumerate(zip(*weights, strict=True)):
            score_T = (scores_TK * (ids_TK == expert)).sum(-1, keepdim=True)
            y_TD = (nn.functional.silu(x_TD @ w1_FD.T) * (x_TD @ w3_FD.T)) @ w2_DF.T
            out_TD = out_TD + score_T * y_TD
        return out_TD.view(x.shape)


def truth() -> dict[str, torch.Tensor]:
    return results(built(layer_config(InFloat64)).double(), torch.float64)


def results(layer: RoutedExperts, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The output, and the gradients of tokens, scores and all weights."""
    x, scores, ids, counts_E = inputs(dtype)
    out = layer(x.requires_grad_(), scores.requires_grad_(), ids, counts_E)
    assert out.shape == x.shape
    assert out.dtype == x.dtype
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(dtype))
    gradients = {name: each.grad for name, each in layer.named_parameters()}
    return {"out": out.detach(), "x": x.grad, "scores": scores.grad, **gradients}


def one_node(backend: str = "for_loop", routed: str = "one_node") -> RoutedExperts.Config:
    return selected_layer(layer_config(), backend, "a test", None, routed)


@pytest.mark.parametrize("backend", HAS_KERNEL)
def test_it_is_as_exact_as_the_hosts_layer(backend):
    true = truth()
    hosts = results(built(layer_config()).bfloat16(), torch.bfloat16)
    ours = results(built(one_node(backend)).bfloat16(), torch.bfloat16)
    assert ours.keys() == hosts.keys()
    for name, value in ours.items():
        bound = 2 * relative_error(hosts[name], true[name]) + 1e-6
        assert relative_error(value, true[name]) <= bound, name


def test_nothing_is_rounded_but_in_the_experts_precision():
    """In float64 what remains is the order of sums: of 48 products and less."""
    config, true = one_node(), truth()
    config.inner_experts.computed_in = "float64"
    for name, value in results(built(config).double(), torch.float64).items():
        assert relative_error(value, true[name]) <= F * 2.0**-53, name


@pytest.mark.parametrize("routed", ["one_node", "composed"])
def test_state_dict_and_initial_values_are_the_hosts(routed):
    theirs = built(layer_config()).state_dict()
    ours = built(one_node(routed=routed)).state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def saved_bytes(layer: RoutedExperts) -> int:
    """Bytes of all storages that autograd saves, but for weights and inputs."""
    given = inputs(torch.bfloat16)
    known = {each.untyped_storage().data_ptr() for each in (*given, *layer.parameters())}
    saved: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    given[0].requires_grad_(), given[1].requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(*given)  # the graph, and so what it saves, lives until all is counted
        return sum(nbytes for at, nbytes in saved.items() if at not in known)


@pytest.mark.parametrize(("backend", "hidden"), [("for_loop", 2), ("for_loop(recompute=true)", 0)])
def test_only_gate_up_and_the_order_are_saved(backend, hidden):
    R = T * K
    expected = hidden * R * F * torch.bfloat16.itemsize + R * torch.int64.itemsize
    assert saved_bytes(built(one_node(backend)).bfloat16()) == expected
    in_float32 = built(one_node(backend))  # whose weights are cast to bfloat16, in backward again
    assert saved_bytes(in_float32) == expected


def test_the_experts_module_is_called():
    """Whoever shards or gathers weights does so around it, by hooks."""
    layer, called = built(one_node()), []
    layer.inner_experts.register_forward_pre_hook(lambda *_: called.append(True))
    layer(*inputs(torch.bfloat16))
    assert called == [True]


def test_rows_that_are_padded_or_dropped_are_counted():
    layer = built(one_node("batched_mm_capacity(capacity_factor=1.0)"))
    layer.inner_experts.row_counts.on = True
    given = inputs(torch.bfloat16)
    layer(*given)
    places, counts_E = T * K // E, given[-1]
    dropped = int((counts_E - places).clamp(min=0).sum())
    assert layer.inner_experts.row_counts.rows_3.tolist() == [T * K, E * places, dropped]


REASONS = {
    "asked for": (layer_config(), "for_loop", "composed"),
    "GptOssGroupedExperts computes another FFN than SwiGLU": (
        layer_config(experts=GptOssGroupedExperts),
        "for_loop",
        "one_node",
    ),
    "OwnForward has a forward of its own": (layer_config(OwnForward), "for_loop", "one_node"),
    "OwnDispatcher sorts and sends tokens in its own way": (
        layer_config(dispatcher=OwnDispatcher),
        "for_loop",
        "one_node",
    ),
}


@pytest.mark.parametrize("why", REASONS)
def test_it_stays_composed_where_it_cannot_be_one_node(why):
    config, backend, routed = REASONS[why]
    assert why_composed(config, backend, routed) == why
    ours = selected_layer(config, backend, "a test", None, routed)
    assert type(ours)._owner is type(config)._owner


class OfProductsAlone(Backend):
    name, summary, host_syncs, static_shapes = "of_products_alone", "a test", False, False

    def _grouped_mm(self, A_RK, B_EKN, offs_E):
        raise AssertionError("not reached")


def test_a_backend_without_such_a_kernel_stays_composed(monkeypatch):
    monkeypatch.setattr(routed_experts, "get_backend", lambda name: OfProductsAlone())
    why = why_composed(layer_config(), "of_products_alone", "one_node")
    assert why == "of_products_alone has no kernel for it"


def test_a_flavor_may_ask_for_it(model_with):
    layer = moe_of(model_with(f'{FLOAT32_FOR_LOOP}routed = "composed"')).routed_experts
    assert type(layer) is RoutedExperts


def test_grouped_mm_stays_the_hosts_layer():
    assert type(one_node("grouped_mm"))._owner is RoutedExperts


@pytest.mark.parametrize(
    ("routed", "said"),
    [
        ("one_node", "; routed layer as one node"),
        ("composed", "; routed layer composed: asked for"),
    ],
)
def test_the_log_says_which(routed, said, caplog):
    with caplog.at_level(logging.INFO):
        built(one_node(routed=routed))
    (line,) = (each.message for each in caplog.records if "compute_backend" in each.message)
    assert line.endswith(f"for 1 MoE layers; a test{said}")


TABLES = {
    "plain": "[telemetry]\n",
    "zero computation": "[router]\nnull_experts = 3\ncopy_experts = 1\nconstant_experts = 1\n",
    "padding": "[router]\npad_token_id = 0\n",
    "capacity": "[balance]\ncapacity_factor = 0.7\n",
}


FORWARDS = {
    "eager": lambda moe: moe,
    "compiled": lambda moe: torch.compile(moe, fullgraph=True, backend="aot_eager"),
    "recomputed": lambda moe: partial(checkpoint, moe, use_reentrant=False),
}
IN_SHORT = "zero computation"
CASES = [
    pytest.param(
        tables, forward, marks=() if forward == "eager" or tables == IN_SHORT else pytest.mark.full
    )
    for tables in TABLES
    for forward in FORWARDS
]


@pytest.mark.parametrize(("tables", "forward"), CASES)
def test_a_models_layer_leaves_out_what_the_composed_one_does(model_with, tables, forward):
    """Choices without an expert, of padding, and beyond a capacity, traced as the host traces."""
    flavor = f"{FLOAT32_FOR_LOOP}{{}}\n{TABLES[tables]}"
    composed = _of_model(model_with(flavor.format('routed = "composed"')), FORWARDS["eager"])
    ours = _of_model(model_with(flavor.format("")), FORWARDS[forward])
    assert ours.keys() == composed.keys()
    for name, value in ours.items():
        # Sums of at most 256 products, in float32.
        assert relative_error(value, composed[name].double()) <= 256 * 2.0**-24, name


def test_what_is_left_out_takes_no_row(model_with):
    """Or it would be computed as a tail: without effect, but not without memory."""
    model, handed = model_with(f"{FLOAT32_FOR_LOOP}{TABLES['capacity']}"), []
    moe_of(model).routed_experts.inner_experts.register_forward_pre_hook(
        lambda _, args, kwargs: handed.append((args[1], kwargs["choices"].num_rows)),
        with_kwargs=True,
    )
    _of_model(model, FORWARDS["eager"])
    ((counts_E, num_rows),) = handed
    assert num_rows == int(counts_E.sum()) < 3 * B * L


def _of_model(model: nn.Module, wrapped) -> dict[str, torch.Tensor]:
    """Output and gradients of the model's first MoE layer, with padding in its last sequence."""
    from ezpz_moe.hosts.titan.router import TokenMask

    moe = moe_of(model)
    router_of(model)  # of sequences of L tokens
    if getattr(moe.routed_experts, "masked_by", None) is not None:
        mask_BL = torch.ones(B, L, dtype=torch.bool)
        mask_BL[-1, 5:] = False
        mask = moe.router.masked_by = moe.routed_experts.masked_by = TokenMask()
        mask.mask_BL = flat(mask_BL)
    x = flat(tokens(moe.router.gate.in_features)).requires_grad_()
    forward = wrapped(moe)
    with torch._dynamo.config.patch(capture_scalar_outputs=True):  # as the host sets it
        torch._dynamo.reset()
        out = forward(x)
        out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(3)))
    gradients = {name: p.grad for name, p in moe.named_parameters() if p.grad is not None}
    return {"out": out.detach(), "x": x.grad, **gradients}
