#!/usr/bin/env bash
# transformers 5.24.0: DeepseekV2 and DeepseekV3 ignore rms_norm_eps in the norms of attention's latents.
#
# The norms before attention and before the FFN have the eps of config.json. Those of the latents
# (q_a_layernorm, kv_a_layernorm) are built without it, and have 1e-6 whatever it says. torchtitan's
# deepseek_v3 has 1e-5 in all of them, so no config.json makes the logits quite equal. Seen with torch
# 2.14.1, on Linux x86-64, Python 3.11:
#
#     deepseek_v2: input_layernorm 1e-05, q_a_layernorm 1e-06, kv_a_layernorm 1e-06
#     deepseek_v3: input_layernorm 1e-05, q_a_layernorm 1e-06, kv_a_layernorm 1e-06
#
# Exits 0 while that is so, 1 when transformers has changed, 2 when packages could not be installed.
set -euo pipefail
source "$(dirname "$0")/environment.bash"
install torch==2.14.1 transformers==5.24.0
cat > norms.py <<'PYTHON'
import torch
from transformers import AutoConfig, AutoModelForCausalLM

found = {}
for kind in ("deepseek_v2", "deepseek_v3"):
    config = AutoConfig.for_model(kind, num_hidden_layers=1, vocab_size=8, rms_norm_eps=1e-5)
    with torch.device("meta"):
        layer = AutoModelForCausalLM.from_config(config).model.layers[0]
    norms = {"input_layernorm": layer.input_layernorm}
    for name in ("q_a_layernorm", "kv_a_layernorm"):
        norms[name] = getattr(layer.self_attn, name)
    found[kind] = {name: norm.variance_epsilon for name, norm in norms.items()}
    print(f"{kind}: {', '.join(f'{name} {eps}' for name, eps in found[kind].items())}")
raise SystemExit(any(list(eps.values()) != [1e-5, 1e-6, 1e-6] for eps in found.values()))
PYTHON
HF_HUB_OFFLINE=1 "$python" norms.py
