"""``ezpz-moe upcycle``: the function at step 0, what is drawn, and what is refused.

Legend: :mod:`upcycle_cases`.
"""

from __future__ import annotations

import shlex

import pytest
import torch
from torch import nn
from upcycle_cases import (
    EXPERTS,
    MLA,
    NORMALIZED,
    NOT_NORMALIZED,
    D,
    F,
    assert_same_function,
    distance,
    in_float64,
    initialized,
    logits,
    mla_dense,
    refused,
    run,
    save,
    upcycled,
    with_ffn_error,
)

from ezpz_moe.config.flavors import load_flavor
from ezpz_moe.errors import EzpzError
from ezpz_moe.hosts.dcp.paths import find_checkpoint
from ezpz_moe.hosts.detect import presumed_host
from ezpz_moe.hosts.titan.v0_3 import Titan03
from ezpz_moe.tools.checkpoints.tensors import write_checkpoint
from ezpz_moe.tools.upcycling import Perturbation, weights

pytestmark = pytest.mark.skipif(
    type(presumed_host()) is not Titan03, reason="builds models of torchtitan 0.3"
)


# The function at step 0 --------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", [1, 2, 4])
def test_the_upcycled_model_computes_what_the_dense_one_does(qwen3, tmp_path, granularity, capsys):
    dense = qwen3(granularity * F)
    save(dense, tmp_path / "dense")
    assert run(tmp_path / "dense", "small", tmp_path / "out", "--router-std", 1) == 0
    assert "the model computes what the dense model does" in capsys.readouterr().out
    moe = upcycled(tmp_path / "out", "small")
    assert_same_function(moe, dense)


def test_and_in_bfloat16_with_the_backend_that_trains(qwen3, tmp_path):
    """No further from it than twice the dense model whose FFNs are computed in bfloat16."""
    dense = qwen3(2 * F)
    save(dense, tmp_path / "dense")
    run(tmp_path / "dense", "small", tmp_path / "out")
    expected = logits(dense)

    def in_bfloat16(ffn, x, _):
        w1, w2, w3 = (getattr(ffn, name).weight.bfloat16() for name in ("w1", "w2", "w3"))
        x = x.bfloat16()
        return ((nn.functional.silu(x @ w1.T) * (x @ w3.T)) @ w2.T).float()

    allowed = distance(with_ffn_error(dense, in_bfloat16), expected)
    assert distance(logits(upcycled(tmp_path / "out", "small")), expected) <= 2 * allowed
    assert allowed < 0.02 * torch.linalg.vector_norm(expected)


