"""What is said of a torch and torchtitan that no tests have run with: little, and rarely."""

from __future__ import annotations

from datetime import date

from ezpz_moe.compute.cache import cache_root
from ezpz_moe.hosts.installed import TESTED_PAIRS, host_name, version


def installed_pair() -> tuple[str | None, str | None]:
    """torch and torchtitan; None for what is not installed."""
    return version("torch"), host_name()


def is_tested() -> bool:
    """Whether the installed pair is a tested one, or differs from one by patch releases alone."""
    installed = tuple(map(_minor, installed_pair()))
    return any(installed == tuple(map(_minor, pair)) for pair in TESTED_PAIRS)


def tested_pairs() -> str:
    """The tested pairs in words."""
    return ", ".join(f"torch {torch} with torchtitan {titan}" for torch, titan in TESTED_PAIRS)


def notice() -> str | None:
    """The line about an untested pair; None for a tested one, and where it was said today.

    All processes of a user share that memory, so that of a run's ranks one says it.
    """
    if is_tested():
        return None
    torch, titan = installed_pair()
    if not _is_first_today(f"{torch} {titan}"):
        return None
    return f"torch {torch} with torchtitan {titan} is untested; `ezpz-moe verify` checks it here"


def _minor(version: str | None) -> tuple[str, ...]:
    """ "2.14.1" as ("2", "14"); a commit as it is."""
    return tuple((version or "").split(".")[:2])


def _is_first_today(pair: str) -> bool:
    """Whether no process of this user has asked for ``pair`` today; remembers that one has."""
    folder, name = cache_root() / "untested", pair.replace(" ", "-with-")
    today = folder / f"{name}.{date.today().isoformat()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        today.touch(exist_ok=False)  # of processes that ask at once one makes it
    except FileExistsError:
        return False
    except OSError:
        return True  # nothing can be remembered there: said every time
    for stamp in set(folder.glob(f"{name}.*")) - {today}:
        stamp.unlink(missing_ok=True)
    return True
