"""What a flavor's router is trained on beside the model's loss, and what it counts."""

import pytest
import torch
from router_cases import B, L, flat, routed, router_of, run_in_copy, sums_of, tokens

from ezpz_moe.hosts.titan.router import Groups, TokenMask

LOSSES = """
[balance]
aux_loss = 0.3
mse_loss = 7.0
z_loss = 0.02
scope = "{scope}"
"""


OF_LOSSES = {"aux_loss": 0.3, "mse_loss": 7.0, "z_loss": 0.02}


def written_out(logits_BLE, ids_BLK, mask_BL, scope, coefficients=OF_LOSSES):
    """The sum of the losses in float64: loops over groups, tokens and experts."""
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
        losses = {
            "aux_loss": E * sum(f_E[i] * P_E[i] for i in range(E)),
            "mse_loss": sum((P_E[i] - 1 / E) ** 2 for i in range(E)) / E,
            "z_loss": z,
        }
        total = total + sum(value * losses[name] for name, value in coefficients.items())
    return total


def assert_gradients_of(loss, router, x_BLD):
    """Those that reached gate and tokens are those of ``loss(logits_BLE)``, in float64."""
    x64_BLD = x_BLD.detach().double().requires_grad_()
    w64_ED = router.gate.weight.detach().double().requires_grad_()
    loss(x64_BLD @ w64_ED.T).backward()
    for ours, exact in ((x_BLD.grad, x64_BLD.grad), (router.gate.weight.grad, w64_ED.grad)):
        assert exact.abs().max() > 0
        # A hundred float32 roundings of the largest element: sums over E, L and D in any order.
        assert (ours.double() - exact).abs().max() <= 100 * 2**-24 * exact.abs().max()


def router_far_from_even(model, groups=None):
    router = router_of(model, groups=groups)
    with torch.no_grad():
        router.gate.weight.mul_(20)
    return router, tokens(router.gate.in_features).requires_grad_()


@pytest.mark.parametrize("scope", ["sequence", "batch"])
@pytest.mark.parametrize("padded", [False, True])
def test_the_gradient_is_that_of_the_written_out_loss(model_with, scope, padded):
    """Of the gate's weight and of its input; the trainer's loss is left out (weights times 0)."""
    weight = 0.25
    groups = Groups(by_sequence=scope == "sequence", length=L, weight=weight)
    router, x_BLD = router_far_from_even(model_with(LOSSES.format(scope=scope)), groups)
    mask_BL = torch.ones(B, L, dtype=torch.bool)
    if padded:
        mask_BL[0, 3:], mask_BL[2, :5] = False, False
        router.masked_by = TokenMask()
        router.masked_by.mask_BL = flat(mask_BL)
    weights, ids, _ = router(flat(x_BLD))
    (weights * 0).sum().backward()
    ids_BLK = ids.view(B, L, -1)
    assert_gradients_of(
        lambda logits_BLE: weight * written_out(logits_BLE, ids_BLK, mask_BL, scope), router, x_BLD
    )
    if padded:
        assert not x_BLD.grad[~mask_BL].any()


SEVERAL = """
[balance.sequence]
aux_loss = 0.3
[balance.batch]
aux_loss = 0.1
z_loss = 0.02
[balance.global]
mse_loss = 7.0
"""


def test_losses_of_several_scopes_add_up(model_with):
    """Each with its coefficient, and with the weight that its groups have in a training step."""
    router, x_BLD = router_far_from_even(model_with(SEVERAL))
    router.groups = {
        "sequence": Groups(True, L, weight=0.25),
        "batch": Groups(False, weight=0.5),
        "global": Groups(False, weight=2.0),
    }
    weights, ids, _ = router(flat(x_BLD))
    (weights * 0).sum().backward()
    ids_BLK, mask_BL = ids.view(B, L, -1), torch.ones(B, L, dtype=torch.bool)

    def loss(logits_BLE):
        parts = (
            (0.25, "sequence", {"aux_loss": 0.3}),
            (0.5, "batch", {"aux_loss": 0.1, "z_loss": 0.02}),
            (2.0, "global", {"mse_loss": 7.0}),
        )
        return sum(
            weight * written_out(logits_BLE, ids_BLK, mask_BL, scope, of)
            for weight, scope, of in parts
        )

    assert_gradients_of(loss, router, x_BLD)


def test_a_table_of_a_scope_is_the_flat_keys_with_that_scope(model_with):
    """Also what it is called in telemetry."""
    found = []
    for tables in ('aux_loss = 0.3\nscope = "batch"', "[balance.batch]\naux_loss = 0.3"):
        router, x_BLD = router_far_from_even(model_with(f"[balance]\n{tables}"))
        weights, _, _ = router(flat(x_BLD))
        (weights * 0).sum().backward()
        found.append((router.gate.weight.grad, router.sums_S, router.coefficients))
    (of_flat, sums_of_flat, flat_ones), (of_table, sums_of_table, table_ones) = found
    assert torch.equal(of_flat, of_table)
    assert torch.equal(sums_of_flat, sums_of_table)
    assert flat_ones == table_ones == {"batch": {"aux_loss": 0.3}}


