"""Would a CPU be faster with an expert on each thread, instead of all threads at each expert?

    python benchmarks/experts_per_thread.py
    GOMP_SPINCOUNT=2000 python benchmarks/experts_per_thread.py

One product of OLMoE/4, forward: as ``for_loop`` does it; with experts taken from one list by
threads of our own, each with one OpenMP thread; and, where all experts have as many rows,
``torch.bmm``. Before each comes an elementwise product with all of torch's threads, as in a layer.
The second form has them sleep early between two parallel regions. The figures are in
docs/internals/hardware.md.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor
from turns import medians

from ezpz_moe.cli import display
from ezpz_moe.tools.bench.routings import counts_of

E, D, HIDDEN, R = 64, 512, 256, 8192

Product = tuple[Tensor, Tensor, Tensor]
"""x [n, D], w.T [D, F] and out [n, F] of an expert."""


def single_threaded_pool(threads: int) -> ThreadPoolExecutor:
    """Threads whose products are computed by themselves alone."""
    everyone = torch.get_num_threads()
    all_here = threading.Barrier(threads + 1)

    def begin() -> None:
        torch.get_num_threads()  # or the first product would set what set_num_threads has set
        torch.set_num_threads(1)

    pool = ThreadPoolExecutor(threads, initializer=begin)
    for _ in range(threads):
        pool.submit(all_here.wait)
    all_here.wait()
    torch.set_num_threads(everyone)  # for this thread, and for those that come later
    return pool


def one_after_the_other(products: Sequence[Product]) -> None:
    for x_nD, w_DF, out_nF in products:
        torch.mm(x_nD, w_DF, out=out_nF)


def one_on_each_thread(products: Sequence[Product], pool: ThreadPoolExecutor) -> None:
    left = iter(sorted(products, key=lambda each: -len(each[0])))

    def take() -> None:
        for x_nD, w_DF, out_nF in left:
            torch.mm(x_nD, w_DF, out=out_nF)

    for done in [pool.submit(take) for _ in range(torch.get_num_threads())]:
        done.result()


def main() -> None:
    pool = single_threaded_pool(torch.get_num_threads())
    w_EDF = torch.randn(E, HIDDEN, D, dtype=torch.bfloat16).transpose(1, 2)
    x_RD, out_RF = (torch.randn(R, size, dtype=torch.bfloat16) for size in (D, HIDDEN))
    timed: dict[tuple[str, str], Callable[[], object]] = {}
    for routing in ("balanced", "zipf1"):
        counts = counts_of(routing, E, R)
        products = list(zip(x_RD.split(counts), w_EDF.unbind(), out_RF.split(counts), strict=True))
        timed[routing, "all threads at each"] = lambda p=products: one_after_the_other(p)
        timed[routing, "one on each thread"] = lambda p=products: one_on_each_thread(p, pool)
    timed["balanced", "torch.bmm"] = lambda: torch.bmm(x_RD.view(E, -1, D), w_EDF)

    found = medians(timed, before=lambda: torch.mul(out_RF, out_RF))
    rows = (
        {"routing": routing, "experts": how, "ms": f"{ms:.2f}"}
        for (routing, how), ms in sorted(found.items())
    )
    title = f"E={E} D={D} F={HIDDEN} R={R}, bfloat16, {torch.get_num_threads()} threads"
    display.print_table(rows, title=title)


if __name__ == "__main__":
    main()
