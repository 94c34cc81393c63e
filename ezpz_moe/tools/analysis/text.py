"""A text, cut into the sequences that the trainer would make from it.

Legend of the suffixes: L = length of a sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Sequence:
    """A sequence of the packed text.

    Attributes:
        tokens_L: token IDs.
        labels_L: the token that follows each within its document.
        positions_L: where each token is in its document, counted from the start of the sequence.
    """

    tokens_L: torch.Tensor
    labels_L: torch.Tensor
    positions_L: torch.Tensor


def sequences(
    documents: Iterable[str], encode: Callable[[str], list[int]], length: int
) -> Iterator[Sequence]:
    """Join documents and cut them into sequences of ``length`` tokens; a shorter rest is dropped.

    Args:
        encode: turns a document into tokens, including those that mark its beginning and end.
        length: L.
    """
    tokens: list[int] = []
    labels: list[int] = []
    positions: list[int] = []
    for document in documents:
        encoded = encode(document)
        # The last token of a document is a label only: nothing follows it.
        tokens += encoded[:-1]
        labels += encoded[1:]
        positions += range(len(encoded) - 1)
        while len(tokens) >= length:
            yield Sequence(
                torch.tensor(tokens[:length]),
                torch.tensor(labels[:length]),
                torch.tensor(_from_zero(positions[:length])),
            )
            del tokens[:length], labels[:length], positions[:length]


def _from_zero(positions: list[int]) -> list[int]:
    """Restart positions at 0 where the sequence cuts into a document."""
    first = positions[0]
    until = next((i for i, each in enumerate(positions) if i and each == 0), len(positions))
    return [each - first for each in positions[:until]] + positions[until:]
