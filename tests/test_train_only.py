"""``[train_only]``: what a job may say, which rows an optimizer keeps, and the anchor's formula."""

import json
from pathlib import Path

import pytest
import torch
from config_cases import config, conflict
from dialect import ON_0_2, SINCE_2026_08
from torch import nn

if ON_0_2 or SINCE_2026_08:
    pytest.skip("about the binding to torchtitan 0.3", allow_module_level=True)

from ezpz_moe.config.job import Job
from ezpz_moe.config.train_only import train_only_of
from ezpz_moe.errors import EzpzError
from ezpz_moe.hosts.titan import frozen_rows
from ezpz_moe.routing.anchor import anchor_loss

# --- the table ------------------------------------------------------------------------------------


def _said(path: Path | None = None, **values):
    return train_only_of(
        Job("tiny", path, {f"train_only.{key}": each for key, each in values.items()})
    )


def _attribution(folder: Path) -> Path:
    shares = {0: [0.5, 0.3, 0.2, 0.0], 2: [0.1, 0.25, 0.4, 0.25]}
    experts = [
        {"layer": layer, "expert": number, "share_of_tokens": share, "share_of_weight": share}
        for layer, of_layer in shares.items()
        for number, share in enumerate(of_layer)
    ]
    path = folder / "attribution.json"
    path.write_text(json.dumps({"flavor": "tiny", "experts": experts}))
    return path


def test_without_a_table_everything_learns():
    assert train_only_of(Job("tiny", None, {"training.steps": 3})) is None


def test_experts_are_named_by_layer():
    said = _said(experts={"3": [5, 1], "4": []}, router=True)
    assert (said.experts, said.router, said.anchor) == ({3: (1, 5), 4: ()}, True, 0.0)
    assert _said(experts="all").experts is None


@pytest.mark.parametrize(
    ("share", "experts"),
    [
        (None, {0: (0,), 2: (2,)}),  # a fifth
        (0.5, {0: (0,), 2: (1, 2)}),
        (0.6, {0: (0, 1), 2: (1, 2)}),
        (1.0, {0: (0, 1, 2), 2: (0, 1, 2, 3)}),
    ],
)
def test_of_a_file_the_fewest_experts_learn_that_have_the_share(tmp_path, share, experts):
    _attribution(tmp_path)
    job = tmp_path / "job.toml"
    values = {} if share is None else {"share": share}
    assert _said(job, experts="attribution.json", **values).experts == experts


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"experts": {}}, "nothing would learn"),
        ({"router": False}, "nothing would learn"),
        ({"experts": {"3": []}}, "nothing would learn"),
        ({"experts": {"three": [1]}}, '"three" is no number of a layer'),
        ({"experts": {"3": [1, 1]}}, '"3" names expert 1 twice'),
        ({"experts": {"3": [1]}, "share": 0.5}, "share = 0.5 has no effect"),
        ({"experts": "all", "share": 0.5}, "share = 0.5 has no effect"),
        ({"experts": "absent.json"}, "No such file"),
        ({"experts": "wrong.json"}, r"experts\.0\.expert: Field required"),
        ({"experts": "broken.json"}, "Invalid JSON"),
    ],
)
def test_a_mistake_is_named_in_a_line(tmp_path, values, message):
    (tmp_path / "wrong.json").write_text('{"experts": [{"layer": 1}]}')
    (tmp_path / "broken.json").write_text('{"experts": [')
    with pytest.raises(EzpzError, match=message) as raised:
        _said(tmp_path / "job.toml", **values)
    assert "\n" not in str(raised.value)
    assert "job.toml: [train_only]" in str(raised.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"experts": {"0": [1]}}, "layer 0 has no experts in this model. Those of layers 1 to 5"),
        ({"experts": {"9": [1]}}, "layer 9 has no experts"),
        ({"experts": {"3": [8]}}, "layer 3 has no expert 8: its experts are 0 to 7"),
        ({"flavor": "zero", "experts": {"1": [8]}}, "layer 1 has no expert 8: its experts are 0"),
        ({"experts": "all", "anchor": 0.1}, "anchor = 0.1 has no effect: all experts learn"),
        ({"experts": {"3": [1]}, "anchor": 0.1}, "nothing before these experts learns"),
    ],
)
def test_what_the_model_does_not_have_is_named(tmp_path, monkeypatch, values, message):
    monkeypatch.setenv("EZPZ_MOE_FLAVORS", str(tmp_path))
    zero = 'inherits = "debugmodel"\nattention = "sdpa"\n[router]\nnull_experts = 4\n'
    (tmp_path / "zero.toml").write_text(zero)
    flavor = values.pop("flavor", "debugmodel_sdpa")
    values = {f"train_only__{key}": each for key, each in values.items()}
    assert message in conflict(flavor, **values)


def test_a_stage_in_which_nothing_learns_has_no_backward():
    table = {"train_only__experts": {"3": [1], "4": [1]}, "train_only__anchor": 0.1}
    message = conflict(**table, parallelism__pipeline_parallel_degree=2)
    assert "[train_only] excludes parallelism.pipeline_parallel_degree = 2" in message
    assert config(**table).learners.anchor == 0.1


