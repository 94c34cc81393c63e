"""Which tensors of a checkpoint count experts, and taking some experts of all of them."""

from __future__ import annotations

import pytest
import torch

from ezpz_moe.errors import EzpzError
from ezpz_moe.tools.checkpoints.expert_rows import Dim, expert_rows, is_stack

INNER = "moe.routed_experts.inner_experts"
STATE = "optimizer.state"
# Layers 2 and 10, of 4 and 3 experts, each with two zero-computation ones. 4 and 3 are sizes of
# other dimensions too.
MODEL = {
    "tok_embeddings.weight": (4, 3),
    "layers.0.feed_forward.w1.weight": (4, 4),
    "layers.10.attention.wq.weight": (3, 3),
    f"layers.10.{INNER}.w1_EFD": (3, 4, 4),
    f"layers.10.{INNER}.b1_EF": (3, 4),
    "layers.10.moe.router.gate.weight": (5, 4),
    "layers.10.moe.router.gate.scale_E": (5,),
    "layers.10.moe.router.gate.residual.weight": (5, 6),
    "layers.10.moe.shared_experts.w1.weight": (3, 4),
    "layers.10.moe.routed_experts.constant_experts.vectors_CD": (3, 4),
    "layers.10.moe.routed_experts.descend.weight": (3, 4),
    f"layers.2.{INNER}.w1_EFD": (4, 4, 4),
    "layers.2.moe.router.gate.bias": (6,),
    "layers.2.moe.expert_bias_E": (6,),
}
NONE = {
    "tok_embeddings.weight",
    "layers.0.feed_forward.w1.weight",
    "layers.10.attention.wq.weight",
    "layers.10.moe.shared_experts.w1.weight",
    "layers.10.moe.routed_experts.constant_experts.vectors_CD",
    "layers.10.moe.routed_experts.descend.weight",
}
OPTIMIZER = {
    f"{STATE}.{name}.{kept}": size if kept == "exp_avg" else ()
    for name, size in MODEL.items()
    for kept in ("step", "exp_avg")
    if "expert_bias" not in name
}


def drawn(sizes):
    return {name: torch.arange(torch.Size(s).numel()).view(s) for name, s in sizes.items()}


def test_what_counts_experts() -> None:
    rows = expert_rows({**MODEL, **OPTIMIZER, "dataloader.dp_rank_0": (4,)})
    # By number: as text, layer 10 would be before layer 2.
    assert list(rows.num_experts.items()) == [("layers.2", 4), ("layers.10", 3)]
    of_2, of_10 = (Dim(0, "layers.2"),), (Dim(0, "layers.10"),)
    counted = {
        name: of_2 if name.startswith("layers.2.") else of_10 for name in MODEL.keys() - NONE
    }
    counted["layers.10.moe.router.gate.residual.weight"] = (*of_10, Dim(1, "layers.2"))
    moments = {
        f"{STATE}.{name}.exp_avg": d for name, d in counted.items() if "expert_bias" not in name
    }
    assert rows.dims == counted | moments


def test_no_map_takes_logits_of_layers_that_predict_further_tokens() -> None:
    further = {f"mtp_layers.5.{INNER}.w1_EFD": (4, 4, 4)}
    rows = expert_rows({**further, **MODEL})
    assert rows.dims["layers.10.moe.router.gate.residual.weight"][1].layer == "layers.2"


@pytest.mark.parametrize(
    "chosen", [{"layers.2": [3, 1]}, {"layers.2": [2, 3, 1, 0], "layers.10": [1, 2, 0]}]
)
def test_rows_in_the_order_that_is_asked_for(chosen) -> None:
    """A selection, and a permutation; what is behind the routed experts stays behind them."""
    sizes = MODEL | OPTIMIZER
    rows, tensors = expert_rows(sizes), drawn(sizes)
    taken = {name: rows.take(name, tensor, chosen) for name, tensor in tensors.items()}
    of_2, of_10 = chosen["layers.2"], chosen.get("layers.10", [0, 1, 2])
    for prefix, suffix in (("", ""), (f"{STATE}.", ".exp_avg")):

        def same(name, *index, prefix=prefix, suffix=suffix):
            name = f"{prefix}{name}{suffix}"
            wanted = tensors[name]
            for dim, of in enumerate(index):
                wanted = torch.stack([wanted.select(dim, one) for one in of], dim)
            torch.testing.assert_close(taken[name], wanted, rtol=0, atol=0)

        same(f"layers.2.{INNER}.w1_EFD", of_2)
        same("layers.2.moe.router.gate.bias", [*of_2, 4, 5])
        same(f"layers.10.{INNER}.b1_EF", of_10)
        same("layers.10.moe.router.gate.residual.weight", [*of_10, 3, 4], [*of_2, 4, 5])
        for name in NONE:
            same(name)


@pytest.mark.parametrize("index", [[0, 1], [2, 0, 1]])
def test_every_generation_has_its_names(index) -> None:
    old = "layers.1.moe"
    new = "layers.1.moe.routed_experts"
    for sizes in (
        {f"{old}.experts.w1": (3, 4, 4), f"{old}.expert_bias": (3,)},
        {f"{old}.experts.mlp1_weight": (3, 8, 4), f"{old}.experts.mlp2_bias": (3, 4)},
        {f"layers.1.{INNER}.mlp1_weight_EGD": (3, 8, 4), f"layers.1.{INNER}.mlp1_bias_EG": (3, 8)},
        {f"{new}.w13.weight": (3, 2, 4, 4), f"{new}.w2.bias": (3, 4), f"{new}.w13.bias": (3, 2, 4)},
    ):
        rows = expert_rows({**sizes, f"{old}.router.gate.weight": (3, 4)})
        assert rows.num_experts == {"layers.1": 3}
        for name, tensor in drawn(sizes).items():
            assert is_stack(name) == ("expert_bias" not in name)
            assert torch.equal(rows.take(name, tensor, {"layers.1": index}), tensor[index])


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        # As many rows as experts, and yet it may mean anything.
        ({"layers.2.moe.router.memory": (4, 4)}, "does not know"),
        ({"layers.2.moe.router.gate.residual.weight": (6, 5)}, "does not know"),
        ({"layers.2.moe.router.gate.weight": (3, 4)}, "does not fit the 4 experts"),
        ({f"layers.2.{INNER}.w3_EFD": (5, 4, 4)}, "does not fit"),
        ({f"{STATE}.layers.2.{INNER}.w1_EFD.row": (4, 4)}, "which of it is an expert's"),
    ],
)
def test_nothing_is_guessed(extra, said) -> None:
    with pytest.raises(EzpzError, match=said) as refused:
        expert_rows(MODEL | extra)
    assert str(refused.value).startswith(f"{next(iter(extra))}: ")
