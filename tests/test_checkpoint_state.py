"""What besides names differs between the generations: position in the data, and the schedule."""

from __future__ import annotations

import pickle
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from checkpoint_cases import OTHERS, THREE, loaded, trained

from ezpz_moe import cli
from ezpz_moe.errors import EzpzError
from ezpz_moe.tools.checkpoints.contents import inspect
from ezpz_moe.tools.checkpoints.remapping import remap

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is unavailable")


def save_run(folder: Path, position: dict, **more) -> Path:
    """A checkpoint with the dataloader's state of one rank, in torchdata's shape."""
    data = {"dp_rank_0": pickle.dumps({"_num_yielded": 4, "dataset_state": position})}
    state = {**trained(), "dataloader": {**data, "world_size": 1}}
    dcp.save(state | more, checkpoint_id=folder)
    return folder


def position_of(folder: Path) -> dict:
    state = pickle.loads(loaded(folder)["dataloader"]["dp_rank_0"])
    assert state["_num_yielded"] == 4
    return state["dataset_state"]


def test_the_position_in_the_data_is_carried(tmp_path) -> None:
    """Tokens 1 to 5 are left over of a document that is partly trained on, and a short one."""
    of_0_3 = {
        "inputs_buffer": [1, 2, 4],
        "labels_buffer": [2, 3, 5],
        "positions_buffer": [61, 62, 0],
        "sample_idx": 28,
        "epoch": 0,
    }
    source = save_run(tmp_path / "source", of_0_3)
    remap(source, tmp_path / "old", "0.2")
    of_0_2 = position_of(tmp_path / "old")
    assert of_0_2.items() >= {"token_buffer": [1, 2, 3, 4, 5], "sample_idx": 28}.items()
    remap(tmp_path / "old", tmp_path / "back", "0.3")
    assert position_of(tmp_path / "back").items() >= of_0_3.items()


@pytest.mark.parametrize("tokens", [[7, 8, 9], [7], []])
def test_tokens_that_0_2_had_left_are_the_pairs_it_would_have_trained_on(tmp_path, tokens) -> None:
    position = {"token_buffer": tokens, "sample_idx": 28}
    old = save_run(tmp_path / "new", position)
    remap(old, tmp_path / "old", "0.2")
    remap(tmp_path / "old", tmp_path / "again", "0.3")
    state = position_of(tmp_path / "again")
    pairs = zip(state["inputs_buffer"], state["labels_buffer"], strict=True)
    assert list(pairs) == list(pairwise(tokens))
    assert state["positions_buffer"] == list(range(len(state["inputs_buffer"])))
    assert state.items() >= position.items()


def test_a_position_that_the_target_cannot_read_is_said(tmp_path, capsys) -> None:
    source = save_run(tmp_path / "source", {"token_buffer": [], "sample_idx": 3})
    assert cli.main(["ckpt", "remap", str(source), str(tmp_path / "main"), "--to", "main"]) == 0
    assert "--checkpoint.exclude_from_loading dataloader" in capsys.readouterr().out
    assert inspect(tmp_path / "main").generation == "2026_09"  # what was once called main
    assert not remap(source, tmp_path / "old", "0.2").notes
    grain = {"dataloader": {"dp_rank_0": {"parent_state": {"next_index": 3}}, "version": 1}}
    dcp.save(trained() | grain, checkpoint_id=tmp_path / "grain")
    assert remap(tmp_path / "grain", tmp_path / "grain_old", "0.2").notes
    assert not remap(tmp_path / "grain", tmp_path / "grain_main", "2026_09").notes


def with_rates(**of_w1) -> dict:
    optimizer = trained()["optimizer"]
    for name in (*THREE, *OTHERS):
        optimizer |= {f"param_groups.{name}.initial_lr": 2e-3, f"param_groups.{name}.lr": 1e-3}
    return optimizer | {f"param_groups.{THREE[0]}.{key}": value for key, value in of_w1.items()}


def test_0_2_gets_the_whole_state_of_the_schedule(tmp_path) -> None:
    """What torch's own scheduler has after four steps; 0.3 saves their number alone."""
    optimizer = torch.optim.AdamW([torch.zeros(1)], lr=2e-3)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 8)
    for _ in range(4):
        optimizer.step()
        scheduler.step()
    expected = scheduler.state_dict()
    del expected["lr_lambdas"]
    more = {"lr_scheduler": {"last_epoch": 4}, "optimizer": with_rates()}
    source = save_run(tmp_path / "source", {}, **more)
    remap(source, tmp_path / "old", "0.2")
    assert loaded(tmp_path / "old")["lr_scheduler"] == expected
    remap(tmp_path / "old", tmp_path / "back", "0.3")
    remap(tmp_path / "back", tmp_path / "again", "0.2")
    assert loaded(tmp_path / "again")["lr_scheduler"] == expected


def test_0_2_has_one_rate_for_all_parameters(tmp_path) -> None:
    more = {"lr_scheduler": {"last_epoch": 4}, "optimizer": with_rates(initial_lr=5e-3)}
    source = save_run(tmp_path / "source", {}, **more)
    with pytest.raises(EzpzError, match="2 values of initial_lr"):
        remap(source, tmp_path / "old", "0.2")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
