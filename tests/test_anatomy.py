"""Parameters and FLOPs by component, against the model's names, torch's counter and the host.

Legend: L = tokens of the sequence, R = rows of tokens routed to experts, N = heads, H = head
dimension of queries and values together.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from flavor_files import SMALL
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from trainer_runs import TINY

from ezpz_moe.config.flavors import flavor_names, load_flavor
from ezpz_moe.errors import EzpzError
from ezpz_moe.hosts.accounting import OF_MOE_LAYERS, Anatomy, dense_model, ffn_matrices
from ezpz_moe.hosts.detect import check_host, host
from ezpz_moe.hosts.titan.v0_3 import Titan03
from ezpz_moe.hosts.titan_0_2.v0_2 import Titan02

check_host()  # before torchtitan is imported: it chooses the device
if type(host()) is not Titan03:
    pytest.skip("about the binding to torchtitan 0.3", allow_module_level=True)

from torchtitan.models.common.config_utils import make_ffn_config  # noqa: E402

from ezpz_moe.hosts.titan.anatomy import anatomy  # noqa: E402
from ezpz_moe.hosts.titan.components import weigh  # noqa: E402
from ezpz_moe.hosts.titan.models import model_spec  # noqa: E402
from ezpz_moe.hosts.titan.parameters import build_on_meta  # noqa: E402

SHORT = (*SMALL, "236B")  # small ones of each family, and one with groups and a query of low rank
SIZES = [
    name if name in SHORT else pytest.param(name, marks=pytest.mark.full) for name in flavor_names()
]

BY_NAME = {
    "embeddings": r"tok_embeddings\.weight",
    "norms": r"(.*\.)?\w*norm\.weight",
    "attention scores": r".*\.attention\.sinks",
    "attention projections": r".*\.attention\..*",
    "router": r".*\.moe\.router\..*",
    "routed experts": r".*\.moe\.routed_experts\..*",
    "shared experts": r".*\.moe\.shared_experts\..*",
    "dense FFN": r".*\.feed_forward\..*",
    "output head": r"lm_head\..*",
}
"""Component -> the names of its parameters; the first that fits counts."""


def component_of(name: str) -> str:
    return next(component for component, names in BY_NAME.items() if re.fullmatch(names, name))


@pytest.mark.parametrize("size", SIZES)
def test_components_have_the_parameters_of_their_names_and_sum_up_to_the_hosts(size: str) -> None:
    flavor = load_flavor(size)
    model, found = build_on_meta(flavor), anatomy(flavor, 16)
    by_name: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        by_name[component_of(name)] += parameter.numel()
    assert {name: cost.parameters for name, cost in found.costs.items()} == {
        "attention scores": 0,
        **by_name,
    }
    total, _ = model_spec(flavor).model.get_nparams_and_flops(model, 16)
    assert found.total.parameters == total
    assert found.uncounted == ()


def unmultiplied(model: nn.Module, found: Anatomy) -> float:
    """Active parameters in no matrix product: norms, biases, sinks. Embeddings are not in it."""
    share = found.top_k / found.num_experts
    number = 0.0
    for name, parameter in model.named_parameters():
        is_bias = parameter.dim() == (2 if "routed_experts" in name else 1)
        number += is_bias * parameter.numel() * (share if "routed_experts" in name else 1)
    return number


@pytest.mark.parametrize("size", SIZES)
def test_the_hosts_flops_are_ours_and_what_it_counts_beside(size: str) -> None:
    """It has attention over the whole sequence, and 6 FLOPs for what is no product's weight."""
    flavor = load_flavor(size)
    model = build_on_meta(flavor)
    for seq_len in (1, 4096):
        found = anatomy(flavor, seq_len)
        scores = found.costs["attention scores"].both
        whole = 6 * found.n_layers * per_key(model) * seq_len
        beside = whole + 6 * unmultiplied(model, found)
        assert found.host_flops == found.total.both - scores + beside


