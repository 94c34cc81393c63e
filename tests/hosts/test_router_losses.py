"""What a flavor's router is trained on beside the model's loss, and what it counts."""

import pytest
import torch
from router_cases import B, L, flat, routed, router_of, tokens

from ezpz_moe.hosts.titan.router import Groups, TokenMask
from ezpz_moe.routing.counters import SUMS

LOSSES = """
[balance]
aux_loss = 0.3
mse_loss = 7.0
z_loss = 0.02
scope = "{scope}"
"""


def written_out(logits_BLE, ids_BLK, mask_BL, scope):
    """The sum of the three losses in float64: loops over groups, tokens and experts."""
    E = logits_BLE.shape[-1]
    if scope != "sequence":
        logits_BLE, ids_BLK, mask_BL = (
            each.flatten(0, 1).unsqueeze(0) for each in (logits_BLE, ids_BLK, mask_BL)
        )
    total = torch.zeros((), dtype=torch.float64)
    for logits_LE, ids_LK, mask_L in zip(logits_BLE, ids_BLK, mask_BL, strict=True):
        kept = [position for position in range(len(mask_L)) if mask_L[position]]
        load_E = torch.zeros(E, dtype=torch.float64)
        P_E = torch.zeros(E, dtype=torch.float64)
        z = torch.zeros((), dtype=torch.float64)
        for position in kept:
            for expert in ids_LK[position].tolist():
                load_E[expert] += 1
            exps_E = logits_LE[position].exp()
            P_E = P_E + exps_E / exps_E.sum() / len(kept)
            z = z + exps_E.sum().log() ** 2 / len(kept)
        f_E = load_E / load_E.sum()
        total = total + 0.3 * E * sum(f_E[i] * P_E[i] for i in range(E))
        total = total + 7.0 * sum((P_E[i] - 1 / E) ** 2 for i in range(E)) / E + 0.02 * z
    return total


@pytest.mark.parametrize("scope", ["sequence", "batch"])
@pytest.mark.parametrize("padded", [False, True])
def test_the_gradient_is_that_of_the_written_out_loss(model_with, scope, padded):
    """Of the gate's weight and of its input; the trainer's loss is left out (weights times 0)."""
    weight = 0.25
    groups = Groups(by_sequence=scope == "sequence", length=L, weight=weight)
    router = router_of(model_with(LOSSES.format(scope=scope)), groups=groups)
    with torch.no_grad():
        router.gate.weight.mul_(20)  # far from even
    x_BLD = tokens(router.gate.in_features).requires_grad_()
    mask_BL = torch.ones(B, L, dtype=torch.bool)
    if padded:
        mask_BL[0, 3:], mask_BL[2, :5] = False, False
        router.masked_by = TokenMask()
        router.masked_by.mask_BL = flat(mask_BL)
    weights, ids, _ = router(flat(x_BLD))
    (weights * 0).sum().backward()

    x64_BLD = x_BLD.detach().double().requires_grad_()
    w64_ED = router.gate.weight.detach().double().requires_grad_()
    loss = written_out(x64_BLD @ w64_ED.T, ids.view(B, L, -1), mask_BL, scope)
    (weight * loss).backward()
    for ours, exact in ((x_BLD.grad, x64_BLD.grad), (router.gate.weight.grad, w64_ED.grad)):
        assert exact.abs().max() > 0
        # A hundred float32 roundings of the largest element: sums over E, L and D in any order.
        assert (ours.double() - exact).abs().max() <= 100 * 2**-24 * exact.abs().max()
    if padded:
        assert not x_BLD.grad[~mask_BL].any()


def test_evaluation_has_no_gradient_and_no_count(model_with):
    router = router_of(model_with(LOSSES.format(scope="batch"))).eval()
    x_BLD = tokens(router.gate.in_features).requires_grad_()
    weights_TK, _, _ = routed(router, x_BLD)
    (weights_TK * 0).sum().backward()
    assert not x_BLD.grad.any()
    assert not router.counts_E.any()


def test_counts_and_sums(model_with):
    router = router_of(model_with("[telemetry]"))
    x_BLD = tokens(router.gate.in_features)
    _, ids_TK, scores_TE = routed(router, x_BLD)
    routed(router, x_BLD)  # a second microbatch
    assert torch.equal(router.counts_E, 2 * ids_TK.flatten().bincount(minlength=8))
    sums = dict(zip(SUMS, router.sums_S.tolist(), strict=True))
    top_T2 = scores_TE.double().topk(2).values
    assert sums["tokens"] == 2 * B * L
    assert sums["top1_probability"] == pytest.approx(2 * top_T2[:, 0].sum().item(), rel=1e-5)
    margins = top_T2[:, 0] - top_T2[:, 1]
    assert sums["margin"] == pytest.approx(2 * margins.sum().item(), rel=1e-4)
    assert sums["not_finite"] == 0


def test_logits_that_are_not_finite_are_counted(model_with):
    router = router_of(model_with("[telemetry]"))
    x_BLD = tokens(router.gate.in_features)
    x_BLD[1, 2:4] = torch.inf
    routed(router, x_BLD)
    assert dict(zip(SUMS, router.sums_S.tolist(), strict=True))["not_finite"] == 2


@pytest.mark.parametrize("activation", ["identity", "softplus", "relu_rmsnorm"])
@pytest.mark.parametrize("counted", [True, False])
def test_a_logit_of_minus_infinity_is_seen(model_with, activation, counted):
    """In the count, or as NaN that reaches the loss: an activation must not make it a number."""
    router = router_of(model_with(f'[router]\nactivation = "{activation}"\n[telemetry]'))
    router.gate.is_counted = counted
    with torch.no_grad():
        router.gate.weight[2] = -torch.inf
    weights_TK, _, _ = routed(router, tokens(router.gate.in_features).abs())
    not_finite = dict(zip(SUMS, router.sums_S.tolist(), strict=True))["not_finite"]
    assert not_finite == B * L
    assert counted or weights_TK.isnan().all()


def test_a_mask_of_another_shape_or_dtype_is_an_error(model_with):
    router = router_of(model_with("[telemetry]"))
    x_BLD = tokens(router.gate.in_features)
    router.masked_by = TokenMask()
    for mask in (torch.ones(B, L + 1, dtype=torch.bool), flat(torch.ones(B, L, 1))[..., 0]):
        router.masked_by.mask_BL = mask
        with pytest.raises(ValueError, match="mask must be bool and"):
            routed(router, x_BLD)
