"""Find what excludes ``overlap_shared_experts``, and say where it has no effect."""

from __future__ import annotations

from collections.abc import Iterator

from torchtitan.config import Configurable
from torchtitan.tools import utils
from torchtitan.trainer import Trainer

from ezpz_moe.compute.side_stream import has_streams
from ezpz_moe.config.flavor_schema import Flavor
from ezpz_moe.hosts.titan.override_conflicts import is_inside, replaced_nodes

_REMOVE = "or remove overlap_shared_experts from the flavor."


def what_it_overlaps(flavor: Flavor) -> str | None:
    """Return what becomes of the flavor's ``overlap_shared_experts`` on this machine."""
    if not flavor.overlap_shared_experts:
        return None
    said = f"flavor {flavor.name}: overlap_shared_experts = true"
    if not has_streams(utils.device_type):
        return (
            f"{said} changes nothing on the {utils.device_type}, which has no streams: shared "
            "experts are computed after the routed ones, as without it"
        )
    return f"{said}: shared experts are computed on a {utils.device_type} stream of their own"


def overlap_problems(config: Trainer.Config) -> Iterator[str]:
    """Yield settings of a run that exclude shared experts on a stream of their own."""
    layers = list(_overlapping(config))
    if not layers:
        return
    said = f"flavor {config.model_spec.flavor!r}: overlap_shared_experts = true cannot be combined"
    compiles = config.compile.enable and "model" in config.compile.components
    if compiles:
        yield (
            f"{said} with compile.enable = true: a compiled layer is one program, which has its "
            "own order for what it computes. Set compile.enable to false, compile the loss alone "
            f'(compile.components = ["loss"]), {_REMOVE}'
        )
    if (degree := config.parallelism.tensor_parallel_degree) > 1:
        yield (
            f"{said} with parallelism.tensor_parallel_degree = {degree}: shared experts then send "
            "to other ranks as well, beside the routed ones, and ranks may begin with one or with "
            f"the other and wait forever. Set it to 1, {_REMOVE}"
        )
    if not config.training.disable_cuda_graphs:
        yield (
            f"{said} with training.disable_cuda_graphs = false: backward has to be captured on "
            "one stream, and shared experts have another. Leave it out, set it to true, "
            f"{_REMOVE}"
        )
    for override, nodes in replaced_nodes(config).items():
        replaced = [each for each in layers if each in nodes or is_inside(each, nodes)]
        if replaced:
            yield (
                f"{said} with override.imports {override}: it replaces {replaced[0]}, which would "
                f"then not be started. Remove the override, {_REMOVE}"
            )


def _overlapping(config: Trainer.Config) -> Iterator[str]:
    """Yield the names of the shared experts that are started first, as overrides name nodes."""
    # By attribute: only such a flavor needs what its class imports of the host. And `recurse`,
    # because every node is of this class.
    for name, node, _, _ in config.traverse(Configurable.Config, recurse=True):
        if getattr(type(node)._owner, "overlaps_shared_experts", False):
            yield f"{name}.shared_experts"
