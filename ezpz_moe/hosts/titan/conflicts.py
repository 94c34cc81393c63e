"""Find settings that cannot be combined, before the run starts.

The host finds some of these conflicts itself, but in the middle of a run, or in words that do not
name the flavor. Each check below yields the messages of its conflicts.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import torch
from torchtitan.config import Configurable
from torchtitan.models.common.attention import BaseAttention, ScaledDotProductAttention
from torchtitan.models.common.config_utils import decoder_vocab_size
from torchtitan.models.common.decoder import Decoder
from torchtitan.tools import utils
from torchtitan.trainer import Trainer

from ezpz_moe.compute import get_backend
from ezpz_moe.config.flavors import with_variant
from ezpz_moe.config.job import accepts, allowed
from ezpz_moe.errors import EzpzError
from ezpz_moe.hosts.cpu import no_accelerator
from ezpz_moe.hosts.job_files import chat_problems, missing_files, vocabulary_problems
from ezpz_moe.hosts.limits import compile_problems, learning_rate_problems, memory_problems
from ezpz_moe.hosts.our_texts import CHAT_FILE
from ezpz_moe.hosts.ranks import (
    Batch,
    head_problems,
    is_dry_run,
    rank_problems,
    schedule_problems,
    started_rank_problems,
)
from ezpz_moe.hosts.titan import gloo
from ezpz_moe.hosts.titan.attention import has_masked_attention
from ezpz_moe.hosts.titan.base import Sizes, titan
from ezpz_moe.hosts.titan.dispatchers import dispatcher_machine_problems, dispatcher_problems
from ezpz_moe.hosts.titan.ffns import ffn_problems
from ezpz_moe.hosts.titan.layer_conflicts import layer_problems
from ezpz_moe.hosts.titan.overlap_conflicts import overlap_problems
from ezpz_moe.hosts.titan.override_conflicts import override_problems
from ezpz_moe.hosts.titan.precision import experts_dtypes
from ezpz_moe.hosts.titan.router_conflicts import router_problems
from ezpz_moe.hosts.titan.telemetry_conflicts import telemetry_problems


def refuse_conflicts(config: Trainer.Config, source: str) -> None:
    """Raise if settings of ``config`` exclude each other, or exclude this machine.

    Checks that depend on the machine run only in a process that is about to train (one started by
    torchrun). A job for a cluster can be inspected on any machine.

    Raises:
        EzpzError: all conflicts, after ``source``, which says where the settings come from.
    """
    checks = (*_ALWAYS, *_checks_before_training(config))
    # Values first, combinations second: a degree of zero would stop the other checks.
    problems = [*_ranges(config)] or [problem for check in checks for problem in check(config)]
    if problems:
        raise EzpzError(
            "\n  ".join([f"{source}:", *problems]) if problems[1:] else f"{source}: {problems[0]}"
        )


def _checks_before_training(config: Trainer.Config) -> tuple[_Check, ...]:
    if not is_about_to_train():
        return ()
    # A dry run stands for another machine, but a tokenizer that is here as well tells about it.
    return (_ranks, _vocabulary) if is_dry_run(config) else (_ranks, *_ON_THIS_MACHINE)


def machine_problems(config: Trainer.Config, ranks: int | None) -> list[str]:
    """Return why this machine cannot run it, before there is a run; ``ranks`` None: not known."""
    problems = [problem for check in _ON_THIS_MACHINE for problem in check(config)]
    return (
        problems
        if ranks is None
        else [*rank_problems(config.parallelism, ranks, _batch(config)), *problems]
    )


def is_about_to_train() -> bool:
    """Return whether this process has a rank."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def captures_cuda_graphs(config: Trainer.Config) -> bool:
    """Return whether the host captures the training step: asked for, and possible here."""
    return (
        # The last three are the host's own condition: on ROCm it captures nothing.
        not config.training.disable_cuda_graphs
        and utils.device_type == "cuda"
        and torch.cuda.is_available()
        and torch.version.hip is None
    )