def per_key(model: nn.Module) -> int:
    """N H of the model's attentions, which are alike."""
    (sizes,) = {
        module.n_heads
        * (
            module.qk_head_dim + module.v_head_dim
            if hasattr(module, "qk_head_dim")
            else 2 * module.head_dim
        )
        for name, module in model.named_modules()
        if name.endswith(".attention")
    }
    return sizes


def grouped_mm_flops(A: torch.Size, B: torch.Size, *_: Any, **__: Any) -> int:
    """Forward and input gradient: A [R, K], B [E, K, N]. Weight gradient: A [K, R], B [R, N]."""
    return 2 * A[0] * A[1] * B[-1]


def counted(name: str, seq_len: int) -> tuple[Counter[str], Counter[str]]:
    """FLOPs of a sequence by operator, in forward and in backward, as torch counts them."""
    formulas = {torch.ops.aten._grouped_mm: grouped_mm_flops}  # torch has none for it
    forward, backward = (FlopCounterMode(display=False, custom_mapping=formulas) for _ in range(2))
    model = build_on_meta(load_flavor(f"{name}_sdpa", near=TINY)).bfloat16()
    with FakeTensorMode(allow_non_fake_inputs=True):  # torch counts by the shapes
        model.to_empty(device="cpu")
        tokens = torch.zeros(1, seq_len, dtype=torch.int64)
        with forward:
            output = model(tokens, torch.arange(seq_len).unsqueeze(0))
        with backward:
            output.float().sum().backward()
    return tuple(
        Counter({str(op): flops for op, flops in each.get_flop_counts()["Global"].items()})
        for each in (forward, backward)
    )


def is_of_attention(operator: str) -> bool:
    return operator == "aten.bmm" or "attention" in operator


@pytest.mark.filterwarnings("ignore:In CPU autocast")
@pytest.mark.parametrize(
    ("name", "seq_len"),
    [
        ("debugmodel", 32),
        ("qwen3_debugmodel", 32),
        ("gpt_oss_debugmodel", 160),  # it has a window of 128
        ("ungated", 32),
        ("pyramid", 32),  # other experts in each layer
        ("latent", 32),
        ("residual", 32),
        pytest.param("debugmodel", 160, marks=pytest.mark.full),
        pytest.param("qwen3_debugmodel", 160, marks=pytest.mark.full),
        pytest.param("gpt_oss_debugmodel", 32, marks=pytest.mark.full),
    ],
)
def test_flops_are_what_torch_counts(name: str, seq_len: int) -> None:
    found = anatomy(load_flavor(name, near=TINY), seq_len)
    scores = found.costs["attention scores"].forward
    forward, backward = counted(name, seq_len)
    for ours, torchs, factor in (
        (found.total.forward - scores, forward, 1),
        (found.total.backward - 2 * scores, backward, 2),
    ):
        of_attention = sum(flops for op, flops in torchs.items() if is_of_attention(op))
        assert torchs.total() - of_attention == ours * seq_len
        # torch counts every query with every key, ours those that the mask leaves; and a fused
        # kernel, which keeps no scores, computes them once more in backward: five products for two.
        is_fused = any("attention" in op for op in torchs)
        products = 2.5 if is_fused and factor == 2 else factor
        whole = (
            2 * found.n_layers * per_key(build_on_meta(load_flavor(name, near=TINY))) * seq_len**2
        )
        # torch 2.14 has no formula for the fused kernel of heads that share keys: it counts none.
        uncounted = not of_attention and name == "qwen3_debugmodel"
        assert uncounted or of_attention == products * whole
    assert scores < whole / seq_len


@pytest.mark.parametrize(
    ("name", "seq_len", "expected"),
    [
        # 16 heads of 192 + 128; token i has i keys: 100 * 101 / 2 pairs in 6 layers
        ("debugmodel", 100, 2 * 6 * 16 * 320 * 5050),
        # 64 heads of 64 + 64; in 2 of 4 layers no token has more than 128 keys: 32896 and 24640
        # pairs, which is 128 * 129 / 2 + 128 * 128
        ("gpt_oss_debugmodel", 256, 2 * 64 * 128 * (2 * 32896 + 2 * 24640)),
    ],
)
def test_scores_are_those_that_the_mask_leaves(name: str, seq_len: int, expected: int) -> None:
    found = anatomy(load_flavor(name), seq_len)
    assert found.costs["attention scores"].forward * seq_len == expected


