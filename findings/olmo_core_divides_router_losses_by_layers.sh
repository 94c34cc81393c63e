#!/usr/bin/env bash
# ai2-olmo-core 3.0.0: a weight of a router's loss is divided by the number of the model's layers.
#
# MoEConfig.build takes `n_layers`, which a transformer passes on, and divides lb_loss_weight and
# z_loss_weight by it; scale_loss_by_num_layers is true by default, and named neither beside the weights
# nor in what a router reports. Whoever carries 0.01 from a model of 16 layers to another trainer takes
# 16 times the loss with it. OLMo-core's own weight for 32 layers is half of that for 16. Seen, on Linux
# x86-64, Python 3.11, torch 2.13.0:
#
#     lb_loss_weight = 0.01, z_loss_weight = 0.001
#     1 layers: 0.01 and 0.001
#     16 layers: 0.000625 and 6.25e-05
#     16 layers, scale_loss_by_num_layers = False: 0.01 and 0.001
#
# Exits 0 while that is so, 1 when OLMo-core has changed, 2 when packages could not be installed.
set -euo pipefail
source "$(dirname "$0")/environment.bash"
install ai2-olmo-core==3.0.0 torch==2.13.0
cat > weights.py <<'PYTHON'
from olmo_core.nn.moe import MoEConfig

print("lb_loss_weight = 0.01, z_loss_weight = 0.001")


def weights(n_layers, **options):
    config = MoEConfig(
        num_experts=8,
        hidden_size=8,
        capacity_factor=1.0,
        lb_loss_weight=0.01,
        z_loss_weight=0.001,
        **options,
    )
    router = config.build(8, n_layers=n_layers).router
    found = router.lb_loss_weight, router.z_loss_weight
    said = "".join(f", {key} = {value}" for key, value in options.items())
    print(f"{n_layers} layers{said}: {found[0]:g} and {found[1]:g}")
    return found


found = [weights(1), weights(16), weights(16, scale_loss_by_num_layers=False)]
raise SystemExit(found != [(0.01, 0.001), (0.01 / 16, 0.001 / 16), (0.01, 0.001)])
PYTHON
"$python" weights.py
