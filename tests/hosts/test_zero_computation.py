"""Zero-computation experts, and padding that goes to no expert."""

import pytest
import torch
from router_cases import B, L, flat, moe_of, router_of, tokens

from ezpz_moe.hosts.titan.router import TokenMask
from ezpz_moe.hosts.titan.zero_computation import dispatch_padding

ZERO = """
[router]
null_experts = 3
copy_experts = 2
constant_experts = 2
"""


def test_zero_computation_experts_answer_without_experts(model_with):
    """Every token to one expert of each kind: nothing, itself, and a mix with a vector."""
    built = model_with(ZERO)
    moe = moe_of(built)
    assert moe.router.num_experts == 8 + 7
    assert moe.router.top_k == round(3 * 15 / 8)
    router_of(built)
    moe.shared_experts = None
    x_BLD = tokens(moe.router.gate.in_features)
    constant = moe.routed_experts.constant_experts
    with torch.no_grad():
        constant.mix_C2D.normal_()
        weights = torch.tensor([0.5, 0.25, 0.125, 0.0625, 0.03125, 0.03125]).repeat(B, L, 1)
        ids = torch.tensor([8, 9, 11, 12, 13, 14]).repeat(B, L, 1)  # null, null, copy x 2, 2
        counts_E = torch.zeros(15, dtype=torch.int64)
        inputs = (flat(x_BLD), flat(weights), flat(ids), counts_E)
        out = moe.routed_experts(*inputs).view(B, L, -1)
        mix_BLC2 = torch.einsum("bld,cmd->blcm", x_BLD, constant.mix_C2D).softmax(-1)
        expected = x_BLD * (0.125 + 0.0625)
        for c in range(2):
            answer = x_BLD * mix_BLC2[:, :, c, :1] + constant.vectors_CD[c] * mix_BLC2[:, :, c, 1:]
            expected = expected + 0.03125 * answer
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)


def test_the_routed_experts_answer_as_without_zero_computation_experts(model_with):
    """Their rows are the same rows: weights and ids of the host's router among them."""
    with_zero, without = moe_of(model_with(ZERO)), moe_of(model_with("[telemetry]"))
    router_of(without)
    experts = (
        with_zero.routed_experts.inner_experts
        if hasattr(with_zero.routed_experts, "inner_experts")
        else None
    )
    if experts is None:
        pytest.skip("this host's RoutedExperts has no inner experts to share")
    with_zero.routed_experts.inner_experts = without.routed_experts.inner_experts
    x_BLD = tokens(without.router.gate.in_features)
    with torch.no_grad():
        weights, ids, _ = without.router(flat(x_BLD))
        counts_E = ids.flatten().bincount(minlength=8)
        expected = without.routed_experts(flat(x_BLD), weights, ids, counts_E)
        nulls = torch.full_like(ids, 9)
        out = with_zero.routed_experts(
            flat(x_BLD),
            torch.stack([weights, weights], -1).flatten(-2),
            torch.stack([ids, nulls], -1).flatten(-2),
            torch.cat([counts_E, counts_E.new_zeros(7)]),
        )
    torch.testing.assert_close(out, expected, rtol=0, atol=0)


@pytest.mark.parametrize("dispatched", ["", "dispatch_padding = false", "dispatch_padding = true"])
def test_padding_that_is_not_dispatched_gets_nothing(model_with, dispatched):
    """By default, too."""
    built = model_with(f"[router]\npad_token_id = 0\n{dispatched}")
    moe = moe_of(built)
    router_of(built)
    mask_BL = torch.ones(B, L, dtype=torch.bool)
    mask_BL[1, 4:] = False
    mask = TokenMask()
    mask.mask_BL = flat(mask_BL)
    moe.router.masked_by = moe.routed_experts.masked_by = mask
    if "true" in dispatched:
        assert type(moe.routed_experts).__name__ != "EzpzRoutedExperts"
        return
    moe.shared_experts = None
    rows = []
    experts = getattr(moe.routed_experts, "inner_experts", None)
    if experts is not None:
        experts.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    out_BLD = moe(flat(tokens(moe.router.gate.in_features))).view(B, L, -1)
    assert not out_BLD[~mask_BL].any()
    assert out_BLD[mask_BL].any(-1).all()
    assert rows in ([], [3 * int(mask_BL.sum())])


def test_all_is_dispatched_again_where_nothing_may_be_copied_to_the_host(model_with):
    """Under CUDA graphs: R is the tensor's size, and not read from it."""
    built = model_with("[router]\npad_token_id = 0")
    moe = moe_of(built)
    router_of(built)
    mask = TokenMask()
    mask.mask_BL = flat(torch.zeros(B, L, dtype=torch.bool))
    moe.router.masked_by = moe.routed_experts.masked_by = mask
    moe.shared_experts = None
    x_BLD = flat(tokens(moe.router.gate.in_features))
    assert not moe(x_BLD).any()
    dispatch_padding(built)
    assert moe.routed_experts.token_dispatcher.computed(torch.empty(4, 3, device="meta")) == 12
    assert moe(x_BLD).any(-1).all()
