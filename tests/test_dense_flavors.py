"""Flavors without experts: what they cost, what they start with, and what is refused."""

from pathlib import Path

import pytest
from config_cases import conflict
from test_models import build
from trainer_runs import TINY

from ezpz_moe.config.flavors import load_flavor
from ezpz_moe.errors import EzpzError
from ezpz_moe.hosts.detect import check_host

check_host()  # before torchtitan is imported: it chooses the device

from torchtitan.models.common.moe import MoE  # noqa: E402

from ezpz_moe.cli.describe import _remarks as remarks  # noqa: E402
from ezpz_moe.config.dense_flavors import OF_EXPERTS, refuse_dense, shown  # noqa: E402
from ezpz_moe.config.flavor_schema import Dimensions, Flavor  # noqa: E402
from ezpz_moe.hosts.accounting import ffn_matrices  # noqa: E402
from ezpz_moe.hosts.anatomy_text import title  # noqa: E402
from ezpz_moe.hosts.counts import counts_at_hand  # noqa: E402
from ezpz_moe.hosts.titan.anatomy import anatomy  # noqa: E402
from ezpz_moe.hosts.titan.models import host_spec, model_spec, what_it_equals  # noqa: E402
from ezpz_moe.hosts.titan.parameters import summarize  # noqa: E402
from ezpz_moe.tools.describe import as_json, describe  # noqa: E402

QWEN3 = 'base = "qwen3/debugmodel_moe"\n[change]\nn_layers = 2\ndim = 64\nnum_experts = 6\n'
QWEN3 += 'router_top_k = 2\nmoe_hidden_dim = 40\nrouter_score_func = "sqrtsoftplus"\n'
UNEVEN = (TINY / "pyramid.toml").read_text().replace('"tiny"', '"debugmodel"')
UNEVEN += 'router_score_func = "sqrtsoftplus"\nshared_gate = true\n'


def flavor_of(folder: Path, text: str, *, experts: str = "", name: str = "mine") -> Flavor:
    (folder / "experts.toml").write_text(experts or 'inherits = "debugmodel"\n')
    (folder / "mine.toml").write_text(text)
    return load_flavor(name, near=folder)


@pytest.mark.parametrize(
    ("experts", "layers"),
    [
        ('inherits = "debugmodel"\n', 5),  # with shared experts, and a dense layer of its own
        ('inherits = "debugmodel"\n[router]\nnull_experts = 8\n', 5),  # half of the choices compute
        (QWEN3, 2),
        # What only layers with experts have, or differs between them.
        (UNEVEN, 3),
    ],
)
def test_a_baseline_costs_as_much_to_half_a_hidden_unit(
    experts: str, layers: int, tmp_path: Path
) -> None:
    dense = flavor_of(tmp_path, 'dense_baseline_of = "experts"', experts=experts)
    assert dense.dense_baseline_of is not None
    assert not dense.is_routed
    assert not dense.other_ffns
    ours, theirs = anatomy(dense, 64), anatomy(dense.dense_baseline_of, 64)
    assert ours.n_moe_layers == 0
    # Of one hidden unit in each of these layers.
    unit = 2 * ffn_matrices("swiglu") * ours.dim * layers
    assert abs(ours.total.forward - theirs.total.forward) <= unit / 2
    same = flavor_of(tmp_path, 'dense_baseline_of = "experts"\nequal = "params"\n', experts=experts)
    difference = anatomy(same, 64).total.parameters - theirs.total.parameters
    assert abs(difference) <= unit / 2 / 2


def test_all_else_is_as_in_the_named_flavor(tmp_path: Path) -> None:
    dense = flavor_of(tmp_path, 'dense_baseline_of = "experts_sdpa_for_loop"', name="mine")
    ours, theirs = model_spec(dense).model, host_spec(load_flavor("debugmodel_sdpa")).model
    assert len(ours.layers) == len(theirs.layers)
    for mine, its in zip(ours.layers, theirs.layers, strict=True):
        assert mine.moe is None
        assert type(mine.attention) is type(its.attention)
        assert mine.attention.wo.out_features == its.attention.wo.out_features
    assert (dense.attention, dense.compute_backend) == ("sdpa", "grouped_mm")
    assert not any(isinstance(module, MoE) for module in build(ours).modules())


