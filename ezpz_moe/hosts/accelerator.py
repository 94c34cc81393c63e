"""Tell, without importing torch, which device there is certainly not.

torch alone knows what it can use, and its import takes two seconds. But a torch that was built
without any kind of accelerator finds none, nor does one whose driver is not there.
"""

from __future__ import annotations

import ast
import ctypes
import os
import platform
import re
from importlib import metadata, util
from pathlib import Path

_CUDA_DRIVER = "libcuda.so.1"
_WSL = Path("/dev/dxg")  # any GPU in Windows' subsystem for Linux
_ROCM = (Path("/dev/kfd"), _WSL)
_XPU = (Path("/dev/dri"), _WSL)
_LIBRARIES = ("libc10.so", "libc10.dylib", "c10.dll")
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


def is_certainly_unknown(device: str) -> bool:
    """Return whether torch will know no kind of device of this name; False also if torch must tell.

    The library of torch that takes a device's name apart has all names of kinds in it, each with
    a zero at its end.
    """
    name = re.fullmatch(r"([A-Za-z_]+)(:(0|[1-9][0-9]*))?", device)
    if name is None or metadata.entry_points(group=_OTHERS):
        return False
    for folder in _folders_of_torch():
        for library in _LIBRARIES:
            if (file := Path(folder, "lib", library)).is_file():
                return f"{name[1]}\0".encode() not in file.read_bytes()
    return False


def _folders_of_torch() -> list[str]:
    spec = util.find_spec("torch")
    return list((spec and spec.submodule_search_locations) or ())


def _built_for() -> dict[str, bool] | None:
    """Return what kinds of accelerators the installed torch was built for, from its version.py."""
    for folder in _folders_of_torch():
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
