"""``ezpz-moe analyze``: the host's model runs on the text as in training, and what is reported."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch
import torch.distributed.checkpoint as dcp
from json_documents import documented
from matplotlib import image
from torch import nn

from ezpz_moe import cli
from ezpz_moe.config.assets import EMBEDDED_TOKENIZER
from ezpz_moe.config.flavors import load_flavor
from ezpz_moe.config.job import Job
from ezpz_moe.config.train_only import train_only_of
from ezpz_moe.errors import EzpzError
from ezpz_moe.hosts.detect import check_host, host, presumed_host
from ezpz_moe.hosts.documents import COLUMN, read_documents
from ezpz_moe.hosts.titan.base import titan
from ezpz_moe.hosts.titan.v0_3 import Titan03
from ezpz_moe.hosts.titan_0_2.v0_2 import Titan02
from ezpz_moe.tools.analysis import drift, similarity, text
from ezpz_moe.tools.analysis.record import record
from ezpz_moe.tools.checkpoints.tensors import write_checkpoint

pytestmark = [
    pytest.mark.skipif(
        type(presumed_host()) is not Titan03, reason="builds models of torchtitan 0.3"
    ),
    pytest.mark.filterwarnings("ignore:In CPU autocast"),
]

LENGTH = 32
TEXT = "\n\n".join(topics[name] for name in sorted(topics)[:8])
SMALL = """
inherits = "debugmodel"
dim = 32
n_layers = 3
n_heads = 2
kv_lora_rank = 16
qk_nope_head_dim = 8
qk_rope_head_dim = 8
v_head_dim = 8
dense_hidden_dim = 48
moe_hidden_dim = 24
attention = "sdpa"
compute_backend = "for_loop"
"""
JOB = """
[job]
dump_folder = "{folder}/run"
[model]
name = "ezpz_moe"
flavor = "small"
[training]
seq_len = 32
"""


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A flavor, a job, a text and a run with two checkpoints."""
    check_host()
    monkeypatch.setenv("EZPZ_MOE_FLAVORS", str(tmp_path))
    (tmp_path / "small.toml").write_text(SMALL)
    (tmp_path / "job.toml").write_text(JOB.format(folder=tmp_path))
    (tmp_path / "text.txt").write_text(TEXT)
    for step in (1, 2):
        checkpoint = tmp_path / "run" / "checkpoint" / f"step-{step}"
        checkpoint.mkdir(parents=True)
        write_checkpoint(checkpoint, weights(step).items())
    return tmp_path


def weights(seed: int) -> dict[str, torch.Tensor]:
    """The model's tensors, large enough that attention and experts matter to the logits."""
    draw = torch.Generator().manual_seed(seed)
    model = host().build_on_meta(load_flavor("small"))
    return {
        name: torch.ones(tensor.shape)
        if "norm" in name
        else torch.zeros(tensor.shape)
        if tensor.dim() == 1
        else torch.randn(tensor.shape, generator=draw) * tensor.shape[-1] ** -0.5
        for name, tensor in model.state_dict().items()
    }


def sequences(folder: Path, count: int) -> list[text.Sequence]:
    encode = host().analysis().encoder(str(EMBEDDED_TOKENIZER), load_flavor("small", near=folder))
    documents = read_documents(str(folder / "text.txt"))[COLUMN]
    found = text.sequences(documents, encode, LENGTH)
    return list(found)[:count]


def run(*arguments: object) -> int:
    return cli.main(["analyze", *map(str, arguments)])


def refused(capsys, *arguments: object) -> str:
    with pytest.raises(SystemExit) as stopped:
        run(*arguments)
    assert stopped.value.code == 2
    return capsys.readouterr().err


def analyzed(folder: Path, *flags: object) -> dict:
    """What is in the JSON file."""
    file = folder / "found.json"
    common = ("--data", folder / "text.txt", "--sequences", 6, "--out", file)
    assert run(folder / "job.toml", *common, *flags) == 0
    found = json.loads(file.read_text())
    assert found.keys() == documented()["analyze"]
    return found


