#!/usr/bin/env bash
# torch 2.14.1: on a CPU, embedding_bag rounds sums of bfloat16 rows away from zero at a tie, and to
# even when the same rows are not contiguous.
#
# 1 and 2**-8 add up to a number halfway between two of bfloat16; 1 is the even one. `torch.sum`, a
# strided table and float16 give it. A contiguous bfloat16 table goes through other code, which adds
# half a unit and cuts off: bits depend on strides, and a sum of rows of one sign is too large on
# average, as expert outputs of a layer that is combined this way would be. Seen, on Linux x86-64,
# Python 3.11:
#
#     torch 2.14.1: contiguous 1.0078125, strided 1.0, torch.sum 1.0
#     mean relative error of a sum of two positive rows: embedding_bag 8.6e-04, torch.sum 5.8e-07
#
# Exits 0 while that is so, 1 when torch has changed, 2 when packages could not be installed.
set -euo pipefail
source "$(dirname "$0")/environment.bash"
install torch==2.14.1 numpy==2.4.6
"$python" - <<'PYTHON'
import torch


def sums(rows: torch.Tensor, of_bag: int) -> torch.Tensor:
    bags = torch.arange(len(rows)).view(-1, of_bag)
    return torch.nn.functional.embedding_bag(bags, rows, mode="sum")


tie = torch.tensor([[1.0], [2.0**-8]], dtype=torch.bfloat16)
strided = tie.repeat_interleave(2, dim=1)[:, ::2]
found = (sums(tie, 2).item(), sums(strided, 2).item(), tie.sum(0).item())
version = torch.__version__.partition("+")[0]
print("torch {}: contiguous {}, strided {}, torch.sum {}".format(version, *found))

torch.manual_seed(0)
rows = torch.rand(2 * 4096, 64).bfloat16()
true = rows.double().view(4096, 2, 64).sum(1)
means = [
    ((each.double() - true) / true).mean().item()
    for each in (sums(rows, 2), rows.view(4096, 2, 64).sum(1))
]
print("mean relative error of a sum of two positive rows: ", end="")
print("embedding_bag {:.1e}, torch.sum {:.1e}".format(*means))
raise SystemExit(not (found == (1.0078125, 1.0, 1.0) and means[0] > 5e-4 > 5e-5 > abs(means[1])))
PYTHON
