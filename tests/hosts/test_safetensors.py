"""The model of a checkpoint as Hugging Face's safetensors and back, through the host's adapter."""

from __future__ import annotations

import json
from importlib import util
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from trainer_runs import job_folder

from ezpz_moe import cli
from ezpz_moe.cli.ckpt import _model
from ezpz_moe.hosts.dcp import paths
from ezpz_moe.hosts.detect import host
from ezpz_moe.tools.checkpoints import storage
from ezpz_moe.tools.checkpoints.huggingface import exporting
from ezpz_moe.tools.checkpoints.huggingface.model import Model

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is unavailable")

GENERATION = host().checkpoint_names
OTHER = "0.3" if GENERATION == "0.2" else "0.2"
UP = {
    "0.2": "layers.1.moe.experts.w3",
    "0.3": "layers.1.moe.routed_experts.inner_experts.w3_EFD",
    "2026_09": "layers.1.moe.routed_experts.w13.weight",
}[GENERATION]
"""The parameter that holds the experts' projections up."""


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> str:
    return str(job_folder(tmp_path_factory.mktemp("job")) / "job.toml")


@pytest.fixture(scope="module")
def weights(job) -> dict[str, torch.Tensor]:
    """The tiny model in the dtype of a checkpoint for inference.

    Its biases of experts are zero: DeepseekV2, which computes its softmax router, has none.
    """
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.zeros(tensor.shape)
        if "expert_bias" in name
        else torch.randn(tensor.shape, generator=generator).bfloat16()
        for name, tensor in _model(job).tensors.items()
    }


@pytest.fixture
def source(tmp_path, weights) -> Path:
    moments = {f"state.{name}.exp_avg": -tensor for name, tensor in weights.items()}
    dcp.save({**weights, "optimizer": moments}, checkpoint_id=tmp_path / "source")
    return tmp_path / "source"


def remap(*arguments: object) -> int:
    return cli.main(["ckpt", "remap", *map(str, arguments)])


def test_there_and_back_keeps_every_bit(
    tmp_path, source, job, weights, monkeypatch, capsys
) -> None:
    monkeypatch.setattr(exporting, "_FILE_BYTES", 2**18)
    target = tmp_path / "hf"
    assert remap(source, target, "--to", "hf", "--model", job) == 0
    assert "no optimizer" in capsys.readouterr().out
    index = json.loads((target / paths.INDEX).read_text())["weight_map"]
    names = sorted(set(index.values()))
    assert len(names) > 3
    assert names[0] == f"model-00001-of-{len(names):05}.safetensors"
    written: dict[str, torch.Tensor] = {}
    for file in names:
        tensors = load_file(target / file)
        assert {index[key] for key in tensors} == {file}
        written |= tensors
    assert written.keys() == index.keys()
    size = json.loads((target / paths.INDEX).read_text())["metadata"]["total_size"]
    assert size == sum(tensor.nbytes for tensor in written.values())
    for number in range(8):
        expert = written[f"model.layers.1.mlp.experts.{number}.up_proj.weight"]
        up = weights[UP][number]
        assert torch.equal(expert, up[1] if GENERATION == "2026_09" else up)
    parameters = [tensor for name, tensor in weights.items() if "expert_bias" not in name]
    written = {name: tensor for name, tensor in written.items() if "bias" not in name}
    assert sum(each.numel() for each in written.values()) == sum(
        each.numel() for each in parameters
    )
    assert remap(target, tmp_path / "back", "--to", GENERATION, "--model", job) == 0
    metadata = storage.read_metadata(tmp_path / "back")
    assert metadata.state_dict_metadata.keys() == weights.keys()
    found = {name: torch.zeros_like(tensor) for name, tensor in weights.items()}
    dcp.load(found, checkpoint_id=tmp_path / "back")
    assert all(torch.equal(found[name], tensor) for name, tensor in weights.items())


