"""A text, cut into the sequences that the trainer would make from it.

Legend of the suffixes: L = length of a sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch

from ezpz_moe.errors import EzpzError
from ezpz_moe.hosts.documents import COLUMN, read_documents


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


def read_sequences(
    file: Path, encode: Callable[[str], list[int]], length: int, number: int
) -> list[Sequence]:
    """Return the first sequences of a file of text, as many as there are.

    Args:
        file: as for a job's dataset_path.
        encode: as for :func:`sequences`.
        length: L.
        number: of sequences, at most.

    Raises:
        EzpzError: it cannot be read, or is too short for one sequence.
    """
    documents = read_documents(str(file))[COLUMN]
    # islice: only as many documents are tokenized as these sequences need.
    text = list(islice(sequences(documents, encode, length), number))
    if not text:
        raise EzpzError(
            f"{file}: has fewer than {length} tokens, too few to fill one sequence. Use more text, "
            "or a smaller --seq-len."
        )
    return text


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
