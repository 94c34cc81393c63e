"""What a flavor's router chooses, and by which scores."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from router_cases import UPSTREAM, B, L, flat, moe_of, routed, router_of, run_in_copy, tokens

from ezpz_moe.config.flavors import load_flavor


@pytest.mark.parametrize("base", UPSTREAM.values(), ids=UPSTREAM)
def test_without_settings_of_its_own_it_is_the_hosts_bit_for_bit(model_with, base):
    host, ours = model_with("", base), model_with("[telemetry]", base)
    assert type(moe_of(host).router).__name__ == "TokenChoiceTopKRouter"
    assert host.state_dict().keys() == ours.state_dict().keys()
    for name, value in host.state_dict().items():
        assert torch.equal(value, ours.state_dict()[name]), name
    x_BLD = tokens(moe_of(host).router.gate.in_features)
    results = []
    for each in (host, ours):
        router, x = moe_of(each).router, flat(x_BLD).clone().requires_grad_()
        if each is ours:
            router.groups = {
                scope: dataclasses.replace(own, length=L) for scope, own in router.groups.items()
            }
        weights, ids, scores = router(x)
        weights.square().sum().backward()
        results.append((weights, ids, scores, x.grad, router.gate.weight.grad))
    for of_host, of_ours in zip(*results, strict=True):
        assert torch.equal(of_host, of_ours)


def test_sinkhorn_spreads_what_topk_does_not_in_training_only(model_with):
    tables = '[router]\nrouting = "sinkhorn"'
    router = router_of(model_with(tables))
    with torch.no_grad():  # every token prefers the first expert
        router.gate.weight[0] += 0.02
    x_BLD = tokens(router.gate.in_features).abs()
    _, ids_TK, scores_TE = routed(router, x_BLD)
    load_E = ids_TK.flatten().bincount(minlength=8)
    assert load_E.max() < 2 * B * L * 3 / 8
    weights_TK, eval_ids_TK, _ = routed(router.eval(), x_BLD)
    assert eval_ids_TK.flatten().bincount(minlength=8)[0] == B * L
    assert torch.equal(weights_TK, scores_TE.gather(-1, eval_ids_TK))


def test_balanced_is_even_and_perturbed_is_not(model_with):
    even, noisy = (
        router_of(model_with(f'[router]\nrouting = "balanced"\n{more}'))
        for more in ("", "noise = 1.0\nskip_first_n_experts = 2")
    )
    x_BLD = tokens(even.gate.in_features)
    weights_TK, ids_TK, _ = routed(even, x_BLD)
    assert set(ids_TK.flatten().bincount(minlength=8).tolist()) == {B * L * 3 // 8}
    assert torch.equal(weights_TK, torch.full((B * L, 3), 1 / 3))
    weights_TK, ids_TK, _ = routed(noisy, x_BLD)
    assert ids_TK.min() == 2
    assert all(len(set(ids_K)) == 3 for ids_K in ids_TK.tolist())
    assert weights_TK.std() > 0.1


def test_jitter_is_for_training_and_recomputation_draws_it_again(model_with):
    router = router_of(model_with("[router]\njitter_noise = 0.3"))
    x_BLD = tokens(router.gate.in_features)
    first, second = (routed(router, x_BLD)[2] for _ in range(2))
    assert not torch.equal(first, second)
    router.eval()
    assert torch.equal(routed(router, x_BLD)[2], routed(router, x_BLD)[2])


def test_activation_temperature_and_precision_reach_the_scores(model_with):
    tables = """
    [router]
    activation = "softplus"
    gate_precision = "float64"
    temperature = {start = 4.0, end = 1.0, steps = 3}
    """
    router = router_of(model_with(tables))
    x_BLD = tokens(router.gate.in_features)
    logits_TE = x_BLD.flatten(0, 1).double() @ router.gate.weight.double().T
    for step, temperature in ((1, 4.0), (2, 2.5), (3, 1.0), (9, 1.0)):
        router.at_step(step)
        scores_TE = routed(router, x_BLD)[2]
        expected_TE = F.softplus(logits_TE / temperature).softmax(-1)
        assert scores_TE.dtype == torch.float64
        torch.testing.assert_close(scores_TE, expected_TE, rtol=1e-12, atol=0)


def test_a_gate_of_bfloat16_has_scores_of_float32(model_with):
    router = router_of(model_with('[router]\ngate_precision = "bfloat16"'))
    x_BLD = tokens(router.gate.in_features)
    logits_TE = x_BLD.flatten(0, 1).bfloat16() @ router.gate.weight.bfloat16().T
    weights_TK, _, scores_TE = routed(router, x_BLD)
    assert (weights_TK.dtype, scores_TE.dtype) == (torch.float32, torch.float32)
    assert torch.equal(scores_TE, logits_TE.float().softmax(-1))


MADE_UP = {
    "config/routing_schema.py": (
        '    activation: Literal["identity"',
        "    sharpness: Schedule = Schedule(start=1.0, end=1.0, steps=1)\n",
    ),
    "routing/gate.py": (
        "    return activated(",
        '    if "sharpness" in now:\n        logits_BLE = logits_BLE * now["sharpness"]\n',
    ),
}
PROGRAM = """
from router_cases import routed, router_of, small_model, tokens

schedule = "sharpness = {start = 3.0, end = 5.0, steps = 3}"
router = router_of(small_model(Path.cwd(), f"[router]\\n{schedule}"))
x_BLD = tokens(router.gate.in_features)
logits_TE = x_BLD.flatten(0, 1) @ router.gate.weight.T
for step, value in ((1, 3.0), (2, 4.0), (9, 5.0)):
    router.at_step(step)
    off = routed(router, x_BLD)[2] - (value * logits_TE).softmax(-1)
    print(float(off.abs().max()) < 1e-6)
"""


def test_an_option_of_the_gate_is_its_key_and_its_formula(tmp_path):
    """A made-up one with a schedule, in a copy of this package."""
    done = run_in_copy(tmp_path, MADE_UP, PROGRAM)
    assert done.stdout == "True\n" * 3, done.stderr


@pytest.mark.parametrize("base", UPSTREAM.values(), ids=UPSTREAM)
def test_every_table_fits_every_model(model_with, base):
    built = model_with(
        """
        [router]
        jitter_noise = true
        activation = "relu_rmsnorm"
        null_experts = 2
        [balance]
        aux_loss = 0.01
        bias_update = "proportional"
        bias_rate = {start = 0.01, end = 0.001, steps = 10}
        [telemetry]
        """,
        base,
    )
    router = router_of(built)
    routed(router, tokens(router.gate.in_features))
    assert moe_of(built).expert_bias_E.shape == router.counts_E.shape


@pytest.mark.parametrize(
    "of_router", ["freeze = true", 'routing = "balanced"', 'routing = "sinkhorn"']
)
def test_a_bias_that_would_balance_nothing_is_not_updated(tmp_path, of_router):
    """Of a gate that is not trained, and where experts are not chosen by it."""
    tables = f"[router]\n{of_router}"
    (tmp_path / "mine.toml").write_text(f'inherits = "debugmodel"\n{tables}\n')
    from ezpz_moe.hosts.titan.models import model_spec

    theirs, ours = (model_spec(load_flavor(name, near=tmp_path)) for name in ("debugmodel", "mine"))
    assert theirs.post_optimizer_build_fn is not None
    assert ours.post_optimizer_build_fn is None
