"""A flavor's router in a small model of the host, and tokens for it.

Whoever imports this is skipped on torchtitan 0.2, which has no such routers.
"""

import dataclasses
import shutil
import subprocess
from pathlib import Path

import fork_server
import pytest
import torch
from dialect import ON_0_2

from ezpz_moe.config.flavors import load_flavor
from ezpz_moe.hosts.titan.base import titan

if ON_0_2:
    pytest.skip("[router] needs torchtitan 0.3 or later", allow_module_level=True)

from torchtitan.models.common.moe import MoE, TokenChoiceTopKRouter

from ezpz_moe.hosts.titan.groups import Groups
from ezpz_moe.routing.counters import SUMS

B, L = 3, 16
RELU = """
[router]
routing = "relu"
activation = "relu_rmsnorm"
learned_scale = true
[balance]
locality_loss = 0.02
chunk_loss = 0.5
"""
"""Routing by ReLU with all that it has; a scope or a size of chunks may follow."""

UPSTREAM = {
    "deepseek_v3": 'base = "deepseek_v3/debugmodel"',
    "qwen3": 'base = "qwen3/debugmodel_moe"',
    "gpt_oss": 'base = "gpt_oss/debugmodel"',
}


def small_model(
    folder: Path, tables: str, base: str = 'inherits = "tiny"', layers: int | None = None
):
    """A small model with these tables in its flavor, whose file is put into ``folder``.

    ``layers``: how many of its first ones are built; all, unless it is given.
    """
    (folder / "tiny.toml").write_text('inherits = "debugmodel"\nn_layers = 2\n')
    (folder / "mine.toml").write_text(f'{base}\nattention = "sdpa"\n{tables}\n')
    from ezpz_moe.hosts.titan.models import model_spec

    model = model_spec(load_flavor("mine", near=folder)).model
    model.layers = model.layers[:layers]
    torch.manual_seed(0)
    built = model.build()
    built.init_weights(buffer_device=torch.device("cpu"))
    return built.train()


def moe_of(model) -> MoE:
    return next(module for module in model.modules() if isinstance(module, MoE))


def router_of(model, *, groups: Groups | None = None) -> TokenChoiceTopKRouter:
    router = moe_of(model).router
    router.groups = {
        scope: groups or dataclasses.replace(own, length=L) for scope, own in router.groups.items()
    }
    return router


def sums_of(router) -> dict[str, float]:
    """What a router has added up, by the names of ``SUMS``; not its experts' probabilities."""
    return dict(zip(SUMS, router.sums_S.tolist()[: len(SUMS)], strict=True))


def tokens(dim: int, *, seed: int = 1) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(B, L, dim, generator=draw)


def flat(x_BLD):
    """As the host hands tokens to a router: since August 2026 sequences are folded."""
    return x_BLD.flatten(0, 1) if titan().one_sequence(1) == (1,) else x_BLD


def routed(router, x_BLD):
    """weights_TK, ids_TK, scores_TE."""
    return tuple(each.flatten(0, -2) for each in router(flat(x_BLD)))


_OF_THE_COPY = """
import sys
for name in [name for name in sys.modules if name.split(".")[0] == "ezpz_moe"]:
    del sys.modules[name]
sys.path.insert(0, ".")
from pathlib import Path
from ezpz_moe.hosts.detect import host
host()  # finds the binding
"""


def run_in_copy(
    folder: Path, additions: dict[str, tuple[str, str]], program: str
) -> subprocess.CompletedProcess:
    """Run a program with a copy of this package, in whose files something is added before a line.

    ``additions``: file in the package -> the beginning of the line, what to add.
    """
    package = Path(__file__).parents[1]
    for name in ("ezpz_moe", "flavors"):
        leave = shutil.ignore_patterns("__pycache__")
        shutil.copytree(package / name, folder / name, ignore=leave)
    for name, (before, added) in additions.items():
        file = folder / "ezpz_moe" / name
        text = file.read_text()
        assert text.count(before) == 1
        file.write_text(text.replace(before, added + before))
    return subprocess.run(
        [fork_server.python(), "-c", _OF_THE_COPY + program],
        cwd=folder,
        capture_output=True,
        text=True,
    )