def test_the_text_is_packed_as_the_trainer_packs_it(folder):
    from torchtitan.components.tokenizer import HuggingFaceTokenizer

    found = sequences(folder, 10_000)
    config = titan().dataloader_config(
        None, str(folder / "text.txt"), job_folder=None, infinite=False
    )
    loader = config.build(
        dp_world_size=1,
        dp_rank=0,
        tokenizer=HuggingFaceTokenizer.Config().build(tokenizer_path=str(EMBEDDED_TOKENIZER)),
        seq_len=LENGTH,
        local_batch_size=1,
    )
    expected = list(loader)
    assert len(found) == len(expected) > 100
    for mine, (inputs, labels) in zip(found, expected, strict=True):
        assert torch.equal(mine.tokens_L, inputs["input"][0])
        assert torch.equal(mine.positions_L, inputs["positions"][0])
        assert torch.equal(mine.labels_L, labels[0])


def with_router(folder: Path, table: str) -> dict:
    """What is found of both checkpoints' models with this ``[router]``, drawn anew."""
    (folder / "small.toml").write_text(f"{SMALL}[router]\n{table}\n")
    for step in (1, 2):
        checkpoint = folder / "run" / "checkpoint" / f"step-{step}"
        shutil.rmtree(checkpoint)
        checkpoint.mkdir()
        write_checkpoint(checkpoint, weights(1).items())
    return analyzed(folder, "--against", folder / "run" / "checkpoint" / "step-1")


def test_constant_experts_have_no_weights_to_compare(folder):
    found = with_router(folder, "constant_experts = 3\nnull_experts = 1")
    for layer in found["layers"]:
        assert (layer["num_experts"], len(layer["load"])) == (12, 12)
        assert len(layer["cosines"]) == 8


def test_the_matrices_of_a_latent_are_no_experts(folder):
    (folder / "small.toml").write_text(f"{SMALL}moe_latent_dim = 16\n")
    checkpoint = folder / "run" / "checkpoint" / "step-2"
    shutil.rmtree(checkpoint)
    checkpoint.mkdir()
    write_checkpoint(checkpoint, weights(2).items())
    for layer in analyzed(folder)["layers"]:
        assert len(layer["cosines"]) == 8


def test_experts_that_a_token_does_not_use_are_none(folder):
    """Of gates whose logits are above 0 about half of the time."""
    relu = 'routing = "relu"\nactivation = "relu_rmsnorm"'
    for layer in with_router(folder, relu)["layers"]:
        assert (layer["num_experts"], len(layer["load"]), len(layer["cosines"])) == (8, 8, 8)
        assert 3 < layer["top_k"] < 5
        assert layer["cache_size"] == min(8, round(2 * layer["top_k"]))
        assert sum(layer["load"]) == pytest.approx(1)
        assert layer["drift"] == {"changed": 0, "jaccard": 1}


def test_a_scheduled_temperature_is_that_of_the_checkpoints_step(folder):
    """The same weights in two steps, in between which the temperature falls."""
    moving = with_router(folder, "temperature = { start = 3.0, end = 1.0, steps = 2 }")
    assert moving["against_loss"] != moving["loss"]
    at_the_end = with_router(folder, "temperature = 1.0")
    assert at_the_end["against_loss"] == at_the_end["loss"] == moving["loss"]


@pytest.mark.parametrize("flag", ["--out", "--plot"])
def test_what_cannot_be_written_is_said(folder, capsys, flag):
    common = ("--data", folder / "text.txt", "--sequences", 2)
    message = refused(capsys, folder / "job.toml", *common, flag, "/proc/nowhere")
    assert "cannot write the results" in message
    assert "/proc/nowhere" in message


