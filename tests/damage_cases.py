"""Checkpoints as a disk, a copy or a stranger damages them, and the commands that read them."""

from __future__ import annotations

import pickle
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch.distributed.checkpoint as dcp
from checkpoint_cases import trained

from ezpz_moe.errors import EzpzError
from ezpz_moe.tools import trained as trained_weights
from ezpz_moe.tools.checkpoints import storage
from ezpz_moe.tools.checkpoints.contents import inspect
from ezpz_moe.tools.checkpoints.remapping import remap
from ezpz_moe.tools.upcycling.dense import DenseCheckpoint

COMMANDS: dict[str, Callable] = {
    "inspect": inspect,
    "remap": lambda folder: remap(folder, folder.with_name("out"), "2026_09"),
    "upcycle": lambda folder: DenseCheckpoint(folder, SimpleNamespace(generation="0.3")),
    "analyze": lambda folder: trained_weights._of_checkpoint(folder, {}),
    "train": storage.check_metadata,
}
"""What reads a checkpoint, before it asks for anything of the model."""


def save(folder: Path, **more) -> Path:
    dcp.save(trained() | more, checkpoint_id=folder)
    return folder


def save_run(folder: Path) -> Path:
    """A run's checkpoint with all that remap converts."""
    position = {"inputs_buffer": [1], "labels_buffer": [2], "positions_buffer": [0]}
    optimizer = trained()["optimizer"]
    names = [name for name in optimizer if name.endswith(".lr")]
    optimizer |= {name.replace(".lr", ".initial_lr"): 1e-3 for name in names}
    data = {"dp_rank_0": pickle.dumps({"dataset_state": position}), "world_size": 1}
    return save(folder, optimizer=optimizer, lr_scheduler={"last_epoch": 7}, dataloader=data)


def refusal(call: Callable, *arguments) -> str:
    """What a call is refused with, on one line."""
    with pytest.raises(EzpzError) as error:
        call(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


def mutations(original: bytes, *, number: int, seed: int) -> Iterator[bytes]:
    """``number`` damaged copies of a file, each of them other than the original."""
    draw = random.Random(seed)
    while number:
        damaged = _mutated(original, draw)
        if damaged != original:
            number -= 1
            yield damaged


def _mutated(original: bytes, draw: random.Random) -> bytes:
    at = draw.randrange(len(original))
    after = min(at + draw.choice((1, 2, 4, 32)), len(original))
    replacement = draw.choice(
        (
            draw.randbytes(1),
            bytes([original[at] ^ 1 << draw.randrange(8)]),
            b"",
            original[at:after] * 2,
            bytes(after - at),
            draw.randbytes(after - at),
        )
    )
    if draw.random() < 0.1:  # a copy that was interrupted
        return original[:at]
    return original[:at] + replacement + original[after:]