def test_with_shared_experts_groups_and_a_scale(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("EZPZ_MOE_FLAVORS", str(tmp_path))
    (tmp_path / "mla.toml").write_text(NORMALIZED + MLA)
    dense = mla_dense("mla")
    save(dense, tmp_path / "dense")
    assert run(tmp_path / "dense", "mla", tmp_path / "out", "--router-std", 1) == 0
    said = capsys.readouterr().out
    assert "w2 of the experts is multiplied by 0.4" in said
    assert "Shared experts: w2 is zero" in said
    moe = upcycled(tmp_path / "out", "mla")
    shared = moe.layers["1"].moe.shared_experts
    assert shared.w1.weight.std() > 0  # or it would never learn
    assert_same_function(moe, dense)


def test_layers_of_different_sizes_split_the_same_ffn_in_other_parts(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("EZPZ_MOE_FLAVORS", str(tmp_path))
    text = (NORMALIZED + MLA).replace(f"num_experts = {EXPERTS}", f"num_experts = [8, {4 * 8}]")
    text = text.replace(f"moe_hidden_dim = {F}", f"moe_hidden_dim = [{F}, {F // 2}]")
    (tmp_path / "mla.toml").write_text(text)
    dense = mla_dense("mla")
    save(dense, tmp_path / "dense")
    assert run(tmp_path / "dense", "mla", tmp_path / "out", "--router-std", 1) == 0
    said = capsys.readouterr().out
    assert "2 layers with 8-32 experts, copies of the dense FFN in 1-2 parts each; " in said
    assert "layers.0: w2 of the experts is multiplied by 0.4" in said
    assert "layers.1: w2 of the experts is multiplied by 0.8" in said
    assert_same_function(upcycled(tmp_path / "out", "mla"), dense)


def test_without_normalized_weights_the_output_is_what_is_said(tmp_path, monkeypatch, capsys):
    """Each layer's FFN, times the sum of the token's weights over that of equal scores."""
    monkeypatch.setenv("EZPZ_MOE_FLAVORS", str(tmp_path))
    (tmp_path / "mla.toml").write_text(NOT_NORMALIZED + MLA)
    dense = mla_dense("mla").double()
    save(dense.float(), tmp_path / "dense")
    run(tmp_path / "dense", "mla", tmp_path / "out", "--router-std", 0.3)
    said = capsys.readouterr().out
    assert "does not compute exactly what the dense model does" in said
    assert "they sum to 0.5 if all scores are equal, and to up to 1" in said
    moe, dense = in_float64(upcycled(tmp_path / "out", "mla")), dense.double()
    x_BLD = torch.randn(2, 16, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    layer = moe.layers["0"].moe
    weights_BLK, _, _ = layer.router(x_BLD)
    factor_BL1 = weights_BLK.double().sum(-1, keepdim=True) / (1.5 * 0.5)
    assert factor_BL1.min() > 1.05  # the router does prefer some
    expected_BLD = factor_BL1 * dense.layers["0"].feed_forward(x_BLD)
    bound = (4 + 3) * 2.0**-24
    assert distance(layer(x_BLD), expected_BLD) <= bound * torch.linalg.vector_norm(expected_BLD)


# What is drawn -----------------------------------------------------------------------------------


def dense_ffn() -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(3)
    shapes = {"w1": (40, 30), "w2": (30, 40), "w3": (40, 30)}
    return {part: 0.1 + 0.3 * torch.randn(s, generator=draw) for part, s in shapes.items()}


def made(part: str, **perturbation) -> torch.Tensor:
    return weights.experts(
        [dense_ffn()[part]],
        "layers.0",
        part,
        num_experts=8,
        granularity=1,
        scale=1.0,
        perturbation=Perturbation(**perturbation),
    )


def test_noise_is_relative_and_every_expert_has_its_own():
    for part, dense in dense_ffn().items():
        relative = (made(part, noise=0.05) - dense) / dense.std()
        # Of n values the mean has the deviation std / sqrt(n) and the std has std / sqrt(2n).
        n = relative[0].numel()
        for expert in relative:
            assert abs(expert.mean().item()) < 5 * 0.05 / n**0.5
            assert abs(expert.std().item() / 0.05 - 1) < 5 / (2 * n) ** 0.5
        correlation = torch.corrcoef(relative.flatten(1)) - torch.eye(8)
        assert correlation.abs().max() < 5 / n**0.5


def test_reinit_draws_the_same_channels_of_all_three_weights_anew():
    dense = dense_ffn()
    changed = {}
    for part in dense:
        new = made(part, reinit=0.25)
        by_channel = (new != dense[part]).all(dim=1 if part == "w2" else 2)
        touched = (new != dense[part]).any(dim=1 if part == "w2" else 2)
        assert torch.equal(by_channel, touched)  # whole channels, and the others bit for bit
        changed[part] = touched
        for e, drawn in enumerate(touched):
            index = (e, slice(None), drawn) if part == "w2" else (e, drawn)
            values, before = new[index], dense[part][index[1:]]
            n = values.numel()
            assert abs(values.mean() - before.mean()).item() < 5 * before.std().item() / n**0.5
            assert abs(values.std() / before.std() - 1).item() < 5 / (2 * n) ** 0.5
    assert changed["w1"].sum(1).tolist() == [10] * 8
    assert torch.equal(changed["w1"], changed["w2"])
    assert torch.equal(changed["w1"], changed["w3"])
    assert len({tuple(each.tolist()) for each in changed["w1"]}) == 8


def test_a_seed_is_the_same_bits_and_another_seed_others():
    same = [made("w1", noise=0.1, reinit=0.5, seed=7) for _ in range(2)]
    assert torch.equal(*same)
    assert not torch.equal(same[0], made("w1", noise=0.1, reinit=0.5, seed=8))


def test_the_parts_of_a_copy_have_the_same_router_row():
    drawn = weights.router(
        torch.Size((64, 4096)), "layers.0", granularity=4, perturbation=Perturbation(router_std=0.5)
    )
    of_copies = drawn.unflatten(0, (16, 4))
    assert torch.equal(of_copies, of_copies[:, :1].expand_as(of_copies))
    assert abs(of_copies[:, 0].std().item() / 0.5 - 1) < 5 / (2 * 16 * 4096) ** 0.5
    assert len(of_copies[:, 0].unique(dim=0)) == 16


# What is read ------------------------------------------------------------------------------------


def test_the_newest_step_of_a_run_is_taken(qwen3, tmp_path):
    for step in (9, 100, 20):
        save(qwen3(), tmp_path / "checkpoint" / f"step-{step}")
    (tmp_path / "checkpoint" / "step-200").mkdir()  # being written: it has no metadata
    newest = tmp_path / "checkpoint" / "step-100"
    assert find_checkpoint(tmp_path) == find_checkpoint(newest.parent) == newest
    assert find_checkpoint(newest.with_name("step-9")).name == "step-9"
    with pytest.raises(EzpzError, match=r"no \.metadata"):
        find_checkpoint(newest.with_name("step-200"))


# What is refused ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dense", "said"),
    [
        (
            {"hidden": 36},
            "layers.0.feed_forward.w1.weight is [36, 32], but "
            "layers.0.moe.routed_experts.inner_experts.w1_EFD of flavor small is [8, 24, 32]",
        ),
        ({"hidden": 72}, "becomes 3 experts of hidden dimension 24"),
        ({"hidden": F, "n_layers": 3}, "has layers.2.attention.k_norm.weight"),
        ({"hidden": F, "n_layers": 1}, "has no layers.1.feed_forward.w1.weight"),
    ],
)
def test_models_that_do_not_fit(qwen3, tmp_path, capsys, dense, said):
    save(qwen3(**dense), tmp_path / "dense")
    assert said in refused(capsys, tmp_path / "dense", "small", tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_a_copy_does_not_span_groups_of_experts(tmp_path, monkeypatch, capsys):
    """A token limited to some groups could not choose such a copy whole."""
    monkeypatch.setenv("EZPZ_MOE_FLAVORS", str(tmp_path))
    groups = NORMALIZED.replace("expert_groups = 2", "expert_groups = 4")
    groups = groups.replace("limited_groups = 1", "limited_groups = 2")
    wide = MLA.replace(f"dense_hidden_dim = {F}", f"dense_hidden_dim = {4 * F}")
    (tmp_path / "mla.toml").write_text(groups + wide)
    save(mla_dense("mla"), tmp_path / "dense")
    said = refused(capsys, tmp_path / "dense", "mla", tmp_path / "out")
    assert "the experts of a group of flavor mla, 2, must be a multiple of 4" in said


@pytest.mark.parametrize(
    ("tensor", "found"),
    [(torch.ones(16), "norm.weight is [16] there"), (None, "has no norm.weight")],
)
def test_a_tensor_that_is_absent_or_of_another_shape_is_named(
    qwen3, tmp_path, capsys, tensor, found
):
    state = qwen3().state_dict()
    del state["norm.weight"]
    if tensor is not None:
        state["norm.weight"] = tensor
    (tmp_path / "dense").mkdir()
    write_checkpoint(tmp_path / "dense", state.items())
    said = refused(capsys, tmp_path / "dense", "small", tmp_path / "out")
    assert f"{found}, but norm.weight of flavor small is [32]" in said


def test_a_mixture_of_experts_is_no_dense_model(qwen3, tmp_path, capsys):
    save(qwen3(), tmp_path / "dense")
    run(tmp_path / "dense", "small", tmp_path / "out")
    said = refused(capsys, tmp_path / "out", "small", tmp_path / "again")
    assert "is already a mixture of experts" in said
    assert "already exists" in refused(capsys, tmp_path / "dense", "small", tmp_path / "out")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--noise", "-1"], "--noise -1.0"),
        (["--noise", "nan"], "--noise nan"),
        (["--router-std", "inf"], "--router-std inf"),
        (["--reinit", "1.5"], "--reinit 1.5"),
    ],
)
def test_flags_out_of_range(qwen3, tmp_path, capsys, flags, said):
    assert said in refused(capsys, tmp_path / "dense", "small", tmp_path / "out", *flags)


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ("null_experts = 2", "null_experts, copy_experts, constant_experts"),
        ('routing = "sinkhorn"', 'routing = "sinkhorn"'),
        ('activation = "softplus"', 'activation = "softplus"'),
    ],
)
def test_a_router_whose_weights_are_others(qwen3, tmp_path, table, said):
    from ezpz_moe.tools.upcycling.fit import check_routing

    text = (tmp_path / "small.toml").read_text()
    (tmp_path / "other.toml").write_text(f"{text}[router]\n{table}\n")
    with pytest.raises(EzpzError, match=r"other\.toml: \[router\]") as refusal:
        check_routing(load_flavor("other"))
    assert said in str(refusal.value)


