"""Stand-ins for packages that models of the host import, and that nothing here computes with."""

import contextlib
import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from types import ModuleType

GATED_DELTA_NET = (
    "fla.modules.conv.causal_conv1d",
    "fla.modules.conv.triton.ops",
    "fla.ops.gated_delta_rule.chunk",
    "fla.ops.gated_delta_rule.fused_recurrent",
)
"""What qwen3_5 imports."""

IMAGES = ("torchvision.io", "torchvision.transforms.v2.functional")
"""What the host's loader of images imports."""


@contextlib.contextmanager
def stand_in(*names: str) -> Iterator[None]:
    """Let ``names`` be imported meanwhile: packages in which every name is a class without content.

    What imports them is gone afterwards, too.
    """
    before = set(sys.modules)
    for name in names:
        above = None
        for depth in range(1, name.count(".") + 2):
            package = ".".join(name.split(".")[:depth])
            here = sys.modules.setdefault(package, _Anything(package))
            if above is not None:
                setattr(above, package.rpartition(".")[2], here)
            above = here
    try:
        yield
    finally:
        for name in set(sys.modules) - before:
            if name.startswith(("torchtitan.", *names)) or isinstance(sys.modules[name], _Anything):
                del sys.modules[name]


class _Anything(ModuleType):
    def __init__(self, name: str):
        super().__init__(name)
        self.__spec__ = ModuleSpec(name, None)
        self.__path__: list[str] = []
        self.lacks: set[str] = set()

    def __getattr__(self, name: str) -> type:
        if name.startswith("__") or name in self.lacks:
            raise AttributeError(name)
        functions = dict.fromkeys(("forward", "backward"), staticmethod(lambda *args: None))
        return type(name, (), functions)
