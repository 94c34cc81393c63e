#!/usr/bin/env bash
# megatron-core 0.19.2: in seq_aux_loss with padding, a sequence counts by the square of its length.
#
# Both sums over a sequence, that of the probabilities and that of the choices, are divided by the mean
# number of tokens of all sequences, not by its own. So a sequence's loss is multiplied by (its tokens /
# the mean)^2, and a short one hardly counts. aux_loss and the z-loss leave padding out of sums and
# divisors alike, and without padding all three are those of Switch Transformers and ST-MoE. Two
# sequences of 24 tokens, of which 19 and 11 are no padding, top-2 of 8 experts, a TopKRouter on the
# CPU; formulas in float64. Seen with torch 2.14.1, on Linux x86-64, Python 3.11:
#
#     aux_loss: value 1.0000, gradient 1.0000 of the formula's
#     aux_loss, sigmoid: value 1.0000, gradient 1.0000 of the formula's
#     aux_loss, padding: value 1.0000, gradient 1.0000 of the formula's
#     seq_aux_loss: value 1.0000, gradient 1.0000 of the formula's
#     z: value 1.0000, gradient 1.0000 of the formula's
#     z, padding: value 1.0000, gradient 1.0000 of the formula's
#     seq_aux_loss, padding: value 1.1163, gradient 1.3204 of the formula's, 34% of it in another direction
#     seq_aux_loss, padding, (tokens / mean)^2: value 1.0000, gradient 1.0000 of the formula's
#
# Exits 0 while that is so, 1 when Megatron-Core has changed, 2 when packages could not be installed.
set -euo pipefail
source "$(dirname "$0")/environment.bash"
install torch==2.14.1 numpy==2.4.6 packaging==26.0
unpack 3.12 megatron-core==0.19.2
cat > sequences.py <<'PYTHON'
from types import SimpleNamespace

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig
from router_losses import B, E, L, chosen, logits, probabilities, ratio_through, switch_loss, z_loss

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
alone = dist.group.WORLD
groups = SimpleNamespace(tp=alone, cp=alone, tp_cp=alone, tp_dp_cp=alone)
x = logits()
lengths = torch.tensor([19, 11])
valid = torch.arange(L) < lengths.unsqueeze(-1)


def seen(formula, padding=None, **options):
    """The router's own loss, whose value it records and whose gradient it adds to its weights'."""
    config = TransformerConfig(
        num_layers=1,
        hidden_size=E,
        num_attention_heads=1,
        num_moe_experts=E,
        moe_router_topk=2,
        use_cpu_initialization=True,
        **options,
    )
    router = TopKRouter(config, groups)
    router.set_layer_number(1)
    tracker = get_moe_metrics_tracker()
    tracker.clear()
    logits_LBE = x.unflatten(0, (B, L)).transpose(0, 1).contiguous()
    weights, _ = router.routing(logits_LBE, padding)
    value = sum(entry.values.sum() for entry in tracker.metrics.values())
    return ratio_through(value, weights, formula, x)


def loss(kind, formula, padding=None, **options):
    options = {"moe_router_load_balancing_type": kind, "moe_aux_loss_coeff": 1.0, **options}
    return seen(formula, padding, **options)


p = x.softmax(-1)
sigmoid = probabilities(x.sigmoid())
each_p = [p.unflatten(0, (B, L))[b][valid[b]] for b in range(B)]
of_each = torch.stack([switch_loss(p_NE, chosen(p_NE, 2)) for p_NE in each_p])
whole = torch.stack([switch_loss(p_LE, chosen(p_LE, 2)) for p_LE in p.chunk(B)])
real, padding = valid.flatten(), ~valid.T
found = {
    "aux_loss": loss("aux_loss", switch_loss(p, chosen(p, 2))),
    "aux_loss, sigmoid": loss(
        "aux_loss", switch_loss(sigmoid, chosen(sigmoid, 2)), moe_router_score_function="sigmoid"
    ),
    "aux_loss, padding": loss("aux_loss", switch_loss(p[real], chosen(p[real], 2)), padding),
    "seq_aux_loss": loss("seq_aux_loss", whole.mean()),
    "z": seen(z_loss(x), moe_z_loss_coeff=1.0),
    "z, padding": seen(z_loss(x[real]), padding, moe_z_loss_coeff=1.0),
    "seq_aux_loss, padding": loss("seq_aux_loss", of_each.mean(), padding),
    "seq_aux_loss, padding, (tokens / mean)^2": loss(
        "seq_aux_loss", (of_each * (lengths / 15) ** 2).mean(), padding
    ),
}
for name, each in found.items():
    print(f"{name}: {each}")
other = found.pop("seq_aux_loss, padding")
raise SystemExit(not (all(each.is_near(1, 1) for each in found.values()) and other.rest > 0.1))
PYTHON
"$python" -W ignore sequences.py
