"""The model of a checkpoint as Hugging Face's safetensors and back, through the host's adapter."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from trainer_runs import job_folder

from ezpz_moe import cli
from ezpz_moe.checkpoints import huggingface, storage
from ezpz_moe.commands.checkpoint import _model

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is unavailable")

EXPERTS = "layers.1.moe.routed_experts.inner_experts"


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> str:
    return str(job_folder(tmp_path_factory.mktemp("job")) / "job.toml")


@pytest.fixture(scope="module")
def weights(job) -> dict[str, torch.Tensor]:
    """The tiny model in the dtype of a checkpoint for inference, its bias of experts in float32."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(tensor.shape, generator=generator).to(
            torch.float32 if name.endswith("expert_bias_E") else torch.bfloat16
        )
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
    monkeypatch.setattr(huggingface, "_FILE_BYTES", 4 * 2**20)
    target = tmp_path / "hf"
    assert remap(source, target, "--to", "hf", "--model", job) == 0
    assert "no optimizer" in capsys.readouterr().out
    index = json.loads((target / huggingface.INDEX).read_text())["weight_map"]
    files = sorted(set(index.values()))
    assert len(files) > 3
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    written: dict[str, torch.Tensor] = {}
    for file in files:
        tensors = load_file(target / file)
        assert {index[key] for key in tensors} == {file}
        written |= tensors
    assert written.keys() == index.keys()
    for number in range(8):
        expert = written[f"model.layers.1.mlp.experts.{number}.up_proj.weight"]
        assert torch.equal(expert, weights[f"{EXPERTS}.w3_EFD"][number])
    assert sum(each.numel() for each in written.values()) == sum(
        each.numel() for each in weights.values()
    )
    assert remap(target, tmp_path / "back", "--to", "0.3", "--model", job) == 0
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

    monkeypatch.setattr(huggingface, "save_file", broken)
    with pytest.raises(SystemExit):
        remap(source, tmp_path / "hf", "--to", "hf", "--model", job)
    assert f"{EXPERTS}.w3_EFD, read back, differs" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_mistakes_are_said(tmp_path, source, job, weights, capsys) -> None:
    old = tmp_path / "old"
    assert remap(source, old, "--to", "0.2") == 0
    hf = tmp_path / "hf"
    assert remap(source, hf, "--to", "hf", "--model", job) == 0
    tensors = load_file(next(hf.glob("*.safetensors")))
    (tmp_path / "less").mkdir()
    del tensors["model.layers.1.mlp.experts.3.up_proj.weight"]
    save_file(tensors, tmp_path / "less" / "model.safetensors")
    new = tmp_path / "new"
    for arguments, message in (
        ((source, new, "--to", "hf"), "the model is needed: --model"),
        ((old, new, "--to", "hf", "--model", job), f"ckpt remap {old} DIR --to 0.3"),
        ((source, new, "--to", "hf", "--model", "debugmodel"), "is nothing in the checkpoint"),
        ((hf, new, "--to", "0.2", "--model", job), "Use --to 0.3, then"),
        ((hf, new, "--to", "0.3", "--model", "debugmodel"), "Is this the model's flavor?"),
        ((tmp_path / "less", new, "--to", "0.3", "--model", job), "1 of 85 tensors are missing"),
    ):
        with pytest.raises(SystemExit) as stop:
            remap(*arguments)
        assert stop.value.code == 2
        assert message in capsys.readouterr().err
        assert not new.exists()


@pytest.mark.parametrize("flavor", ["gpt_oss_debugmodel", "qwen3_debugmodel"])
def test_what_the_hosts_adapter_cannot_say_is_refused(tmp_path, flavor, capsys) -> None:
    """gpt_oss: the adapter knows its experts under other names. qwen3: only biases are left out."""
    tensors = _model(flavor).tensors
    saved = {name: torch.zeros(tensor.shape) for name, tensor in tensors.items()}
    dcp.save(saved, checkpoint_id=tmp_path / "source")
    export = (tmp_path / "source", tmp_path / "hf", "--to", "hf", "--model", flavor)
    if flavor == "qwen3_debugmodel":
        assert remap(*export) == 0
        said = capsys.readouterr().out
        assert "Left out" in said
        assert said.count("expert_bias_E") == 8
        with pytest.raises(SystemExit):
            remap(tmp_path / "hf", tmp_path / "new", "--to", "0.3", "--model", flavor)
        assert "initial_load_in_hf" in capsys.readouterr().err
    else:
        with pytest.raises(SystemExit):
            remap(*export)
        assert "would not be whole" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