def test_the_ffn_starts_with_the_values_of_the_experts_in_its_place(tmp_path: Path) -> None:
    for experts in ("", QWEN3):
        dense = flavor_of(tmp_path, 'dense_baseline_of = "experts"', experts=experts)
        assert dense.dense_baseline_of is not None
        theirs = host_spec(dense.dense_baseline_of).model.layers[1].moe
        drawn = theirs.routed_experts.inner_experts.param_init
        ffn = host_spec(dense).model.layers[1].feed_forward
        for name, key in (("w1", "w1_EFD"), ("w2", "w2_EDF"), ("w3", "w3_EFD")):
            ours = getattr(ffn, name).param_init["weight"]
            assert (ours.func, ours.keywords) == (drawn[key].func, drawn[key].keywords)


def test_the_log_says_what_it_equals(tmp_path: Path) -> None:
    dense = flavor_of(tmp_path, 'dense_baseline_of = "10B_2B"')
    assert what_it_equals(dense) == (
        "flavor mine is dense, with the FLOPs per token of 10B_2B: an FFN of hidden size 7052 in "
        "place of each layer's experts"
    )
    assert what_it_equals(load_flavor("10B_2B")) is None


def test_layers_that_are_all_dense_need_no_word_about_experts(tmp_path: Path) -> None:
    dense = flavor_of(tmp_path, 'inherits = "debugmodel"\nn_dense_layers = 6\n')
    assert dense.is_dense
    own = {key for key in Dimensions.model_fields if key not in OF_EXPERTS}
    size = load_flavor("debugmodel").dimensions
    assert size is not None
    text = "\n".join(f"{k} = {v}" for k, v in size.model_dump(include=own - {"rope"}).items())
    alone = text.replace("n_dense_layers = 1", "n_dense_layers = 6")
    rope = "".join(f"{k} = {v!r}\n".replace("'", '"') for k, v in size.rope.model_dump().items())
    assert flavor_of(tmp_path, f"{alone}\n[rope]\n{rope}").dimensions == dense.dimensions
    summary = summarize(dense)
    assert counts_at_hand(dense) == summary
    D, F, attention = 256, 1024, 256 * 16 * 192 + 256 * 576 + 512 + 512 * 16 * 256 + 16 * 128 * 256
    assert summary.total == 2 * 2048 * D + 6 * (attention + 3 * D * F + 2 * D) + D
    assert summary.active == summary.total
    assert (summary.num_experts, summary.top_k, summary.expert_hidden_dim) == (0, 0, 0)


BASELINE, ALL_DENSE = 'dense_baseline_of = "experts"\n', 'inherits = "16B"\nn_dense_layers = 27\n'


@pytest.mark.parametrize(
    ("text", "name", "message"),
    [
        (
            f"{BASELINE}[router]\nfreeze = true",
            "mine",
            "no experts, so router would have no effect",
        ),
        (f"{BASELINE}[balance]\naux_loss = 0.1", "mine", "so balance would have no effect"),
        (f"{BASELINE}[telemetry]\nevery = 1", "mine", "so telemetry would have no effect"),
        (f'{BASELINE}compute_backend = "for_loop"', "mine", "compute_backend would have no effect"),
        (BASELINE, "mine_for_loop", "has no routed experts that 'for_loop' could compute"),
        (f"{BASELINE}dim = 64", "mine", "so these keys would be ignored: dim. Change them in that"),
        (f'{BASELINE}equal = "flop"', "mine", "equal = 'flop': should be 'flops' or 'params'. Did"),
        ('dense_baseline_of = "mine"', "mine", "is a dense baseline itself. Name a flavor with"),
        ('dense_baseline_of = "expert"', "mine", "unknown flavor 'expert'"),
        ("dense_baseline_of = 7", "mine", "dense_baseline_of = 7: should be the name of a flavor"),
        (
            'inherits = "16B"\nequal = "flops"',
            "mine",
            "says what a dense_baseline_of has in common",
        ),
        (f"{ALL_DENSE}num_experts = 8", "mine", "no experts, so num_experts would have no effect"),
        (ALL_DENSE, "mine_sdpa_for_loop", "Write its name without _for_loop"),
    ],
)
def test_what_a_dense_flavor_cannot_say_is_refused_in_one_line(
    text: str, name: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(EzpzError) as error:
        flavor_of(tmp_path, text, name=name)
    assert message in str(error.value)
    assert str(error.value).startswith(f"{tmp_path / 'mine.toml'}: ")
    assert "\n" not in str(error.value)


def test_the_baseline_of_a_dense_flavor_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EzpzError, match="that flavor is dense itself"):
        flavor_of(tmp_path, BASELINE, experts=ALL_DENSE)