def test_experts_with_biases_have_no_dense_ffn(tmp_path, capsys):
    (tmp_path / ".metadata").touch()  # a checkpoint, as far as anybody has looked by then
    said = refused(capsys, tmp_path, "gpt_oss_debugmodel", tmp_path / "out")
    assert "mlp1_bias_EG" in said
    assert "can only be copied to a SwiGLU FFN without biases" in said


def test_another_ffn_than_the_dense_models_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("EZPZ_MOE_FLAVORS", str(tmp_path))
    (tmp_path / ".metadata").touch()
    mine = tmp_path / "mine.toml"
    mine.write_text('inherits = "debugmodel"\nexpert_activation = "geglu"\n')
    said = refused(capsys, tmp_path, "mine", tmp_path / "out")
    assert "makes this another FFN than the dense model's" in said


# Training ----------------------------------------------------------------------------------------


def test_the_host_takes_the_flags_that_are_said(qwen3, tmp_path, monkeypatch, capsys):
    """As they are said of a relative path with a space in it: in its flag the host takes none.

    The job is the user's own, as it was named.
    """
    from torchtitan.config import ConfigManager

    from ezpz_moe.hosts.titan.command import named

    save(qwen3(F), tmp_path / "dense")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "job.toml").write_text(
        '[model]\nname = "ezpz_moe"\nflavor = "small"\n[training]\nseq_len = 64\n'
    )
    assert run("dense", "job.toml", "my moe/step-0") == 0
    (line,) = (each for each in capsys.readouterr().out.splitlines() if "Train it" in each)
    job, *flags = shlex.split(line.partition("ezpz-moe train ")[2])
    config = ConfigManager().parse_args([*named(job), *flags])
    assert config.checkpoint.initial_load_path == str(tmp_path / "my moe" / "step-0")


