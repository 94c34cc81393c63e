"""A model whose layers have experts of different sizes, in the real trainer: real processes, gloo.

All runs start from one checkpoint and train on the same sequences, in float32 throughout.
"""

from __future__ import annotations

import json
from pathlib import Path

import dialect
import numpy as np
import pytest
import torch
from run_trainer import digest
from trainer_runs import AOT, EP_2, Runs, door_1, job_folder, telemetry, train

from ezpz_moe import cli
from ezpz_moe.config.flavors import load_flavor
from ezpz_moe.hosts.detect import host
from ezpz_moe.hosts.titan.v0_3 import Titan03
from ezpz_moe.tools.trained import load

if type(host()) is not Titan03:
    pytest.skip("the same sequences in every run need torchtitan 0.3", allow_module_level=True)

pytestmark = [pytest.mark.train, pytest.mark.ranks]

LAYERS, EXPERTS, TOP_K = (1, 2, 4), (4, 8, 16), (1, 2, 3)
TOKENS = 2 * dialect.LENGTH
"""Of a step, over all ranks."""
TABLES = """
expert_precision = "float32"
[telemetry]
detail = "per_layer"
dump = { every = 2, what = ["ids", "probabilities"] }
"""
START = (
    *("--training.steps", "3", "--same-sequences"),
    *("--checkpoint.enable", "--checkpoint.initial-load-path"),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = job_folder(tmp_path_factory.mktemp("sizes"))
    with (folder / "pyramid.toml").open("a") as file:
        file.write(TABLES)
    return folder


@pytest.fixture(scope="module")
def runs(folder: Path) -> Runs:
    """By name, one record per rank."""
    seed = ["--checkpoint.enable", "--checkpoint.create-seed-checkpoint"]
    train({"seed": door_1(folder, "pyramid_sdpa_for_loop", *seed)}, folder, ranks=1)
    start = (*START, str(folder / "seed" / "checkpoint" / "step-0"))
    runs = Runs(folder)
    runs.add(
        "one rank", door_1(folder, "pyramid_sdpa_for_loop", *start, *dialect.batch(size=2, whole=2))
    )
    shared = (*start, *dialect.batch(size=1, whole=2), *EP_2)
    runs.add("shared out", door_1(folder, "pyramid_sdpa_for_loop", *shared), ranks=2)
    for name, compiled in (("recomputed", ()), ("compiled, recomputed", AOT)):
        flags = (*start, *dialect.batch(size=2, whole=2), *compiled)
        job = door_1(folder, "pyramid_sdpa_for_loop", *flags, checkpointing="full")
        runs.add(name, job)
    return runs


ALLOWED = 1e-5
"""Of a gradient: float32 sums over the tokens of a step in another order, after five layers."""


def difference(ours: torch.Tensor, other: torch.Tensor) -> float:
    ours, other = ours.double(), other.double()
    return ((ours - other).norm() / other.norm()).item()


@pytest.mark.parametrize(
    "name",
    [
        "shared out",
        "recomputed",
        # test_layer_sizes.py compiles such layers in the short check.
        pytest.param("compiled, recomputed", marks=pytest.mark.full),
    ],
)
def test_the_same_steps_however_they_are_computed(runs: Runs, folder: Path, name: str) -> None:
    """Two ranks share every layer's experts and all other weights; or layers are compiled."""
    (one,), (ours, *_) = runs["one rank"], runs[name]
    assert ours["gradients"].keys() == one["gradients"].keys()
    for parameter, gradient in one["gradients"].items():
        assert difference(ours["gradients"][parameter], gradient) < ALLOWED, parameter
    assert ours["losses"] == pytest.approx(one["losses"], rel=ALLOWED)
    for line, other in zip(telemetry(folder, name), telemetry(folder, "one rank"), strict=True):
        for layer, expected in zip(line["layers"], other["layers"], strict=True):
            assert layer["counts_E"] == expected["counts_E"]


def test_every_layer_reports_its_own_experts(runs: Runs, folder: Path) -> None:
    assert runs["shared out"]
    lines = telemetry(folder, "shared out")
    assert [line["step"] for line in lines] == [1, 2, 3]
    for line in lines:
        assert [layer["layer"] for layer in line["layers"]] == [*LAYERS]
        assert [len(layer["counts_E"]) for layer in line["layers"]] == [*EXPERTS]
        assert [len(layer["probabilities_E"]) for layer in line["layers"]] == [*EXPERTS]
        assert [sum(layer["counts_E"]) for layer in line["layers"]] == [TOKENS * k for k in TOP_K]
        for layer in line["layers"]:
            half = len(layer["counts_E"]) // 2
            of_ranks = sum(layer["counts_E"][:half]), sum(layer["counts_E"][half:])
            assert layer["rank_max_over_mean"] == 2 * max(of_ranks) / sum(of_ranks)


def test_the_biases_are_those_of_the_reported_counts(runs: Runs, folder: Path) -> None:
    """By the host's rule, in float64; three float32 sums of steps of 1e-3 round by u each."""
    (record, *_) = runs["shared out"]
    for index, (number, experts) in enumerate(zip(LAYERS, EXPERTS, strict=True)):
        bias_E = np.zeros(experts)
        for line in telemetry(folder, "shared out"):
            counts_E = np.array(line["layers"][index]["counts_E"], dtype=float)
            step_E = np.sign(counts_E.mean() - counts_E)
            bias_E += 1e-3 * (step_E - step_E.mean())
        found_E = record["biases"][f"layers.{number}.moe.expert_bias_E"]
        assert found_E.tolist() == pytest.approx(bias_E.tolist(), rel=0, abs=3 * 3e-3 * 2.0**-24)
        assert np.abs(bias_E).max() > 0


def test_a_dump_has_the_choices_of_every_layer(runs: Runs, folder: Path) -> None:
    """What a layer does not have is filled: -1 for a choice, 0 for a probability."""
    assert runs["one rank"]
    dump = np.load(folder / "one rank" / "routing" / "step_2_rank_0.npz")
    assert dump["layers"].tolist() == [*LAYERS]
    assert dump["ids"].shape == (len(LAYERS), TOKENS, max(TOP_K))
    assert dump["probabilities"].shape == (len(LAYERS), TOKENS, max(EXPERTS))
    layers = telemetry(folder, "one rank")[1]["layers"]
    for ids_TK, p_TE, layer, k in zip(
        dump["ids"], dump["probabilities"], layers, TOP_K, strict=True
    ):
        assert (ids_TK[:, k:] == -1).all()
        counts_E = np.bincount(ids_TK[:, :k].flatten(), minlength=len(layer["counts_E"]))
        assert counts_E.tolist() == layer["counts_E"]
        assert (p_TE[:, len(counts_E) :] == 0).all()
        assert p_TE.sum(-1) == pytest.approx(1, abs=1e-5)


def parameters(checkpoint: Path, folder: Path) -> dict[str, str]:
    """Digests of what a checkpoint gives a whole model."""
    flavor = load_flavor("pyramid_sdpa_for_loop", near=folder)
    loaded = load(checkpoint, flavor, dialect.LENGTH, device="cpu", dtype=torch.float32)
    return {name: digest(each.detach()) for name, each in loaded.model.named_parameters()}


def test_its_checkpoint_is_read_back_and_analyzed(
    runs: Runs, folder: Path, capsys: pytest.CaptureFixture
) -> None:
    """Two ranks have saved shards of every layer; here the model is whole."""
    (record, *_) = runs["shared out"]
    checkpoint = folder / "shared out" / "checkpoint" / "step-3"
    assert parameters(checkpoint, folder) == record["parameters"]
    (folder / "text.txt").write_text("the load of an expert is the number of its tokens. " * 40)
    command = [
        "analyze",
        str(checkpoint),
        "--config",
        str(folder / "pyramid_sdpa_for_loop.none.toml"),
    ]
    command += ["--data", str(folder / "text.txt"), "--seq-len", "32", "--segment", "16", "--json"]
    assert cli.main(command) == 0
    layers = json.loads(capsys.readouterr().out)["layers"]
    assert [(each["num_experts"], each["top_k"]) for each in layers] == [
        *zip(EXPERTS, TOP_K, strict=True)
    ]


def test_its_checkpoint_is_renamed_and_not_exported(
    runs: Runs, folder: Path, capsys: pytest.CaptureFixture
) -> None:
    """Under the names of September 2026 and back, bit for bit; transformers has no such model."""
    (record, *_) = runs["shared out"]
    checkpoint, newer, back = (folder / name for name in ("shared out", "newer", "back"))
    checkpoint = checkpoint / "checkpoint" / "step-3"
    assert cli.main(["ckpt", "remap", str(checkpoint), str(newer), "--to", "2026_09"]) == 0
    assert cli.main(["ckpt", "remap", str(newer), str(back), "--to", "0.3"]) == 0
    assert parameters(back, folder) == record["parameters"]
    model = ["--model", str(folder / "pyramid_sdpa_for_loop.none.toml")]
    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"):
        cli.main(["ckpt", "remap", str(back), str(folder / "hf"), "--to", "hf", *model])
    said = capsys.readouterr().err
    assert "its layers differ in experts or router" in said
    assert "its dense layers are not the first ones" in said
