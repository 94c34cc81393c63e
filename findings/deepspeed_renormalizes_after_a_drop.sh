#!/usr/bin/env bash
# deepspeed 0.19.8: of a token that loses an expert to the capacity, the others' weights grow.
#
# With drop_tokens (the default) topkgating and top2gating take a dropped choice out first, and divide
# what is left by its sum afterwards. So a token of which one of three experts is left gives it the
# whole weight, where it had a part of it, and the scale of a layer's output does not show that tokens
# were dropped; in top1gating, and in Megatron-Core, the other weights stay as they were. 48 tokens, 8
# experts, logits from a seed. Seen with torch 2.14.1, on Linux x86-64, Python 3.11:
#
#     top-3, nothing dropped: the weights of every token add up to 1: True
#     top-3, capacity_factor = 0.5: 72 of 144 choices are left; 25 tokens keep one expert
#     with weights from 1.00 to 1.00; before the drop they had from 0.28 to 0.88
#
# Exits 0 while that is so, 1 when DeepSpeed has changed, 2 when packages could not be installed.
set -euo pipefail
source "$(dirname "$0")/environment.bash"
install setuptools wheel torch==2.14.1 numpy==2.4.6
DS_BUILD_OPS=0 install --no-build-isolation deepspeed==0.19.8
cat > drop.py <<'PYTHON'
import torch
from deepspeed.moe.sharded_moe import topkgating


def weights(capacity_factor, drop_tokens):
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(48, 8, generator=generator)
    _, weights, _, _ = topkgating(logits, 3, capacity_factor, 0, drop_tokens=drop_tokens)
    return weights.sum(-1)  # over the places in an expert's buffer


whole, cut = weights(1.0, False), weights(0.5, True)
sums_to_1 = torch.allclose(whole.sum(-1), torch.ones(48))
print(f"top-3, nothing dropped: the weights of every token add up to 1: {sums_to_1}")
alone = (cut > 0).sum(-1) == 1
kept = cut[alone].amax(-1)
had = whole[alone][cut[alone] > 0]
print(
    f"top-3, capacity_factor = 0.5: {int((cut > 0).sum())} of {int((whole > 0).sum())} choices are "
    f"left; {int(alone.sum())} tokens keep one expert\nwith weights from {kept.min():.2f} to "
    f"{kept.max():.2f}; before the drop they had from {had.min():.2f} to {had.max():.2f}"
)
whole_weight = torch.allclose(kept, torch.ones_like(kept))
same = sums_to_1 and alone.any() and whole_weight and had.max() < 0.99
raise SystemExit(not same)
PYTHON
"$python" drop.py 2> log | grep -v '^\[' || {
    cat log >&2
    exit 1
}
