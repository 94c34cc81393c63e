"""Routing by ReLU in the host's layer: its formula, what it computes, costs, reports and refuses.

A layer is compared in float64 with its formula as on a blackboard; what remains is the order of
sums.
"""

from pathlib import Path

import pytest
import torch
from layer_cases import SMALL, D, E, F, assert_same_results, double_tokens, flavor
from router_cases import B, L, flat, moe_of, routed, router_of, small_model, tokens

from ezpz_moe.compute.reference import relative_error
from ezpz_moe.hosts.counts import counts_at_hand
from ezpz_moe.hosts.detect import host
from ezpz_moe.hosts.titan.groups import TokenMask
from ezpz_moe.routing import losses
from ezpz_moe.routing.neighbours import Neighbours, chunk_loss, locality_loss

RELU = '[router]\nrouting = "relu"\nactivation = "relu_rmsnorm"\nlearned_scale = true\n'
LOSSES = "[balance]\nlocality_loss = 0.5\nchunk_loss = 3.0\nchunk = 5\nscope = '{scope}'\n"
UNIT = 2.0**-53


def activations(router, x_TD: torch.Tensor) -> torch.Tensor:
    raw_TE = (x_TD @ router.gate.weight.T).clamp(min=0)
    rms_T1 = (raw_TE.square().mean(-1, keepdim=True) + torch.finfo(raw_TE.dtype).eps).sqrt()
    return raw_TE / rms_T1 * router.gate.scale_E


def on_the_blackboard(moe, x_TD: torch.Tensor, *, before: bool) -> torch.Tensor:
    """Every expert computes every token, and its activation multiplies that, or the token."""
    scores_TE1 = activations(moe.router, x_TD).unsqueeze(-1)
    of = moe.routed_experts.inner_experts
    of_input, of_output = (scores_TE1, 1) if before else (1, scores_TE1)
    x_TED = of_input * x_TD.unsqueeze(1).expand(-1, E, -1)
    g_TEF, u_TEF = (torch.einsum("ted,efd->tef", x_TED, w) for w in (of.w1_EFD, of.w3_EFD))
    y_TED = torch.einsum("tef,edf->ted", g_TEF / (1 + torch.exp(-g_TEF)) * u_TEF, of.w2_EDF)
    shared = moe.shared_experts
    g = x_TD @ shared.w1.weight.T
    of_shared_TD = (g / (1 + torch.exp(-g)) * (x_TD @ shared.w3.weight.T)) @ shared.w2.weight.T
    return (of_output * y_TED).sum(1) + of_shared_TD


def layer_of(folder: Path, keys: str, backend: str = "for_loop"):
    """A layer in float64 whose gate uses some experts more than others, one scale below 0."""
    model = small_model(folder, f'{SMALL}compute_backend = "{backend}"\n{keys}')
    router_of(model)
    moe = moe_of(model).double()
    moe.routed_experts.inner_experts.computed_in = torch.float64
    draw = torch.Generator().manual_seed(2)
    for each in moe.parameters():
        each.data = torch.randn(each.shape, generator=draw).double() / each.shape[-1] ** 0.5
    return moe


@pytest.mark.parametrize(
    ("keys", "backend", "unit"),
    [
        ("", "for_loop", UNIT),
        ("", "batched_mm_padded", UNIT),
        # The host's dispatcher combines in float32.
        ('routed = "composed"\n', "for_loop", 2.0**-24),
        ('router_scores = "before"\n', "for_loop", 2.0**-24),
    ],
)
def test_a_layer_is_its_formula(tmp_path, keys, backend, unit):
    """Output and every gradient, whose sums have at most as many terms as x has elements."""
    moe = layer_of(tmp_path, f"{keys}{RELU}", backend)
    x = double_tokens()
    written_TD = on_the_blackboard(moe, x.flatten(0, -2), before="before" in keys)
    assert "router.gate.scale_E" in assert_same_results(moe, written_TD, x, unit)


@pytest.mark.parametrize("scope", ["sequence", "batch"])
def test_both_losses_reach_the_gate(tmp_path, scope):
    """With their coefficients, and without the learned scale."""
    moe = layer_of(tmp_path, RELU + LOSSES.format(scope=scope))
    x = flat(tokens(D)).double()
    router = moe.router
    weights_BLK, _, _ = router(x)
    ours = torch.autograd.grad(weights_BLK.sum(), [router.gate.weight, router.gate.scale_E])
    raw_GNE = losses.in_groups(
        (x.flatten(0, -2) @ router.gate.weight.T).unflatten(0, (B, L)), by_sequence=scope != "batch"
    )
    mask_GN = torch.ones(raw_GNE.shape[:-1], dtype=torch.bool)
    p_GNE = losses.probabilities(raw_GNE.relu(), mask_GN)
    of = Neighbours(raw_GNE, L, 5)
    total = activations(router, x.flatten(0, -2)).sum()
    total = total + 0.5 * locality_loss(of, mask_GN, losses.alone).sum()
    total = total + 3.0 * chunk_loss(of, p_GNE, mask_GN, losses.alone).sum()
    true = torch.autograd.grad(total, [router.gate.weight, router.gate.scale_E])
    for mine, other in zip(ours, true, strict=True):
        assert relative_error(mine, other) <= x.numel() * UNIT


