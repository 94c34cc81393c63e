"""A flavor whose layers are small enough for a blackboard, and what to compare with the formula.

Whoever imports this is skipped on torchtitan 0.2, as by ``router_cases``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from config_cases import config
from router_cases import flat, tokens

from ezpz_moe.compute.reference import relative_error
from ezpz_moe.config.flavors import FOLDER_VARIABLE, Flavor, load_flavor

D, F, SHARED, E, K = 32, 48, 40, 8, 3
SMALL = f"""
dim = {D}
moe_hidden_dim = {F}
dense_hidden_dim = 24
shared_hidden_dim = {SHARED}
n_heads = 2
kv_lora_rank = 16
qk_nope_head_dim = 8
qk_rope_head_dim = 8
v_head_dim = 8
"""


def flavor(folder: Path, keys: str, like: str = 'inherits = "debugmodel"') -> Flavor:
    (folder / "mine.toml").write_text(f'{like}\nattention = "sdpa"\n{keys}\n')
    return load_flavor("mine", near=folder)


def double_tokens() -> torch.Tensor:
    return flat(tokens(D)).double().requires_grad_()


def assert_same_results(
    moe: torch.nn.Module, out_TD: torch.Tensor, x: torch.Tensor, unit: float
) -> set[str]:
    """Compare a layer and all its gradients with ``out_TD``, its formula's; return the names.

    ``unit``: of rounding. Sums of a gradient have at most so many terms as x has elements.
    """
    ours, true = _results(moe, moe(x), x), _results(moe, out_TD.view(x.shape), x)
    assert ours.keys() == true.keys()
    for name, value in ours.items():
        assert relative_error(value, true[name]) <= x.numel() * unit, name
    return set(ours)


def _results(moe, out, x) -> dict[str, torch.Tensor]:
    """The output and all gradients of a layer."""
    draw = torch.Generator().manual_seed(3)
    grad = torch.randn(out.shape, generator=draw, dtype=torch.float64).to(out)
    wanted = dict(moe.named_parameters()) | {"x": x}
    found = torch.autograd.grad(out, list(wanted.values()), grad)
    return {"out": out.detach(), **dict(zip(wanted, found, strict=True))}


def save_as_hf(config: Any) -> None:
    config.checkpoint.last_save_in_hf = True


def said_of_a_changed_run(
    folder: Path, change: Callable[[Any], None], monkeypatch: pytest.MonkeyPatch, capsys
) -> str:
    """What ends a run of the flavor ``mine`` in ``folder`` whose config has been changed."""
    monkeypatch.setenv(FOLDER_VARIABLE, str(folder))
    changed = config("mine")
    change(changed)
    with pytest.raises(SystemExit):  # as of the command line
        dataclasses.replace(changed)
    return capsys.readouterr().err
