#!/usr/bin/env bash
# megatron-core 0.19.2: "sinkhorn" routing ignores moe_router_score_function.
#
# It plans on exp(logits), whatever the score function is, and what it takes of a chosen expert is its
# softmax score for top-k above 1, its sigmoid score for top-1. With softmax the plan is that of the
# scores, because a factor for each token changes nothing. A model with sigmoid scores gets another plan
# than that of its scores, and other weights; one with softmax scores gets other weights for top-1. 512
# tokens, 16 experts, standard normal logits; the plans written out in float64, 200 iterations. Seen with
# torch 2.14.1, on Linux x86-64, Python 3.11:
#
#     softmax, top-2: tokens with other experts than by exp(logits) 0.0%, by the scores 0.0%; weights are softmax scores: True
#     softmax, top-1: tokens with other experts than by exp(logits) 0.0%, by the scores 0.0%; weights are sigmoid scores: True
#     sigmoid, top-2: tokens with other experts than by exp(logits) 0.0%, by the scores 10.9%; weights are softmax scores: True
#     sigmoid, top-1: tokens with other experts than by exp(logits) 0.0%, by the scores 6.4%; weights are sigmoid scores: True
#
# Exits 0 while that is so, 1 when Megatron-Core has changed, 2 when packages could not be installed.
set -euo pipefail
source "$(dirname "$0")/environment.bash"
install torch==2.14.1 numpy==2.4.6 packaging==26.0
unpack 3.12 megatron-core==0.19.2
cat > plans.py <<'PYTHON'
from types import SimpleNamespace

import torch
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig

groups = SimpleNamespace(tp=None, cp=None, tp_cp=None, tp_dp_cp=None)
x = torch.randn(512, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def theirs(score, top_k):
    config = TransformerConfig(
        num_layers=1,
        hidden_size=16,
        num_attention_heads=1,
        num_moe_experts=16,
        moe_router_topk=top_k,
        moe_router_load_balancing_type="sinkhorn",
        moe_router_score_function=score,
        use_cpu_initialization=True,
    )
    weights, chosen = TopKRouter(config, groups).routing(x.unsqueeze(1))
    return weights[chosen].view(-1, top_k), chosen


def planned(scores):
    for _ in range(200):
        scores = scores / scores.sum(1, keepdim=True)
        scores = scores / scores.sum(0)
    return scores


def differing(chosen, plan, top_k):
    """The share of tokens that get other experts than those of a plan."""
    planned = torch.zeros_like(plan).scatter(1, plan.topk(top_k).indices, 1).bool()
    return (chosen != planned).any(1).double().mean().item()


same = True
for score, scores in (("softmax", x.softmax(-1)), ("sigmoid", x.sigmoid())):
    for top_k, of_weights in ((2, x.softmax(-1)), (1, x.sigmoid())):
        weights, chosen = theirs(score, top_k)
        by_exp = differing(chosen, planned(x.exp()), top_k)
        by_scores = differing(chosen, planned(scores), top_k)
        named = "softmax" if top_k > 1 else "sigmoid"
        are = torch.allclose(weights, of_weights[chosen].view(-1, top_k), rtol=1e-5)
        print(
            f"{score}, top-{top_k}: tokens with other experts than by exp(logits) {by_exp:.1%}, "
            f"by the scores {by_scores:.1%}; weights are {named} scores: {are}"
        )
        same &= are and by_exp == 0 and (by_scores > 0.03) == (score == "sigmoid")
raise SystemExit(not same)
PYTHON
"$python" -W ignore plans.py
