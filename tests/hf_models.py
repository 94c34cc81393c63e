"""Models of transformers: opened, drawn, and compared with the host's by logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from hf_cases import LENGTH, VOCABULARY
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

BOUND = 1e-4
"""Of the largest logit. DeepSeek's classes norm latents with another eps than the host; the others
stay a hundred times below."""
TOKENS_L = torch.randint(0, VOCABULARY, (LENGTH,), generator=torch.Generator().manual_seed(3))


def opened(folder: Path) -> PreTrainedModel:
    """The model, when transformers has found every tensor and nothing else."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


def drawn(folder: Path, **config: Any) -> PreTrainedModel:
    """A model of the config in ``folder``, with weights with which everything matters."""
    torch.manual_seed(2)
    described = AutoConfig.from_pretrained(folder, **config)
    model = AutoModelForCausalLM.from_config(described).eval()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            values = torch.randn_like(tensor)
            if "norm" in name:
                tensor.copy_(1 + 0.3 * values)
            elif name.endswith(("bias", "sinks")):
                tensor.copy_(0.1 * values)
            else:
                tensor.copy_(values * (tensor.shape[-1] ** -0.5 if "embed" not in name else 1))
    return model


def logits(model: PreTrainedModel, tokens_L: torch.Tensor = TOKENS_L) -> torch.Tensor:
    with torch.inference_mode():
        return model(tokens_L.unsqueeze(0)).logits[0]


def assert_same_logits(theirs_LV, ours_LV, bound: float = BOUND) -> None:
    difference = ((theirs_LV - ours_LV).abs().max() / ours_LV.abs().max()).item()
    print(f"difference of the largest logit: {difference:.0e}")  # the docs' figures, with pytest -s
    assert difference <= bound


def with_the_hosts_eps(model: PreTrainedModel) -> PreTrainedModel:
    """DeepSeek's classes have 1e-6 in their latents' norms, whatever the config says."""
    for name, module in model.named_modules():
        if name.endswith("_a_layernorm"):
            assert module.variance_epsilon == 1e-6
            module.variance_epsilon = 1e-5
    return model
