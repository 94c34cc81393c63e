"""A flavor's router in the host's model: what it chooses, what it trains on, what it counts."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from dialect import ON_0_2

from ezpz_moe.errors import EzpzError
from ezpz_moe.flavors import load_flavor
from ezpz_moe.hosts import binding
from ezpz_moe.job import find_job

if ON_0_2:
    pytest.skip("[router] needs torchtitan 0.3 or later", allow_module_level=True)

from torchtitan.distributed.activation_checkpoint import FullAC
from torchtitan.models.common.moe import MoE, TokenChoiceTopKRouter

from ezpz_moe.hosts.titan_0_3.checkpointing import keeping_choices
from ezpz_moe.hosts.titan_0_3.router import Groups, TokenMask
from ezpz_moe.routing.counters import SUMS

B, L = 3, 16

UPSTREAM = {
    "deepseek_v3": 'base = "deepseek_v3/debugmodel"',
    "qwen3": 'base = "qwen3/debugmodel_moe"',
    "gpt_oss": 'base = "gpt_oss/debugmodel"',
}


@pytest.fixture
def model(tmp_path):
    """``model(tables)``: a small model with these tables in its flavor, in float32."""

    def build(tables: str, base: str = 'inherits = "tiny"'):
        flavor = "mine"
        (tmp_path / "tiny.toml").write_text('inherits = "debugmodel"\nn_layers = 2\n')
        (tmp_path / f"{flavor}.toml").write_text(f'{base}\nattention = "sdpa"\n{tables}\n')
        spec = binding("models").model_spec(load_flavor(flavor, near=tmp_path))
        torch.manual_seed(0)
        built = spec.model.build()
        built.init_weights(buffer_device=torch.device("cpu"))
        return built.train()

    return build


def moe_of(model) -> MoE:
    return next(module for module in model.modules() if isinstance(module, MoE))


def router_of(model, *, groups: Groups | None = None) -> TokenChoiceTopKRouter:
    router = moe_of(model).router
    router.groups = groups or dataclasses.replace(router.groups, length=L)
    return router


def tokens(dim: int, *, seed: int = 1) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(B, L, dim, generator=draw)


def flat(router, x_BLD):
    """As the host hands tokens to a router: main folds the sequences."""
    return x_BLD.flatten(0, 1) if binding("dialect").one_sequence(1) == (1,) else x_BLD


def routed(router, x_BLD):
    """weights_TK, ids_TK, scores_TE."""
    return tuple(each.flatten(0, -2) for each in router(flat(router, x_BLD)))


@pytest.mark.parametrize("base", UPSTREAM.values(), ids=UPSTREAM)
def test_without_settings_of_its_own_it_is_the_hosts_bit_for_bit(model, base):
    host, ours = model("", base), model("[telemetry]", base)
    assert type(moe_of(host).router).__name__ == "TokenChoiceTopKRouter"
    assert host.state_dict().keys() == ours.state_dict().keys()
    for name, value in host.state_dict().items():
        assert torch.equal(value, ours.state_dict()[name]), name
    x_BLD = tokens(moe_of(host).router.gate.in_features)
    results = []
    for each in (host, ours):
        router, x = moe_of(each).router, flat(None, x_BLD).clone().requires_grad_()
        if each is ours:
            router.groups = dataclasses.replace(router.groups, length=L)
        weights, ids, scores = router(x)
        weights.square().sum().backward()
        results.append((weights, ids, scores, x.grad, router.gate.weight.grad))
    for of_host, of_ours in zip(*results, strict=True):
        assert torch.equal(of_host, of_ours)


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
def test_the_gradient_is_that_of_the_written_out_loss(model, scope, padded):
    """Of the gate's weight and of its input; the trainer's loss is left out (weights times 0)."""
    weight = 0.25
    groups = Groups(by_sequence=scope == "sequence", length=L, weight=weight)
    router = router_of(model(LOSSES.format(scope=scope)), groups=groups)
    with torch.no_grad():
        router.gate.weight.mul_(20)  # far from even
    x_BLD = tokens(router.gate.in_features).requires_grad_()
    mask_BL = torch.ones(B, L, dtype=torch.bool)
    if padded:
        mask_BL[0, 3:], mask_BL[2, :5] = False, False
        router.masked_by = TokenMask()
        router.masked_by.mask_BL = flat(None, mask_BL)
    weights, ids, _ = router(flat(None, x_BLD))
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


def test_evaluation_has_no_gradient_and_no_count(model):
    router = router_of(model(LOSSES.format(scope="batch"))).eval()
    x_BLD = tokens(router.gate.in_features).requires_grad_()
    weights_TK, _, _ = routed(router, x_BLD)
    (weights_TK * 0).sum().backward()
    assert not x_BLD.grad.any()
    assert not router.counts_E.any()


def test_counts_and_sums(model):
    router = router_of(model("[telemetry]"))
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
    assert sums["longest"] == router.counts_E.max()
    assert sums["not_finite"] == 0


@pytest.mark.parametrize("dispatched", [True, False])
def test_padding_that_is_dispatched_is_computed_for_nothing(model, dispatched):
    """The rows of the busiest expert are those of all tokens, its count those without padding."""
    table = f"[router]\npad_token_id = 0\ndispatch_padding = {str(dispatched).lower()}"
    router = router_of(model(f"{table}\n[telemetry]\n"))
    x_BLD = tokens(router.gate.in_features)
    mask_BL = torch.arange(L).expand(B, L) < torch.tensor([[4], [9], [16]])
    router.masked_by.mask_BL = flat(router, mask_BL)
    _, ids_TK, _ = routed(router, x_BLD)
    computed_TK = ids_TK if dispatched else ids_TK[mask_BL.flatten()]
    longest = dict(zip(SUMS, router.sums_S.tolist(), strict=True))["longest"]
    assert longest == computed_TK.flatten().bincount().max()
    assert router.counts_E.sum() == mask_BL.sum() * ids_TK.shape[1]


def test_logits_that_are_not_finite_are_counted(model):
    router = router_of(model("[telemetry]"))
    x_BLD = tokens(router.gate.in_features)
    x_BLD[1, 2:4] = torch.inf
    routed(router, x_BLD)
    assert dict(zip(SUMS, router.sums_S.tolist(), strict=True))["not_finite"] == 2


def test_sinkhorn_spreads_what_topk_does_not_in_training_only(model):
    tables = '[router]\nrouting = "sinkhorn"'
    router = router_of(model(tables))
    with torch.no_grad():  # every token prefers the first expert
        router.gate.weight[0] += 0.02
    x_BLD = tokens(router.gate.in_features).abs()
    _, ids_TK, scores_TE = routed(router, x_BLD)
    load_E = ids_TK.flatten().bincount(minlength=8)
    assert load_E.max() < 2 * B * L * 3 / 8
    weights_TK, eval_ids_TK, _ = routed(router.eval(), x_BLD)
    assert eval_ids_TK.flatten().bincount(minlength=8)[0] == B * L
    assert torch.equal(weights_TK, scores_TE.gather(-1, eval_ids_TK))


def test_balanced_is_even_and_perturbed_is_not(model):
    even, noisy = (
        router_of(model(f'[router]\nrouting = "balanced"\n{more}'))
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


def test_jitter_is_for_training_and_recomputation_draws_it_again(model):
    router = router_of(model("[router]\njitter_noise = 0.3"))
    x_BLD = tokens(router.gate.in_features)
    first, second = (routed(router, x_BLD)[2] for _ in range(2))
    assert not torch.equal(first, second)
    router.eval()
    assert torch.equal(routed(router, x_BLD)[2], routed(router, x_BLD)[2])


def test_activation_temperature_and_precision_reach_the_scores(model):
    tables = """
    [router]
    activation = "softplus"
    gate_precision = "float64"
    temperature = {start = 4.0, end = 1.0, steps = 3}
    """
    router = router_of(model(tables))
    x_BLD = tokens(router.gate.in_features)
    logits_TE = x_BLD.flatten(0, 1).double() @ router.gate.weight.double().T
    for step, temperature in ((1, 4.0), (2, 2.5), (3, 1.0), (9, 1.0)):
        router.at_step(step)
        scores_TE = routed(router, x_BLD)[2]
        expected_TE = F.softplus(logits_TE / temperature).softmax(-1)
        assert scores_TE.dtype == torch.float64
        torch.testing.assert_close(scores_TE, expected_TE, rtol=1e-12, atol=0)


def test_a_mask_of_another_shape_or_dtype_is_an_error(model):
    router = router_of(model("[telemetry]"))
    x_BLD = tokens(router.gate.in_features)
    router.masked_by = TokenMask()
    for mask in (torch.ones(B, L + 1, dtype=torch.bool), flat(None, torch.ones(B, L, 1))[..., 0]):
        router.masked_by.mask_BL = mask
        with pytest.raises(ValueError, match="mask must be bool and"):
            routed(router, x_BLD)


# --- recomputation --------------------------------------------------------------------------------


class _Recomputed(torch.nn.Module):
    """A router behind an input that is another one when it is computed again."""

    def __init__(self, router):
        super().__init__()
        self.router, self.passes, self.ids = router, 0, []

    def forward(self, x_BLD):
        self.passes += 1
        weights, ids, _ = self.router(x_BLD * (1 if self.passes == 1 else -1))
        self.ids.append(ids)
        return weights


@pytest.mark.parametrize(("kept", "same"), [(True, True), (False, False)])
def test_recomputation_chooses_as_the_first_pass_did(model, kept, same):
    """Even when every score has changed; the host's own policy chooses anew."""
    router = router_of(model("[balance]\naux_loss = 0.1"))
    policy = FullAC.Config()
    policy = (keeping_choices(policy) if kept else policy).build()
    block = _Recomputed(router)
    weights = policy._wrap_block(block)(flat(None, tokens(router.gate.in_features)))
    weights.sum().backward()
    first, second = block.ids
    assert torch.equal(first, second) is same
    assert router.counts_E.sum() == B * L * 3