def _experts(config: Trainer.Config) -> list[Any]:
    """Return the configs of the routed experts, one for each MoE layer."""
    if config.model_spec is None:
        return []
    experts_config = titan().experts().HostExperts.Config
    return [node for _, node, _, _ in config.model_spec.traverse(experts_config)]


def _sizes(config: Trainer.Config) -> list[Sizes]:
    return [titan().experts().sizes(node) for node in _experts(config)]


def _backends(config: Trainer.Config) -> list[str]:
    """Return the backends that the model's experts name (in practice one)."""
    return list(dict.fromkeys(node.compute_backend for node in _experts(config)))


def _cuda_graphs(config: Trainer.Config) -> Iterator[str]:
    if config.training.disable_cuda_graphs:
        return
    remedy = "Leave training.disable_cuda_graphs out, or set it to true."
    for name in _backends(config):
        if get_backend(name).host_syncs:
            yield (
                f"training.disable_cuda_graphs = false, but compute_backend {name!r} copies token "
                f"counts to the host, which a CUDA graph cannot capture. {remedy}"
            )
    degree = config.parallelism.pipeline_parallel_degree
    if degree > 1:
        yield (
            f"training.disable_cuda_graphs = false cannot be combined with "
            f"parallelism.pipeline_parallel_degree = {degree}. {remedy}"
        )
    # The host's own check runs last. It is private, but it alone knows which dispatchers can be
    # captured.
    try:
        config._validate_cuda_graphs()
    except ValueError as error:
        if degree == 1:  # otherwise it repeats the message above
            yield (
                f"training.disable_cuda_graphs = false cannot be combined with "
                f"parallelism.expert_parallel_degree = {config.parallelism.expert_parallel_degree} "
                f"and this expert_parallel_comm_backend. {remedy} (torchtitan: {error})"
            )


def _tensor_parallel_degree(config: Trainer.Config) -> Iterator[str]:
    attentions = config.model_spec.traverse(BaseAttention.Config) if config.model_spec else ()
    heads = (
        getattr(node, name, None)
        for _, node, _, _ in attentions
        # Grouped queries have fewer key heads; not every attention has the second field.
        for name in ("n_heads", "n_kv_heads")
    )
    return head_problems(config.parallelism, filter(None, heads), _flavor(config))


def _context_parallel_attention(config: Trainer.Config) -> Iterator[str]:
    degree, spmd = config.parallelism.context_parallel_degree, config.parallelism.spmd_backend
    # The host takes SDPA with context parallelism only under partial_dtensor.
    if degree > 1 and spmd != "partial_dtensor" and _has_sdpa(config):
        yield (
            f"parallelism.context_parallel_degree = {degree} cannot be combined with the SDPA of "
            f"flavor {_flavor(config)!r} and parallelism.spmd_backend = {spmd!r}. Set the latter "
            "to "
            f'"partial_dtensor", or use a flavor without _sdpa.'
        )


def _forced_load(config: Trainer.Config) -> Iterator[str]:
    parallelism = config.parallelism
    degree, spmd = parallelism.tensor_parallel_degree, parallelism.spmd_backend
    # The host looks up plain numbers of experts in scores that are then distributed.
    if config.debug.moe_force_load_balance and degree > 1 and spmd == "partial_dtensor":
        yield (
            "debug.moe_force_load_balance = true cannot be combined with "
            f"parallelism.tensor_parallel_degree = {degree} and parallelism.spmd_backend = "
            f'{spmd!r}. Set the latter to "spmd_types".'
        )


def _has_sdpa(config: Trainer.Config) -> bool:
    if config.model_spec is None:
        return False
    return any(config.model_spec.traverse(ScaledDotProductAttention.Config))


def _ranges(config: Trainer.Config) -> Iterator[str]:
    """Check numbers against the job's table: the host's flags accept any number."""
    for row in (row for section in titan().job_keys().values() for row in section.values()):
        value = None if row.path is None else _at(config, row.path)
        # A bool is an int in Python, and has no range.
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if is_number and not accepts(row, value):
            yield f"{row.path} = {value}: must be {allowed(row)}."


