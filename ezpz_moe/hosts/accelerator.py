"""Tell, without importing torch, that this machine has no accelerator, where that is certain.

torch alone knows what it can use, and its import takes two seconds. But a torch that was built
without any kind of accelerator finds none, nor does one whose driver is not there.
"""

from __future__ import annotations

import ast
import ctypes
import os
import platform
from importlib import metadata, util
from pathlib import Path

_CUDA_DRIVER = "libcuda.so.1"
_WSL = Path("/dev/dxg")  # any GPU in Windows' subsystem for Linux
_ROCM = (Path("/dev/kfd"), _WSL)
_XPU = (Path("/dev/dri"), _WSL)
_OTHERS = "torch.backends"
"""The group of entry points by which packages bring torch a device of another kind."""


def has_certainly_none() -> bool:
    """Return whether torch will find no accelerator here; False also where only torch can tell."""
    # Elsewhere torch has devices whose drivers come with the system.
    if platform.system() != "Linux" or metadata.entry_points(group=_OTHERS):
        return False
    built_for = _built_for()
    if built_for is None:
        return False
    return not (
        (built_for["cuda"] and _has_cuda_driver())
        or (built_for["hip"] and any(path.exists() for path in _ROCM))
        or (built_for["xpu"] and any(path.exists() for path in _XPU))
    )


def _built_for() -> dict[str, bool] | None:
    """Return what kinds of accelerators the installed torch was built for, from its version.py."""
    spec = util.find_spec("torch")
    for folder in (spec and spec.submodule_search_locations) or ():
        try:
            tree = ast.parse(Path(folder, "version.py").read_text(encoding="utf-8"))
        except (OSError, SyntaxError, ValueError):
            return None
        values = {
            node.target.id: node.value.value
            for node in tree.body
            if isinstance(node, ast.AnnAssign)
            and isinstance(node.target, ast.Name)
            and isinstance(node.value, ast.Constant)
        }
        # A torch that writes its version otherwise has to be asked.
        if values.keys() >= {"cuda", "hip", "xpu"}:
            return {kind: values[kind] is not None for kind in ("cuda", "hip", "xpu")}
    return None


def _has_cuda_driver() -> bool:
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return False
    try:
        ctypes.CDLL(_CUDA_DRIVER)
    except OSError:
        return False
    return True
