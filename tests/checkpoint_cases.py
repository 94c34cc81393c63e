"""Checkpoints as the trainer saves them, of one small MoE layer, and what tests ask of them."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from ezpz_moe.tools.checkpoints import storage

EXPERTS = "layers.1.moe.routed_experts.inner_experts"
THREE = [f"{EXPERTS}.{name}" for name in ("w1_EFD", "w2_EDF", "w3_EFD")]
OTHERS = ["layers.1.moe.router.gate.weight", "layers.1.moe.shared_experts.w1.weight"]
MLP1_WEIGHT, MLP1_BIAS, MLP2_WEIGHT, MLP2_BIAS = (
    f"{EXPERTS}.{name}"
    for name in ("mlp1_weight_EGD", "mlp1_bias_EG", "mlp2_weight_EDF", "mlp2_bias_ED")
)

# E = 5, F = 6, D = 4, and G = 2F rows of gate and up in turn.
GATED = dict(zip(THREE, [(5, 6, 4), (5, 4, 6), (5, 6, 4)], strict=True))
GPT_OSS = {MLP1_WEIGHT: (5, 12, 4), MLP1_BIAS: (5, 12), MLP2_WEIGHT: (5, 4, 6), MLP2_BIAS: (5, 4)}


def trained(experts: dict[str, tuple[int, ...]] = GATED) -> dict:
    """A layer as the trainer saves it, with AdamW's state."""
    generator = torch.Generator().manual_seed(0)
    shapes = experts | dict.fromkeys(OTHERS, (5, 4))
    model = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    model[next(iter(experts))][2, 3, 1] = torch.nan
    optimizer: dict = {}
    for name, tensor in model.items():
        optimizer[f"state.{name}.step"] = torch.tensor(7.0)
        optimizer[f"state.{name}.exp_avg"] = torch.randn(tensor.shape, generator=generator)
        optimizer[f"state.{name}.exp_avg_sq"] = torch.rand(tensor.shape, generator=generator)
        optimizer |= {f"param_groups.{name}.lr": 1e-3, f"param_groups.{name}.betas": (0.9, 0.95)}
    return {**model, "optimizer": optimizer, "train_state": {"step": 7}}


def loaded(folder: Path) -> dict:
    """Every entry of a checkpoint, as torch's own reader loads it."""
    state = torch.distributed.checkpoint.state_dict_loader._load_state_dict_from_keys(
        checkpoint_id=folder
    )
    assert isinstance(state, dict)
    return state


def assert_same_checkpoint(folder: Path, other: Path) -> None:
    """The same entries, shards of the same boxes, and in each the same bits."""
    before, after = (storage.read_metadata(each) for each in (folder, other))
    for metadata in (before, after):
        for entry in metadata.state_dict_metadata.values():
            if isinstance(entry, TensorStorageMetadata):
                entry.properties.strides = None  # of the shard that was saved; nothing reads it
    assert before.state_dict_metadata == after.state_dict_metadata
    assert before.planner_data == after.planner_data
    assert before.storage_data.keys() == after.storage_data.keys()
    for index, entry in before.storage_data.items():
        new = storage.load(other, after.storage_data[index])
        assert storage.same_bits(storage.load(folder, entry), new), index
