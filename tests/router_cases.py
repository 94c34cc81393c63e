"""A flavor's router in a small model of the host, and tokens for it.

Whoever imports this is skipped on torchtitan 0.2, which has no such routers.
"""

import dataclasses
from pathlib import Path

import pytest
import torch
from dialect import ON_0_2

from ezpz_moe.config.flavors import load_flavor
from ezpz_moe.hosts.titan.base import titan

if ON_0_2:
    pytest.skip("[router] needs torchtitan 0.3 or later", allow_module_level=True)

from torchtitan.models.common.moe import MoE, TokenChoiceTopKRouter

from ezpz_moe.hosts.titan.router import Groups

B, L = 3, 16

UPSTREAM = {
    "deepseek_v3": 'base = "deepseek_v3/debugmodel"',
    "qwen3": 'base = "qwen3/debugmodel_moe"',
    "gpt_oss": 'base = "gpt_oss/debugmodel"',
}


def small_model(folder: Path, tables: str, base: str = 'inherits = "tiny"'):
    """A small model with these tables in its flavor, whose file is put into ``folder``."""
    (folder / "tiny.toml").write_text('inherits = "debugmodel"\nn_layers = 2\n')
    (folder / "mine.toml").write_text(f'{base}\nattention = "sdpa"\n{tables}\n')
    from ezpz_moe.hosts.titan.models import model_spec

    spec = model_spec(load_flavor("mine", near=folder))
    torch.manual_seed(0)
    built = spec.model.build()
    built.init_weights(buffer_device=torch.device("cpu"))
    return built.train()


def moe_of(model) -> MoE:
    return next(module for module in model.modules() if isinstance(module, MoE))


def router_of(model, *, groups: Groups | None = None) -> TokenChoiceTopKRouter:
    router = moe_of(model).router
    router.groups = groups or dataclasses.replace(router.groups, length=L)
    return router


def tokens(dim: int, *, seed: int = 1) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(B, L, dim, generator=draw)


def flat(x_BLD):
    """As the host hands tokens to a router: since August 2026 sequences are folded."""
    return x_BLD.flatten(0, 1) if titan().one_sequence(1) == (1,) else x_BLD


def routed(router, x_BLD):
    """weights_TK, ids_TK, scores_TE."""
    return tuple(each.flatten(0, -2) for each in router(flat(x_BLD)))
