"""Routing as pure functions of tensors: what chooses experts, balances them and counts.

Nothing here imports torchtitan; ``ezpz_moe/hosts/`` binds it to a trainer's router.

Legend of the shape suffixes, as in the host: B = sequences of a microbatch, L = positions,
T = tokens (B * L), E = what the router chooses from (routed experts, then zero-computation
experts), K = top-k, D = model dimension. Losses see tokens in G groups of N: one per sequence, or
all tokens in a single group.
"""
