#!/usr/bin/env bash
# nemo-automodel 0.7.0: the imbalance that fake_gate_noise makes depends on the number of experts.
#
# fake_balanced_gate takes the experts in turn. With fake_gate_noise above 0 it draws a uniform number for
# each token and expert, adds to it a popularity of the expert with a standard deviation of a tenth of
# the noise, and takes the highest. The smaller the share of the experts that a token takes, the more a
# popular one gains: one noise is an even load in a small model, and a skewed one in a large model. 16384
# tokens, mean over 10 inputs of the load's coefficient of variation. Seen with torch 2.14.1, on Linux
# x86-64, Python 3.11:
#
#     2 of 8 experts: CV 0.00 for 0.0, 0.04 for 0.1, 0.36 for 1.0
#     8 of 64 experts: CV 0.00 for 0.0, 0.08 for 0.1, 0.71 for 1.0
#     8 of 256 experts: CV 0.00 for 0.0, 0.32 for 0.1, 1.62 for 1.0
#
# Exits 0 while that is so, 1 when Automodel has changed, 2 when packages could not be installed.
set -euo pipefail
source "$(dirname "$0")/environment.bash"
install torch==2.14.1 numpy==2.4.6 transformers==5.18.0 pyyaml==6.0.4
install --no-deps nemo-automodel==0.7.0 # of what it needs, its gate imports the above
cat > noise.py <<'PYTHON'
from types import SimpleNamespace

import torch
from nemo_automodel.components.moe.layers import FakeBalancedGate


def variation(experts, top_k, noise, seed):
    config = SimpleNamespace(n_routed_experts=experts, n_activated_experts=top_k)
    x = torch.randn(16384, 4, generator=torch.Generator().manual_seed(seed))
    _, ids, _ = FakeBalancedGate(config, noise=noise)(x, None, None)
    load = ids.flatten().bincount(minlength=experts).double()
    return load.std(correction=0) / load.mean()


found = {}
for experts, top_k in ((8, 2), (64, 8), (256, 8)):
    for noise in (0.0, 0.1, 1.0):
        each = [variation(experts, top_k, noise, seed) for seed in range(10)]
        found[experts, noise] = torch.stack(each).mean().item()
    said = ", ".join(f"{found[experts, noise]:.2f} for {noise}" for noise in (0.0, 0.1, 1.0))
    print(f"{top_k} of {experts} experts: CV {said}")
even = all(found[experts, 0.0] == 0 for experts in (8, 64, 256))
grows = all(found[256, noise] > 3 * found[8, noise] for noise in (0.1, 1.0))
raise SystemExit(not (even and grows))
PYTHON
"$python" -W ignore noise.py
