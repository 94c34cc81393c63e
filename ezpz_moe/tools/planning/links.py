"""How long a collective takes on a machine's links. Seconds and bytes."""

from __future__ import annotations

from math import ceil, log2

from ezpz_moe.tools.planning.machine import Machine, Measured


def seconds(
    on: Machine, ranks_per_node: int, kind: str, size: int, stride: int, sent: float
) -> float:
    """Return the time of one collective: as measured, or else by bandwidth and latency.

    Rings for all-gather and reduce-scatter, which pass (n - 1) / n of the whole on every link; an
    all-reduce is one after the other (Thakur, Rabenseifner and Gropp, 2005). A ring that leaves its
    node has as many links to do so as it has ranks there. Latency counts log2(n) times, as trees
    have it.

    Args:
        on: the machine.
        ranks_per_node: ranks that share a node.
        kind: "all-gather", "reduce-scatter", "all-reduce", "all-to-all" or "send".
        size: ranks that take part, n.
        stride: distance between neighbours among them.
        sent: bytes of the whole tensor; of an all-to-all what one rank sends, to itself too.
    """
    here = min(size, max(1, ranks_per_node // stride))
    # A send goes to a stage that is stride ranks away.
    crosses = stride >= ranks_per_node if kind == "send" else here < size
    if known := _nearest(on, "network" if crosses else "node", kind, size):
        # Of the whole, a rank passes on (n - 1) / n.
        return known.seconds.beyond(sent * _passed(size) / _passed(known.ranks))
    tier = on.network if crosses else on.node
    if kind == "send":
        return tier.latency + sent / tier.rate
    rounds = ceil(log2(size)) * tier.latency
    if kind == "all-to-all":
        inside = sent * (here - 1) / size / on.node.rate
        outside = sent * (size - here) / size / on.network.rate
        return rounds + max(inside, outside)
    passed = sent * _passed(size)
    rate = min(on.node.rate, here * on.network.rate) if crosses else on.node.rate
    return (2 if kind == "all-reduce" else 1) * (rounds + passed / rate)


def _nearest(on: Machine, tier: str, kind: str, size: int) -> Measured | None:
    """Return the collective that was measured with the most similar number of ranks, if any."""
    known = [each for each in on.collectives if (each.tier, each.kind) == (tier, kind)]
    return min(known, key=lambda each: abs(log2(each.ranks / size)), default=None)


def _passed(size: int) -> float:
    return (size - 1) / size


def tier_in_words(ranks_per_node: int, size: int, stride: int) -> str:
    """Return where a group's bytes go: "between nodes" or "within a node"."""
    return "between nodes" if size * stride > ranks_per_node else "within a node"
