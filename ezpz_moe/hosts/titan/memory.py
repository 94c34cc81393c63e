"""Count what a rank of a run holds by component: weights, and what forward leaves for backward.

The rank is built as ``preflight`` builds it, and its forward runs with tensors that have shapes but
no values. The effects of the job's activation checkpointing, dtypes, batch and tensor parallelism
therefore come from the host's own code and not from formulas.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torchtitan.components.loss import ChunkedLossWrapper
from torchtitan.config import ConfigManager
from torchtitan.tools import utils
from torchtitan.trainer import Trainer

from ezpz_moe.errors import EzpzError
from ezpz_moe.hosts import ranks
from ezpz_moe.hosts.dry_run import become_rank
from ezpz_moe.hosts.installed import host_name
from ezpz_moe.hosts.local import local
from ezpz_moe.hosts.precision import as_on_an_accelerator
from ezpz_moe.hosts.rank_report import RankReport
from ezpz_moe.hosts.titan.accelerator_kernels import AcceleratorKernels, give_shapes_only
from ezpz_moe.hosts.titan.attention import has_masked_attention
from ezpz_moe.hosts.titan.command import named
from ezpz_moe.hosts.titan.components import components
from ezpz_moe.hosts.titan.labelled import all_counted
from ezpz_moe.hosts.titan.live import LiveStorages, Place
from ezpz_moe.hosts.titan.preflight import config_of_rank, parts_of_model
from ezpz_moe.hosts.titan.zero_computation import route_evenly

RESIDUAL_STREAM = "residual stream"

_LOGIT_BYTES = torch.float32.itemsize
"""Cross-entropy saves the log-softmax of a chunk's logits in float32."""


@dataclass(frozen=True)
class Pipeline:
    """How a job's ranks work one after another.

    Attributes:
        stages: degree of pipeline parallelism.
        schedule: name of the schedule in torch.
        microbatches: computed by a rank in a step; a pipeline holds several of them at a time.
    """

    stages: int
    schedule: str
    microbatches: int


def fewest_ranks(config: str, host_flags: list[str]) -> int:
    """Return the fewest ranks that the job's degrees allow.

    Raises:
        EzpzError: as :func:`pipeline`.
    """
    return ranks.fewest_ranks(_told(config, host_flags).parallelism)


def pipeline(config: str, host_flags: list[str]) -> Pipeline:
    """Return the job's pipeline.

    Raises:
        EzpzError: the job is wrong. A flag that the trainer does not know ends the process.
    """
    told = _told(config, host_flags)
    par = told.parallelism
    return Pipeline(
        stages=par.pipeline_parallel_degree,
        schedule=par.pipeline_parallel_schedule,
        microbatches=told.training.local_batch_size // _microbatch(told),
    )


def _told(config: str, host_flags: list[str]) -> Trainer.Config:
    told = ConfigManager().parse_args([*named(config), *host_flags])
    if not hasattr(told.training, "local_batch_size"):
        raise EzpzError(
            f"{config}: a rank's memory cannot be computed with torchtitan {host_name()}: its "
            "batches consist of tokens, not of sequences. To get a flavor's parameters and FLOPs, "
            "leave out --world-size."
        )
    return told


def _microbatch(config: Trainer.Config) -> int:
    """Return the number of sequences that a rank computes at once."""
    par = config.parallelism
    has_pipeline = par.pipeline_parallel_degree > 1
    batch = config.training.local_batch_size
    return par.pipeline_parallel_microbatch_size if has_pipeline else batch


def weights(config: str, host_flags: list[str], world_size: int, rank: int) -> RankReport:
    """Report the bytes of the weights that the rank holds. Once per process."""
    held: Counter[Place] = Counter()
    for part in parts_of_model(config_of_rank(config, host_flags, world_size, rank)):
        places = places_of(part)
        for module in part.modules():
            for parameter in module.parameters(recurse=False):
                shard = local(parameter)
                held[places[module]] += shard.numel() * shard.itemsize
    return RankReport(rank, bytes_by_place=held)


def activations_on_cpu(
    config: str, host_flags: list[str], world_size: int, rank: int
) -> RankReport:
    """Report as :func:`activations` does, with torch's kernels on the CPU."""
    return activations(config, host_flags, world_size, rank, is_cpu=True)


