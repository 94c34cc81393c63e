"""Checkpoints of one generation of the host under the names of another, bit for bit."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemWriter

from ezpz_moe import checkpoints, cli
from ezpz_moe.checkpoints import inspect, remap
from ezpz_moe.errors import EzpzError

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is unavailable")

EXPERTS = "layers.1.moe.routed_experts.inner_experts"
# What a layer of each model family is called in 0.2 and from 0.3 on.
FAMILIES = {
    "deepseek_v3": {
        "layers.0.attention.wq.weight": "layers.0.attention.wq.weight",
        "layers.0.attention.wkv_a.weight": "layers.0.attention.wkv_a.weight",
        "layers.0.attention.q_output.weight": "layers.0.attention.q_output.weight",
        "layers.0.feed_forward.w1.weight": "layers.0.feed_forward.w1.weight",
        "layers.1.moe.shared_experts.w1.weight": "layers.1.moe.shared_experts.w1.weight",
        "layers.1.moe.experts.w1": f"{EXPERTS}.w1_EFD",
        "layers.1.moe.experts.w2": f"{EXPERTS}.w2_EDF",
        "layers.1.moe.experts.w3": f"{EXPERTS}.w3_EFD",
        "layers.1.moe.expert_bias": "layers.1.moe.expert_bias_E",
        "output.weight": "lm_head.weight",
    },
    "qwen3": {
        "layers.0.attention.wq.weight": "layers.0.attention.qkv_linear.wq.weight",
        "layers.0.attention.wk.weight": "layers.0.attention.qkv_linear.wk.weight",
        "layers.0.attention.wv.weight": "layers.0.attention.qkv_linear.wv.weight",
        "layers.0.attention.q_norm.weight": "layers.0.attention.q_norm.weight",
        "layers.1.moe.experts.w1": f"{EXPERTS}.w1_EFD",
        "output.weight": "lm_head.weight",
    },
    "gpt_oss": {
        "layers.0.attention.wq.bias": "layers.0.attention.qkv_linear.wq.bias",
        "layers.0.attention.wk.bias": "layers.0.attention.qkv_linear.wk.bias",
        "layers.1.moe.experts.mlp1_weight": f"{EXPERTS}.mlp1_weight_EGD",
        "layers.1.moe.experts.mlp1_bias": f"{EXPERTS}.mlp1_bias_EG",
        "layers.1.moe.experts.mlp2_weight": f"{EXPERTS}.mlp2_weight_EDF",
        "layers.1.moe.experts.mlp2_bias": f"{EXPERTS}.mlp2_bias_ED",
    },
}


def state(names) -> dict:
    """Model, optimizer and step, as the trainer saves them; every tensor has other values."""
    model = {
        name: torch.randn(4, 6, 5, generator=torch.Generator().manual_seed(seed))
        for seed, name in enumerate(names)
    }
    optimizer = {f"state.{name}.exp_avg": -tensor for name, tensor in model.items()}
    groups = {f"param_groups.{name}.lr": seed / 8 for seed, name in enumerate(names)}
    return {**model, "optimizer": optimizer | groups, "train_state": {"step": torch.tensor(7)}}


def save(folder: Path, names) -> Path:
    dcp.save(state(names), storage_writer=FileSystemWriter(folder, thread_count=2))
    return folder


def load(folder: Path, names) -> dict:
    """What a trainer finds that looks for ``names``."""
    loaded = state(names)
    for tensors in (loaded, loaded["optimizer"]):
        for name, value in tensors.items():
            if isinstance(value, torch.Tensor):
                tensors[name] = torch.full_like(value, torch.nan)
    dcp.load(loaded, checkpoint_id=folder)
    return loaded


@pytest.mark.parametrize("family", FAMILIES)
def test_every_entry_is_found_under_its_new_name_with_its_bits(tmp_path, family) -> None:
    old, new = list(FAMILIES[family]), list(FAMILIES[family].values())
    source, target = save(tmp_path / "source", old), tmp_path / "a" / "target"
    changed = sum(a != b for a, b in FAMILIES[family].items())
    assert remap(source, target, "0.3") == 3 * changed  # the weight, its moment and its rate
    torch.testing.assert_close(load(target, new), state(new), rtol=0, atol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_way_back_gives_the_same_checkpoint(tmp_path, family) -> None:
    source = save(tmp_path / "source", FAMILIES[family])
    remap(source, tmp_path / "there", "0.3")
    remap(tmp_path / "there", tmp_path / "back", "0.2")
    before, after = (vars(checkpoints._read(folder)) for folder in (source, tmp_path / "back"))
    del before["storage_meta"], after["storage_meta"]  # a number that each reading draws
    assert before == after
    for file in source.glob("*.distcp"):
        assert file.read_bytes() == (tmp_path / "back" / file.name).read_bytes()


def test_what_a_checkpoint_holds(tmp_path) -> None:
    contents = inspect(save(tmp_path / "step-9", FAMILIES["deepseek_v3"]))
    assert contents.generation == "0.2"
    assert contents.step == 7, "what it says counts, not its folder's name"
    assert (contents.layers, contents.experts) == (2, 4)
    assert contents.parameters == 10 * 4 * 6 * 5
    assert contents.dtypes == ("torch.float32",)
    assert contents.optimizer
    assert contents.files == 2
    assert contents.bytes > 2 * 4 * contents.parameters


def test_a_checkpoint_of_the_model_alone(tmp_path) -> None:
    names = FAMILIES["qwen3"].values()
    dcp.save(dict.fromkeys(names, torch.ones(2, 3)), checkpoint_id=tmp_path / "step-9")
    contents = inspect(tmp_path / "step-9")
    assert (contents.generation, contents.step, contents.optimizer) == ("0.3", 9, False)


def test_a_run_that_is_killed_leaves_nothing_that_looks_finished(tmp_path, monkeypatch) -> None:
    source, target = save(tmp_path / "source", FAMILIES["qwen3"]), tmp_path / "target"

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(checkpoints, "_verify", killed)
        with pytest.raises(KeyboardInterrupt):
            remap(source, target, "0.3")
    assert not target.exists()
    (tmp_path / "target.partial" / "left.distcp").write_text("from the run before")
    remap(source, target, "0.3")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "target"]
    assert not (target / "left.distcp").exists()


def test_a_copy_that_differs_is_not_finished(tmp_path, monkeypatch) -> None:
    source = save(tmp_path / "source", FAMILIES["qwen3"])

    def broken(file, copy):
        shutil.copyfile(file, copy)
        with copy.open("r+b") as handle:
            handle.seek(-9, 2)
            handle.write(b"?")

    monkeypatch.setattr(shutil, "copy2", broken)
    with pytest.raises(EzpzError, match="differ from"):
        remap(source, tmp_path / "target", "0.3")
    assert not (tmp_path / "target").exists()


def test_mistakes_are_said(tmp_path, capsys) -> None:
    source = save(tmp_path / "step-3", FAMILIES["qwen3"])
    dcp.save({"weight": torch.ones(2)}, checkpoint_id=tmp_path / "strange")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / ".metadata").write_bytes(b"no pickle")
    for arguments, message in (
        (["inspect", str(tmp_path)], f"such as {source}"),
        (["inspect", str(tmp_path / "gone")], "holds no checkpoint"),
        (["inspect", str(tmp_path / "strange")], "no generation of torchtitan that we know"),
        (["inspect", str(tmp_path / "broken")], ".metadata: cannot be read"),
        (["remap", str(source), str(tmp_path / "new"), "--to", "0.2"], "of torchtitan 0.2 already"),
        (["remap", str(source), str(tmp_path / "broken"), "--to", "0.3"], "exists already"),
    ):
        with pytest.raises(SystemExit) as stop:
            cli.main(["ckpt", *arguments])
        assert stop.value.code == 2
        assert message in capsys.readouterr().err


def test_what_the_commands_print(tmp_path, capsys) -> None:
    source = save(tmp_path / "step-3", FAMILIES["deepseek_v3"])
    assert cli.main(["ckpt", "remap", str(source), str(tmp_path / "new"), "--to", "0.3"]) == 0
    assert "15 names changed, every data file compared" in capsys.readouterr().out
    assert cli.main(["ckpt", "inspect", str(tmp_path / "new")]) == 0
    said = capsys.readouterr().out
    assert re.search(r"generation +0.3\b", said)
    assert re.search(r"dtypes +torch.float32\b", said)
