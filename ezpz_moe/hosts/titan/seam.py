"""Tell whether a class of experts computes its products in the seam that a backend replaces.

The host's own classes do. A converter or an override may put another class in their place, which
replaces the seam itself, wraps the weights, or multiplies in a forward or a hook of its own. The
run would then compute something else than the log says. Names do not tell such classes apart, so an
instance computes once on the meta device, with a seam that only looks.

Legend of the suffixes: :mod:`ezpz_moe.compute.contract`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import takewhile
from textwrap import shorten
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ezpz_moe.errors import EzpzError
from ezpz_moe.hosts.backends import HOST_PATH
from ezpz_moe.hosts.plain import wrapper_in, wrapper_of
from ezpz_moe.hosts.reliance import in_words
from ezpz_moe.hosts.titan.mixed import is_ours, written_name

ROWS = 1024
"""Rows of a trial: a multiple of what grouped and quantized kernels ask for."""

_NO_CONVERTER = "Remove the quantization converter of the experts, or do not select a backend."
_TAKEN = f"(quantized grouped GEMM). {_NO_CONVERTER}"
_WRAPPED = f"(quantized grouped GEMM: its weights are {{}}). {_NO_CONVERTER}"
_BY_ITSELF = (
    "({}, beside the _grouped_mm that a backend replaces). Choose a model with torchtitan's own "
    "experts, or do not select a backend."
)
# The end of an operator's name, of aten's and others: addmm, _grouped_mm, _scaled_mm, linear, ...
_PRODUCT = re.compile(r"(mm|mv|dot|matmul|linear|convolution)$")


def check_seam(
    config: Any,
    base: type,
    backend: str,
    chosen_by: str,
    compute: Callable[[Any], object] | None = None,
) -> None:
    """Refuse experts whose products ``backend`` could not replace, all of them.

    Args:
        config: of the module with the seam ``_grouped_mm``.
        base: the host's own class that has it.
        backend: what would replace it.
        chosen_by: who asked for it, for the message.
        compute: calls the module that ``config`` builds, with ``ROWS`` rows on the meta device;
            None if its forward is known.

    Raises:
        EzpzError: the seam is taken or the weights are wrapped (quantization), or the class
            computes by itself; or this host has no seam, and the backend is not its own path.
    """
    asked, of = f"compute_backend {backend!r} ({chosen_by})", type(config)._owner
    if not hasattr(base, "_grouped_mm"):
        if backend != HOST_PATH:
            raise EzpzError(
                f"{asked}: this torchtitan has no {base.__name__}._grouped_mm, which the backend "
                f"would replace in {of.__name__}. Use {HOST_PATH!r}; `ezpz-moe doctor` shows what "
                "changed."
            )
        return
    if of is base:
        return
    try:
        # On the host's own path a class may compute as it likes.
        why = _why_not(config, base, None if backend == HOST_PATH else compute)
    except Exception as error:  # the class may be anyone's
        raise EzpzError(
            f"{asked}: {of.__name__} fails in a trial on the meta device, which would show whether "
            f"a backend can replace its products: {shorten(in_words(error), 200)}. Choose a model "
            "with torchtitan's own experts, or do not select a backend."
        ) from error
    if why:
        raise EzpzError(f"{asked}: {of.__name__} computes the experts' products itself {why}")


def refuse_what_came_later(module: nn.Module, backend: str, chosen_by: str) -> None:
    """Refuse experts of ours whose products were taken over after the backend was selected.

    Called when their weights are made: whatever converts or wraps them has done so by then.

    Raises:
        EzpzError: a subclass of ours replaces the seam, or the weights are wrapped.
    """
    why = _TAKEN if any(map(_takes_ours, module.modules())) else None
    if why is None and (wrapper := wrapper_in(module)):
        why = _WRAPPED.format(wrapper)
    if why:
        raise EzpzError(
            f"compute_backend {backend!r} ({chosen_by}): {written_name(type(module))} computes the "
            f"experts' products itself {why}"
        )


def _takes_ours(module: nn.Module) -> bool:
    """Return whether a class made from one of ours has another seam."""
    classes = type(module).__mro__
    made_of_ours = list(takewhile(lambda each: not is_ours(each), classes))
    is_made = len(made_of_ours) < len(classes)
    return is_made and any("_grouped_mm" in vars(each) for each in made_of_ours)


def _why_not(config: Any, base: Any, compute: Callable[[Any], object] | None) -> str | None:
    """Return why a backend could not replace the products, as the end of a sentence; or None."""
    # Forked, because a class may draw numbers.
    with torch.device("meta"), torch.random.fork_rng(devices=[]), torch.no_grad():
        module = config.build()
        # Of the instance: it may be set there, which the class does not show.
        if getattr(module._grouped_mm, "__func__", None) is not base._grouped_mm:
            return _TAKEN
        if wrapper := wrapper_in(module):
            return _WRAPPED.format(wrapper)
        return None if compute is None else _Trial(module).of(compute)


class _Trial(TorchDispatchMode):
    """Sees what a module multiplies, in its seam and elsewhere."""

    def __init__(self, module: Any) -> None:
        super().__init__()
        self._module = module
        self._elsewhere: list[str] = []
        self._wrappers: list[str] = []
        self._multiplied = 0
        module._grouped_mm = self._in_the_seam

    def of(self, compute: Callable[[Any], object]) -> str | None:
        """Return what speaks against the class, as the end of a sentence; or None."""
        with self:
            compute(self._module)
        if self._wrappers:
            return _WRAPPED.format(self._wrappers[0])
        if self._elsewhere:
            return _BY_ITSELF.format(f"with {self._elsewhere[0]}")
        # Every expert's matrices; a bias has fewer dimensions.
        matrices = (each for each in self._module.parameters() if each.squeeze().dim() > 2)
        if self._multiplied < sum(each.numel() for each in matrices):
            return _BY_ITSELF.format("with weights that are never multiplied there")
        return None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if _PRODUCT.search(name):
            self._elsewhere.append(name)
        if name == "aten::_local_scalar_dense":
            # A hook that reads a value, such as a norm for the log. There is none on this device.
            return torch.ones((), dtype=args[0].dtype, device="cpu").item()
        return func(*args, **(kwargs or {}))

    def _in_the_seam(self, **tensors: Tensor) -> Tensor:
        # Its parameters have other names in each host, but the same order.
        x_RK, weight, offs_E = tensors.values()
        self._wrappers += filter(None, map(wrapper_of, (x_RK, weight)))
        self._multiplied += weight.numel()
        R, K = x_RK.shape
        return x_RK.new_empty(R, weight.numel() // (len(offs_E) * K))
