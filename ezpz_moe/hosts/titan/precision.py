"""The precision of a run with torchtitan 0.3, when all that may say it has spoken."""

from collections.abc import Iterator
from functools import cache
from typing import Any

from torchtitan.protocols.model_spec import ModelSpec
from torchtitan.tools import utils
from torchtitan.tools.logging import logger
from torchtitan.trainer import Trainer

from ezpz_moe.config.flavors import Flavor
from ezpz_moe.config.job import Job
from ezpz_moe.hosts.precision import (
    HOSTS_CAST,
    PARAM,
    agreeing_on_precision,
    experts_dtype,
    is_host_path,
    job_line,
    of_run,
    trains_in_float32,
)
from ezpz_moe.hosts.titan.base import titan


def values(job: Job) -> dict[str, Any]:
    """What this CPU wants of a job that does not say in what it trains."""
    if PARAM in job.values or not trains_in_float32(utils.device_type):
        return {}
    return {PARAM: "float32"}


def agreeing(spec: ModelSpec, flavor: Flavor) -> None:
    """Let the ranks of a run compare their precisions before the model is parallelized, in place.

    Where the trainer is built for a model of ``flavor``; see ``agreeing_on_precision``.
    """

    def precision_of(*args: Any, training: Any, **more: Any) -> str:
        param = training.mixed_precision_param
        dtype = experts_dtype(flavor.expert_precision, param, utils.device_type)
        return f'{PARAM} = "{param}" and experts in {dtype}'

    spec.parallelize_fn = agreeing_on_precision(spec.parallelize_fn, precision_of)


def settle(config: Trainer.Config) -> None:
    """Put into the experts' nodes what they compute in, in place: flags may have changed it."""
    for node in _experts(config):
        if hasattr(node, "computed_in") and not is_host_path(node.compute_backend):
            node.computed_in = experts_dtype(
                node.expert_precision, config.training.mixed_precision_param, utils.device_type
            )


def experts_dtypes(config: Trainer.Config) -> list[str]:
    """The names of the dtypes that the model's routed experts compute in; in practice one."""
    dtypes = (getattr(node, "computed_in", HOSTS_CAST) for node in _experts(config))
    return list(dict.fromkeys(dtypes))


def in_words(config: Trainer.Config) -> str:
    """Which precision applies to a run of ``config``."""
    param = config.training.mixed_precision_param
    return of_run(param, " and ".join(experts_dtypes(config)), utils.device_type)


def log_once(config: Trainer.Config) -> None:
    """Say that a run trains in float32 where that is this CPU's doing."""
    if config.training.mixed_precision_param == "float32":
        _log(job_line())


@cache
def _log(line: str) -> None:
    logger.info(line)


def _experts(config: Trainer.Config) -> Iterator[Any]:
    if config.model_spec is not None:
        for _, node, _, _ in config.model_spec.traverse(titan().experts().HostExperts.Config):
            yield node
