"""Embeddings and output matrix as one tensor: ``tie_word_embeddings``.

The rule is that of transformers 5.24. In every class that ezpz_moe converts, an absent key means
false.
"""

from __future__ import annotations

from pathlib import Path

import torch

from ezpz_moe.errors import EzpzError
from ezpz_moe.tools.checkpoints.huggingface.files import CONFIG, Files, open_file, read_config

EMBEDDINGS = "model.embed_tokens.weight"
OUTPUT = "lm_head.weight"
_KEY = "tie_word_embeddings"


def is_tied(folder: Path) -> bool:
    """Return whether the model's ``config.json`` says that its output matrix is its embeddings.

    Raises:
        EzpzError: the file is there, and cannot be read or says neither.
    """
    said = (read_config(folder) or {}).get(_KEY, False)
    if not isinstance(said, bool):
        raise EzpzError(f"{folder / CONFIG}: {_KEY} is {said!r}; it must be true or false.")
    return said


def find_tied(folder: Path, files: Files) -> dict[str, str]:
    """Map the tensor that is absent because two are tied to the one that stands for both.

    Raises:
        EzpzError: the output matrix is absent, and ``config.json`` does not say that they are tied;
            or it says so, and both are there with different values.
    """
    match [key in files for key in (EMBEDDINGS, OUTPUT)], is_tied(folder):
        case [True, True], True:
            _check_equal(folder, files)
        case [True, False], True:
            return {OUTPUT: EMBEDDINGS}
        case [False, True], True:  # transformers ties them in this direction too
            return {EMBEDDINGS: OUTPUT}
        case [True, False], False:
            # A file that was left out in copying looks the same.
            raise EzpzError(
                f"{folder}: has no {OUTPUT}, and no {CONFIG} there says "
                f'"{_KEY}": true, with which it would be {EMBEDDINGS}. Is it whole?'
            )
    return {}


def tied_notes(tied: dict[str, str]) -> list[str]:
    """Return what to tell the user about each tensor that another stands for."""
    return [
        f"{absent} is a copy of {present}, because {CONFIG} ties the two. The flavor's model "
        "trains them apart."
        for absent, present in tied.items()
    ]


def _check_equal(folder: Path, files: Files) -> None:
    """Check that tied tensors which are both there are the same, as those of old formats are."""
    embeddings, output = (_read(folder, files[key], key) for key in (EMBEDDINGS, OUTPUT))
    if embeddings.shape != output.shape or not (embeddings == output).all():
        raise EzpzError(
            f'{folder / CONFIG}: says "{_KEY}": true, but {OUTPUT} (in {files[OUTPUT]}) is not '
            f"{EMBEDDINGS} (in {files[EMBEDDINGS]}). transformers warns, and computes with "
            f'both. Do likewise with "{_KEY}": false; or, if {OUTPUT} does not belong to the '
            "model, remove it from the safetensors and from their index."
        )


def _read(folder: Path, file: str, key: str) -> torch.Tensor:
    with open_file(folder / file) as opened:
        return opened.get_tensor(key)
