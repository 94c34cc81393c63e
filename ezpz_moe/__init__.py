"""Selectable expert backends for Mixture-of-Experts training with an unmodified torchtitan.

Importing this package imports neither torch nor torchtitan. The kernels are in
``ezpz_moe.compute``, the host bindings in ``ezpz_moe.hosts``.
"""

__version__ = "0.1.0"


def __getattr__(name: str):
    """``JobConfig``, for torchtitan 0.2, which asks the module in ``job.custom_config_module``."""
    if name != "JobConfig":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # Imported on demand: the package itself must not import torch or the host.
    from ezpz_moe.errors import exit_on_user_error
    from ezpz_moe.hosts.detect import check_host, host

    with exit_on_user_error():
        check_host()
        return host().job_config()
