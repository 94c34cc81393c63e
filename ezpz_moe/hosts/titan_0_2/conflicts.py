"""Find settings that cannot be combined, before the model is built.

The host finds some of these conflicts itself, but in the middle of a run, or in words that do not
name the setting. Each check below yields the messages of its conflicts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import torch
from torchtitan.components.tokenizer import build_hf_tokenizer
from torchtitan.tools import utils

from ezpz_moe.compute import get_backend
from ezpz_moe.config.flavors import Flavor
from ezpz_moe.config.job import accepts, allowed
from ezpz_moe.errors import EzpzError
from ezpz_moe.hosts.backends import HOST_PATH
from ezpz_moe.hosts.job_files import missing_files, vocabulary_problems
from ezpz_moe.hosts.limits import (
    compile_problems,
    degree_problems,
    learning_rate_problems,
    memory_problems,
)
from ezpz_moe.hosts.precision import experts_dtype
from ezpz_moe.hosts.ranks import (
    Batch,
    head_problems,
    is_dry_run,
    rank_problems,
    schedule_problems,
    started_rank_problems,
)
from ezpz_moe.hosts.titan_0_2.job_keys import KEYS
from ezpz_moe.hosts.titan_0_2.models import model_args

_DEEPEP = 'parallelism.expert_parallel_comm_backend = "deepep"'
_STANDARD = 'Leave it out, or set it to "standard".'


def refuse_conflicts(config: Any, args: Any, source: str) -> None:
    """Raise if settings of ``config`` exclude each other, or exclude this machine.

    Args:
        config: the host's config, as it is trained with.
        args: the model's arguments.
        source: where the settings come from, for the message.

    Raises:
        EzpzError: all conflicts.
    """
    # Values first, combinations second: a degree of zero would stop the other checks.
    checks = (_ranks, *_checks(config))
    problems = [*_ranges(config)] or [problem for each in checks for problem in each(config, args)]
    if problems:
        raise EzpzError(
            "\n  ".join([f"{source}:", *problems]) if problems[1:] else f"{source}: {problems[0]}"
        )


def machine_problems(config: Any, flavor: Flavor, ranks: int | None) -> list[str]:
    """Return why this machine cannot run it, before there is a run; ``ranks`` None: not known."""
    args = model_args(flavor)
    problems = [problem for check in _checks(config) for problem in check(config, args)]
    if ranks is None:
        return problems
    par, batch = config.parallelism, _batch(config)
    within = par.expert_tensor_parallel_degree
    return [*rank_problems(par, ranks, batch, expert_tensor_parallel=within), *problems]


def _checks(config: Any) -> tuple[_Check, ...]:
    # A dry run stands for another machine, with other files and devices. A tokenizer that is here
    # as well tells about it.
    return (*_SETTINGS, _vocabulary) if is_dry_run(config) else (*_SETTINGS, *_ON_THIS_MACHINE)


def _ranges(config: Any) -> Iterator[str]:
    """Check numbers against the job's table: the host's flags accept any number."""
    for section, keys in KEYS.items():
        node = config
        for name in section.split("."):
            # A section may be 0.3's alone.
            node = getattr(node, name, None)
        for name, key in keys.items():
            value = getattr(node, name, None)
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            # No type: this host refuses the key, and a field without effect may stand for it.
            if is_number and key.type is not None and not accepts(key, value):
                yield f"{section}.{name} = {value}: must be {allowed(key)}."


def _expert_parallel_degree(config: Any, args: Any) -> Iterator[str]:
    degree, experts = config.parallelism.expert_parallel_degree, args.moe_args.num_experts
    yield from degree_problems(degree, {"": experts}, config.model.flavor)


def _tensor_parallel_degree(config: Any, args: Any) -> Iterator[str]:
    # Not every model of the host has key heads of their own.
    heads = filter(None, (args.n_heads, getattr(args, "n_kv_heads", None)))
    return head_problems(config.parallelism, heads, config.model.flavor)


def _pipeline_schedule(config: Any, args: Any) -> Iterator[str]:
    return schedule_problems(config)


def _ranks(config: Any, args: Any) -> Iterator[str]:
    """Check the ranks. In a run, the host itself refuses wrong degrees before it calls us."""
    within = config.parallelism.expert_tensor_parallel_degree
    return started_rank_problems(config, _batch(config), expert_tensor_parallel=within)


def _batch(config: Any) -> Batch:
    training = config.training
    return Batch(
        step=("training.global_batch_size", training.global_batch_size),
        microbatch=("training.local_batch_size", training.local_batch_size),
    )


def _sequence_length(config: Any, args: Any) -> Iterator[str]:
    # Only a flavor with sizes has max_positions: the host would otherwise make its RoPE as long as
    # the sequence, here it keeps the flavor's.
    if args.max_positions is not None and config.training.seq_len > args.max_positions:
        yield (
            f"training.seq_len = {config.training.seq_len} exceeds what flavor "
            f"{config.model.flavor!r} is made for: its RoPE ends at max_seq_len = "
            f"{args.max_positions}. A flavor that inherits it, with [rope] max_seq_len = "
            f"{config.training.seq_len}, reaches that far."
        )


def _limits(config: Any, args: Any) -> Iterator[str]:
    yield from compile_problems(config.compile.backend)
    total_steps = getattr(config.lr_scheduler, "total_steps", None)  # 0.2.1 has none
    yield from learning_rate_problems(config.training.steps, total_steps)
    setting, value = _batch(config).microbatch
    yield from memory_problems(setting, value, value * config.training.seq_len, args.dim)


def _quantized_experts(config: Any, args: Any) -> Iterator[str]:
    if args.compute_backend == HOST_PATH:
        return
    # The converter acts where the host calls torch._grouped_mm. Another backend never calls it, and
    # the run would silently train unquantized experts.
    for converter in config.model.converters:
        if "grouped_mm" in converter:
            yield (
                f"model.converters: {converter} quantizes torch._grouped_mm, but "
                f"compute_backend {args.compute_backend!r} computes the experts without it. "
                f"Remove the converter, or use compute_backend = {HOST_PATH!r}."
            )


def _deepep(config: Any, args: Any) -> Iterator[str]:
    if _has_deepep(config, args) and config.parallelism.expert_parallel_degree == 1:
        yield (
            f"{_DEEPEP} sends tokens between ranks, but parallelism.expert_parallel_degree = 1. "
            f"{_STANDARD}"
        )


def _deepep_here(config: Any, args: Any) -> Iterator[str]:
    if not _has_deepep(config, args):
        return
    if utils.device_type != "cuda":
        yield f"{_DEEPEP} has kernels for CUDA alone; this is {utils.device_type}. {_STANDARD}"
    elif find_spec("deep_ep") is None:
        yield (
            f"{_DEEPEP} needs the package deep_ep, which is not installed. Install it from "
            f"https://github.com/deepseek-ai/DeepEP. Or: {_STANDARD}"
        )


def _has_deepep(config: Any, args: Any) -> bool:
    # Models without the field are built as if the setting were not there.
    is_taken = hasattr(args, "expert_parallel_comm_backend")
    return is_taken and config.parallelism.expert_parallel_comm_backend == "deepep"


def _files(config: Any, args: Any) -> Iterator[str]:
    return missing_files(config.model.hf_assets_path, config.checkpoint.initial_load_path)


def _vocabulary(config: Any, args: Any) -> Iterator[str]:
    return vocabulary_problems(
        lambda: build_hf_tokenizer(config),
        config.model.hf_assets_path,
        args.vocab_size,
        config.model.flavor,
    )


def _backend_on_device(config: Any, args: Any) -> Iterator[str]:
    if args.compute_backend == HOST_PATH and not utils.has_cuda_capability(9, 0):
        return  # the host takes its for-loop, which runs everywhere
    device = torch.device(utils.device_type)
    dims = sorted({args.dim, args.moe_inter_dim} if hasattr(args, "moe_inter_dim") else {args.dim})
    param = config.training.mixed_precision_param
    dtype = getattr(torch, experts_dtype(args.expert_precision, param, device.type))
    for reason in get_backend(args.compute_backend).why_not(device, dtype, dims=dims):
        yield f"compute_backend {args.compute_backend!r} cannot run on {device.type}: {reason}."


def _cpu(config: Any, args: Any) -> Iterator[str]:
    if utils.device_type != "cpu":
        return
    if args.attn_type != "sdpa":
        yield (
            f"the attention of flavor {config.model.flavor!r} ({args.attn_type}) has no backward "
            'on the CPU. Use a flavor with attention = "sdpa".'
        )
    if config.parallelism.expert_parallel_degree > 1:
        yield (
            "parallelism.expert_parallel_degree: torchtitan 0.2 sorts tokens for expert "
            "parallelism with a Triton kernel, which does not run on the CPU. Set it to 1, or use "
            "torchtitan 0.3."
        )
    if config.profiling.enable_memory_snapshot:
        yield (
            "profiling.enable_memory_snapshot records an accelerator's allocator, but this machine "
            "has no accelerator. Set it to false."
        )


_Check = Callable[[Any, Any], Iterator[str]]
_SETTINGS: tuple[_Check, ...] = (
    _expert_parallel_degree,
    _tensor_parallel_degree,
    _pipeline_schedule,
    _sequence_length,
    _limits,
    _quantized_experts,
    _deepep,
)
_ON_THIS_MACHINE: tuple[_Check, ...] = (
    _files,
    _vocabulary,
    _backend_on_device,
    _deepep_here,
    _cpu,
)
