"""What becomes of a backend beside a model, converter, override or dispatcher of the host's.

A cell is one combination, tried as a user would ask for it, up to the model without memory.
``scripts/make_neighbour_table.py`` makes a page of them. Packages that a model of the host imports
and that nothing here computes with are stood in for; torchao is not: cells with its converters need
it.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from absent_packages import GATED_DELTA_NET, IMAGES, stand_in

from ezpz_moe.compute import backend_names
from ezpz_moe.errors import EzpzError
from ezpz_moe.hosts.detect import check_host

check_host()  # before torchtitan is imported: it chooses the device

from torchtitan.components import quantization  # noqa: E402
from torchtitan.config.override import apply_overrides  # noqa: E402
from torchtitan.distributed.activation_checkpoint import FullAC  # noqa: E402
from torchtitan.models.common.moe import GroupedExperts, MoE  # noqa: E402

from ezpz_moe.hosts.jobs import load_job  # noqa: E402
from ezpz_moe.hosts.titan.job import trainer_config  # noqa: E402
from ezpz_moe.hosts.titan.override_conflicts import refuse_overrides  # noqa: E402

MODELS = {
    "deepseek_v3": ("deepseek_v3/debugmodel", "deepseek_v3_debugmodel"),
    "deepseek_v3 with MTP": ("deepseek_v3/debugmodel_mtp", "deepseek_v3_debugmodel_mtp"),
    "gpt_oss": ("gpt_oss/debugmodel", "gpt_oss_debugmodel"),
    "kimi_k2_7": ("kimi_k2_7/debugmodel", "kimi_k2_5_debugmodel"),
    "qwen3": ("qwen3/debugmodel_moe", "qwen3_moe_debug"),
    "qwen3_5": ("qwen3_5/debugmodel_moe", "qwen35_debugmodel_moe"),
}
"""Every MoE model of the host: its name in a flavor's ``base``, and its config."""

FLAVOR, OVERRIDE = "flavor", "override"
DOORS = (FLAVOR, OVERRIDE)
NOTHING = "nothing"
CONVERTERS = {
    "float8 linears": ("quantize.linear.float8", "Float8LinearConverter"),
    "MXFP8 linears": ("quantize.linear.mx", "MXFP8LinearConverter"),
    "float8 experts": ("quantize.grouped_mm.float8", "Float8GroupedExpertsConverter"),
    "MXFP8 experts": ("quantize.grouped_mm.mx", "MXFP8GroupedExpertsConverter"),
}
"""Each with its name in a job of torchtitan 0.2, and its class in the host."""

OVERRIDES = {
    "fused_swiglu": "torchtitan.overrides.fused_swiglu.fused_swiglu",
    "fused_grouped_experts": "torchtitan.overrides.fused_swiglu.fused_grouped_experts",
}
BESIDE = (NOTHING, *CONVERTERS, *OVERRIDES)
DISPATCHERS = ("standard", "deepep", "hybridep", "minimal_async_ep")
WORKS = "works"

# A piece of the message -> how the table says it.
REFUSALS = {
    "takes images with its text": "refused: a job has text alone",
    "no such model, but a config": "refused: a config and not a model; names the other door",
    "converts a model where its config is made": "refused: a job has no converters",
    "computes the experts' products itself": "refused: quantized experts",
    # A run beside such an override replaces the experts alone. Here the process has imported ours
    # before, which then replaces the layer around them.
    "the first replaces a node that contains": "refused: both replace the experts",
    "it fuses only torchtitan's own experts": "refused: the flavor has its experts",
    "MoE quantization requires a token dispatcher": "torchtitan refuses: no padding",
}


class Cell(NamedTuple):
    model: str
    door: str
    backend: str
    beside: str
    dispatcher: str


def cells(*, with_torchao: bool) -> Iterator[Cell]:
    """Every combination; without torchao those that do not need it."""
    for model in MODELS:
        for door in DOORS:
            for backend in backend_names():
                for beside in BESIDE:
                    for dispatcher in DISPATCHERS:
                        if with_torchao or door == FLAVOR or beside not in CONVERTERS:
                            yield Cell(model, door, backend, beside, dispatcher)


