#!/usr/bin/env bash
# torchtitan 0.3.0: gpt_oss cannot compute in the documented training.mixed_precision_param = "float32".
#
# The setting takes "bfloat16" and "float32". With the second, deepseek_v3's and qwen3's MoE layers work:
# their experts cast to bfloat16 inside and answer in the dtype that they were given. gpt_oss's experts
# answer in bfloat16 whatever they were given, and the combination then adds bfloat16 rows to a float32
# result, which torch refuses. One MoE layer of the host's own debug model, float32 rows, on the CPU.
# Seen with torch 2.14.1, on Linux x86-64, Python 3.11:
#
#     deepseek_v3: torch.float32
#     gpt_oss: RuntimeError: scatter(): Expected self.dtype to be equal to src.dtype
#
# Exits 0 while that is so, 1 when torchtitan has changed, 2 when packages could not be installed.
set -euo pipefail
source "$(dirname "$0")/environment.bash"
install torch==2.14.1 torchtitan==0.3.0
cat > layers.py <<'PYTHON'
import torch
from torchtitan.models import deepseek_v3, gpt_oss
from torchtitan.models.common.moe import MoE


def answer(model):
    config = model.model_registry("debugmodel").model
    _, layer, _, _ = next(config.traverse(MoE.Config))
    moe = layer.build()
    torch.manual_seed(0)
    moe.init_states(buffer_device=torch.device("cpu"))
    try:
        return moe(torch.randn(1, 16, config.dim)).dtype
    except RuntimeError as error:
        return f"RuntimeError: {str(error).splitlines()[0]}"


found = {model.__name__.rpartition(".")[2]: answer(model) for model in (deepseek_v3, gpt_oss)}
for model, what in found.items():
    print(f"{model}: {what}")
same = found["deepseek_v3"] is torch.float32 and "scatter()" in str(found["gpt_oss"])
raise SystemExit(not same)
PYTHON
"$python" layers.py
