"""What a folder with weights holds, by its files alone. Nothing here imports torch."""

from __future__ import annotations

import re
from pathlib import Path

from ezpz_moe.errors import EzpzError

METADATA = ".metadata"
INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
_FOLDER = "checkpoint"  # the host's default of checkpoint.folder


def refuse_other_folders(folder: Path) -> None:
    """Refuse a folder that is not a checkpoint of torch.distributed.checkpoint (DCP).

    Raises:
        EzpzError: says what is there instead.
    """
    if folder.is_file():
        raise EzpzError(
            f"{folder}: is a file. Name a checkpoint's folder, such as outputs/checkpoint/step-100."
        )
    if not folder.is_dir():
        raise EzpzError(f"{folder}: there is no such folder.")
    if not (folder / METADATA).is_file():
        raise EzpzError(
            f"{folder}: holds no checkpoint of torch.distributed.checkpoint (no .metadata)."
            f"{_what_else(folder)}"
        )


def find_checkpoint(path: Path) -> Path:
    """Find the folder of one checkpoint: ``path`` itself, or the newest step below it.

    Args:
        path: a ``step-N`` folder, the folder that contains these, or a run's dump folder.

    Raises:
        EzpzError: there is no checkpoint.
    """
    if (path / METADATA).is_file():
        return path
    for folder in (path, path / _FOLDER):
        if found := complete_steps(folder):
            return found[max(found)]
    refuse_other_folders(path)
    raise AssertionError(path)


def complete_steps(folder: Path) -> dict[int, Path]:
    """Return step -> folder of the checkpoints in ``folder`` that have their metadata.

    Leaves out others such as "step-20.partial", which a ``ckpt remap`` is writing, or a copy.
    """
    # Steps as numbers: as strings, step-20 would be newer than step-100.
    return {
        int(match[1]): file.parent
        for file in folder.glob(f"step-*/{METADATA}")
        if (match := re.fullmatch(r"step-(\d+)", file.parent.name))
    }


def find_weights(path: Path) -> Path:
    """Find the folder with a model's weights: ``path`` itself, or the newest checkpoint below it.

    Raises:
        EzpzError: there is neither a checkpoint nor safetensors.
    """
    if not (path / METADATA).is_file() and is_safetensors(path):
        return path
    return find_checkpoint(path)


def is_safetensors(folder: Path) -> bool:
    """Return whether ``folder`` holds Hugging Face's safetensors, or an index that names some.

    Raises:
        EzpzError: it holds Hugging Face's older form of weights instead, which is a pickle.
    """
    if any(folder.glob("*.safetensors")) or (folder / INDEX).is_file():
        return True
    if pickled := sorted(folder.glob("pytorch_model*.bin")):
        raise EzpzError(
            f"{pickled[0]}: is a pickle, which ezpz_moe does not read. Save the model as "
            "safetensors first, with transformers: AutoModelForCausalLM.from_pretrained(...)"
            ".save_pretrained(...)."
        )
    return False


def _what_else(folder: Path) -> str:
    """Give a hint for a folder that does not hold a checkpoint itself."""
    if any(folder.glob("*.safetensors")):
        return " It holds safetensors, which ckpt remap reads with --model FLAVOR|JOB.toml."
    steps = [*folder.glob(f"step-*/{METADATA}"), *folder.glob(f"*/step-*/{METADATA}")]
    if not steps:
        return ""
    # By time: these may be of several runs, whose step numbers do not compare.
    newest = max(steps, key=lambda path: path.stat().st_mtime)
    return f" There are checkpoints below it, such as {newest.parent}."
