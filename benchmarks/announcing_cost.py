"""How long rank 0 counts what its model consists of before a run begins.

    python benchmarks/announcing_cost.py
    python benchmarks/announcing_cost.py --flavor 671B_sdpa --repeats 5

On the meta device, as in a run: the trainer has the model anyway, so building it is not in it.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from types import SimpleNamespace

import tyro

from ezpz_moe.config.flavors import load_flavor
from ezpz_moe.hosts.detect import check_host


@dataclass(frozen=True)
class Arguments:
    """How long rank 0 counts what its model consists of."""

    flavor: str = "16B_sdpa"
    length: int = 2048
    repeats: int = 9


def main(arguments: Arguments) -> None:
    check_host()  # before torchtitan is imported: it chooses the device
    from ezpz_moe.hosts.titan.announcing import consists_of
    from ezpz_moe.hosts.titan.parameters import build_on_meta

    flavor = load_flavor(arguments.flavor)
    model, training = build_on_meta(flavor), SimpleNamespace(seq_len=arguments.length)
    print(consists_of(model, flavor, training))
    seconds = []
    for _ in range(arguments.repeats):
        start = time.perf_counter()
        consists_of(model, flavor, training)
        seconds.append(time.perf_counter() - start)
    # The lowest is what it takes; a median above it is other work on the machine.
    lowest, median = min(seconds), statistics.median(seconds)
    print(f"{arguments.repeats} times: {lowest:.3f} s at least, {median:.3f} s in the median")


if __name__ == "__main__":
    main(tyro.cli(Arguments))
