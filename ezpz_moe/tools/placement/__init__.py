"""Which rank an expert should be on, from what a run's routers chose.

Under expert parallelism each of R ranks has E / R neighbouring experts, so an order of a layer's
experts says which rank computes which. ``order_E`` has it everywhere: the new expert ``i`` is the
old expert ``order_E[i]``.

Legend: L = layers, W = records, E = routed experts, R = ranks, N = nodes, I = items, which are
experts or whole groups of them, C = items of a rank, X = whatever is placed side by side.
"""