def _at(node: Any, path: str) -> Any:
    """Return what a config holds at a dotted path; None if there is nothing."""
    for name in path.split("."):
        match node:
            case list() | tuple():
                node = node[int(name)] if int(name) < len(node) else None
            case dict():
                node = node.get(name)
            case _:
                node = getattr(node, name, None)
    return node


def _sequence_length(config: Trainer.Config) -> Iterator[str]:
    host = titan()
    seq_len = _at(config, host.LENGTH)
    # Only decoders have such a limit.
    if config.model_spec is not None and isinstance(config.model_spec.model, Decoder.Config):
        longest = getattr(config.model_spec.model, host.LONGEST)
        if seq_len > longest:
            yield (
                f"{host.LENGTH} = {seq_len} exceeds what flavor {_flavor(config)!r} is made "
                f"for: its RoPE ends at {host.LONGEST} = {longest}. A flavor that inherits it, "
                f"with [rope] max_seq_len = {seq_len}, reaches that far."
            )
    # The loss cuts what a rank has of a sequence into chunks, and context parallelism cuts it
    # before.
    chunks = getattr(config.loss, "num_chunks", 1)
    ranks = config.parallelism.context_parallel_degree
    tokens = _at(config, host.CUT_BY_LOSS)
    if tokens % (chunks * ranks):
        product = f"{chunks} x {ranks}" if ranks > 1 else f"{chunks}"
        yield (
            f"{host.CUT_BY_LOSS} = {tokens} cannot be cut into the {product} equal chunks "
            f"of the loss (loss.num_chunks"
            f"{', parallelism.context_parallel_degree' if ranks > 1 else ''})."
            f" Choose a multiple of {chunks * ranks}."
        )


def _ranks(config: Trainer.Config) -> Iterator[str]:
    return started_rank_problems(config, _batch(config))


def _batch(config: Trainer.Config) -> Batch:
    host = titan()
    return Batch(
        step=(host.STEP, _at(config, host.STEP)),
        microbatch=(host.MICROBATCH, _at(config, host.MICROBATCH)),
        microbatches=host.microbatches(config.parallelism),
    )


def _limits(config: Trainer.Config) -> Iterator[str]:
    yield from compile_problems(config.compile.backend)
    yield from learning_rate_problems(config.training.steps, config.lr_scheduler.total_steps)
    if sizes := _sizes(config):
        together = titan().sequences(config.training, config.parallelism, data_ranks=1)
        setting, value = _batch(config).microbatch
        yield from memory_problems(
            setting, value, together.of_microbatch * together.length, sizes[0].dim
        )


def _of_this_host(config: Trainer.Config) -> Iterator[str]:
    return titan().own_conflicts(config)


def _files(config: Trainer.Config) -> Iterator[str]:
    return missing_files(config.hf_assets_path, config.checkpoint.initial_load_path)


def _vocabulary(config: Trainer.Config) -> Iterator[str]:
    if config.model_spec is None or not isinstance(config.model_spec.model, Decoder.Config):
        return iter(())
    return vocabulary_problems(
        lambda: config.tokenizer.build(tokenizer_path=config.hf_assets_path),
        config.hf_assets_path,
        decoder_vocab_size(config.model_spec),
        _flavor(config),
    )


def _chats(config: Trainer.Config) -> Iterator[str]:
    validation = ["validator.dataloader.dataset"] if config.validator.enable else []
    if CHAT_FILE not in [_at(config, path) for path in ("dataloader.dataset", *validation)]:
        return iter(())
    return chat_problems(
        lambda: config.tokenizer.build(tokenizer_path=config.hf_assets_path), config.hf_assets_path
    )


