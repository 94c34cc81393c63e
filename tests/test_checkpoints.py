"""Checkpoints of one generation of the host under the names of another, bit for bit."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from checkpoint_cases import EXPERTS, assert_same_checkpoint, trained
from torch.distributed.checkpoint import FileSystemWriter

from ezpz_moe import cli
from ezpz_moe.errors import EzpzError
from ezpz_moe.tools.checkpoints import remapping, storage
from ezpz_moe.tools.checkpoints.contents import inspect
from ezpz_moe.tools.checkpoints.remapping import remap

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is unavailable")

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
    assert (
        remap(source, target, "0.3").changed == 3 * changed
    )  # the weight, its moment and its rate
    torch.testing.assert_close(load(target, new), state(new), rtol=0, atol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_way_back_gives_the_same_checkpoint(tmp_path, family) -> None:
    source = save(tmp_path / "source", FAMILIES[family])
    remap(source, tmp_path / "there", "0.3")
    remap(tmp_path / "there", tmp_path / "back", "0.2")
    assert_same_checkpoint(source, tmp_path / "back")


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


def test_a_model_alone_is_told_from_a_run(tmp_path, capsys) -> None:
    dcp.save(dict.fromkeys(FAMILIES["qwen3"], torch.ones(2, 3)), checkpoint_id=tmp_path / "step-9")
    save(tmp_path / "step-5", FAMILIES["qwen3"])
    for step, is_told in (("step-9", True), ("step-5", False)):
        target = str(tmp_path / "new" / step)
        assert cli.main(["ckpt", "remap", str(tmp_path / step), target, "--to", "0.3"]) == 0
        assert ("holds the model alone" in capsys.readouterr().out) is is_told


def test_ctrl_c_leaves_nothing(tmp_path, monkeypatch) -> None:
    source, target = save(tmp_path / "source", FAMILIES["qwen3"]), tmp_path / "target"

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(remapping, "_verify", interrupted)
    with pytest.raises(KeyboardInterrupt):
        remap(source, target, "0.3")
    assert list(tmp_path.iterdir()) == [source]


def test_what_a_killed_run_left_is_not_in_the_next(tmp_path) -> None:
    source, target = save(tmp_path / "source", FAMILIES["qwen3"]), tmp_path / "target"
    (tmp_path / "target.partial").mkdir()
    (tmp_path / "target.partial" / "left.distcp").write_text("from the run before")
    remap(source, target, "0.3")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "target"]
    assert not (target / "left.distcp").exists()


def test_the_source_is_not_taken_for_what_a_killed_run_left(tmp_path) -> None:
    source = save(tmp_path / "step_7.partial", FAMILIES["qwen3"])
    with pytest.raises(EzpzError, match=r"would be written to .*partial first"):
        remap(source, tmp_path / "step-7", "0.3")
    assert inspect(source).step == 7


def test_a_source_inside_of_what_a_killed_run_left_stays(tmp_path) -> None:
    (tmp_path / "new.partial").mkdir()
    source = save(tmp_path / "new.partial" / "step-7", FAMILIES["qwen3"])
    with pytest.raises(EzpzError, match=r"would be written to .*partial first"):
        remap(source, tmp_path / "new", "0.3")
    assert inspect(source).step == 7


def test_a_link_to_nothing_is_not_replaced(tmp_path) -> None:
    source = save(tmp_path / "source", FAMILIES["qwen3"])
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    with pytest.raises(EzpzError, match="link: already exists"):
        remap(source, tmp_path / "link", "0.3")


def test_what_cannot_be_renamed_is_removed(tmp_path, monkeypatch) -> None:
    source = save(tmp_path / "source", FAMILIES["qwen3"])

    def refused(self: Path, target: Path) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted", str(target))

    monkeypatch.setattr(Path, "rename", refused)
    with pytest.raises(EzpzError, match=r"target was not written: .*not permitted"):
        remap(source, tmp_path / "target", "0.3")
    assert list(tmp_path.iterdir()) == [source]


@pytest.mark.parametrize("damage", ["is missing", "is truncated, at 100 of"])
@pytest.mark.parametrize("command", [inspect, lambda folder: remap(folder, folder / "a", "0.3")])
def test_a_checkpoint_that_is_not_whole(tmp_path, damage, command) -> None:
    source = save(tmp_path / "source", FAMILIES["qwen3"])
    file = sorted(source.glob("*.distcp"))[-1]
    if damage == "is missing":
        file.unlink()
    else:
        os.truncate(file, 100)
    with pytest.raises(EzpzError, match=f"{file}: {damage}"):
        command(source)
    assert not list(tmp_path.rglob("*.partial"))


def test_what_is_not_finished_is_no_step_for_the_host(tmp_path, monkeypatch) -> None:
    """It takes every folder with step-N in its name for a checkpoint."""
    names = []
    monkeypatch.setattr(remapping, "_verify", lambda _, folder, *__: names.append(folder.name))
    remap(save(tmp_path / "source", FAMILIES["qwen3"]), tmp_path / "step-7", "0.3")
    assert [re.search(r"step-\d", name) for name in names] == [None]


def test_a_disk_that_is_full_is_said(tmp_path, monkeypatch) -> None:
    source = save(tmp_path / "source", FAMILIES["qwen3"])

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(EzpzError, match=r"target was not written: .*No space left on device"):
        remap(source, tmp_path / "target", "0.3")
    assert list(tmp_path.iterdir()) == [source]


@pytest.mark.parametrize("to", ["0.2", "main"])
def test_a_copy_that_differs_is_not_finished(tmp_path, monkeypatch, to) -> None:
    source = tmp_path / "source"
    dcp.save(trained(), checkpoint_id=source)

    def broken(folder, metadata):
        write_metadata(folder, metadata)
        for index, entry in metadata.storage_data.items():
            if ("experts.w1" in index.fqn or "w13" in index.fqn) and index.offset:
                with (folder / entry.relative_path).open("r+b") as file:
                    file.seek(entry.offset + entry.length // 2)  # a value, in the middle
                    file.write(b"?")

    write_metadata = storage.write_metadata
    monkeypatch.setattr(storage, "write_metadata", broken)
    with pytest.raises(EzpzError, match="differs from"):
        remap(source, tmp_path / "target", to)
    assert [path.name for path in tmp_path.iterdir()] == ["source"], "nothing half-written"


def test_half_of_w13_is_not_a_checkpoint(tmp_path) -> None:
    """The other half of its memory would be what happened to be there."""
    source = save(tmp_path / "source", [f"{EXPERTS}.w3_EFD", f"{EXPERTS}.w2_EDF"])
    with pytest.raises(EzpzError, match=r"w13\.weight: .* has only one of them"):
        remap(source, tmp_path / "target", "2026_09")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("to", ["2026_09", "0.2"])
@pytest.mark.parametrize(
    "names", [("w1_EFD", "w2_EDF"), ("w1_EFD", "w2_EDF", "w3_EFD", "b1_EF", "b2_ED", "b3_EF")]
)
def test_experts_that_the_target_cannot_compute_are_refused(tmp_path, names, to) -> None:
    """Without a gate, or with biases: half of them would have kept their old names."""
    source = save(tmp_path / "source", [f"{EXPERTS}.{name}" for name in names])
    with pytest.raises(EzpzError, match=f"in torchtitan 0.3 alone, so {to} could not load"):
        remap(source, tmp_path / "target", to)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_mistakes_are_said(tmp_path, capsys) -> None:
    source = save(tmp_path / "checkpoint" / "step-3", FAMILIES["qwen3"])
    dcp.save({"weight": torch.ones(2)}, checkpoint_id=tmp_path / "strange")
    for name in ("broken", "new", "hf"):
        (tmp_path / name).mkdir()
    (tmp_path / "hf" / "model.safetensors").touch()
    (tmp_path / "broken" / ".metadata").write_bytes(b"no pickle")
    for arguments, message in (
        (["inspect", str(tmp_path)], f"such as {source}"),
        (["inspect", str(source.parent)], f"such as {source}"),
        (["inspect", str(tmp_path / "gone")], "gone: there is no such folder"),
        (["inspect", str(tmp_path / "new")], "holds no checkpoint"),
        (["inspect", str(tmp_path / "hf")], "It holds safetensors"),
        (["inspect", str(tmp_path / "strange")], "no generation of torchtitan that we know"),
        (["inspect", str(tmp_path / "broken")], ".metadata: cannot be read"),
        (
            ["remap", str(source), str(tmp_path / "other"), "--to", "0.2"],
            "already has the names of torchtitan 0.2",
        ),
        (["remap", str(source), str(tmp_path / "broken"), "--to", "0.3"], "already exists"),
        (["remap", str(source), str(source / ".metadata" / "a"), "--to", "0.3"], "was not written"),
    ):
        with pytest.raises(SystemExit) as stop:
            cli.main(["ckpt", *arguments])
        assert stop.value.code == 2
        assert message in capsys.readouterr().err


def test_what_the_commands_print(tmp_path, capsys) -> None:
    source = save(tmp_path / "step-3", FAMILIES["deepseek_v3"])
    assert cli.main(["ckpt", "remap", str(source), str(tmp_path / "new"), "--to", "0.3"]) == 0
    assert "15 names changed, all 31 entries compared" in capsys.readouterr().out
    assert cli.main(["ckpt", "inspect", str(tmp_path / "new")]) == 0
    said = capsys.readouterr().out
    assert re.search(r"generation +0.3\b", said)
    assert re.search(r"dtypes +torch.float32\b", said)


MEMORY = """
import sys
from pathlib import Path
from ezpz_moe.tools.checkpoints.remapping import remap