# --- zero-computation experts ---------------------------------------------------------------------

ZERO = """
[router]
null_experts = 3
copy_experts = 2
constant_experts = 2
"""


def test_zero_computation_experts_answer_without_experts(model):
    """Every token to one expert of each kind: nothing, itself, and a mix with a vector."""
    built = model(ZERO)
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
        inputs = (flat(None, x_BLD), flat(None, weights), flat(None, ids), counts_E)
        out = moe.routed_experts(*inputs).view(B, L, -1)
        mix_BLC2 = torch.einsum("bld,cmd->blcm", x_BLD, constant.mix_C2D).softmax(-1)
        expected = x_BLD * (0.125 + 0.0625)
        for c in range(2):
            answer = x_BLD * mix_BLC2[:, :, c, :1] + constant.vectors_CD[c] * mix_BLC2[:, :, c, 1:]
            expected = expected + 0.03125 * answer
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)


def test_the_routed_experts_answer_as_without_zero_computation_experts(model):
    """Their rows are the same rows: weights and ids of the host's router among them."""
    with_zero, without = moe_of(model(ZERO)), moe_of(model("[telemetry]"))
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
        weights, ids, _ = without.router(flat(None, x_BLD))
        counts_E = ids.flatten().bincount(minlength=8)
        expected = without.routed_experts(flat(None, x_BLD), weights, ids, counts_E)
        nulls = torch.full_like(ids, 9)
        out = with_zero.routed_experts(
            flat(None, x_BLD),
            torch.stack([weights, weights], -1).flatten(-2),
            torch.stack([ids, nulls], -1).flatten(-2),
            torch.cat([counts_E, counts_E.new_zeros(7)]),
        )
    torch.testing.assert_close(out, expected, rtol=0, atol=0)


