"""``ezpz-moe upcycle A B ... FLAVOR OUT --merge mean``: whose the experts are, and the mean.

Legend: :mod:`upcycle_cases`.
"""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from torch import nn

from ezpz_moe.hosts.detect import check_host, host, presumed_host
from ezpz_moe.hosts.titan.v0_3 import Titan03

if type(presumed_host()) is not Titan03:
    pytest.skip("builds models of torchtitan 0.3", allow_module_level=True)
check_host()  # before torchtitan is imported: it chooses the device

from hf_models import assert_same_logits, opened  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from upcycle_cases import (  # noqa: E402
    EXPERTS,
    LAYERS,
    MLA,
    NORMALIZED,
    TOKENS_BL,
    F,
    in_float64,
    initialized,
    logits,
    mla_dense,
    refused,
    run,
    save,
    tensors,
    upcycled,
)

from ezpz_moe import cli  # noqa: E402
from ezpz_moe.config.flavors import load_flavor  # noqa: E402
from ezpz_moe.tools.checkpoints.tensors import write_checkpoint  # noqa: E402
from ezpz_moe.tools.upcycling import weights  # noqa: E402

MERGE = ("--merge", "mean")
INNER = "moe.routed_experts.inner_experts"
EXPERTS_OF = {"w1": f"{INNER}.w1_EFD", "w2": f"{INNER}.w2_EDF", "w3": f"{INNER}.w3_EFD"}


