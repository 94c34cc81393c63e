#!/usr/bin/env bash
# megatron-core 0.19.2: global_aux_loss reports the loss of all ranks, and trains with a part of it.
#
# A rank's loss is made of its own probabilities, and of the choices and the number of tokens of all
# data-parallel ranks, so that the ranks' losses add up to that of the whole batch; the sum is what it
# reports. Its DistributedDataParallel then takes the mean of the gradients. So moe_aux_loss_coeff is
# divided by the number of data-parallel ranks: whoever doubles the ranks halves the loss. 48 tokens,
# shared by 2 ranks, then by 4, top-2 of 8 experts, with gloo on the CPU; the formula of the whole batch
# in float64. Seen with torch 2.14.1, on Linux x86-64, Python 3.11:
#
#     2 ranks: value 1.0000, gradient 0.5000 of the formula's
#     4 ranks: value 1.0000, gradient 0.2500 of the formula's
#
# Exits 0 while that is so, 1 when Megatron-Core has changed, 2 when packages could not be installed.
set -euo pipefail
source "$(dirname "$0")/environment.bash"
install torch==2.14.1 numpy==2.4.6 packaging==26.0
unpack 3.12 megatron-core==0.19.2
cat > ranks.py <<'PYTHON'
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig
from router_losses import E, chosen, logits, ratio, switch_loss

torch.cuda.current_device = lambda: "cpu"  # where it makes its counters, and asks nobody
torch.cuda.current_stream = lambda: None  # which waits for CUDA graphs, and there are none
dist.init_process_group("gloo")
ranks = dist.get_world_size()
parallel_state.initialize_model_parallel()
config = TransformerConfig(
    num_layers=1,
    hidden_size=E,
    num_attention_heads=1,
    num_moe_experts=E,
    moe_router_topk=2,
    moe_router_load_balancing_type="global_aux_loss",
    moe_aux_loss_coeff=1.0,
    add_bias_linear=False,
    use_cpu_initialization=True,
)
router = TopKRouter(config, get_default_pg_collection())
router.set_layer_number(1)
gate = torch.eye(E)  # so that the input is the logits
with torch.no_grad():
    router.weight.copy_(gate)
model = DistributedDataParallel(config, DistributedDataParallelConfig(), router)
x = logits().detach()
own = x.chunk(ranks)[dist.get_rank()]
weights, _ = model(own.unsqueeze(1).float())
(0 * weights.sum()).backward()  # the balance loss alone
model.finish_grad_sync()
value = get_moe_metrics_tracker().metrics["global_load_balancing_loss"].values.sum()
dist.all_reduce(value)  # as it reports it
gate = gate.double().requires_grad_()
p = (x @ gate.T).softmax(-1)
seen = ratio(value, router.weight.main_grad, switch_loss(p, chosen(p, 2)), gate)
if dist.get_rank() == 0:
    print(f"{ranks} ranks: {seen}", flush=True)
dist.destroy_process_group()
raise SystemExit(not seen.is_near(value=1, gradient=1 / ranks))
PYTHON
for ranks in 2 4; do
    "$python" -m torch.distributed.run --standalone --local-addr localhost \
        --nproc-per-node "$ranks" ranks.py 2> log || {
        cat log >&2
        exit 1
    }
done
