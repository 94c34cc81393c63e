"""How many choices of experts change if a checkpoint's selection biases are left out.

Legend of the suffixes: S = sequences, L = their length, K = experts of a token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from pydoc_data.topics import topics

import torch

from ezpz_moe.config.flavors import Flavor
from ezpz_moe.errors import EzpzError
from ezpz_moe.hosts.detect import host
from ezpz_moe.tools.analysis.record import record
from ezpz_moe.tools.analysis.text import Sequence, sequences

_LENGTH, _SEQUENCES = 256, 8


@dataclass(frozen=True)
class Changed:
    """How many of all choices change, over all layers, and what that does to the text's loss."""

    changed: int
    choices: int
    loss: float
    loss_without: float


def changed_choices(checkpoint: Path, flavor: Flavor, tokenizer: Path) -> Changed:
    """Run a checkpoint's model on sample text with its biases and without.

    The whole model is in memory, on the CPU. A layer's choices also change because those of earlier
    layers have.

    Args:
        checkpoint: a DCP checkpoint's folder.
        flavor: its model.
        tokenizer: the folder of the tokenizer that the model was trained with.

    Raises:
        EzpzError: there is no tokenizer, or it does not fit the model; and as :func:`record`.
    """
    text = _sample(host().analysis().encoder(str(tokenizer), flavor))
    # float32, because rounded scores would tie where a small bias decides.
    with_bias, without = (
        record(checkpoint, flavor, text, device="cpu", dtype=torch.float32, with_bias=with_bias)
        for with_bias in (True, False)
    )
    changed = choices = 0
    for name, routing in with_bias.routing.items():
        ids_SLK, others_SLK = routing.ids_SLK, without.routing[name].ids_SLK
        # Compared as sets: the same experts in another order are no change.
        kept_SLK = (ids_SLK.unsqueeze(-1) == others_SLK.unsqueeze(-2)).any(-1)
        changed += int((~kept_SLK).sum())
        choices += ids_SLK.numel()
    return Changed(changed, choices, with_bias.loss, without.loss)


def _sample(encode: Callable[[str], list[int]]) -> list[Sequence]:
    """Return the beginning of the text that every Python brings."""
    documents = (topics[name] for name in sorted(topics))
    text = list(islice(sequences(documents, encode, _LENGTH), _SEQUENCES))
    if not text:
        raise EzpzError("the job's tokenizer makes too few tokens of the sample text.")
    return text
