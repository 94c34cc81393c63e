"""Routing as pure functions of tensors: what chooses experts, balances them and counts.

Nothing here imports torchtitan; ``ezpz_moe/hosts/`` binds it to a trainer's router.

Legend of the shape suffixes, as the host writes them: B = sequences of a microbatch, L = positions,
T = tokens (B * L), E = what the router chooses among (routed experts, then zero-computation
experts), K = top-k, D = model dimension. Losses see tokens in G groups of N: a sequence each, or
all tokens as one group.
"""
