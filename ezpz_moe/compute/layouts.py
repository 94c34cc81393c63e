"""How tensors lie in memory, where a product or a promise of torch's depends on it.

Legend of the suffixes: :mod:`.contract`.
"""

import torch
from torch import Tensor


def is_transposed(weights_EXY: Tensor) -> bool:
    """Return whether the last two dimensions are swapped in memory, as in the host's ``B_t``.

    Products are written into tensors that are not: on the CPU, ``torch.bmm`` in bfloat16 is two
    thousand times slower with a transposed ``out``.
    """
    return weights_EXY.stride(1) == 1 < weights_EXY.stride(2)


def laid_out_like(gradient: Tensor, model: Tensor) -> Tensor:
    """Return ``gradient`` with dtype and strides of ``torch.empty_like(model)``, copied if needed.

    The strides are taken from a tensor without memory, because a gradient of weights is large.
    """
    # Not model.stride(): empty_like makes an expanded or sliced tensor dense, and fakes promise
    # empty_like's strides.
    wanted = torch.empty_like(model, device="meta")
    if (gradient.dtype, gradient.stride()) == (wanted.dtype, wanted.stride()):
        return gradient
    return torch.empty_like(model).copy_(gradient)
