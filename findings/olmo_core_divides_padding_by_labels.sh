#!/usr/bin/env bash
# ai2-olmo-core 3.0.0: a batch with padding has a larger balance loss and z-loss than one without.
#
# A router knows no padding: every token stands in the sums of both losses. What divides the sums is
# `loss_div_factor`, for which its trainer passes the number of tokens with a label. So the losses, and
# their gradients, are those of all tokens over the share with a label: prompts of chat data, whose
# labels are ignored, raise the weight. 48 tokens, 30 with a label, top-2 of 8 experts; the formulas of
# all tokens in float64, weights of 1. Seen with torch 2.13.0, on Linux x86-64, Python 3.11:
#
#     local_batch: value 1.6000, gradient 1.6000 of the formula's
#     instance: value 1.6000, gradient 1.6000 of the formula's
#     z: value 1.6000, gradient 1.6000 of the formula's
#
# Exits 0 while that is so, 1 when OLMo-core has changed, 2 when packages could not be installed.
set -euo pipefail
source "$(dirname "$0")/environment.bash"
install ai2-olmo-core==3.0.0 torch==2.13.0
cat > labels.py <<'PYTHON'
import torch
from olmo_core.nn.moe import MoERouterConfig
from router_losses import B, E, chosen, logits, ratio_of, switch_loss, z_loss

x = logits()
p = x.softmax(-1)


def loss(**options):
    router = MoERouterConfig(top_k=2).build(E, E, **options)
    with torch.no_grad():
        router.weight.copy_(torch.eye(E).flatten())  # so that the input is the logits
    return router(x.unflatten(0, (B, -1)).float(), loss_div_factor=torch.tensor(30))[-1]


of_sequences = [switch_loss(each, chosen(each, 2)) for each in p.chunk(B)]
found = {
    "local_batch": ratio_of(loss(lb_loss_weight=1.0), switch_loss(p, chosen(p, 2)), x),
    "instance": ratio_of(
        loss(lb_loss_weight=1.0, lb_loss_granularity="instance"),
        torch.stack(of_sequences).mean(),
        x,
    ),
    "z": ratio_of(loss(z_loss_weight=1.0), z_loss(x), x),
}
for name, each in found.items():
    print(f"{name}: {each}")
raise SystemExit(not all(each.is_near(48 / 30, 48 / 30) for each in found.values()))
PYTHON
"$python" labels.py
