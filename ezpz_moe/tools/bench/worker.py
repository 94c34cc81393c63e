"""Measure a plan read from stdin; every step and result is one line of JSON on stdout.

:mod:`.plan` starts this process to measure with another allocator.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from functools import partial
from typing import TextIO

from pydantic import TypeAdapter

from ezpz_moe.errors import exit_on_user_error
from ezpz_moe.tools.bench.measuring import Tick
from ezpz_moe.tools.bench.plan import Begun, Message, Plan, Ticked, run_here


def main() -> None:
    plan = TypeAdapter(Plan).validate_json(sys.stdin.read())
    told = sys.stdout
    # stdout carries results only; whatever a library prints goes to stderr.
    with exit_on_user_error(), redirect_stdout(sys.stderr):
        for measured in run_here(plan, partial(_progress, told)):
            _tell(told, measured)


@contextmanager
def _progress(told: TextIO, what: str, total: int) -> Iterator[Tick]:
    """Pass the progress on to the parent."""
    _tell(told, Begun(what, total))
    yield lambda name: _tell(told, Ticked(name))


def _tell(told: TextIO, message: Message) -> None:
    # flush: the parent shows a step when it begins, not when a buffer is full.
    line: TypeAdapter[Message] = TypeAdapter(type(message))
    print(line.dump_json(message).decode(), file=told, flush=True)


if __name__ == "__main__":
    main()
