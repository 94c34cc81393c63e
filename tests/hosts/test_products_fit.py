"""Selective checkpointing keeps the experts' products of a run if they fit, on all ranks alike."""

import dataclasses
import logging

import pytest
import torch.distributed as dist
from router_cases import flat, moe_of, tokens
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torchtitan.config import ParallelismConfig, TrainingConfig
from torchtitan.distributed.activation_checkpoint import SelectiveAC

from ezpz_moe.hosts.titan import products_fit
from ezpz_moe.hosts.titan.activation_checkpointing import (
    SelectiveACKeepingProducts,
    expert_products,
    products_kept,
)

TRAINING = TrainingConfig(local_batch_size=4, seq_len=32)
ALONE = ParallelismConfig()


@pytest.fixture
def layers(model_with):
    """Two MoE layers."""
    one, other = (moe_of(model_with('compute_backend = "for_loop"')) for _ in range(2))
    return nn.ModuleList([one, nn.Linear(3, 3), other])


def needed(layers) -> int:
    """Written out: gate and up of every choice and the output in bfloat16, and the rows' order."""
    K, D, F = sizes(layers[0])
    return 2 * 4 * 32 * ((K * 2 * F + D) * 2 + K * 8)  # 2 layers, tokens, bytes


def sizes(moe) -> tuple[int, int, int]:
    F = moe.routed_experts.inner_experts.w1_EFD.shape[1]
    return moe.router.top_k, moe.router.gate.in_features, F


def states(layers) -> int:
    return sum(each.numel() * 4 * 4 for each in layers.parameters())  # float32; 4 of each


class Kept(TorchDispatchMode):
    """Weak references to what the experts' operators return, below any checkpointing."""

    def __init__(self):
        super().__init__()
        self.listed, self.returned = expert_products(), []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func in self.listed:
            for each in result if isinstance(result, tuple) else (result,):
                storage = each.untyped_storage()
                self.returned.append((StorageWeakRef(storage), storage.nbytes()))
        return result

    def nbytes(self) -> int:
        return sum(nbytes for storage, nbytes in self.returned if not storage.expired())


# Elements of the experts' dtype, and ids of the rows' order, for each token.
KEPT = {
    "one node": ("for_loop", "", lambda K, D, F: (K * 2 * F + D, K)),
    "composed": ("for_loop", 'routed = "composed"', lambda K, D, F: (K * (2 * F + D), 0)),
    "without a gate": ("for_loop", 'expert_activation = "relu2"', lambda K, D, F: (K * F + D, K)),
    "recompute": ("for_loop(recompute=true)", "", lambda K, D, F: (D, K)),
    "recompute, composed": (
        *("for_loop(recompute=true)", 'routed = "composed"'),
        lambda K, D, F: (K * D, 0),
    ),
    "the host's": ("grouped_mm", "", lambda K, D, F: (K * (2 * F + D), 0)),
}


@pytest.mark.parametrize("layer", KEPT)
def test_what_is_estimated_is_what_a_checkpointed_layer_keeps(model_with, layer):
    backend, tables, by_hand = KEPT[layer]
    moe = moe_of(model_with(f'compute_backend = "{backend}"\n{tables}')).bfloat16()
    x = flat(tokens(moe.router.gate.in_features)).bfloat16()
    block = SelectiveACKeepingProducts.Config(experts="save").build()._wrap_block(moe)
    with Kept() as kept:
        loss = block(x).sum()
        nbytes = kept.nbytes()
    loss.backward()
    elements, ids = by_hand(*sizes(moe))
    (of_a_token,) = products_fit.bytes_per_token(moe)
    assert of_a_token == elements * 2 + ids * 8
    assert nbytes == x.shape[:-1].numel() * of_a_token


def test_one_node_returns_a_row_to_each_rank_that_sent_the_token(layers):
    K, D, _ = sizes(layers[0])
    limit = states(layers) + 2 * needed(layers)
    more = 2 * 2 * 4 * 32 * (min(K, 2) - 1) * D * 2
    assert more > 0
    in_two = dataclasses.replace(ALONE, expert_parallel_degree=2)
    assert products_fit.saved_or_not(layers, TRAINING, in_two, limit + more) == "save"
    assert products_fit.saved_or_not(layers, TRAINING, in_two, limit + more - 1) == "recompute"
    alone, many = (list(products_fit.bytes_per_token(layers, ranks)) for ranks in (1, 64))
    assert [b - a for a, b in zip(alone, many, strict=True)] == [(K - 1) * D * 2] * 2


def test_half_of_what_states_leave_is_the_limit(layers):
    limit = states(layers) + 2 * needed(layers)
    assert products_fit.saved_or_not(layers, TRAINING, ALONE, limit) == "save"
    assert products_fit.saved_or_not(layers, TRAINING, ALONE, limit - 1) == "recompute"


def test_a_rank_has_its_part_of_the_sequence(layers):
    limit = states(layers) + needed(layers)
    in_two = dataclasses.replace(ALONE, context_parallel_degree=2)
    assert products_fit.saved_or_not(layers, TRAINING, in_two, limit) == "save"
    assert products_fit.saved_or_not(layers, TRAINING, in_two, limit - 2) == "recompute"


@pytest.mark.parametrize(("kind", "ranks"), [("cpu", 2), ("cuda", 1)])
def test_the_ranks_of_a_cpu_share_its_memory(layers, monkeypatch, kind, ranks):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(products_fit.utils, "device_type", kind)
    limit = ranks * (states(layers) + 2 * needed(layers))
    for there, decided in ((limit, "save"), (limit - 1, "recompute")):
        monkeypatch.setattr(products_fit, "device_memory", {kind: there}.__getitem__)
        assert products_fit.saved_or_not(layers, TRAINING, ALONE) == decided


def test_the_log_says_what_was_decided_and_how_to_decide_otherwise(layers, caplog):
    with caplog.at_level(logging.INFO):
        products_fit.saved_or_not(layers, TRAINING, ALONE, 2**40)
        products_fit.saved_or_not(layers, TRAINING, ALONE, 0)
    keeps, again = caplog.messages
    assert "keeps what the experts multiplied: " in keeps
    assert 'experts = "save"' not in keeps
    assert "computes again what the experts multiplied: " in again
    assert "of the 0.00 MiB that weights, gradients and optimizer states leave; to keep" in again


@pytest.mark.parametrize("asked", ["save", "recompute"])
def test_whoever_has_said_it_is_not_asked(monkeypatch, asked):
    monkeypatch.setattr(products_fit, "saved_or_not", None)
    policy = SelectiveACKeepingProducts.Config(experts=asked)
    found = products_kept(lambda model, ac_config: ac_config)(nn.Module(), ac_config=policy)
    assert found.experts == asked


def test_the_hosts_own_policy_is_decided_too(layers):
    kept = products_kept(lambda model, ac_config, **_: ac_config)
    found = kept(layers, ac_config=SelectiveAC.Config(), training=TRAINING, parallelism=ALONE)
    assert found.experts == "save", "this machine has more than this layer needs"


def test_one_rank_without_room_decides_for_all(monkeypatch):
    """Otherwise some would repeat collectives that the others do not wait in."""
    votes = []

    def all_reduce(tensor, op):
        votes.append((int(tensor), op))
        tensor.fill_(0)

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    assert products_fit._on_all_ranks(True) is False
    assert votes == [(1, dist.ReduceOp.MIN)]


def test_another_machine_is_described_with_the_products_kept(monkeypatch, layers):
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_backend", lambda: "fake")
    assert products_fit.saved_or_not(layers, TRAINING, ALONE, 0) == "save"