def outcome(cell: Cell, folder: Path) -> str:
    """``WORKS``, or how the table says the refusal.

    Raises:
        ValueError: it is refused in words that the table does not know.
    """
    with stand_in(*GATED_DELTA_NET, *IMAGES):
        return tried(cell, folder)


def tried(cell: Cell, folder: Path) -> str:
    """:func:`outcome`, where what stands in is there already."""
    try:
        spec = _by_flavor(cell, folder) if cell.door == FLAVOR else _by_override(cell)
    except (EzpzError, ValueError) as error:
        said = next((how for piece, how in REFUSALS.items() if piece in str(error)), None)
        if said is None:
            raise ValueError(f"{cell}: {error}") from error
        return said
    _check(spec, cell)
    return WORKS


def _by_flavor(cell: Cell, folder: Path) -> Any:
    """Write the flavor and its job, and read them as the trainer does."""
    (folder / "mine.toml").write_text(
        f'base = "{MODELS[cell.model][0]}"\ncompute_backend = "{cell.backend}"\n'
    )
    converters = [CONVERTERS[cell.beside][0]] if cell.beside in CONVERTERS else []
    overrides = [OVERRIDES[cell.beside]] if cell.beside in OVERRIDES else []
    job = folder / "job.toml"
    job.write_text(
        f'[model]\nname = "ezpz_moe"\nflavor = "mine"\nconverters = {converters}\n'
        f'[activation_checkpoint]\nmode = "full"\n[override]\nimports = {overrides}\n'
        "[parallelism]\nexpert_parallel_degree = 2\n"
        f'expert_parallel_comm_backend = "{cell.dispatcher}"\n'
    )
    return trainer_config(load_job(job)).model_spec


def _by_override(cell: Cell) -> Any:
    """Apply the overrides to the host's config, as its trainer does."""
    base, name = MODELS[cell.model]
    module, _, flavor = base.partition("/")
    package = importlib.import_module(f"torchtitan.models.{module}")
    with _a_gpu_that_multiplies_eight_bits():
        config = getattr(importlib.import_module(f"{package.__name__}.config_registry"), name)()
        mtp = {"num_mtp_layers": 1} if flavor.endswith("_mtp") else {}
        config.model_spec = package.model_registry(
            flavor.removesuffix("_mtp"),
            moe_comm_backend=cell.dispatcher,
            converters=_converters(cell),
            **mtp,
        )
    config.parallelism.expert_parallel_degree = 2
    config.activation_checkpoint = FullAC.Config()
    config.override.imports = [
        *([OVERRIDES[cell.beside]] if cell.beside in OVERRIDES else []),
        ("ezpz_moe.overrides.experts", {"compute_backend": cell.backend}),
    ]
    refuse_overrides(config)  # when the host imports them, which it does once in a process
    config.model_spec.model.update_from_config(config=config)
    with mock.patch.dict("os.environ", EZPZ_MOE_DEBUG="1"):  # raise, do not exit
        apply_overrides(config.override, config)
    return config.model_spec


def _converters(cell: Cell) -> list[Any] | None:
    if cell.beside not in CONVERTERS:
        return None
    return [getattr(quantization, CONVERTERS[cell.beside][1]).Config()]


@contextlib.contextmanager
def _a_gpu_that_multiplies_eight_bits() -> Iterator[None]:
    """The converters ask for it; a model without memory needs none."""
    with contextlib.ExitStack() as patches:
        for module in ("float8", "mx"):
            where = f"torchtitan.components.quantization.{module}.has_cuda_capability"
            patches.enter_context(mock.patch(where, return_value=True))
        yield


def _check(spec: Any, cell: Cell) -> None:
    """The backend is the one of every MoE layer."""
    layers = list(spec.model.traverse(MoE.Config))
    with torch.device("meta"):
        experts = [node.build() for _, node, _, _ in spec.model.traverse(GroupedExperts.Config)]
    assert [each.compute_backend for each in experts] == [cell.backend] * len(layers)
    dispatchers = {type(moe.routed_experts.token_dispatcher) for _, moe, _, _ in layers}
    assert len(dispatchers) == 1
    words = cell.dispatcher.replace("_", "").replace("standard", "")
    assert words in dispatchers.pop().__qualname__.lower()
