#!/usr/bin/env bash
# torchtitan 0.3.0 with torchao 0.18.0: float8 experts are not float8 where _grouped_mm is overridden.
#
# GroupedExperts._grouped_mm is documented as the "overridable seam for low-precision variants". The
# MXFP8 converter overrides it, so a second class that overrides it as well is seen to take its place.
# The float8 converter leaves it alone and wraps the weights, whose __torch_function__ answers
# torch._grouped_mm, linear, mm, matmul and addmm. Whoever overrides the seam with another product,
# such as torch.bmm, gets that of the plain weights, to the bit, without a word.
# Seen on the CPU, Linux x86-64, Python 3.11:
#
#     MXFP8GroupedExperts: own seam True, weights Parameter
#     Float8GroupedExperts: own seam False, weights Float8TrainingWeightWrapperTensor
#     torch.bmm with float8's weights has the bits of plain bfloat16: True
#
# Exits 0 while that is so, 1 when one of them has changed, 2 when packages could not be installed.
set -euo pipefail
source "$(dirname "$0")/environment.bash"
install torch==2.14.1 torchtitan==0.3.0 torchao==0.18.0
cat > experts.py <<'PYTHON'
import torch
from torchtitan.components.quantization import float8, mx
from torchtitan.models.common.moe import GroupedExperts


def made(kind):
    experts = kind.Config(dim=32, hidden_dim=48, num_experts=2).build()
    with torch.no_grad():
        for weight in experts.parameters():
            weight.copy_(torch.randn(weight.shape))
    own_seam = kind._grouped_mm is not GroupedExperts._grouped_mm
    weights = type(experts.w1_EFD).__name__
    print(f"{kind.__name__}: own seam {own_seam}, weights {weights}")
    return experts, own_seam, weights


torch.manual_seed(0)
_, mx_seam, mx_weights = made(mx._get_mxfp8_grouped_experts_cls(GroupedExperts))
experts, float8_seam, float8_weights = made(float8._get_float8_grouped_experts_cls(GroupedExperts))
x = torch.randn(2, 16, 32).bfloat16()
wrapped = experts.w1_EFD.bfloat16().transpose(-2, -1)
same_bits = torch.equal(torch.bmm(x, wrapped), torch.bmm(x, wrapped._data))
print(f"torch.bmm with float8's weights has the bits of plain bfloat16: {same_bits}")
as_described = (mx_seam, mx_weights, float8_seam) == (True, "Parameter", False)
raise SystemExit(not (as_described and float8_weights.startswith("Float8") and same_bits))
PYTHON
"$python" experts.py
