"""Have glibc keep the memory that this process frees: on a CPU, fresh pages cost more than kernels.

By default glibc gets every large block from the system, and gives it back when it is freed. A
training step frees and allocates the same blocks as the one before, and each time the system has to
clear and map their pages. Here every block of the main thread, which trains, comes from the heap,
and the heap never shrinks. What that is worth is in docs/internals/cpu-memory.md.

Set in the running process: that works however it was started. Its children inherit it.
"""

from __future__ import annotations

import ctypes
import os
from typing import Any

from ezpz_moe.errors import EzpzError

VARIABLE = "EZPZ_MOE_KEEP_MEMORY"
"""``0`` leaves the allocator as it is; ``1`` is the default."""

# mallopt(3): the parameter's number in malloc.h, its value, and its name in the environment.
_SETTINGS = (
    (-4, 0, "MALLOC_MMAP_MAX_"),  # M_MMAP_MAX: no block of its own from the system
    (-1, -1, "MALLOC_TRIM_THRESHOLD_"),  # M_TRIM_THRESHOLD: the heap never shrinks
)

# Variables that glibc reads at the start of a process, and tunables in GLIBC_TUNABLES, by which a
# user may have decided the same question. Others (MALLOC_ARENA_MAX) go with ours.
_OF_THE_USER = (
    "MALLOC_MMAP_MAX_",
    "MALLOC_MMAP_THRESHOLD_",
    "MALLOC_TRIM_THRESHOLD_",
    "MALLOC_TOP_PAD_",
)
_TUNABLES = "GLIBC_TUNABLES"
_TUNABLES_OF_THE_USER = tuple(
    f"glibc.malloc.{each}" for each in ("mmap_max", "mmap_threshold", "trim_threshold", "top_pad")
)


def is_wanted() -> bool:
    """Return whether freed memory may be kept: whether :data:`VARIABLE` does not say otherwise.

    Raises:
        EzpzError: the variable is neither 0 nor 1.
    """
    if (value := os.environ.get(VARIABLE, "1")) not in ("0", "1"):
        raise EzpzError(
            f"{VARIABLE} = {value!r}: must be 1, to keep freed memory when training on a CPU, or "
            "0, to leave the allocator as it is."
        )
    return value == "1"


def keep_freed_memory() -> str | None:
    """Have this process keep the memory that it frees, unless its allocator was chosen by the user.

    What was set is then in ``os.environ`` too, as if the process had been started with it:
    ``compute_backend = "auto"`` and benchmarks tell their times apart by these variables.

    Returns:
        One line for the log: what was set, or whose choice stands. None without glibc (macOS,
        musl), where nothing is set.
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):
        return None
    # Another allocator, such as one in LD_PRELOAD, replaces malloc for the whole process.
    if (allocator := _file_of(libc.malloc)) != _file_of(libc.gnu_get_libc_version):
        return f"memory is allocated by {allocator}, which is left as it is"
    if chosen := _chosen_by_the_user():
        return f"{chosen} is set, so the memory allocator is left as it is"
    for number, value, name in _SETTINGS:
        if libc.mallopt(number, value) != 1:
            return f"freed memory is not kept: glibc refused {name}={value}"
        os.environ[name] = str(value)
    settings = ", ".join(f"{name}={value}" for _, value, name in _SETTINGS)
    return (
        f"freed memory is kept, because on a CPU fresh memory costs time in every step "
        f"({settings}). To give it back, set {VARIABLE}=0"
    )


class _SharedObject(ctypes.Structure):
    """``Dl_info`` of dladdr(3)."""

    _fields_ = (
        ("path", ctypes.c_char_p),
        ("base", ctypes.c_void_p),
        ("symbol", ctypes.c_char_p),
        ("address", ctypes.c_void_p),
    )


def _file_of(function: Any) -> str:
    """Return the path of the library that a C function of this process is in."""
    found = _SharedObject()
    ctypes.CDLL(None).dladdr(ctypes.cast(function, ctypes.c_void_p), ctypes.byref(found))
    return os.fsdecode(found.path or b"the program itself")


def _chosen_by_the_user() -> str | None:
    """Return the first setting of the environment that decides what is kept, as NAME=VALUE."""
    for name in _OF_THE_USER:
        if name in os.environ:
            return f"{name}={os.environ[name]}"
    for tunable in os.environ.get(_TUNABLES, "").split(":"):
        if tunable.partition("=")[0] in _TUNABLES_OF_THE_USER:
            return f"{_TUNABLES}={tunable}"
    return None