@pytest.mark.parametrize("size", ["debugmodel", "16B"])
def test_the_dense_model_is_one_that_can_be_built(size: str) -> None:
    flavor = load_flavor(size)
    found = anatomy(flavor, 64)
    dense = dense_model(found)
    config = model_spec(flavor).model
    ffn = make_ffn_config(
        dim=config.dim, hidden_dim=dense.hidden_dim, w1_param_init={}, w2w3_param_init={}
    )
    layers = [
        layer if layer.moe is None else dataclasses.replace(layer, moe=None, feed_forward=ffn)
        for layer in config.layers
    ]
    with torch.device("meta"):
        built, _ = weigh(dataclasses.replace(config, layers=layers).build())
    assert not built.keys() & set(OF_MOE_LAYERS)
    assert sum(cost.parameters for cost in built.values()) == dense.cost.parameters
    scores = found.costs["attention scores"].forward
    assert sum(cost.forward for cost in built.values()) + scores == dense.cost.forward
    # The hidden size is rounded: half a unit of it, in every layer with experts.
    per_unit = 2 * ffn_matrices("swiglu") * found.dim * found.n_moe_layers
    assert abs(dense.cost.forward - found.total.forward) <= per_unit / 2


# Zero-computation experts -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("table", "top_k", "computing"),
    [
        ("null_experts = 8", 6, 3.0),
        ("null_experts = 2\ncopy_experts = 1\nconstant_experts = 1", 4, 4 * 8 / 12),  # 4.5, even
        ("null_experts = 8\ntop_k = 4", 4, 2.0),
    ],
)
def test_zero_computation_experts_cost_no_product(
    tmp_path: Path, table: str, top_k: int, computing: float
) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(f'inherits = "debugmodel"\n[router]\n{table}\n')
    plain = anatomy(load_flavor("debugmodel"), 64)
    found = anatomy(load_flavor("mine", near=tmp_path), 64)
    assert (found.top_k, found.computing_experts) == (top_k, pytest.approx(computing, rel=1e-15))
    for attribute in ("active", "forward", "backward"):
        per_expert = getattr(plain.costs["routed experts"], attribute) / 3
        routed = getattr(found.costs["routed experts"], attribute)
        assert routed == pytest.approx(per_expert * computing, rel=1e-15)


# What cannot be told ------------------------------------------------------------------------------


def test_attention_that_hides_its_heads_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    from torchtitan.models.deepseek_v3.model import Attention

    monkeypatch.setattr(Attention, "forward", lambda self, x, *_: x)
    with pytest.raises(EzpzError, match=r"layers\.0\.attention: Attention .* its queries"):
        anatomy(load_flavor("debugmodel"), 8)


def test_a_module_with_parameters_of_no_known_use_is_named() -> None:
    model = nn.ModuleDict({"mixer": nn.Conv1d(2, 2, 3), "lm_head": nn.Linear(2, 3)})
    costs, uncounted = weigh(model)
    assert uncounted == ["Conv1d"]
    assert {name: cost.parameters for name, cost in costs.items()} == {
        "other": 14,
        "output head": 9,
    }


def test_a_shared_parameter_is_counted_once_and_multiplied_twice() -> None:
    model = nn.ModuleDict({"a": nn.Linear(2, 3, bias=False), "b": nn.Linear(2, 3, bias=False)})
    model["b"].weight = model["a"].weight
    costs, _ = weigh(model)
    assert (costs["other"].parameters, costs["other"].forward) == (6, 2 * 2 * 6)


def test_a_host_whose_binding_has_no_anatomy_says_so() -> None:
    with pytest.raises(EzpzError, match=r"cannot do this with torchtitan 0\.2: .* no anatomy"):
        Titan02().anatomy()
