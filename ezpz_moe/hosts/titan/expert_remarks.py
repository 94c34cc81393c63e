"""Say where the host's own experts do not train as their formula."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

_WITH_A_DIVIDED_BIAS = "GptOssGroupedExperts"


def doubled_gradients(config: Any, moes: Iterable[Any]) -> Iterator[str]:
    """Yield a remark on gpt_oss under tensor parallelism, whose last bias gets whole gradients.

    torchtitan 0.3 divides that bias by the ranks of a group where its weights are DTensors. Under
    FSDP with "spmd_types" they are not, and the gradients of all ranks, each whole, are added up:
    ``findings/torchtitan_gpt_oss_doubles_a_bias_gradient.sh``. With "partial_dtensor" it is right.

    Args:
        config: the trainer's.
        moes: the configs of its layers with experts.
    """
    parallelism = config.parallelism
    ranks = parallelism.tensor_parallel_degree
    backend = getattr(parallelism, "spmd_backend", None)
    is_split = ranks > 1 and parallelism.expert_parallel_degree == 1
    if is_split and backend == "spmd_types" and _has_the_bias(moes):
        yield (
            f"under tensor parallelism torchtitan adds up {ranks} whole gradients of the experts' "
            f"bias mlp2_bias_ED, which is then {ranks} times its gradient on one rank. Set "
            '[parallelism] spmd_backend = "partial_dtensor"'
        )


def _has_the_bias(moes: Iterable[Any]) -> bool:
    layers = (getattr(moe, "routed_experts", None) for moe in moes)
    experts = (getattr(layer, "inner_experts", None) for layer in layers)
    owners = (type(each)._owner for each in experts if each is not None)
    return any(kind.__name__ == _WITH_A_DIVIDED_BIAS for each in owners for kind in each.__mro__)