def grown(model: nn.Module, seed: int) -> nn.Module:
    """The model after a training of its own: every weight has moved."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=draw)
            parameter.add_(0.3 * parameter.std() * noise + 0.01 * noise)
    return model


def three(make, folder: Path) -> list[Path]:
    """Three dense models that came from the same one."""
    return [save(grown(make(), seed), folder / f"dense_{seed}") for seed in range(3)]


# What becomes of the models ----------------------------------------------------------------------


@pytest.mark.parametrize("family", ["qwen3", "mla"])
def test_the_same_model_three_times_is_the_model_once(
    qwen3, family, tmp_path, monkeypatch, capsys
) -> None:
    """To the bit: experts, shared experts, router and all else, however copies are made to differ.

    A mean in the weights' own float32 differs in the last bit.
    """
    if family == "qwen3":
        flavor, dense, flags = "small", qwen3(2 * F), ("--noise", 0.1, "--reinit", 0.3)
    else:
        (tmp_path / "mla.toml").write_text(NORMALIZED + MLA)
        flavor, dense, flags = "mla", mla_dense("mla"), ()
    folder = save(dense, tmp_path / "dense")
    assert run(folder, flavor, tmp_path / "once", *flags) == 0
    of_one = capsys.readouterr().out
    assert run(folder, folder, folder, flavor, tmp_path / "thrice", *MERGE, *flags) == 0
    of_three = capsys.readouterr().out
    once, thrice = tensors(tmp_path / "once"), tensors(tmp_path / "thrice")
    assert once.keys() == thrice.keys()
    assert all(torch.equal(once[name], thrice[name]) for name in once)
    assert "The dense models are the same, bit by bit." in of_three
    said = "does not compute exactly" if flags else "computes"
    for out in (of_one, of_three):
        assert f"At step 0 the model {said} what the dense model does." in out


@pytest.mark.parametrize("parts", [1, 2])
def test_every_expert_is_its_models_and_the_rest_is_the_mean(qwen3, parts, tmp_path, capsys):
    folders = three(lambda: qwen3(parts * F), tmp_path)
    assert run(*folders, "small", tmp_path / "out", *MERGE) == 0
    said = capsys.readouterr().out
    models, made = [tensors(folder) for folder in folders], tensors(tmp_path / "out")
    for layer in range(LAYERS):
        for part, name in EXPERTS_OF.items():
            experts = made.pop(f"layers.{layer}.{name}")
            for e, expert in enumerate(experts):
                # All parts of a copy are one model's, or a token would get pieces of several FFNs.
                dense = models[e // parts % 3][f"layers.{layer}.feed_forward.{part}.weight"]
                of_expert = dense.chunk(parts, dim=1 if part == "w2" else 0)[e % parts]
                assert torch.equal(expert, of_expert * (parts if part == "w2" else 1))
        gate = made.pop(f"layers.{layer}.moe.router.gate.weight")
        assert len(gate.unique(dim=0)) == EXPERTS // parts
        assert not made.pop(f"layers.{layer}.moe.expert_bias_E").any()
    assert len(made) == 8 * LAYERS + 3  # attention and norms; embeddings, norm and head
    for name, mean in made.items():
        exact = torch.stack([model[name].double() for model in models]).sum(0) / 3
        assert (mean.double() - exact).abs().le(2.0**-24 * exact.abs() + 2.0**-149).all(), name
    shares = {1: (3, 3, 2), 2: (2, 1, 1)}[parts]
    listed = ", ".join(f"{n} of {folder}" for n, folder in zip(shares, folders, strict=True))
    neighbours = ", 2 neighbouring experts each" if parts == 2 else ""
    assert f"The experts are copies of the dense FFNs in turn{neighbours}: {listed}." in said
    assert "At step 0 the model computes what none of the dense models does" in said
    assert "what the dense model does" not in said


def test_what_is_drawn_does_not_depend_on_the_number_of_models(tmp_path, monkeypatch) -> None:
    """Routers to the bit; shared experts have the mean's distribution, and the same draws."""
    monkeypatch.setenv("EZPZ_MOE_FLAVORS", str(tmp_path))
    (tmp_path / "mla.toml").write_text(NORMALIZED + MLA)
    folders = three(lambda: mla_dense("mla"), tmp_path)
    run(folders[0], "mla", tmp_path / "one", "--seed", 5)
    run(*folders, "mla", tmp_path / "out", *MERGE, "--seed", 5)
    models = [tensors(folder) for folder in folders]
    one, out = tensors(tmp_path / "one"), tensors(tmp_path / "out")
    for layer in range(LAYERS):
        gate = f"layers.{layer}.moe.router.gate.weight"
        assert torch.equal(one[gate], out[gate])
        for part in ("w1", "w3"):
            shared = f"layers.{layer}.moe.shared_experts.{part}.weight"
            each = [model[f"layers.{layer}.feed_forward.{part}.weight"] for model in models]
            mean = torch.stack(each).mean(0)
            draw = (one[shared] - each[0].mean()) / each[0].std()
            # In float32: a few roundings of numbers below 5 standard deviations.
            bound = 16 * 2.0**-24 * 5 * mean.std()
            assert ((mean.mean() + mean.std() * draw) - out[shared]).abs().max() <= bound


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("number", [2, 3, 7, 10])
def test_the_mean_of_equal_numbers_has_their_bits(dtype, number) -> None:
    """Random bits: all exponents, subnormal numbers, both zeros, the largest and infinity."""
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    range_ = torch.iinfo(integer)
    draw = torch.Generator().manual_seed(0)
    bits = torch.randint(range_.min, range_.max, (20_000,), dtype=integer, generator=draw)
    ends = torch.tensor([0.0, -0.0, torch.inf, torch.finfo(dtype).max, torch.finfo(dtype).tiny])
    if dtype == torch.float64:
        ends[3] = 0
    values = torch.cat([bits.view(dtype), ends.to(dtype)])
    values = values[~values.isnan()]
    if dtype == torch.float64:  # whose sum may be larger than the largest
        values = values[values.isinf() | (values.abs() < 1e300)]
    mean = weights.mean([values] * number)
    assert mean.dtype == dtype
    assert torch.equal(mean.view(integer), values.view(integer))


def test_the_mean_is_rounded_once() -> None:
    """In float32 the first sum loses the 3, and so does the last where products are rounded."""
    sums = weights.mean([torch.tensor([3.0]), torch.tensor([1e10]), torch.tensor([-1e10])])
    assert sums.item() == 1
    draw = torch.Generator().manual_seed(2)
    models = [torch.randn(300, generator=draw) * 10.0**each for each in range(-2, 3)]
    for mean, *values in torch.stack([weights.mean(models), *models]).T.tolist():
        exact = sum(map(Fraction, values)) / len(values)
        widest = max(map(abs, values))
        assert abs(Fraction(mean) - exact) <= abs(exact) * 2.0**-24 + 6 * widest * 2.0**-53


# What the models are -----------------------------------------------------------------------------


