"""``ezpz-moe ckpt prune``: what a smaller model computes, trains on, and is exported as."""

from __future__ import annotations

import re
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch

from ezpz_moe.hosts.detect import check_host, presumed_host
from ezpz_moe.hosts.titan.v0_3 import Titan03

if type(presumed_host()) is not Titan03:
    pytest.skip("builds models of torchtitan 0.3", allow_module_level=True)
check_host()  # before torchtitan is imported: it chooses the device

import dialect  # noqa: E402
from hf_cases import LENGTH, Case, load, random_weights, save, tiny_exports  # noqa: E402
from hf_models import TOKENS_L, assert_same_logits, logits, opened  # noqa: E402
from trainer_runs import OneRank, job_folder  # noqa: E402

from ezpz_moe import cli  # noqa: E402
from ezpz_moe.config.flavors import load_flavor  # noqa: E402
from ezpz_moe.hosts.detect import host  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is unavailable"),
    pytest.mark.filterwarnings("ignore:In CPU autocast"),
]

exports = pytest.fixture(scope="module")(tiny_exports)

TEXT = "\n\n".join(topics[name] for name in sorted(topics)[:8])
UNUSED = [1, 4]
"""Experts that no token chooses."""


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(TEXT)
    return file


def with_unused(case: Case) -> dict[str, torch.Tensor]:
    """Weights with which every token has much of the first dimension, and some gates none of it."""
    weights = random_weights(case, bias=0)
    weights["tok_embeddings.weight"][:, 0] = 8
    for name, tensor in weights.items():
        if name.endswith("gate.weight"):
            tensor[:, 0] = 0
            tensor[UNUSED, 0] = -20
        if name.endswith("ffn_norm.weight"):
            tensor[0] = 1
        if name.endswith(("wo.weight", "w2.weight")):
            tensor[0] = 0  # nothing else writes into that dimension
        if name.endswith("w2_EDF"):
            tensor[:, 0] = 0
    return weights


def prune(case: Case, source: Path, out: Path, text: Path | None, *flags: str) -> int:
    said = ["--text", str(text), "--seq-len", "32", "--sequences", "4"] if text else []
    arguments = [str(source), str(out), "--model", case.job, "--device", "cpu", *said, *flags]
    return cli.main(["ckpt", "prune", *arguments])


def computed(folder: Path, flavor: str) -> torch.Tensor:
    """The logits of the model in a folder that was written."""
    part = host().analysis()
    model = part.build(load_flavor(flavor, near=folder), LENGTH, device="cpu").eval()
    model.load_state_dict(load(folder))
    with torch.inference_mode():
        return part.forward(model, TOKENS_L, torch.arange(len(TOKENS_L)))


def of_whole(case: Case, weights: dict[str, torch.Tensor]) -> tuple[torch.Tensor, float]:
    """The logits of the whole model, and the error of float32 in them."""
    ours = case.logits(weights, TOKENS_L)
    model = case.build()
    model.load_state_dict(weights)
    with torch.inference_mode():
        exact = host().analysis().forward(model.double(), TOKENS_L, torch.arange(len(TOKENS_L)))
    return ours, (ours - exact).abs().max().item()


@pytest.mark.parametrize(("kind", "by"), [("kimi_k2_7", "weight"), ("qwen3_moe", "frequency")])
def test_experts_that_no_token_chose_leave_logits_as_they_were(
    exports, kind, by, text, tmp_path, capsys
) -> None:
    """With sigmoid scores, and with softmax over the chosen ones; and transformers opens it."""
    case = exports.case(kind)
    weights = with_unused(case)
    if kind == "kimi_k2_7":  # a bias moves the choice of sigmoid scores as before
        for name in weights:
            if "expert_bias" in name:
                weights[name] = torch.linspace(-0.02, 0.02, 8)
    source = save(weights, tmp_path / "step-7")
    capsys.readouterr()
    assert prune(case, source, tmp_path / "out", text, "--keep", "6", "--by", by) == 0
    said = capsys.readouterr().out
    assert "Its logits stay as they were, apart from rounding." in said
    assert len(re.findall(r"6 of 8 +(0, 2, 3, 5, 6, 7) +0.0% +0.0%", said)) == 2  # layers
    before, after = re.search(r"Loss on .*: (\S+) before, (\S+) now", said).groups()
    assert before == after
    name = f"{kind}_6_experts"
    whole, error = of_whole(case, weights)
    assert 0 < error < 1e-4 * whole.abs().max()  # the measure itself is sound
    smaller = computed(tmp_path / "out", name)
    assert (smaller - whole).abs().max() <= 2 * error
    out, hf = tmp_path / "out", tmp_path / "hf"
    assert (
        cli.main(
            ["ckpt", "remap", *map(str, (out, hf)), "--to", "hf", "--model", f"{out}/job.toml"]
        )
        == 0
    )
    assert_same_logits(logits(opened(hf)), whole)


