#!/usr/bin/env bash
# ai2-olmo-core 3.0.0: a weight of a router's loss is divided by the number of the model's layers.
#
# MoEConfig.build takes `n_layers`, which a transformer passes on, and divides lb_loss_weight and
# z_loss_weight by it; scale_loss_by_num_layers is true by default, and named neither beside the weights
# nor in what a router reports. Whoever carries 0.01 from a model of 16 layers to another trainer takes
# 16 times the loss with it. OLMo-core's own weight for 32 layers is half of that for 16. Otherwise the
# losses are those of Switch Transformers (of the batch, or the mean over sequences) and ST-MoE; the
# choices are counted with the bias. 48 tokens in 2 sequences, top-2 of 8 experts, the formulas in
# float64, times the weights. Seen with torch 2.13.0, on Linux x86-64, Python 3.11:
#
#     lb_loss_weight = 0.01, z_loss_weight = 0.001
#     1 layers: 0.01 and 0.001
#     16 layers: 0.000625 and 6.25e-05
#     16 layers, scale_loss_by_num_layers = False: 0.01 and 0.001
#     16 layers, local_batch: value 0.0625, gradient 0.0625 of the formula's
#     16 layers, local_batch, sigmoid: value 0.0625, gradient 0.0625 of the formula's
#     16 layers, local_batch, bias: value 0.0625, gradient 0.0625 of the formula's
#     16 layers, instance: value 0.0625, gradient 0.0625 of the formula's
#     16 layers, z: value 0.0625, gradient 0.0625 of the formula's
#
# Exits 0 while that is so, 1 when OLMo-core has changed, 2 when packages could not be installed.
set -euo pipefail
source "$(dirname "$0")/environment.bash"
install ai2-olmo-core==3.0.0 torch==2.13.0
cat > weights.py <<'PYTHON'
import torch
from olmo_core.nn.moe import MoEConfig, MoERouterConfig
from router_losses import B, E, chosen, logits, probabilities, ratio_of, switch_loss, z_loss

print("lb_loss_weight = 0.01, z_loss_weight = 0.001")


def router(n_layers, bias_gamma=None, gating_function="softmax", **options):
    options = {"lb_loss_weight": 0.01, "z_loss_weight": 0.001, **options}
    of_router = MoERouterConfig(top_k=2, bias_gamma=bias_gamma, gating_function=gating_function)
    config = MoEConfig(
        num_experts=E, hidden_size=8, capacity_factor=1.0, router=of_router, **options
    )
    return config.build(E, n_layers=n_layers).router


def weights(n_layers, **options):
    built = router(n_layers, **options)
    found = built.lb_loss_weight, built.z_loss_weight
    said = "".join(f", {key} = {value}" for key, value in options.items())
    print(f"{n_layers} layers{said}: {found[0]:g} and {found[1]:g}")
    return found


found = [weights(1), weights(16), weights(16, scale_loss_by_num_layers=False)]
same = found == [(0.01, 0.001), (0.01 / 16, 0.001 / 16), (0.01, 0.001)]
x = logits()
bias = torch.linspace(-0.4, 0.4, E)


def loss(**options):
    built = router(16, **options)
    with torch.no_grad():
        built.weight.copy_(torch.eye(E).flatten())  # so that the input is the logits
        if built.score_bias is not None:
            built.score_bias.copy_(bias)
    return built(x.unflatten(0, (B, -1)).float())[-1]


balance, sequences = {"z_loss_weight": None}, {"lb_loss_granularity": "instance"}
softmax, sigmoid = x.softmax(-1), probabilities(x.sigmoid())
of_sequences = [switch_loss(p, chosen(p, 2)) for p in softmax.chunk(B)]
theirs_and_formulas = {
    "local_batch": (loss(**balance), 0.01 * switch_loss(softmax, chosen(softmax, 2))),
    "local_batch, sigmoid": (
        loss(**balance, gating_function="sigmoid"),
        0.01 * switch_loss(sigmoid, chosen(sigmoid, 2)),
    ),
    "local_batch, bias": (
        loss(**balance, bias_gamma=0.001),
        0.01 * switch_loss(softmax, chosen(softmax + bias, 2)),
    ),
    "instance": (loss(**balance, **sequences), 0.01 * torch.stack(of_sequences).mean()),
    "z": (loss(lb_loss_weight=None), 0.001 * z_loss(x)),
}
for name, (theirs, formula) in theirs_and_formulas.items():
    seen = ratio_of(theirs, formula, x)
    print(f"16 layers, {name}: {seen}")
    same &= seen.is_near(1 / 16, 1 / 16)
raise SystemExit(not same)
PYTHON
"$python" weights.py
