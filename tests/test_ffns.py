"""Activations, biases and shared experts of a flavor: formulas, sizes, and what is refused.

A layer is compared in float64 with its formula as on a blackboard; what remains is the order of
sums.
"""

import logging
import math
from collections import Counter
from pathlib import Path

import pytest
import torch
from dialect import SINCE_2026_09
from layer_cases import (
    SHARED,
    SMALL,
    D,
    E,
    F,
    K,
    assert_same_results,
    double_tokens,
    flavor,
    said_of_a_changed_run,
    save_as_hf,
)
from router_cases import moe_of, small_model

if SINCE_2026_09:
    pytest.skip("this host's experts compute their own activation", allow_module_level=True)

from ezpz_moe.compute.activations import ACTIVATIONS
from ezpz_moe.errors import EzpzError
from ezpz_moe.hosts.accounting import ffn_matrices
from ezpz_moe.hosts.counts import counts_at_hand
from ezpz_moe.hosts.detect import host
from ezpz_moe.hosts.titan import selector
from ezpz_moe.hosts.titan.models import model_spec
from ezpz_moe.hosts.titan.products_fit import bytes_per_token
from ezpz_moe.tools.checkpoints.huggingface.config import transformers_class


def gelu(h):
    return h / 2 * (1 + torch.erf(h / math.sqrt(2)))


def clamped(g, u):
    g, u = torch.minimum(g, torch.tensor(7.0)), torch.clip(u, -7, 7)
    return g / (1 + torch.exp(-1.702 * g)) * (u + 1)


FORMULAS = {
    "swiglu": lambda g, u: g / (1 + torch.exp(-g)) * u,
    "geglu": lambda g, u: gelu(g) * u,
    "reglu": lambda g, u: torch.where(g > 0, g, 0) * u,
    "clamped_swiglu": clamped,
    "relu2": lambda h: torch.where(h > 0, h, 0) ** 2,
    "gelu": gelu,
}


def model(folder: Path, keys: str):
    return small_model(folder, f"{SMALL}{keys}")


def on_the_blackboard(activation, x_TD, w1, w2, w3, b1=0, b2=0, b3=0):
    g, u = x_TD @ w1.T + b1, None if w3 is None else x_TD @ w3.T + b3
    hidden = FORMULAS[activation](g) if u is None else FORMULAS[activation](g, u)
    return hidden @ w2.T + b2


def by_formula(moe, x_TD, case: tuple):
    """The layer's output, expert by expert, with its own router's choices."""
    activation, _, ffn_activation, has_gate = case
    scores_TK, ids_TK, _ = (each.flatten(0, -2) for each in moe.router(x_TD, moe.expert_bias_E))
    experts, shared = moe.routed_experts.inner_experts, moe.shared_experts
    of = dict(experts.named_parameters())
    # The names say where a key belongs: w1_EFD is w1, and so on.
    parts = {name[:2]: each for name, each in of.items()}
    out_TD = torch.zeros_like(x_TD)
    for expert in range(experts.num_experts):
        own = {name: parts[name][expert] if name in parts else None for name in ("w1", "w2", "w3")}
        own |= {name: each[expert] for name, each in parts.items() if name.startswith("b")}
        score_T = (scores_TK * (ids_TK == expert)).sum(-1, keepdim=True)
        out_TD = out_TD + score_T * on_the_blackboard(activation, x_TD, **own)
    weights = [None if each is None else each.weight for each in (shared.w1, shared.w2, shared.w3)]
    gate_T1 = 1 / (1 + torch.exp(-(x_TD @ shared.gate.weight.T))) if has_gate else 1
    return out_TD + gate_T1 * on_the_blackboard(ffn_activation, x_TD, *weights)


CASES = [
    ("swiglu", True, "relu2", True),
    ("geglu", False, "gelu", False),
    ("reglu", True, "clamped_swiglu", True),
    ("clamped_swiglu", True, "swiglu", True),
    ("relu2", True, "geglu", True),
    ("gelu", True, "reglu", False),
    ("relu2", False, "swiglu", False),
]


def keys(activation: str, has_biases: bool, ffn_activation: str, has_gate: bool) -> str:
    return (
        f'expert_activation = "{activation}"\nexpert_bias = {str(has_biases).lower()}\n'
        f'ffn_activation = "{ffn_activation}"\nshared_gate = {str(has_gate).lower()}\n'
    )


def layer(folder: Path, case: tuple, backend: str, computed_in: torch.dtype):
    """An MoE layer, and tokens for it; large enough for every clamp, and with biases."""
    moe = moe_of(model(folder, f'{keys(*case)}compute_backend = "{backend}"\n')).double()
    moe.routed_experts.inner_experts.computed_in = computed_in
    draw = torch.Generator().manual_seed(2)
    for name, each in moe.named_parameters():
        if "router" not in name:
            value = torch.randn(each.shape, generator=draw) / (1 if each.dim() < 3 else D**0.25)
            each.data = value.double()
    return moe, double_tokens()


