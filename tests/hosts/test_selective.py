"""Selective checkpointing keeps what routed experts multiplied: backward multiplies it no more."""

import subprocess
from collections import Counter
from dataclasses import dataclass
from functools import partial

import fork_server
import pytest
import torch
from router_cases import flat, moe_of, tokens
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchtitan.distributed.activation_checkpoint import FullAC, SelectiveAC

from ezpz_moe.compute import backend_names, get_backend, products
from ezpz_moe.compute.reference import random_case
from ezpz_moe.hosts.titan.activation_checkpointing import (
    SelectiveACKeepingProducts,
    expert_products,
    keeping_products,
)

HOST = SelectiveAC.Config()
SAVE = SelectiveACKeepingProducts.Config(experts="save")
RECOMPUTE = SelectiveACKeepingProducts.Config(experts="recompute")

CASE = random_case([5, 0, 3, 4], dim=8, hidden_dim=16)
T, K = 6, 2
IDS_TK = torch.tensor([0] * 5 + [2] * 3 + [3] * 4).view(T, K)
COUNTS_E = torch.bincount(IDS_TK.flatten(), minlength=4)


class Products(TorchDispatchMode):
    """Counts the operators with an expert's product that really run, below any checkpointing."""

    def __init__(self):
        super().__init__()
        self.listed, self.runs = expert_products(), Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.runs[func] += func in self.listed
        return func(*args, **(kwargs or {}))

    def total(self) -> int:
        return self.runs.total()


class Experts(nn.Module):
    """An entry point of a backend, with something on both sides that is computed again."""

    def __init__(self, backend: str, entry: str):
        super().__init__()
        weights = {"w1": CASE.w1_EFD, "w2": CASE.w2_EDF, "w3": CASE.w3_EFD}
        for name, weight in weights.items():
            self.register_parameter(name, nn.Parameter(weight.detach().clone()))
        self.compute = partial(getattr(self, entry), get_backend(backend).lossless)

    def forward(self, x, scores_TK):
        return self.compute(x.sin(), scores_TK).cos()

    def grouped_mm(self, backend, x, scores_TK):
        offs_E = torch.cumsum(COUNTS_E, 0, dtype=torch.int32)
        return backend.grouped_mm(x, self.w1.transpose(1, 2), offs_E)

    def ffn(self, backend, x, scores_TK):
        return backend.ffn(self.w1, self.w2, self.w3, x, COUNTS_E)

    def routed(self, backend, x, scores_TK):
        out_TD = backend.routed(self.w1, self.w2, self.w3, x[:T], scores_TK, IDS_TK, COUNTS_E)
        return out_TD * scores_TK.sum(dim=1, keepdim=True)


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    """x_RD, of which `routed` takes the first T rows, and scores_TK."""
    scores_TK = torch.linspace(0.1, 1, T * K).view(T, K)
    return CASE.x_RD.detach().clone().requires_grad_(), scores_TK.requires_grad_()


def gradients(module: nn.Module) -> list[torch.Tensor]:
    x_RD, scores_TK = inputs()
    module.zero_grad()
    module(x_RD, scores_TK).square().sum().backward()
    leaves = (x_RD, scores_TK, *module.parameters())
    return [leaf.grad.clone() for leaf in leaves if leaf.grad is not None]


def checkpointed(module: nn.Module, policy) -> nn.Module:
    return policy.build()._wrap_block(module)


@pytest.mark.parametrize("entry", ["grouped_mm", "ffn", "routed"])
@pytest.mark.parametrize(
    "backend",
    [
        *("for_loop", "for_loop(recompute=true)", "batched_mm_padded", "batched_mm_capacity"),
        *("grouped_mm", "grouped_mm_fused", "auto"),
    ],
)
def test_what_is_saved_is_not_multiplied_again(backend, entry):
    """Nor by the host's own path, whose product is torch's; and no gradient changes a bit."""
    module = Experts(backend, entry)
    with Products() as forward, torch.no_grad():
        module(*inputs())
    with Products() as plain:
        expected = gradients(module)
    assert forward.total() > 0
    for policy, again in [(SAVE, 0), (RECOMPUTE, forward.total()), (HOST, forward.total())]:
        with Products() as products:
            found = gradients(checkpointed(module, policy))
        assert products.total() == plain.total() + again, policy
        assert len(found) == len(expected) >= 2
        assert all(map(torch.equal, found, expected)), policy


