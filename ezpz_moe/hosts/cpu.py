"""The host on a machine without an accelerator.

torchtitan fixes its device type and device module when ``torchtitan.tools.utils`` is imported, from
two functions of torch, and answers "cuda" where torch finds nothing. While that one module is
imported, :func:`import_host_on_cpu` lets the two functions answer "cpu" and
:class:`CpuDeviceModule`; then torch is as it was. This is the only place where the package replaces
something that is not its own, and :func:`no_accelerator` guards it.
"""

from __future__ import annotations

import functools
import importlib
import os
import platform
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import psutil
import torch
from torch.distributed.fsdp import FSDPModule

from ezpz_moe.errors import EzpzError

_HOST_UTILS = "torchtitan.tools.utils"
_HOST_COMMAND = ("-m", "torchtitan.train")

# Memory limits of the container this process runs in: cgroup version 2, then 1.
_CGROUP_LIMITS = (
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)
_CPU_INFO = Path("/proc/cpuinfo")
_PROCESS_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_RESET_PEAK_RESIDENT_SET = "5"  # proc(5): "writing 5 resets the peak resident set size"


def no_accelerator() -> bool:
    """True where torch finds no accelerator: the question that the host asks, in its own words."""
    return torch._utils._get_available_device_type() is None


def import_host_on_cpu() -> None:
    """Import ``torchtitan.tools.utils`` with the device type "cpu"; torch is unchanged afterwards.

    ``python -m torchtitan.train`` imports the host before it asks for anything of ours: then the
    process becomes ``python -m ezpz_moe.train`` with the same arguments, and does not return here.

    Raises:
        EzpzError: the host has already been imported with another device type.
    """
    utils = sys.modules.get(_HOST_UTILS)
    if utils is None:
        device_module = CpuDeviceModule()
        with mock.patch.multiple(
            torch._utils,
            _get_available_device_type=lambda: "cpu",
            _get_device_module=lambda device_type: device_module,
        ):
            importlib.import_module(_HOST_UTILS)
    elif utils.device_type != "cpu":
        _start_again()
        raise EzpzError(
            f"this machine has no accelerator, but torchtitan was imported with the device type "
            f"{utils.device_type!r}. Start the run with `ezpz-moe train` or "
            "`python -m ezpz_moe.train`, which choose the device before importing torchtitan."
        )


def _start_again() -> None:
    """Replace this process if it is the host's own command: same number, environment, arguments."""
    command = sys.orig_argv
    if _HOST_COMMAND not in pairwise(command):
        return
    module = command.index(_HOST_COMMAND[1])
    print(
        "ezpz_moe: this machine has no accelerator; restarting as ezpz_moe.train, on the CPU",
        file=sys.stderr,
        flush=True,
    )
    os.execv(sys.executable, [*command[:module], "ezpz_moe.train", *command[module + 1 :]])


class CpuDeviceModule(ModuleType):
    """``torch.cpu`` plus what the trainer asks of a device module.

    "Device memory" is this process's resident memory.
    """

    def __init__(self) -> None:
        super().__init__("ezpz_moe.hosts.cpu.device_module", type(self).__doc__)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cpu, name)

    @property
    def memory(self) -> Any:
        raise EzpzError(
            "memory snapshots (`[profiling] enable_memory_snapshot`) record an accelerator's "
            "allocator, but this machine has no accelerator: set enable_memory_snapshot = false."
        )

    def current_device(self) -> int:
        # An index, as the trainer's barrier wants it; torch.cpu answers "cpu".
        return 0

    def get_device_name(self, device: Any = None) -> str:
        threads = torch.get_num_threads()
        return f"{_processor_name()}, {threads} thread{'s' if threads > 1 else ''}"

    def get_device_properties(self, device: Any = None) -> SimpleNamespace:
        return SimpleNamespace(name=self.get_device_name(), total_memory=_total_memory())

    def memory_stats(self, device: Any = None) -> dict[str, int]:
        """Peak resident memory in bytes since the last reset (elsewhere than on Linux: now)."""
        peak = _peak_resident_memory()
        return {
            "active_bytes.all.peak": peak,
            "reserved_bytes.all.peak": peak,
            "num_alloc_retries": 0,
            "num_ooms": 0,
        }

    def reset_peak_memory_stats(self, device: Any = None) -> None:
        if _CLEAR_REFS.exists():
            _CLEAR_REFS.write_text(_RESET_PEAK_RESIDENT_SET)

    def empty_cache(self) -> None:
        """Nothing to do: the CPU allocator keeps no cache of its own."""


def _peak_resident_memory() -> int:
    """Peak resident memory of this process in bytes."""
    current = psutil.Process().memory_info().rss
    if not _PROCESS_STATUS.exists():
        return current
    fields = dict(line.split(":", maxsplit=1) for line in _PROCESS_STATUS.read_text().splitlines())
    return max(current, int(fields["VmHWM"].removesuffix("kB")) * 1024)


def _total_memory() -> int:
    """Memory in bytes that this process may use: the machine's, or the container's if lower."""
    total = psutil.virtual_memory().total
    for path in _CGROUP_LIMITS:
        # Version 2 writes "max" for no limit, version 1 a number above any machine's memory.
        if path.exists() and (limit := path.read_text().strip()).isdigit():
            total = min(total, int(limit))
    return total


def _processor_name() -> str:
    """The processor's model name, or its architecture where the system does not tell."""
    if _CPU_INFO.exists():
        for line in _CPU_INFO.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def sum_reduction_on_gloo(parallelize_fn: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a model's ``parallelize_fn`` so that FSDP trains over gloo.

    FSDP scales gradients inside the collective (PREMUL_SUM), which gloo does not have; on the CPU
    it is told to reduce with a plain sum and to scale apart. On an accelerator nothing changes.
    """

    @functools.wraps(parallelize_fn)
    def parallelize(model: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.nn.Module:
        # Not at the top: importing it there would fix the host's device type.
        from torchtitan.tools.utils import device_type

        model = parallelize_fn(model, *args, **kwargs)
        if device_type == "cpu":
            for module in model.modules():
                if isinstance(module, FSDPModule):
                    module.set_force_sum_reduction_for_comms(True)
        return model

    return parallelize