def test_loss_and_routing_are_those_of_the_hosts_model(folder):
    """The host's model, loaded by torch's own reader and run on all sequences at once."""
    from torchtitan.models.common.moe import TokenChoiceTopKRouter

    checkpoint = folder / "run" / "checkpoint" / "step-2"
    found = sequences(folder, 4)
    said = record(checkpoint, load_flavor("small"), found, device="cpu", dtype=torch.float32)
    from ezpz_moe.hosts.titan.models import model_spec

    spec = model_spec(load_flavor("small"))
    model = spec.model.build()
    model.init_states(buffer_device=torch.device("cpu"))
    state = model.state_dict()
    dcp.load(state, checkpoint_id=checkpoint, no_dist=True)
    model.load_state_dict(state)
    model.eval()
    inputs = {}
    for name, module in model.named_modules():
        if isinstance(module, TokenChoiceTopKRouter):
            module.register_forward_hook(
                lambda m, x, _, name=name: inputs.update({name.split(".moe")[0]: (m, x[0])})
            )
    stacked = [torch.stack([getattr(each, field) for each in found]) for field in vars(found[0])]
    tokens, labels, positions = stacked
    with torch.no_grad():
        logits = model(tokens, positions=positions)
    expected = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).item()
    assert said.loss == pytest.approx(expected, abs=1e-4)  # experts round in bfloat16
    assert list(said.routing) == list(inputs) == ["layers.1", "layers.2"]
    for name, (router, x_BLD) in inputs.items():
        ids_BLK = (x_BLD @ router.gate.weight.T).topk(router.top_k).indices
        chosen = said.routing[name].ids_SLK
        assert drift.drift(chosen.flatten(0, 1), ids_BLK.flatten(0, 1), 8).changed < 0.02
        experts = model.get_submodule(f"{name}.moe.routed_experts.inner_experts")
        assert torch.equal(said.cosines[name], similarity.cosines(experts.parameters()).detach())


def test_bfloat16_leaves_the_rotary_positions_as_they_are(folder, monkeypatch):
    """Cast to a real dtype they would lose their imaginary part, and the model its positions."""
    part, kept = host().analysis(), {}
    forward = part.forward

    def looked_at(model, *inputs):
        kept.update(model.named_buffers())
        kept["weight"] = model.lm_head.weight
        return forward(model, *inputs)

    monkeypatch.setattr(part, "forward", looked_at)
    checkpoint = folder / "run" / "checkpoint" / "step-2"
    flavor = load_flavor("small")
    losses = {
        dtype: record(checkpoint, flavor, sequences(folder, 2), device="cpu", dtype=dtype).loss
        for dtype in (torch.float32, torch.bfloat16)
    }
    assert kept["weight"].dtype == torch.bfloat16
    assert any(buffer.is_complex() for buffer in kept.values())
    assert 0 < abs(losses[torch.float32] - losses[torch.bfloat16]) < 0.05


def test_the_whole_report(folder, capsys):
    found = analyzed(folder, "--against", folder / "run/checkpoint/step-1", "--plot", folder / "p")
    said = capsys.readouterr().out
    assert found["checkpoint"].endswith("step-2")  # the newest of the job's run
    assert found["against"].endswith("step-1")
    assert (found["sequences"], found["seq_len"]) == (6, LENGTH)
    assert f"loss {found['loss']:.4f}" in said
    assert [each["layer"] for each in found["layers"]] == ["layers.1", "layers.2"]
    for layer in found["layers"]:
        assert (layer["num_experts"], layer["top_k"], layer["cache_size"]) == (8, 3, 6)
        assert sum(layer["load"]) == pytest.approx(1)
        assert layer["sch"] == layer["sch_by_size"][5] <= layer["sch_by_size"][7] == 1
        assert layer["dropped"] == pytest.approx(sum(layer["dropped_by_position"]) / 8)
        assert layer["dropped_by_position"][0] < layer["dropped_by_position"][-1]
        assert layer["mean_cosine"] < 0.1 < layer["drift"]["changed"]
        assert f"{layer['drift']['changed']:.1%}" in said
        assert f"{layer['explained']['share']:.1%}" in said
    names = {"load", "tokens", "drops", "consistency", "similarity", "drift"}
    assert {file.stem for file in (folder / "p").glob("*.png")} == names
    for file in (folder / "p").glob("*.png"):
        assert image.imread(file)[..., :3].std() > 0.05, f"{file} is blank"


