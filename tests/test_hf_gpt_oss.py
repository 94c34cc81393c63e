"""gpt_oss's experts in transformers' form, from the form of every generation of the host."""

from __future__ import annotations

import pytest
import torch

from ezpz_moe.hosts.gpt_oss_adapter import GptOssAdapter
from ezpz_moe.tools.checkpoints.names import GENERATIONS, GPT_OSS_EXPERTS

E, D, F = 2, 3, 4
OWN = "model.layers.5.mlp.experts"


class Host:
    """An adapter that knows nothing of experts."""

    def to_hf(self, state: dict) -> dict:
        assert state.keys() == {"norm.weight"}
        return {"model.norm.weight": state["norm.weight"]}

    def from_hf(self, state: dict) -> dict:
        assert state.keys() == {"model.norm.weight"}
        return {"norm.weight": state["model.norm.weight"]}


def parameters(generation: str) -> dict[str, torch.Tensor]:
    """Gate's row f of expert e is 100 e + f, and up's is 50 more; biases likewise, negative."""
    gate = 100 * torch.arange(E).unsqueeze(1) + torch.arange(F)
    pairs = torch.stack([gate, gate + 50], 1).float()  # [E, 2, F]
    pairs = pairs if generation == "2026_09" else pairs.transpose(1, 2).flatten(1)
    down = torch.arange(E * D * F).view(E, D, F).float()
    values = (pairs.unsqueeze(-1).expand(*pairs.shape, D), -pairs, down, -down[..., 0])
    names = (f"layers.5.{part.of(generation)}" for part in GPT_OSS_EXPERTS)
    return dict(zip(names, values, strict=True))


@pytest.mark.parametrize("generation", GENERATIONS)
def test_experts_are_renamed_and_two_of_them_transposed(generation) -> None:
    tensors = {**parameters(generation), "norm.weight": torch.ones(D)}
    adapter = GptOssAdapter(Host(), tensors)
    hf = adapter.to_hf(tensors)
    gate_up, bias = hf[f"{OWN}.gate_up_proj"], hf[f"{OWN}.gate_up_proj_bias"]
    assert gate_up.shape == (E, D, 2 * F)
    # In transformers, rows of gate and up alternate.
    assert gate_up[1, 0].tolist() == [100, 150, 101, 151, 102, 152, 103, 153]
    assert bias[1].tolist() == [-x for x in gate_up[1, 0].tolist()]
    assert hf[f"{OWN}.down_proj"].shape == (E, F, D)
    assert hf[f"{OWN}.down_proj"][1, 2, 0] == tensors[_down(generation)][1, 0, 2]
    assert hf[f"{OWN}.down_proj_bias"].shape == (E, D)
    assert "model.norm.weight" in hf
    back = adapter.from_hf(hf)
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in tensors.items())


def _down(generation: str) -> str:
    return f"layers.5.{GPT_OSS_EXPERTS[2].of(generation)}"
