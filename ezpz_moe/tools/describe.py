"""What a flavor's model consists of and what it costs: ``ezpz-moe describe``."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from ezpz_moe.config.flavors import Flavor, load_flavor
from ezpz_moe.hosts.accounting import Anatomy, Cost, DenseModel, dense_model
from ezpz_moe.hosts.detect import host
from ezpz_moe.hosts.jobs import find_job
from ezpz_moe.hosts.precision import as_on_an_accelerator
from ezpz_moe.hosts.ranks import outside_of_a_run
from ezpz_moe.tools.memory import Device, StageMemory, stage_memories


@dataclass(frozen=True)
class Baseline:
    """What a dense model is the baseline of.

    Attributes:
        flavor: the model with experts.
        equal: what both have in common, "flops" or "params".
        more_flops: FLOPs per token that the dense model has beyond it, as a share.
        more_parameters: the same of the parameters.
    """

    flavor: str
    equal: str
    more_flops: float
    more_parameters: float


@dataclass(frozen=True)
class Description:
    """A model and its costs.

    Attributes:
        flavor: its name.
        seq_len: tokens per sequence.
        precision: what the run and its experts compute in, in words.
        anatomy: the components.
        row_width: of what ranks exchange under expert parallelism, the model's dimension or that of
            a latent.
        dense: the dense model with equal FLOPs; None for a model that is dense itself.
        baseline_of: for a dense baseline, the model that it is compared with.
        ranks: of the run; None for a flavor if nobody said how many ranks train it.
        memory: per pipeline stage, for one of its ranks; empty without ranks.
    """

    flavor: str
    seq_len: int
    precision: str
    anatomy: Anatomy
    row_width: int
    dense: DenseModel | None
    baseline_of: Baseline | None = None
    ranks: int | None = None
    memory: Sequence[StageMemory] = ()


def describe(
    config: str, host_flags: list[str], world_size: int | None, device: Device
) -> Description:
    """Inspect a flavor's model and a rank's memory, without allocating it.

    Args:
        config: a flavor's name or the path of a job's TOML.
        host_flags: the trainer's own flags, which override the job.
        world_size: ranks of the run. None means the fewest that a job's degrees allow; for a flavor
            it means not to look at the memory.
        device: whose kernels determine the memory.

    Raises:
        EzpzError: the flavor or the job is wrong, or the host's binding cannot do this.
    """
    job = find_job(config)
    flavor = load_flavor(job.flavor, near=job.folder)
    part = host().anatomy()
    # RANK and WORLD_SIZE of a surrounding job script are not the described job's.
    with outside_of_a_run():
        seq_len = part.sequence_length(config, host_flags)
        # The precision is that of the run's device, not of the machine that describes it.
        with contextlib.nullcontext() if device == "cpu" else as_on_an_accelerator():
            precision = part.precision_in_words(config, host_flags, flavor)
        anatomy = part.anatomy(flavor, seq_len)
        described = Description(
            flavor.name,
            seq_len,
            precision,
            anatomy,
            flavor.moe_latent_dim or anatomy.dim,
            None if flavor.is_dense else dense_model(anatomy),
            _baseline(flavor, anatomy, seq_len),
        )
        # A job has degrees, which say how many ranks it needs at least. A flavor has none.
        if world_size is None and job.path is not None:
            world_size = host().memory().fewest_ranks(config, host_flags)
        if world_size is None:
            return described
        # Last, because it takes the longest: it builds the ranks, each in its own process.
        memory = stage_memories(config, host_flags, world_size=world_size, device=device)
    return replace(described, ranks=world_size, memory=memory)


def _baseline(flavor: Flavor, anatomy: Anatomy, seq_len: int) -> Baseline | None:
    of = flavor.dense_baseline_of
    if of is None:
        return None
    # Both are built and counted, so that this is what rounding left, and not what it should have.
    ours, theirs = anatomy.total, host().anatomy().anatomy(of, seq_len).total
    return Baseline(
        of.name, flavor.equal, ours.both / theirs.both - 1, ours.parameters / theirs.parameters - 1
    )


def as_json(description: Description) -> dict[str, Any]:
    """Return the description as plain values; FLOPs are per token."""
    anatomy = description.anatomy
    return {
        "flavor": description.flavor,
        "seq_len": description.seq_len,
        "precision": description.precision,
        "dim": anatomy.dim,
        "row_width": description.row_width,
        "n_layers": anatomy.n_layers,
        "n_moe_layers": anatomy.n_moe_layers,
        "num_experts": anatomy.num_experts,
        "zero_computation_experts": anatomy.zero_experts,
        "top_k": anatomy.top_k,
        "computing_experts_per_token": anatomy.computing_experts,
        "components": {name: _figures(cost) for name, cost in anatomy.in_order.items()},
        "total": _figures(anatomy.total),
        "dense_model_of_equal_flops": description.dense
        and {
            "ffn_hidden_dim": description.dense.hidden_dim,
            **_figures(description.dense.cost),
        },
        "baseline_of": description.baseline_of and asdict(description.baseline_of),
        "host_flops": anatomy.host_flops,
        "uncounted_modules": list(anatomy.uncounted),
        "world_size": description.ranks,
        "memory": [_memory(stage) for stage in description.memory],
    }


def _memory(stage: StageMemory) -> dict[str, Any]:
    """Return a stage's memory in bytes."""
    return {
        "rank": stage.rank,
        "microbatches_in_flight": stage.in_flight,
        **stage.held,
        "components": stage.held_by_component,
    }


def _figures(cost: Cost) -> dict[str, float]:
    return {
        "parameters": cost.parameters,
        "active_parameters": cost.active,
        "flops_forward": cost.forward,
        "flops_backward": cost.backward,
        "flops": cost.both,
    }
