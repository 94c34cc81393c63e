#!/usr/bin/env bash
# nemo-automodel 0.7.0: with sigmoid scores, the balance loss may add up raw scores for probabilities.
#
# The loss of its Gate is that of Switch Transformers, E sum f P, for softmax scores (of all experts, even
# where the weights are softmax over the chosen ones), with a bias (f counts where the tokens go) and
# with padding (which is in neither sum). Sigmoid scores are divided by their sum where the weights are:
# with norm_topk_prob, if a token has more than one expert. Otherwise P is the mean of raw scores, for
# top-1 whatever the option says. That is several times the loss, and another one: it falls with all
# scores, however uneven the load. 48 tokens, 8 experts, top-2 unless said, the Gate's own loss and the
# gradient that it adds; formulas in float64. Seen with torch 2.14.1, on Linux x86-64, Python 3.11:
#
#     softmax: value 1.0000, gradient 1.0000 of the formula's
#     softmax, padding: value 1.0000, gradient 1.0000 of the formula's
#     sigmoid, norm_topk_prob: value 1.0000, gradient 1.0000 of the formula's
#     the same, bias: value 1.0000, gradient 1.0000 of the formula's
#     sigmoid: value 4.6005, gradient 2.2289 of the formula's, 93% of it in another direction
#     sigmoid, top-1, norm_topk_prob: value 4.5985, gradient 2.3130 of the formula's, 92% of it in another direction
#     sigmoid, with raw scores: value 1.0000, gradient 1.0000 of the formula's
#     the same, top-1, norm_topk_prob: value 1.0000, gradient 1.0000 of the formula's
#
# Exits 0 while that is so, 1 when Automodel has changed, 2 when packages could not be installed.
set -euo pipefail
source "$(dirname "$0")/environment.bash"
install torch==2.14.1 numpy==2.4.6 transformers==5.18.0 pyyaml==6.0.4
install --no-deps nemo-automodel==0.7.0 # of what it needs, its gate imports the above
cat > gate.py <<'PYTHON'
import torch
from nemo_automodel.components.moe.config import MoEConfig
from nemo_automodel.components.moe.layers import Gate
from router_losses import E, chosen, logits, probabilities, ratio_through, switch_loss

x = logits()
everyone = torch.ones(len(x), dtype=torch.bool)
bias = torch.linspace(-0.4, 0.4, E)


def seen(formula, mask=everyone, top_k=2, with_bias=False, **options):
    sizes = dict.fromkeys(("dim", "inter_dim", "moe_inter_dim", "n_routed_experts"), E)
    config = MoEConfig(
        **sizes,
        n_shared_experts=0,
        n_activated_experts=top_k,
        n_expert_groups=1,
        n_limited_groups=1,
        train_gate=True,
        gate_bias_update_factor=0.001 if with_bias else 0,
        aux_loss_coeff=1.0,
        route_scale=1.0,
        dtype=torch.float32,
        **options,
    )
    gate = Gate(config)
    with torch.no_grad():
        gate.weight.copy_(torch.eye(E))  # so that the input is the logits
        if with_bias:
            gate.e_score_correction_bias.copy_(bias)
    weights, _, loss = gate(x.float(), mask, None)
    return ratio_through(loss, weights, formula, x)


softmax = {"score_func": "softmax", "norm_topk_prob": False}
sigmoid = {"score_func": "sigmoid", "norm_topk_prob": True}
raw = {"score_func": "sigmoid", "norm_topk_prob": False}
p, s = x.softmax(-1), x.sigmoid()
q = probabilities(s)
real = torch.arange(len(x)) % 24 < 15
found = {
    "softmax": seen(switch_loss(p, chosen(p, 2)), **softmax),
    "softmax, padding": seen(switch_loss(p[real], chosen(p[real], 2)), real, **softmax),
    "sigmoid, norm_topk_prob": seen(switch_loss(q, chosen(s, 2)), **sigmoid),
    "the same, bias": seen(switch_loss(q, chosen(s + bias, 2)), with_bias=True, **sigmoid),
    "sigmoid": seen(switch_loss(q, chosen(s, 2)), **raw),
    "sigmoid, top-1, norm_topk_prob": seen(switch_loss(q, chosen(s, 1)), top_k=1, **sigmoid),
    "sigmoid, with raw scores": seen(switch_loss(s, chosen(s, 2)), **raw),
    "the same, top-1, norm_topk_prob": seen(switch_loss(s, chosen(s, 1)), top_k=1, **sigmoid),
}
for name, each in found.items():
    print(f"{name}: {each}")
other = [found.pop(name) for name in ("sigmoid", "sigmoid, top-1, norm_topk_prob")]
same = all(each.is_near(1, 1) for each in found.values())
raise SystemExit(not (same and all(each.value > 2 and each.rest > 0.1 for each in other)))
PYTHON
"$python" -W ignore gate.py
