"""Door 1: the module that ``torchtitan.train --module ezpz_moe --config NAME`` imports.

The host fixes this file's name. It asks the module for an attribute called NAME and calls it.
NAME is a flavor, or the path of a job file:

    torchrun ... -m torchtitan.train --module ezpz_moe --config 16B_sdpa_for_loop
    torchrun ... -m torchtitan.train --module ezpz_moe --config my/job.toml

The host takes any ImportError here to mean "no such module" and hides it. So this file imports
nothing from the plugin or the host before NAME is built, and turns an ImportError on the way into
the plugin's own error.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from ezpz_moe.errors import EzpzError, exit_on_user_error


def __getattr__(name: str) -> Callable[[], Any]:
    if name.startswith("__"):  # the import system asks for these itself, __path__ for example
        raise AttributeError(name)
    return partial(_trainer_config, name)


def __dir__() -> list[str]:
    from ezpz_moe.config.flavors import flavor_names

    return flavor_names()


def _trainer_config(name: str):
    """Return the trainer's config for a flavor or job file. A user's mistake exits with code 2."""
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