def test_what_differs_when_read_back_is_not_kept(
    tmp_path, source, job, monkeypatch, capsys
) -> None:
    def broken(tensors, path, metadata):
        tensors["model.layers.1.mlp.experts.3.up_proj.weight"][0, 0] += 1
        save_file(tensors, path, metadata)

    monkeypatch.setattr(exporting, "save_file", broken)
    with pytest.raises(SystemExit):
        remap(source, tmp_path / "hf", "--to", "hf", "--model", job)
    assert f"{UP}, read back, differs" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_mistakes_are_said(tmp_path, source, job, weights, capsys) -> None:
    old = tmp_path / "old"
    assert remap(source, old, "--to", OTHER) == 0
    hf = tmp_path / "hf"
    assert remap(source, hf, "--to", "hf", "--model", job) == 0
    tensors = load_file(next(hf.glob("*.safetensors")))
    (tmp_path / "less").mkdir()
    key = "model.layers.1.mlp.experts.3.up_proj.weight"
    less = {key: tensors.pop(key)}
    save_file(tensors, tmp_path / "less" / "model.safetensors")
    (tmp_path / "quantized").mkdir()
    quantized = {key: tensor.to(torch.float8_e4m3fn) for key, tensor in tensors.items()}
    save_file(quantized | less, tmp_path / "quantized" / "model.safetensors")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "model.safetensors").write_text("version https://git-lfs.github.com")
    (hf / "config.json").unlink(missing_ok=True)  # it would say that the flavor is another
    folder = Path(job).parent
    (folder / "deeper.toml").write_text('inherits = "tiny"\nn_layers = 4\n')
    deeper = folder / "deeper_job.toml"
    deeper.write_text('[model]\nname = "ezpz_moe"\nflavor = "deeper"\n')
    new = tmp_path / "new"
    back = (new, "--to", GENERATION, "--model")
    deep = Path(job).with_name("deep.toml")  # a flavor with layers that the checkpoint has not
    deep.write_text('inherits = "tiny"\nn_layers = 5\n')
    deeper = deep.with_name("deeper.toml")
    deeper.write_text(Path(job).read_text().replace('"tiny_sdpa"', '"deep_sdpa"'))
    for arguments, message in (
        ((source, new, "--to", "hf"), "need the model: add --model"),
        ((old, new, "--to", "hf", "--model", job), f"ckpt remap {old} DIR --to {GENERATION}"),
        ((source, new, "--to", "hf", "--model", deeper), "is nothing in the checkpoint"),
        ((hf, new, "--to", OTHER, "--model", job), f"Use --to {GENERATION}, then"),
        ((hf, *back, deeper), "Is this the model's flavor?"),
        ((tmp_path / "less", *back, job), f"1 of {len(tensors) + 1} tensors are missing"),
        ((tmp_path / "quantized", *back, job), "is quantized (torch.float8_e4m3fn). Convert"),
        ((tmp_path / "broken", *back, job), "model.safetensors: cannot be read"),
    ):
        with pytest.raises(SystemExit) as stop:
            remap(*arguments)
        assert stop.value.code == 2
        assert message in capsys.readouterr().err
        assert not new.exists()


def save_zeros(folder: Path, flavor: str) -> Model:
    model = _model(flavor)
    saved = {
        name: torch.zeros(tensor.shape, dtype=torch.bfloat16)
        for name, tensor in model.tensors.items()
    }
    dcp.save(saved, checkpoint_id=folder)
    return model


def test_zero_biases_without_a_place_are_left_out_and_come_back(tmp_path, capsys) -> None:
    save_zeros(tmp_path / "source", "qwen3_debugmodel")
    model = ("--model", "qwen3_debugmodel")
    assert remap(tmp_path / "source", tmp_path / "hf", "--to", "hf", *model) == 0
    said = capsys.readouterr().out
    assert "Left out" in said
    assert said.count("expert_bias") == 8
    assert remap(tmp_path / "hf", tmp_path / "new", "--to", GENERATION, *model) == 0
    assert "biases, which the other format lacks, are zero" in capsys.readouterr().out
    metadata = storage.read_metadata(tmp_path / "new")
    assert metadata.state_dict_metadata.keys() == _model("qwen3_debugmodel").tensors.keys()


def test_gpt_oss_has_the_names_and_shapes_of_transformers() -> None:
    """The host's own adapter has names of the quantized checkpoint, or of an older host."""
    if util.find_spec("torchtitan.models.gpt_oss") is None:
        pytest.skip("this host has no gpt_oss")
    model = _model("gpt_oss_debugmodel")
    keys = {name: model.keys(name) for name in model.tensors}
    assert {name for name in keys if not keys[name]} == model.buffers
    experts = {key: shape for each in keys.values() for key, shape in each.items()}
    E, D, F = 8, 256, 2880
    assert {
        key.removeprefix("model.layers.3.mlp.experts."): shape
        for key, shape in experts.items()
        if "layers.3.mlp.experts" in key
    } == {
        "gate_up_proj": (E, D, 2 * F),
        "gate_up_proj_bias": (E, 2 * F),
        "down_proj": (E, F, D),
        "down_proj_bias": (E, D),
    }