def test_a_checkpoint_does_not_drift_from_itself(folder):
    found = analyzed(folder, "--against", folder / "run", "--capacity-factor", 8 / 3)
    assert found["loss"] == found["against_loss"]
    for layer in found["layers"]:
        assert layer["drift"] == {"changed": 0.0, "jaccard": 1.0}
        assert layer["dropped"] == 0.0  # there is room for all


def test_an_expert_without_tokens_and_without_weights(folder):
    """JSON has no NaN: null stands for what does not exist."""
    checkpoint = folder / "run" / "checkpoint" / "step-3"
    checkpoint.mkdir()
    state = weights(3)
    state["layers.1.moe.expert_bias_E"] = torch.tensor([-10.0] + 7 * [0.0])
    for name in ("w1_EFD", "w2_EDF", "w3_EFD"):
        state[f"layers.1.moe.routed_experts.inner_experts.{name}"][0] = 0
    write_checkpoint(checkpoint, state.items())
    layer = analyzed(folder, "--plot", folder / "p")["layers"][0]
    assert layer["load"][0] == 0
    assert layer["concentration"][0] is None
    assert layer["cosines"][0] == 8 * [None]
    assert layer["mean_cosine"] is not None


def test_what_is_missing_or_does_not_fit(folder, capsys):
    data, job = ("--data", folder / "text.txt"), folder / "job.toml"
    step = folder / "run" / "checkpoint" / "step-2"
    assert "Add --config FLAVOR|JOB.toml" in refused(capsys, step, *data)
    absent = folder / "no.txt"
    assert f"--data {absent}: is not a file." in refused(capsys, job, "--data", absent)
    assert "there is no such folder" in refused(capsys, folder / "no", *data, "--config", "small")
    too_long = refused(capsys, job, *data, "--seq-len", 16000)
    assert "fewer than 16000 tokens" in too_long
    assert "--segment 33" in refused(capsys, job, *data, "--segment", 33)
    assert "--cache 0.0" in refused(capsys, job, *data, "--cache", 0)
    assert "--seq-len 0" in refused(capsys, job, *data, "--seq-len", 0)
    assert "--sequences 0" in refused(capsys, job, *data, "--sequences", 0)
    assert "there is no folder" in refused(capsys, job, *data, "--out", folder / "no" / "x.json")
    assert "is a file" in refused(capsys, job, *data, "--plot", folder / "text.txt")
    (folder / "other.toml").write_text('inherits = "small"\nmoe_hidden_dim = 16\n')
    other = refused(capsys, step, *data, "--config", "other", "--seq-len", LENGTH)
    assert "is not the flavor's model" in other
    (folder / "few.toml").write_text('inherits = "small"\nvocab_size = 4096\n')
    few = refused(capsys, step, *data, "--config", "few", "--seq-len", LENGTH)
    assert "is not the flavor's model" in few


def test_a_tokenizer_of_another_model_is_refused(folder, capsys):
    (folder / "few.toml").write_text('inherits = "small"\nvocab_size = 300\n')
    flags = ("--config", "few", "--seq-len", LENGTH, "--data", folder / "text.txt")
    said = refused(capsys, folder / "run", *flags)
    assert "the token ID 2047, but flavor 'few' has a vocabulary of 300" in said


def test_a_host_without_the_part_says_so():
    old = Titan02()
    for part, ask in {
        "analysis": old.analysis,
        "upcycling": lambda: old.upcycling_target(None),
    }.items():
        with pytest.raises(EzpzError, match=rf"torchtitan 0\.2: its binding has no {part}"):
            ask()


