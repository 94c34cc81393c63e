"""Measure a plan read from stdin; every result is one line of JSON on stdout.

:mod:`.plan` starts this process to measure with another allocator.
"""

from __future__ import annotations

import contextlib
import sys

from pydantic import TypeAdapter

from ezpz_moe.errors import exit_on_user_error
from ezpz_moe.tools.bench.plan import Plan, run_here
from ezpz_moe.tools.bench.results import Measured


def main() -> None:
    plan = TypeAdapter(Plan).validate_json(sys.stdin.read())
    results = sys.stdout
    # stdout carries results only; whatever a library prints goes to stderr.
    with exit_on_user_error(), contextlib.redirect_stdout(sys.stderr):
        for measured in run_here(plan):
            print(TypeAdapter(Measured).dump_json(measured).decode(), file=results, flush=True)


if __name__ == "__main__":
    main()