# --- the optimizer --------------------------------------------------------------------------------

LEARNS = torch.tensor([True, False, True])


def _stepped(kind, *, frozen: bool, steps: int = 10, **settings):
    """A stack and another parameter after some steps; the stack before; the optimizer."""
    generator = torch.Generator().manual_seed(3)
    stack_E23 = nn.Parameter(torch.randn(3, 2, 3, generator=generator))
    other_4 = nn.Parameter(torch.randn(4, generator=generator))
    before_E23 = stack_E23.detach().clone()
    groups = [{"params": [stack_E23, other_4], "param_names": ["stack", "other"]}]
    optimizer = kind(groups, **settings)
    if frozen:
        frozen_rows.zero_gradients(stack_E23, LEARNS)
        frozen_rows.keep_rows(optimizer)
    for _ in range(steps):
        optimizer.zero_grad()
        (stack_E23.square().sum() + other_4.exp().sum()).backward()
        optimizer.step()
    return stack_E23.detach(), other_4.detach(), before_E23, optimizer


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Adam])
@pytest.mark.parametrize("implementation", [{}, {"fused": True}, {"foreach": True}])
def test_frozen_rows_keep_their_bits_and_the_others_move_as_ever(kind, implementation):
    settings = {"lr": 0.05, "weight_decay": 0.3, **implementation}
    found_E23, other_4, before_E23, optimizer = _stepped(kind, frozen=True, **settings)
    free_E23, free_4, _, _ = _stepped(kind, frozen=False, **settings)
    assert torch.equal(found_E23[~LEARNS], before_E23[~LEARNS])
    # A decay of its own is one more rounding of each weight in each of ten steps.
    torch.testing.assert_close(found_E23[LEARNS], free_E23[LEARNS], rtol=1e-5, atol=1e-6)
    assert torch.equal(other_4, free_4)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.3]
    assert [group["param_names"] for group in optimizer.param_groups] == [["other"], ["stack"]]


def test_moments_that_are_loaded_are_forgotten_for_frozen_rows():
    settings = {"lr": 0.05, "weight_decay": 0.3}
    _, _, _, free = _stepped(torch.optim.AdamW, frozen=False, **settings)
    saved = free.state_dict()
    _, _, _, optimizer = _stepped(torch.optim.AdamW, frozen=True, steps=1, **settings)
    # The host's: by name, so that groups do not matter.
    other, stack = saved["state"][1], saved["state"][0]
    optimizer.load_state_dict({**optimizer.state_dict(), "state": {0: other, 1: stack}})
    moments = optimizer.state[optimizer.param_groups[1]["params"][0]]
    for name in ("exp_avg", "exp_avg_sq"):
        assert not moments[name][~LEARNS].any()
        assert torch.equal(moments[name][LEARNS], stack[name][LEARNS])


class _Restless(torch.optim.SGD):
    def step(self, closure=None):
        for group in self.param_groups:
            for each in group["params"]:
                each.data.mul_(0.5)


class _Untriable(torch.optim.SGD):
    def __init__(self, params, **settings):
        super().__init__(params, **settings)
        if len(self.param_groups[0]["params"]) < 2:
            raise ValueError("two at least")


@pytest.mark.parametrize(
    ("kind", "message"),
    [(_Restless, "_Restless moves weights that have no gradient"), (_Untriable, "cannot be tried")],
)
def test_an_optimizer_that_moves_frozen_weights_is_refused(kind, message):
    stack = nn.Parameter(torch.randn(3, 2, 2))
    optimizer = kind([stack, nn.Parameter(torch.randn(2))], lr=0.1)
    frozen_rows.zero_gradients(stack, LEARNS)
    with pytest.raises(EzpzError, match=message):
        frozen_rows.keep_rows(optimizer)


# --- the anchor -----------------------------------------------------------------------------------


@pytest.mark.parametrize("trained", [[False, True, False], [True, True, False], [True, True]])
def test_the_anchor_is_its_formula(trained):
    generator = torch.Generator().manual_seed(5)
    p_GNE = torch.rand(2, 4, 3, generator=generator, dtype=torch.float64).softmax(-1)
    p_GNE.requires_grad_()
    mask_GN = torch.ones(2, 4, dtype=torch.bool)
    mask_GN[1, 2:] = False
    loss = anchor_loss(p_GNE, mask_GN, torch.tensor(trained))
    (gradient,) = torch.autograd.grad(loss, p_GNE)
    # One that computes nothing comes after those that may learn.
    wanted = [each / sum(trained) for each in [*trained, False][:3]]
    expected, expected_GNE = 0.0, torch.zeros_like(p_GNE)
    for g, tokens in enumerate((4, 2)):
        for n in range(tokens):
            for e, want in enumerate(wanted):
                apart = p_GNE[g, n, e].item() - want
                expected += apart**2 / tokens
                expected_GNE[g, n, e] = 2 * apart / tokens
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    torch.testing.assert_close(gradient, expected_GNE, rtol=1e-12, atol=1e-15)
