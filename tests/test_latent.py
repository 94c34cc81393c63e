"""Experts in a latent: their formula, what they cost, and what is refused.

A layer is compared in float64 with its formula as on a blackboard; what remains is the order of
sums.
"""

import dataclasses
from pathlib import Path

import pytest
import torch
from config_cases import config
from dialect import ON_0_2, SINCE_2026_09
from router_cases import UPSTREAM, flat, moe_of, router_of, small_model, tokens

from ezpz_moe.compute.reference import relative_error
from ezpz_moe.config.flavors import FOLDER_VARIABLE, load_flavor
from ezpz_moe.errors import EzpzError
from ezpz_moe.hosts.counts import counts_at_hand
from ezpz_moe.hosts.detect import host
from ezpz_moe.hosts.titan.models import model_spec
from ezpz_moe.hosts.titan.products_fit import bytes_per_token

D, F, Z, E, K = 32, 48, 16, 8, 3
SMALL = f"""
dim = {D}
moe_hidden_dim = {F}
dense_hidden_dim = 24
shared_hidden_dim = 40
n_heads = 2
kv_lora_rank = 16
qk_nope_head_dim = 8
qk_rope_head_dim = 8
v_head_dim = 8
"""
LATENT = f"moe_latent_dim = {Z}\n"

before_september = pytest.mark.skipif(SINCE_2026_09, reason="its layers have no place for it")


def flavor(folder: Path, keys: str, like: str = 'inherits = "debugmodel"'):
    (folder / "mine.toml").write_text(f'{like}\nattention = "sdpa"\n{keys}\n')
    return load_flavor("mine", near=folder)


def on_the_blackboard(moe, x_TD):
    """The layer's output, expert by expert, with its own router's choices."""
    scores_TK, ids_TK, _ = (each.flatten(0, -2) for each in moe.router(x_TD, moe.expert_bias_E))
    layer, shared = moe.routed_experts, moe.shared_experts
    of = layer.inner_experts
    x_TZ = x_TD @ layer.descend.weight.T
    sum_TZ = torch.zeros_like(x_TZ)
    for expert in range(E):
        g, u = x_TZ @ of.w1_EFD[expert].T, x_TZ @ of.w3_EFD[expert].T
        score_T1 = (scores_TK * (ids_TK == expert)).sum(-1, keepdim=True)
        sum_TZ = sum_TZ + score_T1 * (g / (1 + torch.exp(-g)) * u @ of.w2_EDF[expert].T)
    g = x_TD @ shared.w1.weight.T
    of_shared_TD = (g / (1 + torch.exp(-g)) * (x_TD @ shared.w3.weight.T)) @ shared.w2.weight.T
    return sum_TZ @ layer.ascend.weight.T + of_shared_TD


def results(moe, out, x) -> dict[str, torch.Tensor]:
    """The output and all gradients of a layer."""
    draw = torch.Generator().manual_seed(3)
    grad = torch.randn(out.shape, generator=draw, dtype=torch.float64).to(out)
    wanted = dict(moe.named_parameters()) | {"x": x}
    found = torch.autograd.grad(out, list(wanted.values()), grad)
    return {"out": out.detach(), **dict(zip(wanted, found, strict=True))}


@before_september
@pytest.mark.parametrize(
    ("backend", "computed_in", "unit"),
    [
        ('for_loop"', torch.float64, 2.0**-53),
        ('batched_mm_padded"', torch.float64, 2.0**-53),
        # The host's dispatcher combines in float32.
        ('for_loop"\nrouted = "composed"', torch.float32, 2.0**-24),
        ('for_loop"\n[router]\nnull_experts = 2', torch.float64, 2.0**-53),
    ],
    ids=["one node", "padded", "composed", "null experts"],
)
def test_a_layer_is_its_formula(tmp_path, backend, computed_in, unit):
    """Sums of a gradient have at most so many terms as x has elements."""
    keys = f"{SMALL}{LATENT}compute_backend = \"{backend}"
    model = small_model(tmp_path, keys)
    if "[router]" in backend:
        router_of(model)  # which has to know how long a sequence is
    moe = moe_of(model).double()
    moe.routed_experts.inner_experts.computed_in = computed_in
    draw = torch.Generator().manual_seed(2)
    for name, each in moe.named_parameters():
        if "router" not in name:
            each.data = torch.randn(each.shape, generator=draw).double() / each.shape[-1] ** 0.5
    x = flat(tokens(D)).double().requires_grad_()
    ours = results(moe, moe(x), x)
    true = results(moe, on_the_blackboard(moe, x.flatten(0, -2)).view(x.shape), x)
    assert {"routed_experts.descend.weight", "routed_experts.ascend.weight"} < ours.keys()
    assert ours.keys() == true.keys()
    for name, value in ours.items():
        assert relative_error(value, true[name]) <= x.numel() * unit, name
