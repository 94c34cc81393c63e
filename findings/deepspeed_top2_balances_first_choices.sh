#!/usr/bin/env bash
# deepspeed 0.19.8: with two experts for a token, the balance loss sees the first of them alone.
#
# The loss of top1gating and of topkgating is that of Switch Transformers: E sum f P, where f counts the
# choices, all k of a token. top2gating, which MoE(k=2) takes, counts first choices. So second choices
# may all go to one expert, at no cost, and a weight tuned with k=2 means another loss with k=3. With
# used_token, which top1gating alone takes, unused tokens are left out of f, but stay in P and in what
# both are divided by. 48 tokens, 8 experts, logits from a seed; the formula in float64. Seen with torch
# 2.14.1, on Linux x86-64, Python 3.11:
#
#     top-1: value 1.0000, gradient 1.0000 of the formula's
#     top-3: value 1.0000, gradient 1.0000 of the formula's
#     top-4: value 1.0000, gradient 1.0000 of the formula's
#     top-2: value 1.0206, gradient 1.0160 of the formula's, 46% of it in another direction
#     top-2 with the first choices: value 1.0000, gradient 1.0000 of the formula's
#     top-1, 30 tokens used: value 0.6195, gradient 0.3906 of the formula's, 63% of it in another direction
#     the same, with all tokens in P: value 1.0000, gradient 1.0000 of the formula's
#
# Exits 0 while that is so, 1 when DeepSpeed has changed, 2 when packages could not be installed.
set -euo pipefail
source "$(dirname "$0")/environment.bash"
install setuptools wheel torch==2.14.1 numpy==2.4.6
DS_BUILD_OPS=0 install --no-build-isolation deepspeed==0.19.8
cat > losses.py <<'PYTHON'
import torch
from deepspeed.moe.sharded_moe import top1gating, top2gating, topkgating
from router_losses import chosen, logits, ratio_of, switch_loss

x = logits()
p, given = x.softmax(-1), x.float()
top1 = top1gating(given, 8.0, 0)[0]
top2 = top2gating(given, 8.0, 0, top2_2nd_expert_sampling=False)[0]
used = torch.arange(48) % 24 < 15
top1_used = top1gating(given, 8.0, 0, used_token=used.long())[0]
f_of_used = (chosen(p, 1) * used.unsqueeze(-1)).mean(0)
found = {
    "top-1": ratio_of(top1, switch_loss(p, chosen(p, 1)), x),
    "top-3": ratio_of(topkgating(given, 3, 8.0, 0)[0], switch_loss(p, chosen(p, 3)), x),
    "top-4": ratio_of(topkgating(given, 4, 8.0, 0)[0], switch_loss(p, chosen(p, 4)), x),
    "top-2": ratio_of(top2, switch_loss(p, chosen(p, 2)), x),
    "top-2 with the first choices": ratio_of(top2, switch_loss(p, chosen(p, 1)), x),
    "top-1, 30 tokens used": ratio_of(top1_used, switch_loss(p[used], chosen(p, 1)[used]), x),
    "the same, with all tokens in P": ratio_of(top1_used, 8 * (f_of_used * p.mean(0)).sum(), x),
}
for name, each in found.items():
    print(f"{name}: {each}")
other = [found.pop(name) for name in ("top-2", "top-1, 30 tokens used")]
same = all(each.is_near(1, 1) for each in found.values()) and all(each.rest > 0.1 for each in other)
raise SystemExit(not same)
PYTHON
"$python" losses.py 2> log | grep -v '^\[' || {
    cat log >&2
    exit 1
}
