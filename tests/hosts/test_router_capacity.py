"""A flavor's ``[balance] capacity_factor``: which tokens the experts of a model compute.

The function that says which is in ``tests/test_routing_capacity.py``.
"""

import pytest
import torch
from dialect import SINCE_2026_09
from router_cases import B, L, flat, moe_of, router_of, tokens

from ezpz_moe.compute.plain import plain_loop
from ezpz_moe.compute.reference import relative_error
from ezpz_moe.hosts.titan.zero_computation import Choices
from ezpz_moe.routing.capacity import beyond_capacity, capacity

EXPERTS, FACTOR = 8, 0.75


def case(model_with, drop, more="", least=1):
    tables = f'{more}[balance]\ncapacity_factor = {FACTOR}\ndrop = "{drop}"\nmin_capacity = {least}'
    built = model_with(f'compute_backend = "for_loop"\nexpert_precision = "float32"\n{tables}')
    router = router_of(built)
    with torch.no_grad():
        router.gate.weight.mul_(20)  # far from even
    return moe_of(built), tokens(router.gate.in_features).requires_grad_()


def choices_of(moe):
    """How many choices were made, and how many of them were beyond the capacity."""
    (counter,) = (each for each in moe.modules() if isinstance(each, Choices))
    return tuple(counter.choices_2.tolist())


def kept_choices(moe, x, weights, ids_TK, beyond_TK, grad, dtype):
    """The layer's routed output and gradients by the plain loop, one kept choice at a time."""
    experts = moe.routed_experts.inner_experts
    leaves = [
        each.detach().to(dtype).requires_grad_()
        for each in (x, weights, experts.w1_EFD, experts.w2_EDF, experts.w3_EFD)
    ]
    x_TD, weights_TK = leaves[0].flatten(0, -2), leaves[1].flatten(0, -2)
    out_TD = torch.zeros_like(x_TD)
    for t, k in (~beyond_TK).nonzero().tolist():
        counts_E = torch.zeros(EXPERTS, dtype=torch.int64)
        counts_E[ids_TK[t, k]] = 1
        y_1D = plain_loop(*leaves[2:], x_TD[t : t + 1], counts_E)
        out_TD = out_TD.index_add(0, torch.tensor([t]), weights_TK[t, k] * y_1D)
    return out_TD.detach(), *torch.autograd.grad(out_TD, leaves, grad.flatten(0, -2).to(dtype))


@pytest.mark.skipif(SINCE_2026_09, reason="its experts are grouped linears of bfloat16 products")
@pytest.mark.parametrize("drop", ["last", "probability"])
def test_output_and_gradients_are_those_of_the_kept_choices(model_with, drop):
    """Against float64: of tokens, weights of choices, and all three weights of the experts."""
    moe, x_BLD = case(model_with, drop)
    weights, ids, _ = moe.router(flat(x_BLD))
    ids_TK, weights = ids.flatten(0, -2), weights.detach().requires_grad_()
    beyond_TK = beyond_capacity(
        ids_TK,
        weights.flatten(0, -2),
        experts=EXPERTS,
        capacity=capacity(ids_TK.numel(), EXPERTS, factor=FACTOR, least=1),
        by_weight=drop == "probability",
    )
    assert 0 < beyond_TK.sum() < beyond_TK.numel() / 2
    x = flat(x_BLD).detach().requires_grad_()
    out = moe.routed_experts(x, weights, ids, ids_TK.flatten().bincount(minlength=EXPERTS))
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    experts = moe.routed_experts.inner_experts
    leaves = (x, weights, experts.w1_EFD, experts.w2_EDF, experts.w3_EFD)
    found = (out, *torch.autograd.grad(out, leaves, grad))
    plain, true = (
        kept_choices(moe, x, weights, ids_TK, beyond_TK, grad, dtype)
        for dtype in (torch.float32, torch.float64)
    )
    for value, of_plain, exact in zip(found, plain, true, strict=True):
        bound = 2 * relative_error(of_plain, exact) + 1e-6
        assert relative_error(value.detach().view_as(exact), exact) <= bound
    assert not found[2].flatten(0, -2)[beyond_TK].any()
    assert choices_of(moe) == (3 * B * L, beyond_TK.sum())


def test_at_inference_nothing_is_dropped(model_with):
    moe, x_BLD = case(model_with, "last")
    with torch.no_grad():
        in_training, at_inference = moe(flat(x_BLD)), moe.eval()(flat(x_BLD))
        moe.routed_experts.choices = None
        without = moe(flat(x_BLD))
    assert torch.equal(at_inference, without)
    assert not torch.equal(in_training, without)


def test_null_experts_take_no_place(model_with):
    """The even share is one of all choices; those of no computation are not cut off twice."""
    moe, x_BLD = case(model_with, "last", "[router]\nnull_experts = 8\n")
    _, ids, _ = moe.router(flat(x_BLD))
    ids_TK = ids.flatten(0, -2)
    moe(flat(x_BLD))
    made, beyond = choices_of(moe)
    assert made == (ids_TK < EXPERTS).sum()
    places = capacity(ids_TK.numel(), 2 * EXPERTS, factor=FACTOR, least=1)
    loads_E = ids_TK[ids_TK < EXPERTS].bincount(minlength=EXPERTS)
    assert beyond == (loads_E - places).clamp(min=0).sum() > 0


@pytest.mark.parametrize("least", [1, 20])
def test_an_expert_has_the_places_of_a_least_capacity(model_with, least):
    """An even share times the factor is 14 places."""
    moe, x_BLD = case(model_with, "last", least=least)
    loads_E = moe.router(flat(x_BLD))[1].flatten().bincount(minlength=EXPERTS)
    moe(flat(x_BLD))
    assert choices_of(moe) == (3 * B * L, (loads_E - max(14, least)).clamp(min=0).sum())
    assert loads_E.max() > 20