def in_safetensors(state: dict[str, torch.Tensor], folder: Path, **config) -> Path:
    folder.mkdir()
    keys = host().adapter(load_flavor("small")).to_hf(state)
    save_file({key: each.clone() for key, each in keys.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen3", **config}))
    return folder


def test_a_checkpoint_and_safetensors_of_other_dtypes_and_ties(qwen3, tmp_path, capsys) -> None:
    """The wider dtype holds both; what is said of one model names it."""
    a, b = grown(qwen3(F), 1), grown(qwen3(F, tied=True), 2).bfloat16()
    state = b.state_dict()
    del state["lm_head.weight"]
    folders = [
        save(a, tmp_path / "run" / "checkpoint" / "step-3"),
        in_safetensors(
            state,
            tmp_path / "hf",
            tie_word_embeddings=True,
            rms_norm_eps=1e-5,
            rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        ),
    ]
    assert run(tmp_path / "run", folders[1], "small", tmp_path / "out", *MERGE) == 0
    said = capsys.readouterr().out
    assert f"made from {folders[0]} and {folders[1]}, " in said
    assert f"{folders[1]}: lm_head.weight is a copy of model.embed_tokens.weight" in said
    assert f"{folders[1]}: config.json has rms_norm_eps = 1e-05" in said
    assert f"float32 in {folders[0]}, bfloat16 in {folders[1]}. Written in float32." in said
    made, bfloat16 = tensors(tmp_path / "out"), b.state_dict()
    assert {each.dtype for each in made.values()} == {torch.float32}
    experts = made[f"layers.1.{EXPERTS_OF['w1']}"]
    assert torch.equal(experts[0], a.state_dict()["layers.1.feed_forward.w1.weight"])
    assert torch.equal(experts[1], bfloat16["layers.1.feed_forward.w1.weight"].float())
    both = (a.state_dict()["lm_head.weight"], bfloat16["tok_embeddings.weight"])
    assert torch.equal(made["lm_head.weight"], sum(each.double() for each in both).div(2).float())


@pytest.mark.parametrize(("related", "low", "high"), [(True, 0.8, 1.0), (False, -0.3, 0.3)])
def test_it_is_said_how_far_the_models_are_apart(qwen3, related, low, high, tmp_path, capsys):
    """The mean of models without a common ancestor is no model, and nothing else would show it."""
    a, b = (grown(qwen3(), seed) for seed in (1, 2))
    if not related:
        with torch.no_grad():
            a.layers["1"].attention.wo.weight.normal_(generator=torch.Generator().manual_seed(9))
    folders = [save(a, tmp_path / "a"), save(b, tmp_path / "b")]
    assert run(*folders, "small", tmp_path / "out", *MERGE) == 0
    said = capsys.readouterr().out
    _, _, after = said.partition("Of the matrices that are averaged, ")
    name, cosine = after.split(" differs most: cosine ")[0], float(after.split()[4])
    assert low < cosine < high
    assert related or name == "layers.1.attention.wo.weight"
    assert f"between {folders[0]} and {folders[1]}. It is near 1 for" in said


# What is refused ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["a b", "c", "small", "out"],
            "'a b' c small out --merge mean.",
        ),
        (["a", "small", "out", *MERGE], "a would be the only dense model, small the flavor, and"),
        (["a", "small", *MERGE], "upcycle: OUT is missing."),
        (["a", "b", "small", "out", "--merge", "sum"], "--merge sum: must be mean."),
        (["a", "b", "small", *MERGE, "out"], "a: there is no such folder."),
    ],
)
def test_words_that_do_not_say_what_to_do(words, said, capsys) -> None:
    error = refused(capsys, *words)
    assert said in error
    assert error.count("\n") == 1


