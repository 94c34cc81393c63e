"""A checkpoint with its experts in another order computes the same, and leads back to the first."""

from __future__ import annotations

import json
import os
import random
import signal
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from checkpoint_cases import GATED, GPT_OSS, assert_same_checkpoint, loaded, trained
from damage_cases import refusal

from ezpz_moe import cli
from ezpz_moe.hosts.detect import check_host, presumed_host
from ezpz_moe.hosts.titan.v0_3 import Titan03
from ezpz_moe.tools.checkpoints import storage
from ezpz_moe.tools.checkpoints.contents import inspect
from ezpz_moe.tools.checkpoints.expert_order import (
    FILE,
    composed,
    inverse,
    read_order,
    why_not_reorder,
)
from ezpz_moe.tools.checkpoints.remapping import remap
from ezpz_moe.tools.checkpoints.reordering import permute_experts

if type(presumed_host()) is not Titan03:
    pytest.skip("builds models of torchtitan 0.3", allow_module_level=True)
check_host()  # before torchtitan is imported: it chooses the device

import hf_cases  # noqa: E402
from torchtitan.models.common.moe import MoE  # noqa: E402

from ezpz_moe.config.job import Job  # noqa: E402
from ezpz_moe.hosts.titan.experts import EzpzGroupedExperts  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is unavailable")

# What there is besides stacks, gate and selection bias: a map of the logits of a layer with another
# number of experts, biases of gates and experts, and logits behind those of the routed experts.
RICH = """
num_experts = [4, 8]
router_top_k = [2, 3]
router_bias = true
expert_bias = true
[router]
gating_residual = true
null_experts = 1
constant_experts = 1
"""
# A learned scale, and matrices that no expert has.
RELU = """
moe_latent_dim = 16
[router]
routing = "relu"
activation = "relu_rmsnorm"
learned_scale = true
[balance]
bias_update = "none"
"""
# Without a selection bias, which would tell most of them apart.
TIES = '[router]\nactivation = "relu_rmsnorm"\n[balance]\nbias_update = "none"\n'
CASES = {
    "rich": ("deepseek_v2", RICH),
    "relu": ("deepseek_v2", RELU),
    "ties": ("deepseek_v2", TIES),
    "groups": ("deepseek_v3", ""),
    "biases": ("gpt_oss", ""),
}
ORDERS = {
    "rich": {1: [2, 0, 3, 1], 2: [5, 1, 7, 0, 2, 6, 3, 4]},
    "relu": {1: [7, 6, 5, 4, 3, 2, 1, 0], 2: [1, 2, 3, 4, 5, 6, 7, 0]},
    "ties": {1: [7, 6, 5, 4, 3, 2, 1, 0]},
    # Four groups of two: the last one first, and its experts the other way round.
    "groups": {2: [7, 6, 2, 3, 4, 5, 1, 0]},
    "biases": {0: [3, 1, 0, 2, 7, 6, 5, 4], 1: [5, 1, 7, 0, 2, 6, 3, 4]},
}
GROUPS = {"groups": 4}


