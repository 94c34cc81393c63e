"""What a flavor's router chooses, and by which scores."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from router_cases import (
    UPSTREAM,
    B,
    L,
    flat,
    moe_of,
    routed,
    router_of,
    run_in_copy,
    sums_of,
    tokens,
)
from torchtitan.models.common.moe import MoE, TokenChoiceTopKRouter

from ezpz_moe.config.flavors import load_flavor
from ezpz_moe.routing.balance import value_at


@pytest.mark.parametrize("base", UPSTREAM.values(), ids=UPSTREAM)
def test_without_settings_of_its_own_it_is_the_hosts_bit_for_bit(model_with, base):
    host, ours = (model_with(tables, base, layers=2) for tables in ("", "[telemetry]"))
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
    assert ids_TK.min() >= 2
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


GROUPS = "router_num_expert_groups = {}\nrouter_num_limited_groups = 2\n"
SMALL = 'inherits = "tiny"\n'


def test_groups_are_ranked_as_the_host_does_bit_for_bit(model_with):
    router = router_of(model_with("[telemetry]", SMALL + GROUPS.format(4)))
    scores_TE = tokens(8).flatten(0, 1)
    scores_TE[::3] = 0.5  # ties
    of_host_TE = TokenChoiceTopKRouter._get_node_limited_routing_scores(router, scores_TE)
    assert torch.equal(router._get_node_limited_routing_scores(scores_TE), of_host_TE)


@pytest.mark.parametrize(
    ("keys", "best"),
    [(GROUPS.format(4) + 'router_group_score = "max"', 1), (GROUPS.format(8), 1)],
    ids=["max", "groups of one expert"],
)
def test_a_token_stays_in_the_groups_that_a_flavor_ranks(model_with, keys, best):
    router = router_of(model_with("", f"{SMALL}router_top_k = 2\n{keys}"))
    assert type(router).__name__ == "EzpzTokenChoiceTopKRouter"
    _, ids_TK, scores_TE = routed(router, tokens(router.gate.in_features))
    size = 8 // router.num_expert_groups
    of_group_TG = scores_TE.unflatten(-1, (-1, size)).topk(best).values.sum(-1)
    best_T2 = of_group_TG.topk(2).indices
    assert all(
        set((ids_K // size).tolist()) <= set(best_2.tolist())
        for ids_K, best_2 in zip(ids_TK, best_T2, strict=True)
    )


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_sqrtsoftplus_is_routed_as_any_other_score(model_with, norm, biased):
    keys = f'router_score_func = "sqrtsoftplus"\nrouter_route_norm = {str(norm).lower()}\n'
    router = router_of(model_with("", f"{SMALL}{keys}router_route_scale = 2.5\n"))
    x_BLD = tokens(router.gate.in_features).requires_grad_()
    bias_E = torch.tensor([9.0, 0, 0, 0, 0, 0, 0, -9.0]) if biased else None
    weights, ids, scores = router(flat(x_BLD), bias_E)
    weights.square().sum().backward()
    x64_BLD = x_BLD.detach().double().requires_grad_()
    w64_ED = router.gate.weight.detach().double().requires_grad_()
    s64_TE = F.softplus(x64_BLD.flatten(0, 1) @ w64_ED.T).sqrt()
    expected_TK = s64_TE.gather(-1, ids.flatten(0, -2))
    if norm:
        expected_TK = expected_TK / expected_TK.sum(-1, keepdim=True)
    (2.5 * expected_TK).square().sum().backward()
    pairs = (
        (weights.flatten(0, -2), 2.5 * expected_TK),
        (scores.flatten(0, -2), s64_TE),
        (x_BLD.grad, x64_BLD.grad),
        (router.gate.weight.grad, w64_ED.grad),
    )
    for ours, exact in pairs:
        # A hundred float32 roundings of the largest element: sums over E, L and D in any order.
        assert (ours.double() - exact).abs().max() <= 100 * 2**-24 * exact.abs().max()
    by_TE = s64_TE if bias_E is None else s64_TE + bias_E
    assert torch.equal(ids.flatten(0, -2).sort(-1).values, by_TE.topk(3).indices.sort(-1).values)
    assert not biased or (ids == 0).any(-1).all()


@pytest.mark.parametrize("kept", [False, True])
def test_a_gate_learns_from_its_only_score_if_it_is_kept(model_with, kept):
    keys = f"{SMALL}router_top_k = 1\nrouter_route_norm = true\n"
    tables = f"[router]\nkeep_top1_score = {str(kept).lower()}\n[telemetry]"
    router = router_of(model_with(tables, keys))
    weights_TK, ids_TK, scores_TE = routed(router, tokens(router.gate.in_features))
    weights_TK.square().sum().backward()
    largest = router.gate.weight.grad.abs().max()
    assert largest > 1e-3 if kept else largest < 1e-5
    if kept:
        assert torch.equal(weights_TK, scores_TE.gather(-1, ids_TK))


def test_only_a_single_score_is_kept(model_with):
    keys = f"{SMALL}router_top_k = 2\nrouter_route_norm = true\n"
    router = router_of(model_with("[router]\nkeep_top1_score = true", keys))
    weights_TK, _, _ = routed(router, tokens(router.gate.in_features))
    # A rounding of the sum, of each quotient, and of the sum of these.
    assert (weights_TK.sum(-1) - 1).abs().max() <= 4 * 2**-24


@pytest.fixture
def building_in_bfloat16():
    """As a trainer builds its model under training.dtype = "bfloat16"."""
    torch.set_default_dtype(torch.bfloat16)
    yield
    torch.set_default_dtype(torch.float32)


def test_a_model_in_bfloat16_counts_as_any_other(model_with, building_in_bfloat16):
    """A sum in bfloat16 no longer grows at 256 times what is added."""
    tables = """
    [router]
    temperature = {start = 1.01, end = 1.0, steps = 1000}
    constant_experts = 2
    [telemetry]
    """
    built = model_with(tables)
    torch.set_default_dtype(torch.float32)
    assert next(built.parameters()).dtype == torch.bfloat16
    router = router_of(built)
    x_BLD = tokens(router.gate.in_features).bfloat16()
    with torch.no_grad():
        for _ in range(300):
            routed(router, x_BLD)
    assert sums_of(router)["tokens"] == 300 * B * L
    assert router.counts_E.sum() == 300 * B * L * router.top_k
    counters = {"counts_E", "sums_S", "tokens_per_expert_E", "expert_bias_E"}
    buffers = {name.rpartition(".")[2]: each for name, each in built.named_buffers()}
    assert counters <= buffers.keys()
    for name in counters:
        assert buffers[name].dtype in (torch.int64, torch.float32), name
    router.at_step(2)
    assert router.gate.temperature == torch.tensor(1.01 - 0.01 / 999)


MADE_UP = {
    "config/routing_schema.py": (
        '    activation: Literal["identity"',
        "    sharpness: Schedule = Schedule(start=1.0, end=1.0, steps=1)\n",
    ),
    "routing/gate.py": (
        "    return logits_BLE, activated(",
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
        layers=2,
    )
    router = router_of(built)
    routed(router, tokens(router.gate.in_features))
    assert moe_of(built).expert_bias_E.shape == router.counts_E.shape


@pytest.mark.parametrize(
    "of_router", ["freeze = true", 'routing = "balanced"', 'routing = "sinkhorn"']
)
def test_a_bias_that_would_balance_nothing_is_not_updated(tmp_path, of_router):
    """Of a gate that is not trained, and where experts are not chosen by it."""
    theirs, ours = (spec_of(tmp_path, tables) for tables in ("", f"[router]\n{of_router}"))
    assert theirs.post_optimizer_build_fn is not None
    assert ours.post_optimizer_build_fn is None


def spec_of(folder, tables):
    from ezpz_moe.hosts.titan.models import model_spec

    (folder / "mine.toml").write_text(f'inherits = "debugmodel"\n{tables}\n')
    return model_spec(load_flavor("mine", near=folder))


def test_a_bias_may_be_used_without_being_updated(model_with, tmp_path):
    tables = '[balance]\nbias_update = "sign"\nbias_rate = 0'
    assert spec_of(tmp_path, tables).post_optimizer_build_fn is None
    built = model_with(tables)
    moe, router = moe_of(built), router_of(built)
    assert moe.expert_bias_E is not None
    x_BLD = tokens(router.gate.in_features)
    assert not (router(flat(x_BLD), moe.expert_bias_E)[1] == 5).any(-1).all()
    moe.expert_bias_E[5] = 9
    assert (router(flat(x_BLD), moe.expert_bias_E)[1] == 5).any(-1).all()


def test_a_rate_may_end_at_nothing(tmp_path):
    """Its last value is not what the host is told, which asserts one above 0."""
    rate = "bias_rate = {start = 0.1, end = 0, steps = 3}"
    spec = spec_of(tmp_path, f'[balance]\nbias_update = "proportional"\n{rate}')
    assert spec.post_optimizer_build_fn is not None
    (_, config, _, _) = next(spec.model.traverse(MoE.Config))
    assert config.load_balance_coeff > 0
    schedule = config.router.balance.bias_rate
    assert [value_at(schedule, step) for step in (1, 2, 3, 9)] == [0.1, 0.05, 0, 0]
