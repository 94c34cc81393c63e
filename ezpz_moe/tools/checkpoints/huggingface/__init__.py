"""Models as Hugging Face's folders: to and from transformers, with the same logits or not at all.

``exporting``    the folder that transformers opens
``importing``    the way back
``config``       the class of transformers that computes a model, and its ``config.json``
``differences``  what another ``config.json`` says otherwise
``tied``         embeddings and output matrix as one tensor
``card``         what stands beside the weights: config, tokenizer, model card
``model``        what both ways know of a model
``files``        which of a folder's safetensors holds a tensor, and reading it
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ezpz_moe.errors import EzpzError
from ezpz_moe.tools.checkpoints.huggingface.exporting import export
from ezpz_moe.tools.checkpoints.huggingface.importing import import_
from ezpz_moe.tools.checkpoints.huggingface.model import Converted, Model
from ezpz_moe.tools.checkpoints.names import current_name


def convert(
    source: Path,
    target: Path,
    to: str,
    model: Model,
    measure: Callable[[], str] | None = None,
) -> Converted:
    """Call :func:`export` for "hf", or :func:`import_` for the installed host's generation.

    Raises:
        EzpzError: as these two; or safetensors should become a checkpoint of another host.
    """
    if to == "hf":
        return export(source, target, model, measure)
    to = current_name(to)
    if to != model.generation:
        raise EzpzError(
            f"{source}: the installed host writes the names of torchtitan {model.generation}, not "
            f"{to}. Use --to {model.generation}, then run ezpz-moe ckpt remap again."
        )
    return import_(source, target, model)