def _backend_on_device(config: Trainer.Config) -> Iterator[str]:
    # If torch finds no device, torchtitan falls back to "cuda" and fails when it first uses it.
    if no_accelerator() and utils.device_type != "cpu":
        yield (
            f"this machine has no accelerator, and torchtitan on its own would train on "
            f"{utils.device_type}. Start the run with `ezpz-moe train` or `python -m "
            f"ezpz_moe.train`, which train on the CPU."
        )
        return
    device = torch.device(utils.device_type)
    dims = {dim for sizes in _sizes(config) for dim in (sizes.dim, sizes.hidden_dim)}
    for name in _backends(config):
        for dtype in experts_dtypes(config):
            reasons = get_backend(name).why_not(device, getattr(torch, dtype), dims=sorted(dims))
            for reason in reasons:
                yield f"compute_backend {name!r} cannot run on {device.type}: {reason}."


def _cpu(config: Trainer.Config) -> Iterator[str]:
    if utils.device_type != "cpu":
        return
    spmd = config.parallelism.spmd_backend
    found = gloo.why_not_spmd_types(asdict(config.parallelism))
    if found and spmd == "spmd_types":
        setting, reason = found
        yield (
            f"{setting} on the CPU cannot be combined with {gloo.SPMD} = {spmd!r}: {reason}. "
            f'Set {gloo.SPMD} to "{gloo.INSTEAD}".'
        )
    if config.model_spec and has_masked_attention(config.model_spec):
        yield (
            f"the attention of flavor {_flavor(config)!r} (FlexAttention or varlen) has no "
            f"backward on the CPU. Use {_flavor_with_sdpa(config)}."
        )
    if (degree := config.parallelism.context_parallel_degree) > 1:
        yield (
            f"parallelism.context_parallel_degree = {degree}: on CPUs, torch cannot compute "
            "attention over a sequence that ranks share. Set it to 1."
        )
    if config.profiler.enable_memory_snapshot:
        yield (
            "profiling.enable_memory_snapshot records an accelerator's allocator, but this machine "
            "has no accelerator. Set it to false."
        )


def _flavor(config: Trainer.Config) -> str:
    return config.model_spec.flavor if config.model_spec else ""


def _flavor_with_sdpa(config: Trainer.Config) -> str:
    # Files beside a job are not found from here: of those only the attention can be named.
    name = with_variant(_flavor(config), "attention", "sdpa")
    return f"flavor {name}" if name else 'a flavor with attention = "sdpa"'


def _routers(config: Trainer.Config) -> Iterator[str]:
    """Check what a flavor's ``[router]`` asks of the run. All layers have the same settings."""
    every = Configurable.Config
    # recurse, because every node is of this class: the search would otherwise end at the root.
    nodes = config.model_spec.model.traverse(every, recurse=True) if config.model_spec else ()
    # By attribute: our class is not imported, as only flavors with a router need what it relies on.
    moes = (node for _, node, _, _ in nodes if hasattr(getattr(node, "router", None), "settings"))
    moe = next(moes, None)
    return router_problems(config, moe, _flavor(config)) if moe else iter(())


def _train_only(config: Trainer.Config) -> Iterator[str]:
    if getattr(config, "learners", None) is None:
        return iter(())
    with titan().importing():  # only such a job needs this from the host
        from ezpz_moe.hosts.titan.train_only import problems
    return problems(config)


def _telemetry(config: Trainer.Config) -> Iterator[str]:
    return telemetry_problems(config, _flavor(config))


_Check = Callable[[Trainer.Config], Iterator[str]]
_ALWAYS: tuple[_Check, ...] = (
    _cuda_graphs,
    layer_problems,
    _tensor_parallel_degree,
    _context_parallel_attention,
    _forced_load,
    override_problems,
    dispatcher_problems,
    _sequence_length,
    _limits,
    schedule_problems,
    _routers,
    ffn_problems,
    overlap_problems,
    _telemetry,
    _train_only,
    _of_this_host,
)
# A dry run skips these: it stands for ranks with other files and devices.
_ON_THIS_MACHINE: tuple[_Check, ...] = (
    _files,
    _vocabulary,
    _chats,
    _backend_on_device,
    dispatcher_machine_problems,
    _cpu,
)
