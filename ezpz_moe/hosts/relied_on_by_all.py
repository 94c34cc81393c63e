"""List what the bindings to every generation of torchtitan rely on."""

from ezpz_moe.hosts.reliance import NO_FLAVOR, NOTHING_TRAINS, Reliance

_NO_FLAGS = "`doctor`, `show` and `train --dry-run` cannot take the trainer's flags"
_NO_SAFETENSORS = "`ckpt remap` cannot go through the host's adapter to or from safetensors"

OF_EVERY_GENERATION = (
    Reliance(
        "torch.distributed.tensor._utils:compute_local_shape_and_global_offset",
        used_for="several CPU ranks start with the values of one: which rank holds which part",
        if_broken=NO_FLAVOR,
        takes=("global_shape", "mesh", "placements"),
        vital=True,
    ),
    Reliance(
        "torchtitan.train",
        used_for="`ezpz-moe train` and `python -m ezpz_moe.train` run this module",
        if_broken=NOTHING_TRAINS,
        vital=True,
    ),
    Reliance(
        "torchtitan.config.manager:custom_registry",
        used_for="reading the trainer's flags without a run: what its command line may look like",
        if_broken=_NO_FLAGS,
    ),
    Reliance(
        "torchtitan.config.manager:ConfigManager.register_tyro_rules",
        used_for="the same: it fills the registry",
        if_broken=_NO_FLAGS,
        takes=("registry",),
    ),
    Reliance(
        "torchtitan.hf_datasets.text_datasets:DATASETS",
        used_for="adding the embedded text and the user's own files to the host's datasets",
        if_broken=NO_FLAVOR,
        vital=True,
    ),
    Reliance(
        "torchtitan.protocols.state_dict_adapter:StateDictAdapter.to_hf",
        used_for="ckpt remap --to hf",
        if_broken=_NO_SAFETENSORS,
        takes=("state_dict",),
    ),
    Reliance(
        "torchtitan.protocols.state_dict_adapter:StateDictAdapter.from_hf",
        used_for="ckpt remap of safetensors",
        if_broken=_NO_SAFETENSORS,
        takes=("hf_state_dict",),
    ),
    Reliance(
        "torchtitan.tools.logging:logger",
        used_for="logging which backend computes the experts, among the host's own lines",
        if_broken=NO_FLAVOR,
        vital=True,
    ),
    Reliance(
        "torchtitan.tools.utils:device_type",
        used_for="telling the host to train on the CPU without an accelerator; its device",
        if_broken=NO_FLAVOR,
        vital=True,
    ),
)

DATASET_CONFIG = Reliance(
    "torchtitan.hf_datasets:DatasetConfig",
    used_for="an entry of DATASETS",
    if_broken=NO_FLAVOR,
    fields=("path", "loader", "sample_processor"),
    vital=True,
)
"""Needed for 0.2 and 0.3; in August 2026 the host's texts became another class."""
