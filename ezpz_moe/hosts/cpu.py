"""Run the host on a machine without an accelerator.

torchtitan fixes its device type and device module when ``torchtitan.tools.utils`` is imported. It
asks two functions of torch, and falls back to "cuda" if torch finds nothing. While that one module
is being imported, :func:`import_host_on_cpu` makes the two functions answer "cpu" and
:class:`CpuDeviceModule`, and restores torch afterwards. Nowhere else does the package replace
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
    """Return whether torch finds no accelerator, by the same call that the host uses."""
    return torch._utils._get_available_device_type() is None


def import_host_on_cpu() -> None:
    """Import ``torchtitan.tools.utils`` with the device type "cpu", and leave torch unchanged.

    ``python -m torchtitan.train`` imports the host before it asks for anything of ours. In that
    case this call does not return: the process becomes ``python -m ezpz_moe.train`` with the same
    arguments.

    Raises:
        EzpzError: the host has already been imported with another device type.
    """
    utils = sys.modules.get(_HOST_UTILS)
    if utils is None:
        # Patching the host's module afterwards would be too late: other modules of the host copy
        # `device_type` with `from ... import`, and the trainer has chosen its device by then.
        device_module = CpuDeviceModule()
        with mock.patch.multiple(
            torch._utils,
            _get_available_device_type=lambda: "cpu",
            _get_device_module=lambda device_type: device_module,
        ):
            importlib.import_module(_HOST_UTILS)
    elif utils.device_type != "cpu":
        # Returns only if this is not the host's own command, for example a notebook.
        _start_again()
        raise EzpzError(
            f"this machine has no accelerator, but torchtitan was imported with the device type "
            f"{utils.device_type!r}. Start the run with `ezpz-moe train` or "
            "`python -m ezpz_moe.train`, which choose the device before importing torchtitan."
        )


def _start_again() -> None:
    """Replace this process if it runs the host's own command. Keeps pid, environment, arguments."""
    # sys.argv no longer shows `-m torchtitan.train`: Python replaced it by the module's path.
    command = sys.orig_argv
    if _HOST_COMMAND not in pairwise(command):
        return
    module = command.index(_HOST_COMMAND[1])
    print(
        "ezpz_moe: this machine has no accelerator; restarting as ezpz_moe.train, on the CPU",
        file=sys.stderr,
        flush=True,
    )
    # execv and not a subprocess: torchrun watches this pid, and must see our exit code and signals.
    os.execv(sys.executable, [*command[:module], "ezpz_moe.train", *command[module + 1 :]])


class CpuDeviceModule(ModuleType):
    """``torch.cpu`` plus what the trainer asks of a device module.

    "Device memory" is the resident memory of this process.
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
        # The trainer's barrier needs an index; torch.cpu.current_device() returns "cpu".
        return 0

    def get_device_name(self, device: Any = None) -> str:
        threads = torch.get_num_threads()
        return f"{_processor_name()}, {threads} thread{'s' if threads > 1 else ''}"

    def get_device_properties(self, device: Any = None) -> SimpleNamespace:
        return SimpleNamespace(name=self.get_device_name(), total_memory=_total_memory())

    def memory_stats(self, device: Any = None) -> dict[str, int]:
        """Return peak resident memory in bytes since the last reset (outside Linux: current)."""
        peak = _peak_resident_memory()
        # The keys that the host's memory monitor reads. The CPU has no separate notion of reserved
        # memory, so both get the same value.
        return {
            "active_bytes.all.peak": peak,
            "reserved_bytes.all.peak": peak,
            "num_alloc_retries": 0,
            "num_ooms": 0,
        }

    def reset_peak_memory_stats(self, device: Any = None) -> None:
        # Linux only. Elsewhere no peak is recorded, and `memory_stats` returns current memory.
        if _CLEAR_REFS.exists():
            _CLEAR_REFS.write_text(_RESET_PEAK_RESIDENT_SET)

    def empty_cache(self) -> None:
        """Do nothing: the CPU allocator keeps no cache of its own."""


def device_module(kind: str) -> Any:
    """Return torch's module of a kind of device, such as ``torch.cuda``; of "cpu" the above."""
    return CpuDeviceModule() if kind == "cpu" else torch.get_device_module(kind)


def device_memory(kind: str) -> int:
    """Return the bytes of the first device's memory; of "cpu", what all processes here share."""
    return device_module(kind).get_device_properties(torch.device(kind, 0)).total_memory


def _peak_resident_memory() -> int:
    """Return the peak resident memory of this process in bytes."""
    current = psutil.Process().memory_info().rss
    if not _PROCESS_STATUS.exists():
        return current
    fields = dict(line.split(":", maxsplit=1) for line in _PROCESS_STATUS.read_text().splitlines())
    # Read at two moments: a peak must not lie below the current value.
    return max(current, int(fields["VmHWM"].removesuffix("kB")) * 1024)


def _total_memory() -> int:
    """Return the memory in bytes that this process may use: the machine's, or the container's."""
    total = psutil.virtual_memory().total
    for path in _CGROUP_LIMITS:
        # Version 2 writes "max" for no limit, version 1 a number above any machine's memory.
        if path.exists() and (limit := path.read_text().strip()).isdigit():
            total = min(total, int(limit))
    return total


def _processor_name() -> str:
    """Return the processor's model name, or its architecture if the system has no model name."""
    # platform.processor() is often empty on Linux, so /proc/cpuinfo comes first.
    if _CPU_INFO.exists():
        for line in _CPU_INFO.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def sum_reduction_on_gloo(parallelize_fn: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a model's ``parallelize_fn`` to make FSDP train over gloo.

    FSDP scales gradients inside the collective (PREMUL_SUM), which gloo does not have. On the CPU
    the wrapper makes FSDP reduce with a plain sum and scale separately. It changes nothing on an
    accelerator.
    """

    @functools.wraps(parallelize_fn)
    def parallelize(model: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.nn.Module:
        # Not at the top of the file: importing it there would fix the host's device type.
        from torchtitan.tools.utils import device_type

        model = parallelize_fn(model, *args, **kwargs)
        if device_type == "cpu":
            for module in model.modules():
                # Every FSDP module and not only the root: each one reduces its own gradients.
                if isinstance(module, FSDPModule):
                    module.set_force_sum_reduction_for_comms(True)
        return model

    return parallelize
