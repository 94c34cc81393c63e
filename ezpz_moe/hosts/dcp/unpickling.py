"""Read pickles of strangers: nothing that they name is run, apart from a few known classes.

A pickle is a program. It calls whatever function it names, which may be any of the machine's, so
``pickle.load`` of a file means to trust whoever wrote it. Here a name that is not on a list ends
the reading. The lists are short, because DCP's metadata is made of a few dataclasses, and the
position in the data of plain values.
"""

from __future__ import annotations

import io
import pickle
import pickletools
from typing import Any

from ezpz_moe.hosts.dcp.kinds import Kinds, Known

_AT_INDEX = {"BINPUT", "LONG_BINPUT"}
"""Opcodes that number what is referred to again. DCP writes protocol 4 or later, without them."""
_WIDTHS = {
    pickletools.TAKEN_FROM_ARGUMENT1: 1,
    pickletools.TAKEN_FROM_ARGUMENT4: 4,
    pickletools.TAKEN_FROM_ARGUMENT4U: 4,
    pickletools.TAKEN_FROM_ARGUMENT8U: 8,
}


class Refused(Exception):
    """A pickle names what is not on the list. ``str`` of it is the name."""


def load_metadata(pickled: bytes, kinds: Kinds) -> Any:
    """Unpickle DCP's metadata. The result may have any type: see :mod:`.structure`.

    Raises:
        Refused: it names something else than DCP's classes, dtypes and paths.
        Exception: of any class, if it is damaged.
    """
    return _load(pickled, kinds.known)


def load_plain(pickled: bytes) -> Any:
    """Unpickle numbers, strings, bytes, lists, tuples, dicts and sets of such.

    Raises:
        Refused: it names a class or function.
        Exception: of any class, if it is damaged.
    """
    return _load(pickled, lambda module, name: None)


def _load(pickled: bytes, known: Known) -> Any:
    _check_opcodes(pickled)
    return _Unpickler(pickled, known).load()


def _check_opcodes(pickled: bytes) -> None:
    """Check that unpickling takes no more memory than the pickle is large.

    Python makes room for as many references as the largest number of one says, and for as many
    bytes as a length says: a single damaged byte would ask for gigabytes.

    Raises:
        UnpicklingError: it is cut off, or has opcodes that no DCP writes.
    """
    # By a table, because pickletools.genops takes longer than the unpickling.
    at, end, stop = 0, len(pickled), pickle.STOP[0]
    while at < end and (code := pickled[at]) != stop:
        step = _STEPS[code]
        if step > 0:
            at += step
        elif step < 0:
            text = at + 1 - step
            at = text + int.from_bytes(pickled[at + 1 : text], "little")
        else:
            raise pickle.UnpicklingError(f"unexpected byte at {at}")
    if at >= end:
        raise pickle.UnpicklingError("it is cut off")


def _steps() -> list[int]:
    """Return, for each byte, how long its opcode is with its argument.

    Negative is the width of a length that is followed by so many bytes; 0 is refused.
    """
    steps = [0] * 256
    for opcode in pickletools.opcodes:
        size = opcode.arg.n if opcode.arg else 0
        if opcode.name in _AT_INDEX:
            continue
        if size >= 0:
            steps[ord(opcode.code)] = 1 + size
        elif size in _WIDTHS:  # and not text up to a newline, as in protocol 0
            steps[ord(opcode.code)] = -_WIDTHS[size]
    return steps


_STEPS = _steps()


class _Unpickler(pickle.Unpickler):
    def __init__(self, pickled: bytes, known: Known) -> None:
        super().__init__(io.BytesIO(pickled))
        self._known = known

    def find_class(self, module: str, name: str) -> Any:
        """Return what the pickle names; Python asks here for everything that it would call."""
        found = self._known(module, name)
        if found is None:
            # As a literal: it is a stranger's text, and may hold what a terminal acts on.
            raise Refused(repr(f"{module}.{name}"))
        return found