class Reordered:
    """Checkpoints of small models with random weights, and in another order."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.case = cache(self._case)
        self.checkpoints = cache(self._checkpoints)

    def _case(self, name: str) -> hf_cases.Case:
        kind, extra = CASES[name]
        return hf_cases.make_case(kind, self._folder / name, extra)

    def _checkpoints(self, name: str) -> tuple[Path, Path]:
        case = self.case(name)
        source = hf_cases.save(hf_cases.random_weights(case, bias=0.3), case.folder / "source")
        target = case.folder / "target"
        permute_experts(source, target, ORDERS[name], groups=GROUPS.get(name, 1))
        return source, target

    def logits(self, name: str, checkpoint: Path, noise: float = 0.0) -> torch.Tensor:
        """What the model computes in float64.

        Args:
            noise: how much larger what a layer's experts add is than they computed.
        """
        case = self.case(name)
        model = case.build()
        model.load_state_dict(hf_cases.load(checkpoint))
        model.double()
        for module in model.modules():
            if isinstance(module, EzpzGroupedExperts):
                module.computed_in = torch.float64
            if isinstance(module, MoE):
                module.register_forward_hook(lambda _, x, y: y * (1 + noise))
        tokens_L = torch.randint(2048, (32,), generator=torch.Generator().manual_seed(3))
        with torch.inference_mode():
            analysis = hf_cases.host().analysis()
            return analysis.forward(model, tokens_L, torch.arange(len(tokens_L)))


@pytest.fixture(scope="module")
def reordered(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        hf_cases.add_tiny_bases(patch)
        yield Reordered(tmp_path_factory.mktemp("reordered"))


@pytest.mark.parametrize("name", ["rich", "relu", "groups", "biases"])
def test_the_model_computes_the_same(reordered, name) -> None:
    """In float64 the logits differ by what another order of sums rounds.

    A softmax adds up E + Z scores, a token's norm and output K of them: with E + Z <= 10 and K <= 8
    not 32 additions, each of which rounds to half a unit.
    """
    source, target = reordered.checkpoints(name)
    first_LV = reordered.logits(name, source)
    allowed = torch.dist(reordered.logits(name, source, noise=32 * 2.0**-53), first_LV)
    assert torch.dist(reordered.logits(name, target), first_LV) <= allowed
    assert allowed < 1e-12 * first_LV.norm()


@pytest.mark.parametrize("name", ["rich", "groups", "biases"])
def test_every_order_is_undone_bit_for_bit(reordered, name, tmp_path) -> None:
    source, target = reordered.checkpoints(name)
    back = permute_experts(target, tmp_path / "back", inverse(read_order(target)))
    assert back.experts == sum(
        sum(i != e for i, e in enumerate(of)) for of in ORDERS[name].values()
    )
    assert_same_checkpoint(source, tmp_path / "back")
    assert not (tmp_path / "back" / FILE).exists(), "every expert has its first number"


def test_the_way_back_goes_through_hugging_faces_form(reordered, tmp_path) -> None:
    case, (_, target) = reordered.case("groups"), reordered.checkpoints("groups")
    assert case.remap(target, tmp_path / "hf", "--to", "hf") == 0
    assert case.remap(tmp_path / "hf", tmp_path / "back", "--to", "0.3") == 0
    for folder in (tmp_path / "hf", tmp_path / "back"):
        assert read_order(folder) == ORDERS["groups"]


def test_where_equal_scores_go_by_number_an_order_is_refused(reordered) -> None:
    source, target = reordered.checkpoints("ties")
    first_LV = reordered.logits("ties", source)
    assert torch.dist(reordered.logits("ties", target), first_LV) > 1e-3 * first_LV.norm()
    (why,) = why_not_reorder(reordered.case("ties").flavor, Job("ties"))
    assert "of equal ones the number decides" in why


@pytest.mark.parametrize(
    ("tables", "values", "said"),
    [
        ("", {}, []),
        (RELU, {"train_only.experts": "all", "debug.moe_force_load_balance": False}, []),
        ("", {"train_only.router": True}, []),
        ('[router]\nrouting = "balanced"\n', {}, ['routing = "balanced" takes experts in turn']),
        ("", {"debug.moe_force_load_balance": True}, ["moe_force_load_balance = true takes"]),
        ("", {"train_only.experts": {"1": [0]}}, ["names experts by numbers"]),
        ("", {"train_only.experts": "attribution.json"}, ["names experts by numbers"]),
        ('dense_baseline_of = "plain"', {}, ["no layer has experts"]),
        (TIES, {"train_only.experts": {"1": [0]}}, ["of equal ones", "names experts by numbers"]),
    ],
)
def test_where_experts_are_chosen_by_number(tmp_path, tables, values, said) -> None:
    flavor = tmp_path / "mine.toml"
    flavor.write_text(tables if "baseline" in tables else f'inherits = "plain"\n{tables}')
    (tmp_path / "plain.toml").write_text('inherits = "tiny"\nn_layers = 2\n')
    (tmp_path / "tiny.toml").write_text('inherits = "debugmodel"\n')
    reasons = why_not_reorder(
        hf_cases.load_flavor("mine", near=tmp_path), Job("mine", None, values)
    )
    assert len(reasons) == len(said)
    for reason, words in zip(reasons, said, strict=True):
        assert words in reason


@pytest.mark.parametrize(
    ("order", "groups", "said"),
    [
        ({0: [0, 1]}, 1, "layer 0 has no experts to reorder; layers 1, 2 have"),
        ({1: [0, 1, 2]}, 1, "names each of its experts 0 to 3 once"),
        ({1: [0, 1, 1, 2]}, 1, "names each of its experts 0 to 3 once"),
        ({1: [0, 1, 2, 3, 5, 4]}, 1, "Zero-computation experts are not among them"),
        ({1: [1, 0, 2, 3], 2: [0, 2, 1, 3, 4, 5, 6, 7]}, 2, ""),
        ({1: [0, 2, 1, 3]}, 2, "experts 0 to 1 would be [0, 2], which are of several of the"),
        ({2: [0, 1, 2, 3, 4, 5, 6, 7]}, 1, "every expert keeps its number"),
    ],
)
def test_what_is_no_order_of_the_experts_is_refused(
    reordered, tmp_path, order, groups, said
) -> None:
    source, _ = reordered.checkpoints("rich")
    target = tmp_path / "target"
    if not said:
        assert permute_experts(source, target, order, groups=groups).layers == 2
        return
    assert said in refusal(lambda: permute_experts(source, target, order, groups=groups))
    assert list(tmp_path.iterdir()) == []


# A run's checkpoint, with the state of its optimizer ----------------------------------------------

ORDER = {1: [3, 0, 4, 2, 1]}


@pytest.fixture(scope="module", params=[GATED, GPT_OSS], ids=["gated", "gpt_oss"])
def saved(request, tmp_path_factory) -> Path:
    """A trained layer of 5 experts, with a moment for every weight."""
    folder = tmp_path_factory.mktemp("saved") / "step-7"
    dcp.save(trained(request.param), checkpoint_id=folder)
    return folder


def entries(folder: Path) -> dict:
    """Every entry of a checkpoint, the optimizer's beside the model's."""
    state = loaded(folder)
    return {**state.pop("optimizer"), **state.pop("train_state"), **state}


def test_what_changes_and_nothing_else(saved, tmp_path) -> None:
    done = permute_experts(saved, tmp_path / "step-7", ORDER)
    before, after = entries(saved), entries(tmp_path / "step-7")
    assert before.keys() == after.keys()
    changed = {
        name
        for name, value in before.items()
        if getattr(value, "ndim", 0) and ("inner_experts" in name or "router" in name)
    }
    for name, old in before.items():
        wanted = old[ORDER[1]] if name in changed else old
        assert storage.same_bits(after[name], wanted), name
    assert done.tensors == len(changed)
    assert (done.experts, done.layers, done.with_optimizer) == (5, 1, True)


@pytest.mark.parametrize("to", ["0.2", "2026_09"])
def test_under_other_names_it_is_the_same(saved, tmp_path, to) -> None:
    """And where it came from goes along with the names."""
    permute_experts(saved, tmp_path / "permuted", ORDER)
    remap(tmp_path / "permuted", tmp_path / "first", to)
    remap(saved, tmp_path / "remapped", to)
    permute_experts(tmp_path / "remapped", tmp_path / "then", ORDER)
    assert_same_checkpoint(tmp_path / "first", tmp_path / "then")
    assert read_order(tmp_path / "first") == read_order(tmp_path / "then") == ORDER


def test_the_first_numbers_are_kept_over_several_orders(saved, tmp_path) -> None:
    draw, numbers = random.Random(0), range(5)
    source = saved
    for step in range(3):
        target = tmp_path / f"step-{step}"
        permute_experts(source, target, {1: draw.sample(numbers, 5)})
        source = target
    permute_experts(source, tmp_path / "back", inverse(read_order(source)))
    assert_same_checkpoint(saved, tmp_path / "back")


def test_orders_are_composed() -> None:
    """Expert 0 comes from 1 of the second, which came from 2 of the first; layer 2 is back."""
    assert composed({1: [0, 2, 1], 2: [1, 0]}, {1: [1, 0, 2], 2: [1, 0]}) == {1: [2, 0, 1]}


def test_inspect_shows_it(saved, tmp_path, capsys) -> None:
    target = tmp_path / "step-7"
    permute_experts(saved, target, ORDER)
    assert (inspect(saved).reordered, inspect(target).reordered) == ((), (1,))
    for folder, is_shown in ((saved, False), (target, True)):
        assert cli.main(["ckpt", "inspect", str(folder)]) == 0
        assert (f"the experts of 1 layer ({FILE})" in capsys.readouterr().out) is is_shown
    assert cli.main(["ckpt", "inspect", str(target), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["reordered"] == [1]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"first_numbers": [1]}',
        '{"first_numbers": {"1": [0, 0]}}',
        '{"first_numbers": {"1": "x"}}',
    ],
)
def test_a_damaged_file_of_numbers_is_one_line(saved, tmp_path, text) -> None:
    """It is not taken for one of experts with their first numbers."""
    target = tmp_path / "step-7"
    permute_experts(saved, target, ORDER)
    (target / FILE).write_text(text)
    again = tmp_path / "again"
    for said in (
        refusal(inspect, target),
        refusal(permute_experts, target, again, ORDER),
        refusal(remap, target, again, "0.2"),
    ):
        assert said.startswith(f"{target / FILE}: does not say which number")
    assert not again.exists()


def test_ctrl_c_leaves_nothing(saved, tmp_path) -> None:
    def interrupted(names):
        yield from names[: len(names) // 2]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        permute_experts(saved, tmp_path / "target", ORDER, progress=interrupted)
    assert list(tmp_path.iterdir()) == []


def test_a_killed_one_leaves_nothing_that_looks_finished(saved, tmp_path) -> None:
    def killed(names):
        yield from names[: len(names) // 2]
        os.kill(os.getpid(), signal.SIGKILL)

    target = tmp_path / "step-7"
    if (child := os.fork()) == 0:
        try:
            permute_experts(saved, target, ORDER, progress=killed)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL
    assert [path.name for path in tmp_path.iterdir()] == ["step_7.partial"]
    permute_experts(saved, target, ORDER)
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("name", ["router.gate.weight", "shared_experts.w1.weight"])
def test_what_was_written_wrong_is_not_kept(saved, tmp_path, monkeypatch, name) -> None:
    """Of what changes, and of what is copied: one bit of a moment."""
    moment = entries(saved)[f"state.layers.1.moe.{name}.exp_avg"]
    written = (moment[ORDER[1]] if "router" in name else moment).numpy().tobytes()
    sync = storage.sync

    def flip(folder, places):
        (file,) = folder.glob("*.distcp")
        file.write_bytes(
            file.read_bytes().replace(written, written[:-1] + bytes([written[-1] ^ 1]))
        )
        sync(folder, places)

    monkeypatch.setattr(storage, "sync", flip)
    said = refusal(permute_experts, saved, tmp_path / "target", ORDER)
    assert f"{name}.exp_avg, read back, differs" in said
    assert list(tmp_path.iterdir()) == []