def activations(
    config: str, host_flags: list[str], world_size: int, rank: int, *, is_cpu: bool = False
) -> RankReport:
    """Report the bytes that the forward of one microbatch leaves for backward. Once per process.

    This covers all layers, on a rank without neighbours (:func:`_without_neighbours`), with the
    kernels that an accelerator has for attention and norms.
    """
    # The machine that is described has an accelerator: the rule for CPUs that emulate bfloat16 must
    # not turn the job's dtype into float32.
    here = contextlib.nullcontext() if is_cpu else as_on_an_accelerator()
    with here:
        trainer_config = config_of_rank(config, host_flags, world_size, rank)
    # The job has been read as a rank of the whole run. From here on, and before the trainer looks
    # at the environment, this process is rank 0 of the smaller one.
    become_rank(0, _without_neighbours(trainer_config, world_size))
    if is_cpu:
        _refuse_masked_attention(trainer_config)
    else:
        give_shapes_only(trainer_config.model_spec.model)
    (model,) = parts_of_model(trainer_config)
    norms = contextlib.nullcontext() if is_cpu else AcceleratorKernels()
    # Without values nobody can count the assignments that are not computed.
    route_evenly(model)
    # As the chunked loss does it: it applies the output head itself, chunk by chunk.
    model._skip_lm_head = isinstance(trainer_config.loss, ChunkedLossWrapper.Config)
    training = trainer_config.training
    shape = (training.local_batch_size, training.seq_len)
    # A compiler would run on fake tensors of its own, where nothing here sees what is saved.
    force_eager = torch.compiler.set_stance("force_eager")
    with FakeTensorMode(allow_non_fake_inputs=True), force_eager, norms:
        model.to_empty(device=utils.device_type)
        tokens, positions = torch.zeros((2, *shape), dtype=torch.int64, device=utils.device_type)
        counted = all_counted(trainer_config.dataloader, tokens)
        held = live_after_forward(model, tokens, positions=positions, **counted)
    # The loss is not run: it frees one chunk after another, so a formula for one chunk is enough.
    held[("lm_head", "output head")] = _loss_bytes(trainer_config)
    return RankReport(rank, bytes_by_place=held)


def _refuse_masked_attention(config: Trainer.Config) -> None:
    if has_masked_attention(config.model_spec):
        raise EzpzError(
            f"--device cpu: the attention of flavor {config.model_spec.flavor!r} has no backward "
            "on the CPU. Choose a flavor with _sdpa."
        )


def _without_neighbours(config: Trainer.Config, world_size: int) -> int:
    """Change the job to make its rank compute one microbatch alone, and return its ranks.

    Without a pipeline the rank has all layers. Without context parallelism it has a shorter
    sequence. Without expert parallelism it keeps the rows of its own tokens; with even routing it
    would get equally many from others. What shards the weights stays: it does not change what
    forward leaves.
    """
    par, training = config.parallelism, config.training
    microbatch = _microbatch(config)
    config.training = replace(
        training,
        seq_len=training.seq_len // par.context_parallel_degree,
        local_batch_size=microbatch,
        global_batch_size=-1,
    )
    config.parallelism = replace(
        par,
        pipeline_parallel_degree=1,
        context_parallel_degree=1,
        expert_parallel_degree=1,
        data_parallel_shard_degree=-1,
    )
    # The other degrees keep their ranks: those of experts and of the sequence join the sharding.
    return world_size // par.pipeline_parallel_degree


def live_after_forward(
    model: nn.Module, tokens: torch.Tensor, **inputs: torch.Tensor
) -> dict[Place, int]:
    """Return bytes that ``model(tokens, **inputs)`` leaves for backward, by place."""
    storages = LiveStorages(places_of(model))
    with storages.watching():
        output = model(tokens, **inputs)
    held = storages.live_bytes(model)
    del output  # backward starts from it, so it had to live until here
    return held


def places_of(model: nn.Module) -> dict[nn.Module, Place]:
    """Return each module's part of the model, such as "layers.3" or "norm", and its component."""
    component = dict(components(model))
    parts = [("", model), *model.named_children()]
    parts += [(f"layers.{name}", layer) for name, layer in model.layers.named_children()]
    # From the outside in: a later, more exact part replaces an earlier one.
    places = {module: (part, component[module]) for part, top in parts for module in top.modules()}
    for name, layer in model.layers.named_children():  # a layer's own forward adds up the stream
        for block in (layer, getattr(layer, "_checkpoint_wrapped_module", layer)):
            places[block] = (f"layers.{name}", RESIDUAL_STREAM)
    return places


def _loss_bytes(config: Trainer.Config) -> int:
    """Return the bytes that cross-entropy saves of one chunk's logits."""
    training = config.training
    tokens = training.local_batch_size * training.seq_len
    loss = config.loss
    chunks = loss.num_chunks if isinstance(loss, ChunkedLossWrapper.Config) else 1
    # Tensor parallelism shards the vocabulary.
    vocabulary = config.model_spec.model.vocab_size // config.parallelism.tensor_parallel_degree
    return tokens // chunks * vocabulary * _LOGIT_BYTES
