"""Door 1: the module that ``torchtitan.train --module ezpz_moe --config NAME`` imports.

Its file name is fixed by the host, which asks it for an attribute called NAME and calls that.
NAME is a flavor, or the path of a job file:

    torchrun ... -m torchtitan.train --module ezpz_moe --config 16B_sdpa_for_loop
    torchrun ... -m torchtitan.train --module ezpz_moe --config my/job.toml

The host takes any ImportError here for "no such module" and hides it, so that nothing is
imported from the plugin or the host before NAME is built, and an ImportError on the way is
turned into the plugin's own error.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from ezpz_moe.errors import EzpzError, exit_on_user_error


def __getattr__(name: str) -> Callable[[], Any]:
    if name.startswith("__"):  # the import system's own questions, such as __path__
        raise AttributeError(name)
    return partial(_trainer_config, name)


def __dir__() -> list[str]:
    from ezpz_moe.config.flavors import flavor_names

    return flavor_names()


def _trainer_config(name: str):
    """The trainer's config of a flavor or job file. A user's mistake exits with code 2."""
    with exit_on_user_error():
        try:
            from ezpz_moe.hosts.detect import check_host, host
            from ezpz_moe.hosts.jobs import find_job

            check_host()
            return host().trainer_config(find_job(name))
        except ImportError as error:
            raise EzpzError(
                f"--config {name}: ezpz_moe cannot be loaded, because {error!r}. "
                f"Reinstall it with its dependencies: pip install --force-reinstall ezpz_moe."
            ) from error
