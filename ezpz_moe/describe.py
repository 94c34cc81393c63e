"""What a flavor's model is made of and what it costs: ``ezpz-moe describe``. Gathers; no printing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ezpz_moe.accounting import COMPONENTS, Anatomy, Cost, DenseModel, dense_model
from ezpz_moe.flavors import load_flavor
from ezpz_moe.hosts import binding
from ezpz_moe.hosts.ranks import outside_of_a_run
from ezpz_moe.job import find_job


@dataclass(frozen=True)
class Description:
    """A model and its costs.

    Attributes:
        flavor: its name.
        source: the flavor or the job, for people.
        seq_len: tokens of a sequence.
        anatomy: the components.
        dense: the dense model of equal FLOPs.
    """

    flavor: str
    source: str
    seq_len: int
    anatomy: Anatomy
    dense: DenseModel

    @property
    def costs(self) -> dict[str, Cost]:
        """Component -> cost, in the order of ``COMPONENTS``."""
        return {name: self.anatomy.costs[name] for name in COMPONENTS if name in self.anatomy.costs}


def describe(config: str, host_flags: list[str]) -> Description:
    """Look at a flavor's model, built without memory.

    Args:
        config: a flavor's name or the path of a job's TOML.
        host_flags: the trainer's own flags, which override the job.

    Raises:
        EzpzError: the flavor or the job is wrong, or the host's binding cannot do this.
    """
    job = find_job(config)
    flavor = load_flavor(job.flavor, near=job.folder)
    host = binding("anatomy")
    with outside_of_a_run():
        seq_len = host.sequence_length(config, host_flags)
    anatomy = host.anatomy(flavor, seq_len)
    return Description(flavor.name, job.source, seq_len, anatomy, dense_model(anatomy))


def as_json(description: Description) -> dict[str, Any]:
    """The same as plain values; FLOPs are of one token."""
    anatomy = description.anatomy
    return {
        "flavor": description.flavor,
        "seq_len": description.seq_len,
        "dim": anatomy.dim,
        "n_layers": anatomy.n_layers,
        "n_moe_layers": anatomy.n_moe_layers,
        "num_experts": anatomy.num_experts,
        "zero_computation_experts": anatomy.zero_experts,
        "top_k": anatomy.top_k,
        "computing_experts_per_token": anatomy.computing_experts,
        "components": {name: _figures(cost) for name, cost in description.costs.items()},
        "total": _figures(anatomy.total),
        "dense_model_of_equal_flops": {
            "ffn_hidden_dim": description.dense.hidden_dim,
            **_figures(description.dense.cost),
        },
        "host_flops": anatomy.host_flops,
        "uncounted_modules": list(anatomy.uncounted),
    }


def _figures(cost: Cost) -> dict[str, float]:
    return {
        "parameters": cost.parameters,
        "active_parameters": cost.active,
        "flops_forward": cost.forward,
        "flops_backward": cost.backward,
        "flops": cost.both,
    }
