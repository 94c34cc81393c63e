"""Damage as a disk, a copy or a stranger does it to a file, from a seed."""

from __future__ import annotations

import random
from collections.abc import Iterator


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
