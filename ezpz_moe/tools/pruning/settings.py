"""The flavor and the job of a model with fewer experts, as TOML.

The flavor inherits nothing: it says all that the model's own and its parents say, so that the
folder may be moved away from them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ezpz_moe.config.flavors import Flavor, load_flavor
from ezpz_moe.config.job import Job
from ezpz_moe.config.layer_sizes import one_or_each
from ezpz_moe.errors import EzpzError

JOB = "job.toml"
RUN = "run"

_OF_FLAVOR = {"name", "source", "dense_baseline_of", "equal"}
_OF_RUN = {
    "checkpoint.load_step",
    "checkpoint.folder",
    "checkpoint.create_seed_checkpoint",
    "checkpoint.initial_load_model_only",
    "checkpoint.initial_load_in_hf",
    "checkpoint.initial_load_in_hf_quantized",
}
"""Of the run that made the checkpoint: where it wrote, and what it began with."""
_INPUTS = ("model.hf_assets_path", "training.dataset_path", "validation.dataset_path")


def flavor_name(flavor: Flavor, keep: int) -> str:
    """Return the name of the smaller model's flavor; a pruned one's says the last number alone."""
    stem = re.sub(r"_\d+_experts$", "", flavor.source.stem)
    return f"{stem}_{keep}_experts"


def write_flavor(
    flavor: Flavor, folder: Path, *, keep: int, choices: Mapping[str, int], constants: int = 0
) -> Flavor:
    """Write the flavor of the same model with fewer experts, and read it back.

    Args:
        flavor: of the whole model.
        folder: where to.
        keep: experts of a layer that stay.
        choices: how many choices a token makes, by layer.
        constants: how many of the others become constant ones.

    Raises:
        EzpzError: there is no such flavor, or it does not say the same of everything else.
    """
    values = _values(flavor)
    if flavor.base is not None:
        values["change"] = {**values.get("change", {}), "num_experts": keep}
    else:
        values["num_experts"] = keep
    router = flavor.router
    if router.zero_computation_experts or constants:
        # What the model had without being told depends on the number of experts.
        top_k = one_or_each(list(choices.values()))
        if not isinstance(top_k, int):
            raise EzpzError(
                f"{flavor.source}: a token makes {' or '.join(map(str, sorted(set(top_k))))} "
                "choices, depending on the layer, and [router] top_k is one number. Take the "
                "zero-computation experts out of the flavor, or leave the experts as they are."
            )
        said = {"top_k": top_k, "constant_experts": router.constant_experts + constants}
        values["router"] = {**values.get("router", {}), **said}
    path = folder / f"{flavor_name(flavor, keep)}.toml"
    path.write_text(f"# {flavor.name} with {keep} experts in a layer.\n{_toml(values)}")
    written = load_flavor(path.stem, near=folder)
    _check_same(flavor, written, path)
    return written


def write_job(job: Job, flavor: Flavor, folder: Path, checkpoint: Path) -> None:
    """Write a job that trains the smaller model on from its checkpoint.

    Args:
        job: of the whole model.
        flavor: of the smaller one, beside the job.
        folder: where to.
        checkpoint: where the weights will be.
    """
    own = {
        # Of this model alone: a run of another one there would be resumed in place of it.
        "job.dump_folder": str(checkpoint.absolute() / RUN),
        "model.name": "ezpz_moe",
        "model.flavor": flavor.source.stem,
        "checkpoint.enable": True,
        "checkpoint.initial_load_path": str(checkpoint.absolute()),
    }
    # The numbers of experts in [train_only] are of the whole model.
    of_run = {key for key in job.values if key in _OF_RUN or key.startswith("train_only.")}
    values = {**own, **{k: v for k, v in job.values.items() if k not in of_run | own.keys()}}
    for key in _INPUTS:
        if isinstance(values.get(key), str):
            values[key] = job.resolve(values[key])
    nested: dict[str, Any] = {}
    for key, value in values.items():
        *tables, last = key.split(".")
        table = nested
        for each in tables:
            table = table.setdefault(each, {})
        table[last] = value
    head = (
        f"# Trains on from {checkpoint.name}, with the settings of {job.source}. If you move this "
        "folder,\n# change its path below, in dump_folder and initial_load_path.\n"
    )
    (folder / JOB).write_text(f"{head}{_toml(nested)}")


def _values(flavor: Flavor) -> dict[str, Any]:
    """Return what a flavor's file has to say to be this one."""
    values = flavor.model_dump(
        mode="json", exclude=_OF_FLAVOR, exclude_unset=True, exclude_none=True
    )
    return {**values.pop("dimensions", {}), **values}


def _check_same(flavor: Flavor, written: Flavor, path: Path) -> None:
    """Compare all that pruning leaves as it was."""

    def rest(of: Flavor) -> dict[str, Any]:
        values = of.model_dump(exclude=_OF_FLAVOR)
        for table, keys in (
            ("dimensions", ("num_experts",)),
            ("change", ("num_experts",)),
            ("router", ("top_k", "constant_experts")),
        ):
            said = values[table] or {}
            values[table] = {key: value for key, value in said.items() if key not in keys}
        # With nothing but the number of experts, it is as if there were none.
        values["change"] = {k: v for k, v in values["change"].items() if v is not None}
        return values

    if rest(flavor) != rest(written):
        raise EzpzError(f"{path}: does not describe the model of {flavor.source}.")


def _toml(values: Mapping[str, Any], table: str = "") -> str:
    """Write keys as TOML, tables last: a key below a header would belong to it."""
    plain = {key: value for key, value in values.items() if not isinstance(value, dict)}
    lines = [f"{key} = {json.dumps(value, ensure_ascii=False)}\n" for key, value in plain.items()]
    text = f"\n[{table}]\n" * bool(table and lines) + "".join(lines)
    for key, value in values.items():
        if isinstance(value, dict):
            text += _toml(value, f"{table}.{_key(key)}" if table else _key(key))
    return text


def _key(name: str) -> str:
    return name if name.isidentifier() else json.dumps(name)
