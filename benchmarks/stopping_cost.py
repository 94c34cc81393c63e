"""What hearing SIGTERM costs a run: the question after each step, and the one to the store.

    python benchmarks/stopping_cost.py

The first is the main thread's, once a step. The second is a thread's, once a second, here over the
loopback. Medians of five rounds.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

from ezpz_moe.hosts.detect import check_host

check_host()  # before anything else imports the host: it chooses the device

from torch.distributed import TCPStore  # noqa: E402

from ezpz_moe.hosts.titan.stopping import Agreement  # noqa: E402


def microseconds(call: Callable[[], object], calls: int) -> float:
    """Return the median time of a call."""
    rounds = []
    for _ in range(5):
        begin = time.perf_counter()
        for _ in range(calls):
            call()
        rounds.append((time.perf_counter() - begin) / calls * 1e6)
    return statistics.median(rounds)


def main() -> None:
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    agreement = Agreement(store, rank=0, ranks=1, passed=0)
    print(f"a step: {microseconds(lambda: agreement.ends_at(1), 100_000):.2f} us")
    print(f"the store: {microseconds(agreement.is_asked, 2_000):.0f} us")


if __name__ == "__main__":
    main()