def test_padding_that_is_not_dispatched_gets_nothing(model):
    built = model("[router]\npad_token_id = 0\ndispatch_padding = false")
    moe = moe_of(built)
    router_of(built)
    mask_BL = torch.ones(B, L, dtype=torch.bool)
    mask_BL[1, 4:] = False
    mask = TokenMask()
    mask.mask_BL = flat(None, mask_BL)
    moe.router.masked_by = moe.routed_experts.masked_by = mask
    moe.shared_experts = None
    rows = []
    experts = getattr(moe.routed_experts, "inner_experts", None)
    if experts is not None:
        experts.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    out_BLD = moe(flat(None, tokens(moe.router.gate.in_features))).view(B, L, -1)
    assert not out_BLD[~mask_BL].any()
    assert out_BLD[mask_BL].any(-1).all()
    assert rows in ([], [3 * int(mask_BL.sum())])


# --- the trainer's config -------------------------------------------------------------------------


@pytest.mark.parametrize("base", UPSTREAM.values(), ids=UPSTREAM)
def test_every_table_fits_every_model(model, base):
    built = model(
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


@pytest.mark.parametrize("tables", ["[router]\nfreeze = true", '[router]\nrouting = "balanced"'])
def test_an_untrained_gate_has_no_bias_update(tmp_path, tables):
    (tmp_path / "mine.toml").write_text(f'inherits = "debugmodel"\n{tables}\n')
    host, ours = (
        binding("models").model_spec(load_flavor(name, near=tmp_path))
        for name in ("debugmodel", "mine")
    )
    assert host.post_optimizer_build_fn is not None
    assert ours.post_optimizer_build_fn is None


EP = "[parallelism]\nexpert_parallel_degree = 2\n"
REFUSED = {
    "too few experts": (
        'routing = "balanced"\nskip_first_n_experts = 6',
        "",
        "chooses 3 experts, of which there are 2 .*skip_first_n_experts = 6",
    ),
    "fixed rows": (
        "null_experts = 2",
        f'{EP}expert_parallel_comm_backend = "minimal_async_ep"',
        'null_experts does not go with the dispatcher MinimalAsyncEP.*to "standard"',
    ),
    "a fixed number of rows for padding too": (
        "pad_token_id = 0\ndispatch_padding = false",
        f'{EP}expert_parallel_comm_backend = "deepep"',
        "dispatch_padding does not go with the dispatcher DeepEP",
    ),
    "capture of what is cut": (
        "copy_experts = 1",
        "[training]\ndisable_cuda_graphs = false",
        "leaving assignments out copies a number to the host",
    ),
    "capture of sinkhorn": (
        'routing = "sinkhorn"',
        "[training]\ndisable_cuda_graphs = false",
        'routing = "sinkhorn" copies a number to the host',
    ),
    "constants and TP": (
        "constant_experts = 2",
        "[parallelism]\ntensor_parallel_degree = 2",
        "constant_experts do not go with parallelism.tensor_parallel_degree = 2",
    ),
    "padding and PP": (
        "pad_token_id = 0",
        "[parallelism]\npipeline_parallel_degree = 2",
        "pad_token_id = 0 does not go with parallelism.pipeline_parallel_degree = 2",
    ),
    "padding, TP and EP": (
        "pad_token_id = 0",
        f"{EP}tensor_parallel_degree = 2",
        "pad_token_id = 0 does not go with parallelism.tensor_parallel_degree and",
    ),
    "distributed tensors": (
        'routing = "sinkhorn"',
        '[parallelism]\nspmd_backend = "full_dtensor"',
        "sinkhorn. does not go with parallelism.spmd_backend = 'full_dtensor', where",
    ),
    "distributed tensors with TP": (
        'routing = "balanced"',
        '[parallelism]\nspmd_backend = "partial_dtensor"\ntensor_parallel_degree = 2',
        "balanced. does not go with .* 'partial_dtensor' and tensor parallelism",
    ),
    "cadence": (
        "[telemetry]\nevery = 15",
        "[metrics]\nlog_freq = 10",
        r"\[telemetry\] every = 15 must be a multiple of metrics.log_freq = 10",
    ),
    "groups": (
        "null_experts = 8",
        "",
        "null_experts does not go with router_num_expert_groups = 4",
    ),
}
GROUPS = "router_num_expert_groups = 4\nrouter_num_limited_groups = 2\n"


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_go_together_is_refused(tmp_path, case):
    keys, of_job, message = REFUSED[case]
    more = GROUPS if case == "groups" else ""
    # Of an upstream model the flavor itself does not know the sizes.
    of = 'base = "deepseek_v3/debugmodel"' if "few" in case else 'inherits = "debugmodel"'
    (tmp_path / "mine.toml").write_text(f"{of}\n{more}[router]\n{keys}\n")
    job = tmp_path / "job.toml"
    job.write_text(f'[model]\nname = "ezpz_moe"\nflavor = "mine_sdpa"\n{of_job}\n')
    with pytest.raises(EzpzError, match=message) as refusal:
        binding("job").trainer_config(find_job(str(job)))
    assert "mine_sdpa" in str(refusal.value)


def test_balance_losses_are_reported_without_being_asked(tmp_path):
    (tmp_path / "mine.toml").write_text('inherits = "debugmodel"\n[balance]\naux_loss = 0.1\n')
    (tmp_path / "job.toml").write_text('[model]\nname = "ezpz_moe"\nflavor = "mine_sdpa"\n')
    config = binding("job").trainer_config(find_job(str(tmp_path / "job.toml")))
    assert config.metrics.telemetry.detail == "brief"