def test_a_family_whose_layers_need_experts_is_refused(tmp_path: Path) -> None:
    dense = flavor_of(tmp_path, 'dense_baseline_of = "gpt_oss_debugmodel"')
    with pytest.raises(EzpzError, match="torchtitan's gpt_oss/debugmodel have no dense form"):
        host_spec(dense)


def test_nothing_about_experts_is_shown(tmp_path: Path) -> None:
    for text in (BASELINE, ALL_DENSE):
        said = shown(flavor_of(tmp_path, text))
        assert "compute_backend" not in said
        assert said["dimensions"].keys() & OF_EXPERTS == set()
        assert said["dimensions"]["dense_hidden_dim"] in (1024, 10944)
    assert said["dimensions"].keys() < shown(load_flavor("16B"))["dimensions"].keys()


def test_what_a_model_does_not_say_is_not_shown(tmp_path: Path) -> None:
    assert "equal" not in shown(load_flavor("16B"))
    assert "equal" in shown(flavor_of(tmp_path, BASELINE))
    # The host's gpt_oss has biases and its own activation.
    assert not {"expert_bias", "expert_activation"} & shown(load_flavor("gpt_oss_20b")).keys()
    said = flavor_of(tmp_path, 'inherits = "qwen3_debugmodel"\nexpert_activation = "swiglu"\n')
    assert shown(said)["expert_activation"] == "swiglu"


def test_what_is_about_experts_refuses_a_dense_flavor(tmp_path: Path) -> None:
    dense = flavor_of(tmp_path, BASELINE)
    with pytest.raises(EzpzError, match="flavor 'mine' is dense: it has no experts to analyze"):
        refuse_dense(dense, "to analyze")
    refuse_dense(load_flavor("debugmodel"), "to analyze")


def test_expert_parallelism_has_nothing_to_divide(tmp_path: Path, monkeypatch) -> None:
    flavor_of(tmp_path, 'dense_baseline_of = "debugmodel_sdpa"')
    monkeypatch.setenv("EZPZ_MOE_FLAVORS", str(tmp_path))
    message = conflict("mine", parallelism__expert_parallel_degree=2)
    assert "expert_parallel_degree = 2: flavor 'mine' is dense" in message


def test_describe_says_what_rounding_leaves(tmp_path: Path, monkeypatch) -> None:
    flavor_of(tmp_path, 'dense_baseline_of = "qwen3_30B_A3B"')
    monkeypatch.setenv("EZPZ_MOE_FLAVORS", str(tmp_path))
    told = describe("mine", [], None, "cpu")
    assert told.dense is None
    assert told.baseline_of is not None
    # A third of a hidden unit in each of 48 layers, of 20 GFLOPs.
    left = 3 * 48 * 2 * ffn_matrices("swiglu") * 2048 / 3 / told.anatomy.total.both
    assert told.baseline_of.more_flops == pytest.approx(left, rel=1e-3)
    lines = list(remarks(told))
    assert any("Dense baseline of qwen3_30B_A3B with equal FLOPs" in line for line in lines)
    assert not any("Dense model with equal FLOPs" in line for line in lines)
    document = as_json(told)
    assert document["dense_model_of_equal_flops"] is None
    assert document["baseline_of"]["flavor"] == "qwen3_30B_A3B"
    assert document["computing_experts_per_token"] == 0
    assert title("mine", told.anatomy, 64).startswith("mine: 48 layers, all dense. FLOPs are per")