def test_only_experts_that_a_token_uses_get_its_row(tmp_path, monkeypatch):
    """And neither do those of padding. Telemetry counts what was left out."""
    moe = layer_of(tmp_path, f"{RELU}pad_token_id = 0\n[telemetry]\n")
    mask_BL = torch.ones(B, L, dtype=torch.bool)
    mask_BL[1, 4:] = False
    for each in (moe.router, moe.routed_experts):
        each.masked_by = TokenMask()
        each.masked_by.mask_BL = flat(mask_BL)
    x = flat(tokens(D)).double()
    is_used_TE = (activations(moe.router, x.flatten(0, -2)) != 0) & mask_BL.view(-1, 1)
    seen, dispatcher = [], moe.routed_experts.token_dispatcher
    computed = dispatcher.computed
    dispatcher.computed = lambda ids: seen.append(computed(ids)) or seen[-1]
    out = moe(x)
    assert set(seen) == {is_used_TE.sum().item()}
    assert torch.equal(moe.router.counts_E, is_used_TE.sum(0))
    assert moe.tokens_per_expert_E.shape == (E + 1,)
    shared = moe.shared_experts(x)
    is_padding = ~flat(mask_BL)
    assert torch.equal(out[is_padding], shared[is_padding])


def test_a_token_without_experts_has_those_that_are_shared(tmp_path):
    moe = layer_of(tmp_path, f"{RELU}{LOSSES.format(scope='sequence')}")
    with torch.no_grad():
        moe.router.gate.weight.copy_(-moe.router.gate.weight.abs())
    x = flat(tokens(D)).double().abs().requires_grad_()
    assert torch.equal(moe(x), moe.shared_experts(x))
    _, ids_TK, _ = routed(moe.router, x.detach().view(B, L, D))
    assert (ids_TK == E).all()


def test_a_scale_begins_at_one(tmp_path):
    """In the dtype and on the device of the gate, and as the host initializes it."""
    from torchtitan.protocols.module import Module

    moe = moe_of(small_model(tmp_path, SMALL + RELU))
    gate = moe.router.gate
    assert torch.equal(gate.scale_E, torch.ones(E))
    with torch.no_grad():
        gate.scale_E.fill_(7)
    Module.init_states(gate)
    assert torch.equal(gate.scale_E, torch.ones(E))


def test_no_scale_adds_no_weight(tmp_path):
    moe = moe_of(small_model(tmp_path, SMALL + RELU.replace("learned_scale = true", "")))
    assert [name for name, _ in moe.router.named_parameters()] == ["gate.weight"]


# Sizes --------------------------------------------------------------------------------------------


def test_parameters_and_flops_count_every_expert_as_used(tmp_path):
    """How many are is not known beforehand, so that this is the most."""
    sizes = f"{SMALL}n_layers = 3\n"
    all_of_them = host().anatomy().anatomy(flavor(tmp_path, f"{sizes}router_top_k = {E}\n"), 16)
    found = flavor(tmp_path, f"{sizes}{RELU}")
    ours = host().anatomy().anatomy(found, 16)
    assert (ours.num_experts, ours.zero_experts, ours.top_k) == (E, 0, E)
    assert ours.computing_experts == E
    experts = ours.costs["routed experts"]
    assert experts == all_of_them.costs["routed experts"]
    assert experts.active == experts.parameters == 2 * E * 3 * F * D
    scales = ours.costs["router"].parameters - all_of_them.costs["router"].parameters
    assert scales == 2 * E
    assert ours.host_flops - all_of_them.host_flops == 6 * scales
    summary = host().summarize(found)
    assert counts_at_hand(found) is None
    assert summary.total == ours.total.parameters
    assert summary.active == ours.total.active


def test_choices_take_twelve_bytes_of_every_expert(tmp_path):
    """A score and an id, of E experts where top-k has those of k."""
    for keys, choices in ((RELU, E), ("[telemetry]\n", 3)):
        router = router_of(small_model(tmp_path, SMALL + keys))
        weights_BLK, ids_BLK, _ = router(flat(tokens(D)))
        assert weights_BLK.nbytes + ids_BLK.nbytes == 12 * choices * B * L
