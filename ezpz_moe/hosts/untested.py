"""Report a pair of torch and torchtitan that no tests have run with: briefly, and rarely."""

from __future__ import annotations

from datetime import date

from ezpz_moe.compute.cache import cache_root
from ezpz_moe.hosts.installed import TESTED_PAIRS, host_name, version


def installed_pair() -> tuple[str | None, str | None]:
    """Return the versions of torch and torchtitan; None for what is not installed."""
    return version("torch"), host_name()


def is_tested() -> bool:
    """Return whether the installed pair is tested, up to patch releases."""
    installed = tuple(map(_minor, installed_pair()))
    return any(installed == tuple(map(_minor, pair)) for pair in TESTED_PAIRS)


def tested_pairs() -> str:
    """Return the tested pairs in words."""
    return ", ".join(f"torch {torch} with torchtitan {titan}" for torch, titan in TESTED_PAIRS)


def notice() -> str | None:
    """Return the line about an untested pair, or None if it is tested or was reported today.

    All processes of a user share that memory, so only one rank of a run reports it.
    """
    if is_tested():
        return None
    torch, titan = installed_pair()
    if not _is_first_today(f"{torch} {titan}"):
        return None
    return f"torch {torch} with torchtitan {titan} is untested; `ezpz-moe verify` checks it here"


def _minor(version: str | None) -> tuple[str, ...]:
    """ "2.14.1" as ("2", "14"); a commit unchanged."""
    return tuple((version or "").split(".")[:2])


def _is_first_today(pair: str) -> bool:
    """Return whether this is today's first call for ``pair`` by this user, and remember it."""
    folder, name = cache_root() / "untested", pair.replace(" ", "-with-")
    today = folder / f"{name}.{date.today().isoformat()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        today.touch(exist_ok=False)  # atomic: of several processes, exactly one creates it
    except FileExistsError:
        return False
    except OSError:
        return True  # nothing can be remembered there, so it is reported every time
    # Yesterday's files; without this the folder would grow by one file a day.
    for stamp in set(folder.glob(f"{name}.*")) - {today}:
        stamp.unlink(missing_ok=True)
    return True