@pytest.mark.parametrize(("policy", "again"), [(SAVE, 0), (RECOMPUTE, 1)])
def test_compiled_blocks_save_it_too(monkeypatch, policy, again):
    """There torch's partitioner asks the policy, once, and not a mode at every call."""
    calls = []

    def counting(*arguments):
        calls.append(arguments)
        return multiply(*arguments)

    multiply = products.mm
    monkeypatch.setattr(products, "mm", counting)
    module = Experts("for_loop", "ffn")
    expected = gradients(module)
    plain = len(calls)
    with torch.no_grad():
        module(*inputs())
    forward = len(calls) - plain
    block = checkpointed(module, policy)
    torch.compiler.reset()  # what it has compiled for the other policy would be taken for this one
    block.compile(backend="aot_eager", fullgraph=True)
    calls.clear()
    found = gradients(block)
    assert len(calls) == plain + again * forward
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("backend", ["for_loop", "batched_mm_capacity"])
def test_a_layer_of_the_host_multiplies_once(model_with, backend):
    """With the router's choices and what drops tokens around it."""
    moe = moe_of(model_with(f'compute_backend = "{backend}"'))
    x = flat(tokens(moe.router.gate.in_features))
    found = {}
    for name, policy in {"none": None, "save": SAVE, "recompute": RECOMPUTE}.items():
        # With its place, because the host's policy recomputes `moe.router.gate` by that name.
        block = policy.build()._wrap_block(moe, base_fqn="layers.1.moe") if policy else moe
        moe.zero_grad()
        with Products() as products:
            block(x).square().sum().backward()
        grads = [each.grad.clone() for each in moe.parameters() if each.grad is not None]
        found[name] = products.total(), grads
    assert {name: runs for name, (runs, _) in found.items()} == {
        "none": 1,
        "save": 1,
        "recompute": 2,
    }
    for _, grads in found.values():
        assert len(grads) > 3
        assert all(map(torch.equal, grads, found["none"][1]))


def test_every_operator_that_computes_forward_is_on_the_list():
    """Whoever gives backends another operator has to say whether it is kept."""
    listed = {op.name() for op in expert_products()}
    starts = tuple(f"ezpz_moe::{name}_" for name in backend_names())
    registered = {
        name
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith(starts) and not name.endswith("_backward")
    }
    assert len(registered) > 10
    assert listed == registered | {"aten::_grouped_mm"}


class OfTheirOwn(SelectiveAC):
    @dataclass(kw_only=True, slots=True)
    class Config(SelectiveAC.Config):
        pass


def test_only_the_hosts_own_policy_is_replaced():
    """A subclass has its own list; ours has been told what to do; settings stay."""
    told = SelectiveAC.Config(force_recompute_mm_shapes_by_fqns=["a"], debug=True)
    found = keeping_products(told)
    assert found == SelectiveACKeepingProducts.Config(
        force_recompute_mm_shapes_by_fqns=["a"], debug=True, experts=None
    )
    for other in (OfTheirOwn.Config(), RECOMPUTE, FullAC.Config(), None):
        assert keeping_products(other) is other


# As the trainer does it: overrides are applied, and the model is parallelized later.
DOOR_2 = """
import sys
from ezpz_moe.hosts.detect import check_host
check_host()
from torch import nn
from torchtitan.config.override import apply_overrides, parse_cli_imports
from torchtitan.distributed.activation_checkpoint import SelectiveAC
from torchtitan.models.deepseek_v3.config_registry import deepseek_v3_debugmodel

def parallelize(model, *, ac_config, training, parallelism):
    model.policy = ac_config
    return model

config = deepseek_v3_debugmodel()
config.dump_folder = sys.argv[1]
config.model_spec.parallelize_fn = parallelize
config.override.imports = parse_cli_imports(sys.argv[2:])
apply_overrides(config.override, config)
model = config.model_spec.parallelize_fn(
    nn.Module(),
    ac_config=SelectiveAC.Config(),
    training=config.training,
    parallelism=config.parallelism,
)
# Whoever asks first, before a backend is loaded, gets the whole list.
from ezpz_moe.hosts.titan.activation_checkpointing import expert_products
assert {"ezpz_moe::for_loop_routed", "ezpz_moe::auto_mm"} <= {op.name() for op in expert_products()}
print(type(model.policy).__qualname__)
"""


@pytest.mark.parametrize(
    ("override", "policy"),
    [
        (
            'ezpz_moe.overrides.experts={"compute_backend": "for_loop"}',
            "SelectiveACKeepingProducts.Config",
        ),
        ("ezpz_moe.overrides.sdpa", "SelectiveAC.Config"),
    ],
)
def test_door_2_saves_with_our_experts_alone(tmp_path, override, policy):
    command = [fork_server.python(), "-c", DOOR_2, str(tmp_path), override]
    run = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert run.stdout.splitlines()[-1:] == [policy], run.stderr
