"""Fill in the sheet that planning computes with, from the host's own model on the meta device.

How tensor parallelism splits a weight is what the host's ``ShardingConfig`` says of it, so no model
needs a table.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import spmd_types as spmd
import torch
from torch import nn
from torchtitan.components.loss import ChunkedLossWrapper
from torchtitan.config import ConfigManager
from torchtitan.distributed.activation_checkpoint import FullAC, SelectiveAC
from torchtitan.models.common.attention import BaseAttention
from torchtitan.models.common.moe import MoE

from ezpz_moe.compute import get_backend
from ezpz_moe.config.flavors import with_variant
from ezpz_moe.config.job import Job, find_job
from ezpz_moe.errors import EzpzError
from ezpz_moe.hosts.installed import host_name
from ezpz_moe.hosts.model_sheet import (
    EMBEDDINGS,
    HEAD,
    NORM,
    Degrees,
    JobSheet,
    ModelSheet,
    Part,
    Routed,
    Weight,
)
from ezpz_moe.hosts.precision import as_on_an_accelerator
from ezpz_moe.hosts.titan.anatomy import attentions, score_flops
from ezpz_moe.hosts.titan.base import titan
from ezpz_moe.hosts.titan.command import named
from ezpz_moe.hosts.titan.components import _computing_shares, _multiplied, components
from ezpz_moe.hosts.titan.job import trainer_config
from ezpz_moe.hosts.titan.memory import places_of
from ezpz_moe.hosts.titan.selector import Selector


def model_sheet(
    config: str, host_flags: list[str], *, is_cpu: bool = False, backend: str = ""
) -> ModelSheet:
    """Return the sheet of a job's model.

    Args:
        config: a flavor's name or the path of a job's TOML.
        host_flags: the trainer's own flags, which override the job.
        is_cpu: whether the run's ranks are CPUs like this one, which may train in float32.
        backend: computes the experts in place of the job's own.

    Raises:
        EzpzError: the job is wrong, or has what is not planned: context parallelism, another
            activation checkpointing than the three. A flag that the trainer does not know ends the
            process.
    """
    with contextlib.nullcontext() if is_cpu else as_on_an_accelerator():
        told = ConfigManager().parse_args([*named(config), *host_flags])
    _refuse_what_is_not_planned(told, config)
    if backend:
        told.model_spec = _on_backend(find_job(config, titan().job_keys()), host_flags, backend)
    # Without expert parallelism, whose split of the experts is always the first dimension.
    whole = replace(told.parallelism, expert_parallel_degree=1)
    asked, told.parallelism = told.parallelism, whole
    spec = told.model_spec.model
    spec.update_from_config(config=told)
    told.parallelism = asked
    with torch.device("meta"):
        model = spec.build()
    attending = [node for _, node, _, _ in spec.traverse(BaseAttention.Config)]
    backends = {each.compute_backend for each in model.modules() if isinstance(each, Selector)}
    pads = any(get_backend(each).pads for each in backends)
    parts = _parts(spec, model, told.training.seq_len)
    if unknown := [name for name in parts if not _is_planned(name)]:
        raise EzpzError(
            f"{config}: this model has a part {unknown[0]!r}, which is not planned. `ezpz-moe "
            "preflight` builds one cut."
        )
    return ModelSheet(
        flavor=told.model_spec.flavor,
        dim=spec.dim,
        n_layers=len(spec.layers),
        parts=parts,
        heads=tuple(_heads(attending)),
        backend=", ".join(sorted(backends)),
        pads=pads,
        is_tied=bool(getattr(spec, "enable_weight_tying", False)),
        job=_job(told),
    )


def _on_backend(job: Job, host_flags: list[str], backend: str) -> Any:
    """Return the spec of a job's model with another backend.

    Raises:
        EzpzError: the flavor has no variant of this name.
    """
    name = with_variant(job.flavor, "compute_backend", backend, near=job.folder)
    if not name:
        raise EzpzError(
            f"{job.source}: flavor {job.flavor!r} has no variant on backend {backend!r}."
        )
    return trainer_config(replace(job, flavor=name), host_flags).model_spec


def _refuse_what_is_not_planned(config: Any, source: str) -> None:
    if not hasattr(config.training, "local_batch_size"):
        raise EzpzError(
            f"{source}: cannot be planned with torchtitan {host_name()}: its batches consist of "
            "tokens, not of sequences. `ezpz-moe preflight` builds one cut."
        )
    if (degree := config.parallelism.context_parallel_degree) > 1:
        raise EzpzError(
            f"{source}: parallelism.context_parallel_degree = {degree}: context parallelism is not "
            "planned. Set it to 1; `ezpz-moe preflight` builds one cut with it."
        )
    if config.parallelism.module_fqns_per_model_part is not None:
        raise EzpzError(
            f"{source}: parallelism.module_fqns_per_model_part says which layers a stage has, for "
            "one number of stages. A plan compares several: remove it."
        )
    _checkpointing(config.activation_checkpoint, source)


def _checkpointing(policy: Any, source: str = "") -> str:
    if policy is None:
        return "none"
    if isinstance(policy, FullAC.Config):
        return "full"
    if isinstance(policy, SelectiveAC.Config):
        return "selective"
    raise EzpzError(
        f'{source}: activation_checkpoint.mode: only "none", "selective" and "full" are planned.'
    )


def _job(config: Any) -> JobSheet:
    par, training = config.parallelism, config.training
    return JobSheet(
        degrees=Degrees(
            par.data_parallel_shard_degree,
            par.data_parallel_replicate_degree,
            par.tensor_parallel_degree,
            par.pipeline_parallel_degree,
            par.expert_parallel_degree,
        ),
        seq_len=training.seq_len,
        local_batch=training.local_batch_size,
        global_batch=training.global_batch_size,
        microbatch=par.pipeline_parallel_microbatch_size,
        checkpointing=_checkpointing(config.activation_checkpoint),
        schedule=par.pipeline_parallel_schedule,
        less_layers=(
            par.pipeline_parallel_first_stage_less_layers,
            par.pipeline_parallel_last_stage_less_layers,
        ),
        reshards=par.fsdp_reshard_after_forward,
        weight_bytes=_bytes(training.dtype),
        compute_bytes=_bytes(training.mixed_precision_param),
        reduce_bytes=_bytes(training.mixed_precision_reduce),
        sequence_parallel=par.enable_sequence_parallel,
        spmd=par.spmd_backend,
        loss_chunks=_loss_chunks(config),
    )


def _bytes(dtype: str) -> int:
    return int(getattr(torch, dtype).itemsize)


def _loss_chunks(config: Any) -> int:
    # A pipeline's last stage applies the head itself.
    is_chunked = isinstance(config.loss, ChunkedLossWrapper.Config)
    return config.loss.num_chunks if is_chunked else 1


def _parts(spec: Any, model: nn.Module, seq_len: int) -> dict[str, Part]:
    """Return the parts in the model's order."""
    weights: dict[str, list[Weight]] = {}
    for part, weight in _weights(model):
        weights.setdefault(part, []).append(weight)
    found = attentions(spec, model)
    attending = {_part(each.path): each for each in found}
    # Layers with other windows are averaged over.
    scores = score_flops(spec, found, seq_len) / max(len(found), 1)
    moes = {_part(name): each for name, each in model.named_modules() if isinstance(each, MoE)}
    alike: dict[Any, Part] = {}
    parts = {}
    for name, own in weights.items():
        routed = _routed(moes[name], spec.dim) if name in moes else None
        attention = attending.get(name)
        held = attention.heads * seq_len if attention and attention.holds_scores else 0
        fields = (tuple(own), scores if attention else 0.0, routed, held)
        parts[name] = alike.setdefault(fields, Part(*fields))
    return parts


