"""Stand-ins for a quantizer that wraps weights instead of changing the class that holds them."""

import torch
from torch import nn


class Wrapped(torch.Tensor):
    """Multiplies grouped products by itself, as torchao's weights do for float8."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is torch._grouped_mm:
            raise AssertionError("not reached")
        return super().__torch_function__(func, types, args, kwargs or {})


class Dispatched(torch.Tensor):
    """Holds another tensor, and acts where operators are dispatched."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor):
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, dtype=inner.dtype, device=inner.device
        )

    def __init__(self, inner: torch.Tensor):
        self.inner = inner

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        def plain(each):
            return each.inner if isinstance(each, cls) else each

        out = func(*map(plain, args), **(kwargs or {}))
        return cls(out) if func is torch.ops.aten.detach.default else out


WRAPPERS = {"torch_function": lambda w: w.as_subclass(Wrapped), "torch_dispatch": Dispatched}


def wrap_weights(module: nn.Module, how: str) -> None:
    """Wrap every parameter of ``module`` and below, as ``torchao.quantize_`` does."""
    for each in module.modules():
        for name, parameter in list(each.named_parameters(recurse=False)):
            setattr(each, name, nn.Parameter(WRAPPERS[how](parameter.data)))