def test_the_model_that_does_not_fit_is_named(qwen3, tmp_path, capsys) -> None:
    a, out = save(qwen3(F), tmp_path / "a"), tmp_path / "out"
    of_two = save(qwen3(2 * F), tmp_path / "of_two")
    wrong = {
        of_two: "layers.0.feed_forward.w1.weight is [48, 32], but [24, 32] in "
        f"{a}: dense models that become one must have the same sizes.",
        save(qwen3(F, n_layers=3), tmp_path / "deep"): "has layers.2.attention.k_norm.weight",
        save(qwen3(F, n_layers=1), tmp_path / "flat"): "has no layers.1.feed_forward.w1.weight",
    }
    state = qwen3(F).state_dict()
    for name, changed, said in [
        ("short", {"norm.weight": torch.ones(16)}, "norm.weight is [16] there"),
        ("whole", {"norm.weight": torch.ones(32, dtype=torch.int32)}, "norm.weight is int32, of"),
        ("again", {"layers.0.moe.x": torch.ones(1)}, "is already a mixture of experts"),
    ]:
        (tmp_path / name).mkdir()
        write_checkpoint(tmp_path / name, (state | changed).items())
        wrong[tmp_path / name] = said
    for folder, said in wrong.items():
        error = refused(capsys, a, folder, "small", out, *MERGE)
        assert f"error: {folder}: {said}" in error
        assert error.count("\n") == 1
    assert not list(tmp_path.glob("out*"))
    # Eight experts in two parts each are four dense FFNs.
    error = refused(capsys, *[of_two] * 6, "small", out, *MERGE)
    assert f"{of_two} and {of_two}: no expert would come from there, because layers.0 of" in error
    assert "room for 4 dense FFNs in 2 parts each. Name at most 4 dense models" in error


def test_no_model_is_overwritten(qwen3, tmp_path, capsys) -> None:
    """Not the second either, which is where the folder is written until it is complete."""
    a, b = save(qwen3(F), tmp_path / "a"), save(qwen3(F), tmp_path / "out.partial")
    error = refused(capsys, a, b, "small", tmp_path / "out", *MERGE)
    assert f"{b}: {tmp_path / 'out'} would be written to" in error
    assert tensors(b)


# Afterwards --------------------------------------------------------------------------------------


def test_a_merged_model_opens_in_transformers(qwen3, tmp_path, capsys) -> None:
    """And computes what torchtitan's model computes, whose experts differ."""
    folders = three(lambda: qwen3(2 * F), tmp_path)
    assert run(*folders, "small", tmp_path / "step-0", *MERGE, "--router-std", 1) == 0
    remap = ["ckpt", "remap", str(tmp_path / "step-0"), str(tmp_path / "hf")]
    assert cli.main([*remap, "--to", "hf", "--model", "small"]) == 0
    with torch.no_grad():
        theirs_BLV = opened(tmp_path / "hf")(TOKENS_BL).logits
    ours_BLV = logits(in_float64(upcycled(tmp_path / "step-0", "small")))
    assert_same_logits(theirs_BLV, ours_BLV, 1e-5)
    first = logits(in_float64(grown(qwen3(2 * F), 0)))
    assert (ours_BLV - first).abs().max() > 0.1 * first.abs().max()


@pytest.mark.train
def test_a_merged_model_trains_on(tmp_path, monkeypatch) -> None:
    """The trainer begins with the function that was written, and its loss falls."""
    import dialect
    from trainer_runs import job_folder, train

    from ezpz_moe.hosts.titan.models import host_spec

    folder = job_folder(tmp_path / "job")
    monkeypatch.setenv("EZPZ_MOE_FLAVORS", str(folder))
    (folder / "mixed.toml").write_text(
        'inherits = "tiny"\nn_layers = 2\nrouter_top_k = 2\nrouter_route_norm = true\n'
        'attention = "sdpa"\ncompute_backend = "for_loop"\nexpert_precision = "float32"\n'
    )
    (folder / "dense.toml").write_text('inherits = "mixed"\nn_dense_layers = 2\n')
    config = host_spec(load_flavor("dense")).model
    models = [grown(initialized(config), seed) for seed in (1, 2)]
    with torch.no_grad():
        for model in models:
            model.lm_head.weight.mul_(6)  # logits that no drawn model of the host has
    folders = [save(model, tmp_path / f"{each}") for each, model in enumerate(models)]
    assert run(*folders, "mixed", tmp_path / "step-0", *MERGE) == 0
    job = folder / "job.toml"
    job.write_text(job.read_text().replace('"tiny_sdpa"', '"mixed"'))
    flags = [*dialect.batch(size=1, seq_len=64), "--training.steps", "6", "--checkpoint.enable"]
    start = ["--checkpoint.initial-load-path", str(tmp_path / "step-0")]
    (record,) = train({"on": dialect.job(job, *flags, *start)}, tmp_path, ranks=1)["on"]
    losses = record["losses"]
    # Logits of standard deviation s, here 6, cost about s^2 / 2 more than log(2048), 7.6.
    assert 12 < losses[0] < 40
    assert losses[-1] < losses[0] - 1
