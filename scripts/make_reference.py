"""Write the tables of docs/reference, and the index of the benchmarks, from the code.

    python scripts/make_reference.py            rewrite the tables
    python scripts/make_reference.py --check    exit with 1 if one is out of date

What a key or a figure means is written by people, into the last cells of its row; a row without it
is exit code 1.
"""

from __future__ import annotations

import sys

import tables
import tyro
from reference import benchmarks, commands, flavor_keys, job_keys, metrics

PARTS = (job_keys, flavor_keys, commands, metrics, benchmarks)


def main(check: bool = False) -> int:
    """Write the tables of docs/reference, and the index of the benchmarks.

    Args:
        check: write nothing; exit with 1 if a table is out of date.
    """
    failed = 0
    for part in PARTS:
        for document, made in part.made().items():
            failed |= tables.update(document, made, check=check)
            for name, text in made.items():
                for key in tables.without(text, ("meaning", "formula")):
                    print(f"{document}, {name}: {key} has no meaning; write it", file=sys.stderr)
                    failed = 1
    return failed


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