@pytest.mark.parametrize(
    ("choice", "biased", "by_scores"),
    [
        ("", False, False),
        ("", True, True),
        ('aux_loss_choice = "scores"', True, True),
        ('aux_loss_choice = "routed"', True, False),
    ],
)
def test_what_counts_as_chosen(model_with, choice, biased, by_scores):
    """A bias that sends every token to the same experts is seen by one count, not by the other."""
    router, x_BLD = router_far_from_even(model_with(f"[balance]\naux_loss = 0.3\n{choice}"))
    bias_E = torch.tensor([9.0, 0, 0, 9, 0, 0, 0, 9]) if biased else None
    weights, ids, scores = router(flat(x_BLD), bias_E)
    (weights * 0).sum().backward()
    routed_BLK = ids.view(B, L, -1)
    highest_BLK = scores.view(B, L, -1).topk(routed_BLK.shape[-1]).indices
    assert routed_BLK.unique().tolist() == ([0, 3, 7] if biased else list(range(8)))
    mask_BL = torch.ones(B, L, dtype=torch.bool)
    counted_BLK = highest_BLK if by_scores else routed_BLK
    assert_gradients_of(
        lambda logits_BLE: written_out(
            logits_BLE, counted_BLK, mask_BL, "sequence", {"aux_loss": 0.3}
        ),
        router,
        x_BLD,
    )
    # What telemetry calls the load is where the tokens went, whatever the loss counts.
    assert torch.equal(router.counts_E, routed_BLK.flatten().bincount(minlength=8))


MADE_UP = {
    "config/routing_schema.py": ("    z_loss: _NotNegative", "    peak_loss: _NotNegative = 0.0\n"),
    "routing/losses.py": (
        '    "z_loss": lambda of:',
        '    "peak_loss": lambda of: of.P_GE.square().sum(-1),\n',
    ),
}
PROGRAM = """
from types import SimpleNamespace
import torch
from ezpz_moe.hosts.titan.layer_records import layer_record
from ezpz_moe.telemetry.figures import layer_figures, over_layers
from ezpz_moe.telemetry.summary import LABELS
from router_cases import flat, moe_of, router_of, small_model, tokens

model = small_model(Path.cwd(), "[balance.batch]\\npeak_loss = 3.0\\n[balance.global]\\nz_loss = 1")
router = router_of(model)
weights, _, scores = router(flat(tokens(router.gate.in_features)))
(grad,) = torch.autograd.grad((weights * 0).sum() + 0 * scores.sum(), router.gate.weight)
print(bool(grad.any()))
use = {"padding_waste": None, "drop_rate": None}
layer, _ = layer_record(1, moe_of(model), router.counts_E.tolist(), router.sums_S.tolist(), use)
expected = float(scores.flatten(0, -2).mean(0).square().sum())
print(abs(layer.losses["peak_loss_batch"] / expected - 1) < 1e-5)
print(layer.scaled_losses["peak_loss_batch"] == 3 * layer.losses["peak_loss_batch"])
print("peak_loss_batch_worst" in over_layers([layer_figures(layer)]), LABELS["peak_loss"])
"""


def test_a_balance_loss_is_its_key_and_its_formula(tmp_path):
    """A made-up one, in a copy of this package: it is trained on, and telemetry names it."""
    done = run_in_copy(tmp_path, MADE_UP, PROGRAM)
    assert done.stdout == "True\n" * 3 + "True peak_loss, unscaled\n", done.stderr


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
    sums = sums_of(router)
    top_T2 = scores_TE.double().topk(2).values
    assert sums["tokens"] == 2 * B * L
    assert sums["top1_probability"] == pytest.approx(2 * top_T2[:, 0].sum().item(), rel=1e-5)
    margins = top_T2[:, 0] - top_T2[:, 1]
    assert sums["margin"] == pytest.approx(2 * margins.sum().item(), rel=1e-4)
    assert sums["not_finite"] == 0


def test_choices_of_padding_are_those_of_experts_that_compute(model_with):
    router = router_of(model_with("[router]\nnull_experts = 8\n[telemetry]"))
    mask_BL = torch.ones(B, L, dtype=torch.bool)
    mask_BL[0, 3:], mask_BL[2, :5] = False, False
    router.masked_by = TokenMask()
    router.masked_by.mask_BL = flat(mask_BL)
    _, ids_TK, _ = routed(router, tokens(router.gate.in_features))
    of_padding_NK = ids_TK[~mask_BL.flatten()]
    assert sums_of(router)["of_padding"] == (of_padding_NK < 8).sum() < of_padding_NK.numel()


def test_logits_that_are_not_finite_are_counted(model_with):
    router = router_of(model_with("[telemetry]"))
    x_BLD = tokens(router.gate.in_features)
    x_BLD[1, 2:4] = torch.inf
    routed(router, x_BLD)
    assert sums_of(router)["not_finite"] == 2


@pytest.mark.parametrize("activation", ["identity", "softplus", "relu_rmsnorm"])
@pytest.mark.parametrize("counted", [True, False])
def test_a_logit_of_minus_infinity_is_seen(model_with, activation, counted):
    """In the count, or as NaN that reaches the loss: an activation must not make it a number."""
    router = router_of(model_with(f'[router]\nactivation = "{activation}"\n[telemetry]'))
    router.gate.is_counted = counted
    with torch.no_grad():
        router.gate.weight[2] = -torch.inf
    weights_TK, _, _ = routed(router, tokens(router.gate.in_features).abs())
    not_finite = sums_of(router)["not_finite"]
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