@pytest.mark.full
@pytest.mark.train
def test_training_starts_with_the_dense_models_loss(tmp_path):
    """The host trains its dense qwen3 and its upcycled one: both see the same batch first.

    The weights are drawn large, for in a dense model that has hardly been trained the FFNs matter
    too little to the loss to tell.
    """
    import dialect
    from torchtitan.models.qwen3 import qwen3_configs
    from trainer_runs import train

    dense = save(initialized(qwen3_configs["debugmodel"]("flex")), tmp_path / "dense" / "step-0")
    assert run(dense, "qwen3_debugmodel", tmp_path / "moe") == 0
    dialect.write_text(tmp_path)
    (tmp_path / "job.toml").write_text(
        '[model]\nname = "ezpz_moe"\nflavor = "qwen3_debugmodel_sdpa_for_loop"\n'
        '[training]\ndataset = "c4_test"\n'
    )
    stock = [
        *("--module", "qwen3", "--config", "qwen3_debugmodel"),
        *("--hf-assets-path", str(dialect.EMBEDDED_TOKENIZER)),
        *("--override.imports", "ezpz_moe.overrides.sdpa"),
    ]
    start = [
        *(*dialect.batch(size=1, seq_len=64), "--debug.seed", "7", *dialect.precision("qwen3")),
        *("--dataloader.dataset-path", str(tmp_path / "text")),
        *("--training.steps", "1", "--checkpoint.enable", "--checkpoint.initial-load-path"),
    ]
    scenarios = {
        "from_dense": [*stock, *start, str(dense)],
        "from_moe": [*dialect.job(tmp_path / "job.toml"), *start, str(tmp_path / "moe")],
    }
    records = train(scenarios, tmp_path, ranks=1)
    (of_dense,), (of_moe,) = (records[name][0]["losses"] for name in scenarios)
    # Experts compute in bfloat16, whose relative rounding is 2^-9; a loss is a mean over 64 tokens.
    assert abs(of_moe - of_dense) < 2.0**-9 * of_dense