def kibibytes(what):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(what))

remap(Path(sys.argv[1]), Path(sys.argv[2]), "0.3")  # imports, and what torch keeps
Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
before = kibibytes("VmRSS")
remap(Path(sys.argv[3]), Path(sys.argv[4]), "main")
print((kibibytes("VmHWM") - before) * 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of memory is read from Linux's /proc")
def test_memory_holds_a_few_tensors_and_not_the_checkpoint(tmp_path) -> None:
    size = 16 * 2**20
    names = [f"layers.{n}.moe.routed_experts.inner_experts.w{k}" for n in range(12) for k in (1, 3)]
    big = {f"{name}_EFD": torch.ones(4, 1024, 1024) for name in names}
    dcp.save(big, checkpoint_id=tmp_path / "big")
    small = save(tmp_path / "small", FAMILIES["deepseek_v3"])
    places = (small, tmp_path / "small.new", tmp_path / "big", tmp_path / "big.new")
    command = [sys.executable, "-c", MEMORY, *map(str, places)]
    # What is freed goes back at once. By default glibc comes to keep blocks of this size, and how
    # many it keeps differs from run to run: 50 to over 130 MB here.
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**20)}
    result = subprocess.run(
        command, check=True, capture_output=True, text=True, timeout=300, env=env
    )
    assert inspect(tmp_path / "big.new").parameters == 24 * size // 4
    # A tensor, the bytes that it was read from, and the one that it is compared with.
    assert size < int(result.stdout) < 4 * size, "of 24 tensors"