def _is_planned(part: str) -> bool:
    return part in (EMBEDDINGS, NORM, HEAD) or part.startswith("layers.")


def _weights(model: nn.Module) -> Iterator[tuple[str, Weight]]:
    """Yield parameters with their part; of one that two modules share, the second has no shape."""
    places, shares = places_of(model), _computing_shares(model)
    seen: set[nn.Parameter] = set()
    for module, component in components(model):
        is_expert = component == "routed experts"
        share = shares[module] if is_expert else 1.0
        for name, parameter in module.named_parameters(recurse=False):
            weight = Weight(
                component=component,
                shape=() if parameter in seen else tuple(parameter.shape),
                split=_split(module, name, parameter),
                used=share * _is_multiplied(module, component, name, parameter),
                is_expert=is_expert,
                learns=parameter.requires_grad,
            )
            yield places[module][0], weight
            seen.add(parameter)


def _is_multiplied(module: nn.Module, component: str, name: str, parameter: nn.Parameter) -> bool:
    """Return whether a token multiplies by a parameter, as :func:`.components.weigh` counts."""
    if not _multiplied(module, component):
        return False
    return parameter.dim() > 1 + (component == "routed experts") and "bias" not in name


def _split(module: nn.Module, name: str, parameter: nn.Parameter) -> int | None:
    """Return the dimension of a parameter that the host's tensor parallelism splits, if any."""
    sharding = getattr(module, "_sharding_config", None)
    layout = sharding.state_shardings.get(name) if sharding and sharding.state_shardings else None
    if layout is None:
        return None
    of_tp = {axis.value: each for axis, each in layout.axis_types.items()}.get("tp")
    return of_tp.dim % parameter.dim() if isinstance(of_tp, spmd.Shard) else None


def _part(name: str) -> str:
    """Return "layers.3" for the name of a module in that layer."""
    return ".".join(name.split(".")[:2])


def _heads(attentions: list[Any]) -> Iterator[int]:
    found = (getattr(node, name, None) for node in attentions for name in ("n_heads", "n_kv_heads"))
    yield from dict.fromkeys(filter(None, found))


def _routed(moe: Any, dim: int) -> Routed:
    descend = getattr(moe.routed_experts, "descend", None)
    chosen = [each for each in moe.modules() if isinstance(each, Selector)]
    return Routed(
        num_experts=moe.router.num_experts,
        top_k=moe.router.top_k,
        row_width=descend.out_features if descend else dim,
        is_one_node=bool(chosen) and all(each.is_one_node for each in chosen),
    )
