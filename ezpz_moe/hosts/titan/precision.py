"""Determine the precision of a run with torchtitan 0.3 once flags, job and flavor are known."""

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
    """Return the setting that this CPU wants if the job does not choose a precision."""
    if PARAM in job.values or not trains_in_float32(utils.device_type):
        return {}
    return {PARAM: "float32"}


def agreeing(spec: ModelSpec, flavor: Flavor) -> None:
    """Make the ranks of a run compare precisions before the model is parallelized, in place.

    It is for the spec of ``flavor`` that a trainer is built from; see ``agreeing_on_precision``.
    """

    def precision_of(*args: Any, training: Any, **more: Any) -> str:
        # From the arguments of parallelize_fn: these are the settings after the flags.
        param = training.mixed_precision_param
        dtype = experts_dtype(flavor.expert_precision, param, utils.device_type)
        return f'{PARAM} = "{param}" and experts in {dtype}'

    spec.parallelize_fn = agreeing_on_precision(spec.parallelize_fn, precision_of)


def settle(config: Trainer.Config) -> None:
    """Set in the experts' nodes what they compute in, in place: flags may have changed it."""
    for node in _experts(config):
        # Experts with the host's forward have no such field, and its own path must keep its own
        # casts.
        if hasattr(node, "computed_in") and not is_host_path(node.compute_backend):
            node.computed_in = experts_dtype(
                node.expert_precision, config.training.mixed_precision_param, utils.device_type
            )


def experts_dtypes(config: Trainer.Config) -> list[str]:
    """Return the names of the dtypes that the model's routed experts compute in; usually one."""
    # Without the field the forward is the host's, which casts.
    dtypes = (getattr(node, "computed_in", HOSTS_CAST) for node in _experts(config))
    return list(dict.fromkeys(dtypes))


def in_words(config: Trainer.Config) -> str:
    """Describe the precision of a run of ``config``."""
    param = config.training.mixed_precision_param
    return of_run(param, " and ".join(experts_dtypes(config)), utils.device_type)


def log_once(config: Trainer.Config) -> None:
    """Log that a run trains in float32 if it does so because of this CPU."""
    if config.training.mixed_precision_param == "float32":
        _log(job_line())


# A job's config may be constructed more than once per process.
@cache
def _log(line: str) -> None:
    logger.info(line)


def _experts(config: Trainer.Config) -> Iterator[Any]:
    if config.model_spec is not None:
        for _, node, _, _ in config.model_spec.traverse(titan().experts().HostExperts.Config):
            yield node
