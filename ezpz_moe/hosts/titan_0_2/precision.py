"""Determine the precision of a run with torchtitan 0.2."""

from typing import Any

from torchtitan.tools import utils

from ezpz_moe.config.flavors import Flavor
from ezpz_moe.hosts.precision import experts_dtype, is_host_path, of_run


def in_words(config: Any, flavor: Flavor) -> str:
    """Describe the precision of a run of ``config`` with the model of ``flavor``."""
    param = config.training.mixed_precision_param
    dtype = experts_dtype(flavor.expert_precision, param, utils.device_type)
    if is_host_path(flavor.compute_backend) and utils.device_type == "cpu":
        dtype = param  # the host's for-loop, which casts nothing
    return of_run(param, dtype, utils.device_type)
