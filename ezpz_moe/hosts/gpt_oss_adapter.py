"""gpt_oss's experts between the host's parameters and those of transformers.

The host's own adapter knows them under names of an older host, or gives them the names of the
quantized checkpoint, ``..._blocks``, which transformers does not read. Everything else goes through
it. Legend: E = experts, D = model dimension, F = an expert's inner dimension, G = 2F rows in which
those of gate and up alternate.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

_HF = "model.layers.{}.mlp.experts.{}"
_NAMES = {
    "experts.mlp1_weight": "gate_up_proj",
    "experts.mlp1_bias": "gate_up_proj_bias",
    "experts.mlp2_weight": "down_proj",
    "experts.mlp2_bias": "down_proj_bias",
    "routed_experts.inner_experts.mlp1_weight_EGD": "gate_up_proj",
    "routed_experts.inner_experts.mlp1_bias_EG": "gate_up_proj_bias",
    "routed_experts.inner_experts.mlp2_weight_EDF": "down_proj",
    "routed_experts.inner_experts.mlp2_bias_ED": "down_proj_bias",
    "routed_experts.w13.weight": "gate_up_proj",
    "routed_experts.w13.bias": "gate_up_proj_bias",
    "routed_experts.w2.weight": "down_proj",
    "routed_experts.w2.bias": "down_proj_bias",
}
"""Below ``layers.N.moe``, in 0.2, since 0.3 and since September 2026 -> below ``experts``."""
_OURS = re.compile(rf"layers\.(\d+)\.moe\.({'|'.join(map(re.escape, _NAMES))})")
_THEIRS = re.compile(_HF.replace(".", r"\.").format(r"(\d+)", r"(\w+)"))

Convert = Callable[[Tensor], Tensor]


class GptOssAdapter:
    """The host's adapter, with the experts as transformers has them.

    Args:
        host: the host's own adapter.
        names: the model's parameters. Only with them it is known what a name becomes here.
    """

    def __init__(self, host: Any, names: Mapping[str, Tensor]) -> None:
        self._host = host
        self._back = {
            _HF.format(match[1], _NAMES[match[2]]): (name, tensor.dim())
            for name, tensor in names.items()
            if (match := _OURS.fullmatch(name))
        }

    def to_hf(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Convert the host's parameters to Hugging Face's."""
        converted, rest = {}, {}
        for name, tensor in state_dict.items():
            if match := _OURS.fullmatch(name):
                key = _NAMES[match[2]]
                converted[_HF.format(match[1], key)] = _to_hf(key, tensor)
            else:
                rest[name] = tensor
        return converted | (self._host.to_hf(rest) if rest else {})

    def from_hf(self, hf_state_dict: dict[str, Any]) -> dict[str, Any]:
        """Convert Hugging Face's parameters to the host's."""
        converted, rest = {}, {}
        for key, tensor in hf_state_dict.items():
            if match := _THEIRS.fullmatch(key):
                name, dims = self._back[key]
                converted[name] = _from_hf(match[2], tensor, dims)
            else:
                rest[key] = tensor
        return converted | (self._host.from_hf(rest) if rest else {})


def _to_hf(key: str, tensor: Tensor) -> Tensor:
    match key:
        # transformers computes x @ W, so its matrices are the host's transposed: [E, D, G], with
        # gate and up in turn along G.
        case "gate_up_proj" if tensor.dim() == 4:  # [E, 2, F, D]
            return tensor.permute(0, 3, 2, 1).flatten(2)
        case "gate_up_proj_bias" if tensor.dim() == 3:  # [E, 2, F]
            return tensor.transpose(1, 2).flatten(1)
        case "gate_up_proj" | "down_proj":  # [E, G, D] and [E, D, F]
            return tensor.transpose(1, 2)
        case _:
            return tensor


def _from_hf(key: str, tensor: Tensor, dims: int) -> Tensor:
    match key:
        case "gate_up_proj" if dims == 4:
            return tensor.unflatten(2, (-1, 2)).permute(0, 3, 2, 1)
        case "gate_up_proj_bias" if dims == 3:
            return tensor.unflatten(1, (-1, 2)).transpose(1, 2)
        case "gate_up_proj" | "down_proj":
            return tensor.transpose(1, 2)
        case _:
            return tensor
