"""Ranks' load in orders of experts, as tables: ours, greedy, and what no order is below.

python benchmarks/placement.py

Greedy gives the highest load that is left to the idlest rank that has a place. Loads are Zipf's,
1 / n ** s, dealt to the experts at random: 61 layers, each with its own numbers. Pairs are of
tokens that choose experts of one cluster mostly, with as many clusters as nodes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial

import numpy as np

from ezpz_moe.tools.placement.even import even_order, least_possible
from ezpz_moe.tools.placement.layer import Grid, even_orders, order_with_pairs
from ezpz_moe.tools.placement.orders import Floats, Ints, moved, rank_loads
from ezpz_moe.tools.placement.together import weight_inside

LAYERS = 61
TOKENS = 4096


def main() -> None:
    print(markdown(even_rows()))
    print()
    print(markdown(pair_rows()))


def even_rows() -> Iterable[dict[str, str]]:
    for experts, ranks in ((64, 8), (256, 8), (256, 16), (64, 64), (256, 64)):
        for exponent in (0.5, 1.0, 1.2):
            random = np.random.default_rng(0)
            one_layer_E = np.arange(1, experts + 1.0) ** -exponent
            loads_LE = random.permuted(np.tile(one_layer_E, (LAYERS, 1)), axis=1)
            ours_LE, seconds = timed(partial(even_order, loads_LE, ranks))
            greedy_LE, greedy_seconds = timed(partial(greedy, loads_LE, ranks))
            as_it_is_LE = np.tile(np.arange(experts), (LAYERS, 1))
            least = (least_possible(loads_LE, ranks) / loads_LE.sum(1)).mean() * ranks
            yield {
                "E": str(experts),
                "ranks": str(ranks),
                "s": f"{exponent}",
                "as it is": f"{over_mean(loads_LE, as_it_is_LE, ranks):.3f}",
                "greedy": f"{over_mean(loads_LE, greedy_LE, ranks):.3f}",
                "place": f"{over_mean(loads_LE, ours_LE, ranks):.3f}",
                "at best": f"{least:.3f}",
                "moved": f"{np.mean([moved(each, ranks) for each in ours_LE]) / experts:.0%}",
                "greedy, s": f"{greedy_seconds:.2f}",
                "place, s": f"{seconds:.2f}",
            }


def pair_rows() -> Iterable[dict[str, str]]:
    for experts, ranks, nodes, top_k in ((64, 16, 4, 6), (256, 64, 8, 8)):
        for stray in (0.05, 0.3):
            pairs_EE, loads_E = tokens_of_clusters(experts, nodes, top_k, stray)
            grid = Grid(experts, ranks, ranks // nodes)
            orders: Mapping[str, Callable[[], Ints]] = {
                "as it is": partial(np.arange, experts),
                "load": lambda loads_LE=loads_E[None], grid=grid: even_orders(loads_LE, grid)[0],
                "affinity": partial(order_with_pairs, loads_E, pairs_EE, grid, "affinity"),
                "both": partial(order_with_pairs, loads_E, pairs_EE, grid, "both"),
            }
            for by, make in orders.items():
                order_E, seconds = timed(make)
                inside = weight_inside(pairs_EE, order_E, nodes) / pairs_EE.sum() * 2
                yield {
                    "E": str(experts),
                    "ranks": str(ranks),
                    "nodes": str(nodes),
                    "outside of the cluster": f"{stray:.0%}",
                    "by": by,
                    "max / mean": f"{over_mean(loads_E[None], order_E[None], ranks):.3f}",
                    "pairs on a node": f"{inside:.0%}",
                    "a layer, s": f"{seconds:.2f}",
                }


def greedy(loads_LE: Floats, ranks: int) -> Ints:
    """Return the orders in which the highest load left goes to the idlest rank with a place."""
    layers, experts = loads_LE.shape
    sums_LR, taken_LR = np.zeros((layers, ranks)), np.zeros((layers, ranks), dtype=int)
    orders_LRC, layer = np.zeros((layers, ranks, experts // ranks), dtype=int), np.arange(layers)
    for expert in np.argsort(-loads_LE, axis=1, kind="stable").T:
        rank = np.where(taken_LR < experts // ranks, sums_LR, np.inf).argmin(1)
        orders_LRC[layer, rank, taken_LR[layer, rank]] = expert
        taken_LR[layer, rank] += 1
        sums_LR[layer, rank] += loads_LE[layer, expert]
    return orders_LRC.reshape(layers, experts)


def tokens_of_clusters(
    experts: int, clusters: int, top_k: int, stray: float
) -> tuple[Floats, Floats]:
    """Return pairs_EE and loads_E of tokens that mostly choose experts of one cluster each.

    Args:
        stray: the weight of all others together, before the experts' own popularity.
    """
    random = np.random.default_rng(0)
    popular_E = random.permutation(np.arange(1, experts + 1.0) ** -0.3)
    cluster_E = random.permutation(np.arange(experts) % clusters)
    chosen_TE = np.zeros((TOKENS, experts))
    for of_token_E, cluster in zip(chosen_TE, random.integers(clusters, size=TOKENS), strict=True):
        others = stray / (clusters - 1)
        weight_E = popular_E * np.where(cluster_E == cluster, 1 - stray, others)
        of_token_E[np.argsort(-np.log(weight_E) - random.gumbel(size=experts))[:top_k]] = 1
    pairs_EE = chosen_TE.T @ chosen_TE
    loads_E = pairs_EE.diagonal().copy()
    np.fill_diagonal(pairs_EE, 0)
    return pairs_EE, loads_E


def over_mean(loads_LE: Floats, orders_LE: Ints, ranks: int) -> float:
    """Return the busiest rank's load over the mean, on the average of the layers."""
    of_ranks_LR = rank_loads(np.take_along_axis(loads_LE, orders_LE, 1), ranks)
    return float((of_ranks_LR.max(1) / of_ranks_LR.mean(1)).mean())


def timed(make: Callable[[], Ints]) -> tuple[Ints, float]:
    """Return what it makes, and the median of three: CPU seconds, as others may be at work too."""
    seconds = []
    for _ in range(3):
        begun = time.process_time()
        made = make()
        seconds.append(time.process_time() - begun)
    return made, sorted(seconds)[1]


def markdown(rows: Iterable[Mapping[str, str]]) -> str:
    first, *rest = rows
    lines = [first.keys(), ["---:"] * len(first), first.values(), *(row.values() for row in rest)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    main()