def assert_is_its_formula(
    folder: Path, case: tuple, backend: str, computed_in: torch.dtype, unit: float
) -> None:
    moe, x = layer(folder, case, backend, computed_in)
    assert_same_results(moe, by_formula(moe, x.flatten(0, -2), case), x, unit)


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_a_layer_is_its_formula(tmp_path, case):
    assert_is_its_formula(tmp_path, case, "for_loop", torch.float64, 2.0**-53)


@pytest.mark.parametrize("backend", ['for_loop"\nrouted = "composed', "grouped_mm"])
def test_and_with_the_hosts_own_dispatch(tmp_path, backend):
    """Which combines in float32; ``grouped_mm`` has the host's products, of our formula."""
    assert_is_its_formula(tmp_path, CASES[4], backend, torch.float32, 2.0**-24)


@pytest.mark.parametrize("activation", FORMULAS)
def test_the_flavors_words_are_the_kernels(activation):
    assert FORMULAS.keys() == ACTIVATIONS.keys()
    assert ffn_matrices(activation) == 2 + ACTIVATIONS[activation].is_gated


# Sizes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [CASES[0], CASES[3], CASES[4], CASES[6]], ids=str)
def test_parameters_are_those_of_the_formula(tmp_path, case):
    found = flavor(tmp_path, f"{SMALL}n_layers = 2\n{keys(*case)}")
    activation, has_biases, ffn_activation, has_gate = case
    plain = flavor(tmp_path, f"{SMALL}n_layers = 2\n")
    n, m = ffn_matrices(activation), ffn_matrices(ffn_activation)
    # One dense layer, and one with experts.
    of_experts = E * ((n - 3) * D * F + has_biases * ((n - 1) * F + D))
    beside = (m - 3) * D * (24 + SHARED) + has_gate * D
    summary = host().summarize(found)
    assert summary.total - host().summarize(plain).total == of_experts + beside
    assert summary == counts_at_hand(found)


def test_no_shared_experts_are_no_module(tmp_path):
    found = flavor(
        tmp_path, SMALL.replace(f"shared_hidden_dim = {SHARED}", "num_shared_experts = 0")
    )
    assert host().summarize(found) == counts_at_hand(found)
    assert moe_of(host().build_on_meta(found)).shared_experts is None


def test_of_experts_without_a_gate_one_product_less_is_kept(tmp_path):
    """Of every choice: up and the row's output, in bfloat16."""
    built = model(tmp_path, 'expert_activation = "relu2"')
    assert list(bytes_per_token(built)) == [K * (F + D) * 2]


# What is refused ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("base", "key", "said"),
    [
        ("gpt_oss/debugmodel", 'expert_activation = "relu2"', "expert_activation: the experts of"),
        ("gpt_oss/debugmodel", "expert_bias = true", "expert_bias: the experts of this model (G"),
        (
            "qwen3/debugmodel_moe",
            'ffn_activation = "gelu"',
            "has no effect: this model has neither",
        ),
    ],
)
def test_a_base_that_cannot_have_it(tmp_path, base, key, said):
    found = flavor(tmp_path, key, f'base = "{base}"')
    with pytest.raises(EzpzError) as refused:
        model_spec(found)
    assert str(refused.value).startswith(f"{tmp_path / 'mine.toml'}: ")
    assert said in str(refused.value)


def test_a_base_that_can(tmp_path):
    found = flavor(tmp_path, 'expert_activation = "gelu"', 'base = "qwen3/debugmodel_moe"')
    assert moe_of(host().build_on_meta(found)).routed_experts.inner_experts.w3_EFD is None


def test_no_class_of_transformers_computes_it(tmp_path):
    found = host().architecture(flavor(tmp_path, f"{SMALL}{keys(*CASES[4])}"))
    said = "; ".join(transformers_class(found).differences)
    for part in ("experts that compute relu2", "experts with biases", "FFNs that compute geglu"):
        assert f"it has {part}" in said
    assert "a gate of its shared experts" in said


def fuse(config) -> None:
    config.override.imports = ["torchtitan.overrides.fused_swiglu.fused_swiglu"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (fuse, "replaces FFNs with a fused SwiGLU"),
        (save_as_hf, "no class of transformers computes the FFNs"),
    ],
)
def test_settings_that_would_lose_it(tmp_path, monkeypatch, capsys, change, said):
    flavor(tmp_path, f"{SMALL}{keys(*CASES[4])}")
    assert said in said_of_a_changed_run(tmp_path, change, monkeypatch, capsys)


def test_the_log_says_that_the_hosts_own_path_is_not_taken(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(selector, "_choices_not_logged", Counter())  # other tests' models
    with caplog.at_level(logging.INFO):
        model(tmp_path, 'expert_activation = "relu2"')
        model(tmp_path, "")
    other, own = (line for line in caplog.messages if "compute_backend grouped_mm" in line)
    assert "(composed of the host's products, as its experts have no such FFN)" in other
    assert "1 MoE layers of relu2 experts;" in other
    assert "(the host's own path)" in own