def test_the_experts_of_an_upcycled_model_are_one(folder, capsys):
    """Two commands together: copies have the cosine 1."""
    dense = {
        name.replace("shared_experts", "feed_forward").replace(".moe.", "."): tensor
        for name, tensor in weights(4).items()
        if not any(part in name for part in (".routed_experts.", ".router.", "expert_bias"))
    }
    for layer in (1, 2):
        for part, shape in {"w1": (24, 32), "w2": (32, 24), "w3": (24, 32)}.items():
            dense[f"layers.{layer}.feed_forward.{part}.weight"] = torch.randn(shape)
    (folder / "dense").mkdir()
    write_checkpoint(folder / "dense", dense.items())
    step = folder / "run" / "checkpoint" / "step-9"
    assert cli.main(["upcycle", str(folder / "dense"), "small", str(step)]) == 0
    for layer in analyzed(folder)["layers"]:
        assert layer["mean_cosine"] == pytest.approx(1)


@pytest.mark.train
def test_a_run_of_the_trainer_is_analyzed(tmp_path):
    """A real run's checkpoint has in ``analyze`` the loss that the next run starts with."""
    import dialect
    from trainer_runs import job_folder, train

    folder = job_folder(tmp_path / "job")
    (folder / "text.txt").write_text(TEXT)
    job = [
        *dialect.job(folder / "job.toml", "--checkpoint.enable"),
        *("--dataloader.dataset", "text_file"),
        *("--dataloader.dataset-path", str(folder / "text.txt")),
    ]
    train({"first": [*job, "--training.steps", "20"]}, tmp_path, ranks=1)
    step = tmp_path / "first" / "checkpoint" / "step-20"
    on = [*job, "--training.steps", "1", "--checkpoint.initial-load-path", str(step)]
    (record,) = train({"on": on}, tmp_path, ranks=1)["on"]
    flags = ("--sequences", 2, "--config", folder / "job.toml")
    file = tmp_path / "found.json"
    assert run(tmp_path / "first", "--data", folder / "text.txt", *flags, "--out", file) == 0
    loss = json.loads(file.read_text())["loss"]
    assert loss < 7.0, "the model has learnt too little to tell"
    # The experts compute in bfloat16, whose relative rounding is 2^-9.
    assert loss == pytest.approx(record["losses"][0], rel=2.0**-9)


def test_attributed_experts_can_be_trained(folder):
    """The file says what ``[train_only]`` takes, and the shares are those of the routers."""
    (folder / "other.txt").write_text("abc " * 400)
    file = folder / "attributed.json"
    texts = ("--attribute", folder / "text.txt", "--against", folder / "other.txt")
    assert run(folder / "job.toml", *texts, "--sequences", 6, "--out", file) == 0
    found = json.loads(file.read_text())
    assert found.keys() == documented()["analyze --attribute"]
    layers = analyzed(folder)["layers"]
    assert [each["layer"] for each in found["experts"]] == [1] * 8 + [2] * 8
    for number, layer in zip((1, 2), layers, strict=True):
        of_layer = [each for each in found["experts"] if each["layer"] == number]
        # Every token has three experts: its choices are its shares.
        assert [each["share_of_tokens"] for each in of_layer] == pytest.approx(layer["load"])
        for shares in (of_layer, [each["against"] for each in of_layer]):
            for share in ("share_of_tokens", "share_of_weight"):
                assert sum(each[share] for each in shares) == pytest.approx(1)
        assert of_layer != [each | each["against"] for each in of_layer]
    values = {"train_only.experts": str(file), "train_only.share": 0.5}
    said = train_only_of(Job("small", folder / "job.toml", values))
    assert said.experts.keys() == {1, 2}
    for number, experts in said.experts.items():
        load = layers[number - 1]["load"]
        assert sum(load[expert] for expert in experts) >= 0.5
        assert sum(sorted(load)[-len(experts) + 1 :]) < 0.5 or len(experts) == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "the text is missing"),
        (("--data", "text.txt", "--attribute", "text.txt"), "both are given"),
        (("--attribute", "text.txt", "--plot", "pictures"), "--plot has no effect"),
        (("--attribute", "text.txt", "--against", "absent.txt"), "--against absent.txt: is"),
    ],
)
def test_a_text_is_named_once(folder, capsys, monkeypatch, flags, message):
    monkeypatch.chdir(folder)
    assert message in refused(capsys, folder / "job.toml", *flags)