def test_a_softmax_over_all_experts_is_another_one(exports, text, tmp_path, capsys) -> None:
    """As is said: what the gone experts had of it goes to those that are left."""
    case = exports.case("deepseek_v2")
    weights = random_weights(case, bias=0)
    for name, tensor in weights.items():
        if name.endswith("gate.weight"):
            tensor[UNUSED] = 0.0
    source = save(weights, tmp_path / "step-7")
    capsys.readouterr()
    assert prune(case, source, tmp_path / "out", text, "--keep", "6", "--by", "cosine") == 0
    said = capsys.readouterr().out
    assert "have other logits too: the scores are a softmax over all experts and not norm" in said
    whole, error = of_whole(case, weights)
    smaller = computed(tmp_path / "out", "deepseek_v2_6_experts")
    assert (smaller - whole).abs().max() > 100 * error


def test_constant_experts_keep_the_choice(exports, text, tmp_path, capsys) -> None:
    """Unused ones change nothing even with a softmax over all; used ones are reported."""
    case = exports.case("deepseek_v2")
    weights = with_unused(case)
    source = save(weights, tmp_path / "step-7")
    flags = ("--by", "frequency", "--as-constant")
    assert prune(case, source, tmp_path / "six", text, "--keep", "6", *flags) == 0
    whole, error = of_whole(case, weights)
    smaller = computed(tmp_path / "six", "deepseek_v2_6_experts")
    assert (smaller - whole).abs().max() <= 2 * error
    capsys.readouterr()
    assert prune(case, source, tmp_path / "four", text, "--keep", "4", *flags) == 0
    said = capsys.readouterr().out
    assert "Routers choose as before." in said
    of_layers = re.findall(r"4 of 8 .* (\d+\.\d)% +(\d+\.\d)% +(\d+\.\d)%", said)
    assert len(of_layers) == 2
    assert all(0 < float(share) < 100 for row in of_layers for share in row)


def test_merging_adds_no_expert_that_no_token_chose(exports, text, tmp_path) -> None:
    case = exports.case("qwen3_moe")
    weights = with_unused(case)
    source = save(weights, tmp_path / "step-7")
    for out, keep in (("six", "6"), ("five", "5")):
        flags = ("--keep", keep, "--by", "frequency", "--merge")
        assert prune(case, source, tmp_path / out, text, *flags) == 0
    six, five = load(tmp_path / "six"), load(tmp_path / "five")
    stay = [0, 2, 3, 5, 6, 7]
    for name, tensor in weights.items():
        if "inner_experts" in name:
            assert torch.equal(six[name], tensor[stay])
            # The sixth is in one of the five, and the others are as they were.
            same = [any(torch.equal(new, old) for old in tensor) for new in five[name]]
            assert sorted(same) == [False, True, True, True, True]


@pytest.mark.parametrize(
    ("kind", "flags", "said"),
    [
        ("deepseek_v2", ["--keep", "2", "--by", "cosine"], "uses 3 experts. Keep at least as many"),
        ("deepseek_v2", ["--keep", "8", "--by", "cosine"], "has 8 experts. Keep fewer."),
        ("deepseek_v2", ["--keep", "4", "--by", "weight"], "--by weight: needs a text"),
        ("deepseek_v2", ["--keep", "4", "--by", "cosine", "--as-constant"], "needs a text"),
        ("deepseek_v2", ["--keep", "4", "--by", "weight", "--text", "no.txt"], "--text no.txt: is"),
        ("deepseek_v3", ["--keep", "6", "--by", "cosine"], "in 4 groups of equal size"),
        ("deepseek_v3", ["--keep", "4", "--by", "cosine"], "of 2 groups, which would have 2."),
    ],
)
def test_what_is_refused(exports, kind, flags, said, tmp_path, capsys) -> None:
    """In a line, and nothing is written."""
    case = exports.case(kind)
    source = exports.plain(kind)[1]
    with pytest.raises(SystemExit) as ended:
        prune(case, source, tmp_path / "out", None, *flags)
    assert ended.value.code == 2
    line = capsys.readouterr().err.strip()
    assert said in line
    assert "\n" not in line
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> OneRank:
    """A run, what remains of its last step, and runs that train that on."""
    folder = job_folder(tmp_path_factory.mktemp("runs"))
    known = OneRank(folder)
    saving = ["--checkpoint.enable", "--checkpoint.interval", "100"]
    known.add("whole", dialect.job(folder / "job.toml", *saving, *dialect.precision("tiny")))
    known.folder = folder
    return known


@pytest.mark.train
@pytest.mark.parametrize("flags", [["--merge"], ["--as-constant"]])
def test_a_smaller_model_trains_on(runs, flags, text, tmp_path, monkeypatch) -> None:
    """From where the run left off, with the job that was written."""
    whole, folder = runs["whole"], runs.folder
    monkeypatch.chdir(folder)
    out = folder / "out".join(flags)
    arguments = ["--model", "job.toml", "--keep", "4", "--by", "weight", "--text", str(text)]
    sizes = ["--seq-len", "64", "--sequences", "4", "--device", "cpu"]
    assert cli.main(["ckpt", "prune", "whole", str(out), *arguments, *sizes, *flags]) == 0
    runs.add(out.name, dialect.job(out / "job.toml", *dialect.precision("tiny")))
    smaller = runs[out.name]
    assert len(smaller["losses"]) == 3
    # The loss of the last step before is not far away, as the first one of a new model is.
    assert smaller["losses"][0] < whole["losses"][1]
    assert smaller["losses"][-1] < smaller["losses"][0]
