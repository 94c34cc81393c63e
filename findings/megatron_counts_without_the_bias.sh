#!/usr/bin/env bash
# megatron-core 0.19.2: with an expert bias, the balance loss counts other choices than those computed.
#
# moe_router_enable_expert_bias adds a bias to the scores before the top-k, and the tokens go where the
# sum says. The auxiliary losses ask compute_routing_scores_for_aux_loss for a routing of their own,
# which does not know the bias: f is the load of a router without it. So a load that the bias has
# evened out still has a loss and a gradient, and one that the bias has made uneven has none. 512
# tokens whose sigmoid scores favour the first of 8 experts, and a bias that undoes it. Seen with
# torch 2.14.1, on Linux x86-64, Python 3.11:
#
#     computed: 77 to 158 tokens an expert, in the loss: 2 to 353
#
# Exits 0 while that is so, 1 when Megatron-Core has changed, 2 when packages could not be installed.
set -euo pipefail
source "$(dirname "$0")/environment.bash"
install torch==2.14.1 numpy==2.4.6 packaging==26.0
# Unpacked, not installed: its metadata asks for Python 3.12, its router runs with 3.11 as well.
unpack 3.12 megatron-core==0.19.2
cat > counts.py <<'PYTHON'
import torch
from megatron.core.transformer.moe.moe_utils import (
    compute_routing_scores_for_aux_loss,
    topk_routing_with_score_function,
)

# As TopKRouter.routing calls both, for logits that it has from the gate.
favour = torch.linspace(2, -1, 8)
logits = torch.randn(512, 8, generator=torch.Generator().manual_seed(0)) + favour
bias = logits.sigmoid().mean(0).mean() - logits.sigmoid().mean(0)
_, computed = topk_routing_with_score_function(
    logits, 2, score_function="sigmoid", expert_bias=bias
)
counted, _ = compute_routing_scores_for_aux_loss(logits, 2, "sigmoid")
computed, counted = (each.sum(0).tolist() for each in (computed, counted))
print(
    f"computed: {min(computed)} to {max(computed)} tokens an expert, "
    f"in the loss: {min(counted)} to {max(counted)}"
)
without_bias = logits.sigmoid().topk(2).indices.flatten().bincount(minlength=8).tolist()
raise SystemExit(counted != without_bias or max(computed) * 2 > max(counted))
PYTHON
"$python" -W ignore counts.py
