"""The routing of whole steps: what is kept of it, and the files that it becomes. No trainer runs.

Legend: T = tokens, K = top-k, E = experts.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from routing_cases import over_runs
from torch import Tensor

from ezpz_moe.routing import keeping
from ezpz_moe.telemetry.dump import ABANDONED, Dumps, file_name

T, K, E = 4, 2, 3
X_TE = torch.tensor([[3.0, 1.0, 2.0], [0.0, 5.0, 1.0], [4.0, 1.0, 0.0], [9.0, 0.0, 1.0]])
IDS_TK = [[0, 2], [1, 2], [0, 1], [0, 2]]
MASK_T = torch.tensor([True, True, False, True])
BOTH = ("ids", "probabilities")


def keeping_its_choices(x_TE: Tensor, kept_2: Tensor) -> Tensor:
    """A router that would be a compiler's: its tensors are its own, and are written to again."""
    p_TE, mask_T = x_TE.detach().clone(), MASK_T.clone()
    ids_TK = p_TE.topk(K).indices.sort().values
    keeping.keep(kept_2, ids_TK, p_TE, mask_T)
    for each in (p_TE, ids_TK):
        each.zero_()
    return x_TE.square().sin()


@pytest.fixture(autouse=True)
def nothing_kept():
    yield
    keeping.end()


@over_runs
def test_each_microbatch_of_a_kept_step_is_kept_once(run: Callable) -> None:
    """Recomputed or not, and nothing of other steps; a compiled model needs no other program."""
    torch._dynamo.reset()
    kept_2 = torch.tensor([7, 0])
    function = run(partial(keeping_its_choices, kept_2=kept_2))
    for step in range(3):
        if is_kept := step == 1:
            kept_2[1] = 0
            keeping.begin(BOTH)
        for scale in (1.0, 2.0):
            x_TE = (scale * X_TE).requires_grad_()
            with torch._dynamo.config.patch(error_on_recompile=step > 0):
                function(x_TE).sum().backward()
        kept = keeping.end()
        assert kept.keys() == ({7} if is_kept else set())
        for scale, microbatch in zip((1.0, 2.0), kept.get(7, ()), strict=False):
            assert microbatch["ids"].tolist() == IDS_TK
            assert microbatch["probabilities"].tolist() == (scale * X_TE).tolist()
            assert microbatch["mask"].tolist() == MASK_T.tolist()
        assert len(kept.get(7, ())) == 2 * is_kept
    assert kept_2.tolist() == [7, 2]


def test_a_pipelines_trial_whose_buffers_are_put_back_is_not_kept() -> None:
    keeping.begin(BOTH)
    kept_2 = torch.tensor([7, 0])
    for trials in (1, 0, 2):
        for _ in range(trials):
            before_2 = kept_2.clone()
            keeping_its_choices(torch.ones(3, E), kept_2)
            kept_2.copy_(before_2)
        keeping_its_choices(X_TE, kept_2)
    assert [each["ids"].tolist() for each in keeping.end()[7]] == [IDS_TK] * 3


def test_only_what_is_asked_for_is_kept_in_the_dtypes_of_the_file() -> None:
    keeping.begin(("ids",))
    keeping.keep(torch.tensor([1, 0]), torch.tensor(IDS_TK), X_TE.double(), MASK_T)
    (microbatch,) = keeping.end()[1]
    dtypes = {name: each.dtype for name, each in microbatch.items()}
    assert dtypes == {"ids": torch.int16, "mask": torch.bool}
    keeping.begin(("probabilities",))
    keeping.keep(torch.tensor([1, 0]), torch.tensor(IDS_TK), X_TE.double(), MASK_T)
    (microbatch,) = keeping.end()[1]
    dtypes = {name: each.dtype for name, each in microbatch.items()}
    assert dtypes == {"probabilities": torch.float32, "mask": torch.bool}


# Files --------------------------------------------------------------------------------------------


def arrays(value: int) -> dict[str, np.ndarray]:
    return {"ids": np.full((2, T, K), value, np.int16)}


def values(folder: Path) -> dict[str, int]:
    """What is in the files of a folder, by their names."""
    return {each.name: int(np.load(each)["ids"].max()) for each in folder.glob("*.npz")}


def test_a_resumed_run_overwrites_nothing_of_the_attempt_before_it(tmp_path) -> None:
    """That had four ranks, this one has two; and it goes back twice."""
    folder = tmp_path / "routing"
    for rank in range(4):
        for step in (1, 10, 20):
            Dumps(folder, rank, 4).write(step, arrays(step + rank))
    (folder / "notes.txt").touch()
    for attempt in (1, 2):
        ranks = [Dumps(folder, rank, 2) for rank in range(2)]
        moved = [path for rank in ranks for path in rank.set_aside(6)]
        assert len(moved) == (8 if attempt == 1 else 2)
        assert values(folder) == {file_name(1, rank): 1 + rank for rank in range(4)}
        for rank, of_rank in enumerate(ranks):
            of_rank.write(10, arrays(100 * attempt + rank))
    assert values(folder)[file_name(10, 1)] == 201
    abandoned = values(folder / ABANDONED)
    assert abandoned == {
        **{f"step_10_rank_{rank}.1.npz": 10 + rank for rank in range(4)},
        **{f"step_20_rank_{rank}.1.npz": 20 + rank for rank in range(4)},
        **{f"step_10_rank_{rank}.2.npz": 100 + rank for rank in range(2)},
    }
    assert (folder / "notes.txt").exists()
    assert Dumps(tmp_path / "new", 0, 1).set_aside(1) == []


def test_dumps_that_cannot_be_written_are_said_once_and_nothing_is_left_of_them(
    tmp_path, caplog
) -> None:
    """A full disk; a dump of the same step, of before, stays whole."""
    dumps = Dumps(tmp_path, 0, 1)
    dumps.write(10, arrays(1))
    for step in (10, 20):
        (tmp_path / "rank_0.partial").symlink_to("/dev/full")
        dumps.write(step, arrays(2))
    (said,) = (each.getMessage() for each in caplog.records if each.levelno >= logging.WARNING)
    path = tmp_path / file_name(10, 0)
    assert f"{path}: cannot be written: No space left on device. The run goes on" in said
    assert [each.name for each in tmp_path.iterdir()] == [path.name]
    dumps.write(20, arrays(3))
    assert values(tmp_path) == {path.name: 1, file_name(20, 0): 3}
    (tmp_path / "rank_0.partial").symlink_to("/dev/full")
    dumps.write(30, arrays(2))
    assert len(caplog.records) == 2, "another failure is said again"
