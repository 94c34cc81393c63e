"""Balance losses: values and gradients against the formulas written out, padding, ranks, injection.

The invariances hold for the weights that a binding gives to groups: a group's loss is divided by
the groups of the whole training step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from routing_cases import LOSSES, MASKS, Case, make_case, of_groups, over_runs, written_groups
from torch import Tensor

from ezpz_moe.routing import losses
from ezpz_moe.routing.balance import inject

SIZES = {
    "usual": (3, 7, 5, 2),
    "one_token": (1, 1, 4, 2),
    "one_expert": (2, 3, 1, 1),
    "all_chosen": (2, 5, 4, 4),
    "long": (2, 300, 16, 4),
}

over_losses = pytest.mark.parametrize("name", LOSSES)
over_scopes = pytest.mark.parametrize("by_sequence", [True, False], ids=["sequence", "batch"])


def gradient(loss: Tensor, leaves: tuple[Tensor, Tensor]) -> Tensor:
    """That of the one leaf, scores or logits, which the loss depends on."""
    scores, logits = torch.autograd.grad(loss, leaves, materialize_grads=True)
    return scores + logits


# Values and gradients -----------------------------------------------------------------------------


@over_losses
@over_scopes
@pytest.mark.parametrize("sigmoid", [False, True], ids=["softmax", "sigmoid"])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES.keys())
def test_a_loss_and_its_gradient_are_those_written_out(
    name: str, by_sequence: bool, sigmoid: bool, mask: str, size: tuple[int, ...]
) -> None:
    case = make_case(*size, mask=mask, sigmoid=sigmoid)
    leaves = case.leaves()
    loss_G = of_groups(leaves, case, by_sequence=by_sequence)[name]
    found_GNE = losses.in_groups(gradient(loss_G.sum(), leaves), by_sequence=by_sequence)
    groups = [each[name] for each in written_groups(case, by_sequence=by_sequence)]
    assert loss_G.dtype == torch.float32
    assert loss_G.shape == (len(groups),)
    for loss, found_NE, written in zip(loss_G.tolist(), found_GNE, groups, strict=True):
        assert abs(loss - written.loss) <= written.loss_bound
        error_NE = (found_NE.double() - torch.tensor(written.gradient).double()).abs()
        assert bool((error_NE <= torch.tensor(written.gradient_bound).double()).all())


@over_losses
@over_scopes
def test_in_float64_a_loss_stays_so_and_passes_gradcheck(name: str, by_sequence: bool) -> None:
    case = make_case(2, 4, 5, 2)
    case = Case(
        case.scores_BLE.nan_to_num(), case.logits_BLE.nan_to_num(), case.ids_BLK, case.mask_BL
    )
    leaves = case.leaves(torch.float64)

    def loss(*leaves: Tensor) -> Tensor:
        return of_groups(leaves, case, by_sequence=by_sequence)[name]

    assert loss(*leaves).dtype == torch.float64
    assert torch.autograd.gradcheck(loss, leaves)


@over_losses
def test_bfloat16_is_computed_in_float32(name: str) -> None:
    case = make_case(2, 6, 5, 2)
    narrow = tuple(leaf.bfloat16() for leaf in case.leaves())
    wide = tuple(leaf.float() for leaf in narrow)
    losses_of = partial(of_groups, case=case, by_sequence=True)
    assert torch.equal(losses_of(narrow)[name], losses_of(wide)[name])


# What a balance loss is for -----------------------------------------------------------------------


def routed_to(favourites: list[int], E: int, top_k: int, *, pull: float) -> tuple[Tensor, Case]:
    """Logits that pull token t to expert favourites[t], as a leaf, and the case that they make."""
    logits_BLE = torch.zeros(1, len(favourites), E, dtype=torch.float64)
    for token, expert in enumerate(favourites):
        for rank in range(top_k):
            logits_BLE[0, token, (expert + rank) % E] = pull * (1 - rank / 10)
    logits_BLE.requires_grad_()
    scores_BLE = logits_BLE.softmax(-1)
    ids_BLK = scores_BLE.topk(top_k, dim=-1).indices
    return logits_BLE, Case(scores_BLE, logits_BLE, ids_BLK, torch.ones(1, len(favourites)).bool())


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("name", ["switch", "mse"])
def test_balanced_and_collapsed_routing_differ_in_value_and_gradient(name: str, top_k: int) -> None:
    """A loss of the chosen experts' scores alone has no gradient with one expert per token."""
    E = 4
    found = {}
    for routing, favourites in {"even": [0, 1, 2, 3], "collapsed": [0, 0, 0, 0]}.items():
        logits_BLE, case = routed_to(favourites, E, top_k, pull=2.0)
        leaves = (case.scores_BLE, case.logits_BLE)
        loss = of_groups(leaves, case, by_sequence=True)[name].sum()
        found[routing] = loss.item(), torch.autograd.grad(loss, logits_BLE)[0][0]
    even, collapsed = found["even"], found["collapsed"]
    assert even[0] == pytest.approx({"switch": 1, "mse": 0}[name], abs=1e-7)  # f has float32
    assert even[1].abs().max() <= 1e-7
    p = torch.tensor([2.0 * (1 - rank / 10) if rank < top_k else 0 for rank in range(E)]).softmax(0)
    expected = {
        "switch": E / top_k * p[:top_k].sum().item(),
        "mse": (p - 1 / E).square().mean().item(),
    }
    assert collapsed[0] == pytest.approx(expected[name], rel=1e-6)
    chosen, others = collapsed[1][:, :top_k], collapsed[1][:, top_k:]
    assert chosen.sum() > 0.01  # descent makes the favourites less likely,
    assert others.max() < 0  # and every other expert more
    assert torch.allclose(chosen.sum(-1), -others.sum(-1))


def test_one_expert_for_everything_has_the_switch_loss_E() -> None:
    for E in (2, 16):
        f_GE = torch.eye(E)[:1]
        assert losses.switch_loss(f_GE, f_GE).tolist() == [E]


def test_the_switch_loss_does_not_differentiate_the_choice() -> None:
    f_GE, P_GE = torch.rand(2, 1, 4).requires_grad_()
    loss = losses.switch_loss(f_GE, P_GE).sum()
    assert torch.autograd.grad(loss, f_GE, allow_unused=True)[0] is None


def test_the_z_loss_tells_small_logits_from_large_ones() -> None:
    """A factor on the probabilities leaves the balance losses alone; here it is what counts."""
    logits_GNE = torch.zeros(1, 3, 4, dtype=torch.float64)
    mask_GN = torch.ones(1, 3).bool()
    n_G = losses.tokens_in_group(mask_GN)
    small, large = (losses.z_loss(logits_GNE + up, mask_GN, n_G).item() for up in (0.0, 9.0))
    assert small == pytest.approx(math.log(4) ** 2)
    assert large == pytest.approx((9 + math.log(4)) ** 2)


def test_the_share_of_zero_computation_experts_is_spread_over_them() -> None:
    f_GE = torch.tensor([[0.5, 0.1, 0.4, 0.0], [0.25, 0.25, 0.1, 0.4]])
    merged_GE = losses.merged_null_share(f_GE, experts=2)
    expected_GE = torch.tensor([[0.5, 0.1, 0.2, 0.2], [0.25, 0.25, 0.25, 0.25]])
    torch.testing.assert_close(merged_GE, expected_GE, rtol=1e-6, atol=0)
    assert torch.equal(losses.merged_null_share(f_GE, experts=4), f_GE)


# Padding ------------------------------------------------------------------------------------------


@over_losses
@over_scopes
def test_padding_changes_nothing_and_gets_no_gradient(name: str, by_sequence: bool) -> None:
    """NaN there reaches neither value nor gradient, bit by bit."""
    case = make_case(3, 6, 5, 2)
    padding_BL1 = ~case.mask_BL.unsqueeze(-1)
    other = Case(
        case.scores_BLE.masked_fill(padding_BL1, 0.7),
        case.logits_BLE.masked_fill(padding_BL1, -3.0),
        torch.where(padding_BL1, torch.tensor([3, 0]), case.ids_BLK),
        case.mask_BL,
    )
    of_case, of_other = (
        (
            loss_G := of_groups(leaves, each, by_sequence=by_sequence)[name],
            gradient(loss_G.sum(), leaves),
        )
        for each in (case, other)
        for leaves in [each.leaves()]
    )
    assert all(torch.equal(a, b) for a, b in zip(of_case, of_other, strict=True))
    assert not of_case[1][~case.mask_BL].any()
    assert bool(of_case[1][case.mask_BL].any())


@over_losses
def test_a_group_without_tokens_has_no_loss(name: str) -> None:
    case = make_case(3, 4, 5, 2, mask="a_sequence_padded")
    loss_G = of_groups(case.leaves(), case, by_sequence=True)[name]
    assert loss_G[-1] == 0
    assert bool((loss_G[:-1] > 0).all())


# Ranks and microbatches ---------------------------------------------------------------------------


def over_ranks(parts: list[Case], name: str, *, by_sequence: bool) -> list[tuple[Tensor, Tensor]]:
    """Loss_G and gradient on each of the ranks that have a part of the group's tokens.

    What is shared is recorded on every rank, and added in a second pass.
    """
    recorded: list[list[Tensor]] = []

    def record(addend: Tensor) -> Tensor:
        recorded[-1].append(addend.detach())
        return addend

    for part in parts:
        recorded.append([])
        of_groups(part.leaves(torch.float64), part, by_sequence=by_sequence, share=record)
    found = []
    for rank, part in enumerate(parts):
        calls = iter(range(len(recorded[rank])))

        def share(addend: Tensor, rank: int = rank, calls: Callable = calls) -> Tensor:
            call = next(calls)
            return addend + sum(r[call] for n, r in enumerate(recorded) if n != rank)

        leaves = part.leaves(torch.float64)
        loss_G = of_groups(leaves, part, by_sequence=by_sequence, share=share)[name]
        found.append((loss_G, gradient(loss_G.sum(), leaves)))
    return found


@over_losses
@over_scopes
@pytest.mark.parametrize("padded_from", [9, 4], ids=["tokens_on_both", "padding_alone_on_one"])
def test_gradients_of_the_ranks_add_up_to_those_of_the_whole_group(
    name: str, by_sequence: bool, padded_from: int
) -> None:
    whole = make_case(2, 9, 5, 2)
    whole.mask_BL[:, padded_from:] = False
    places = (slice(None, 4), slice(4, None))
    parts = [
        Case(*(getattr(whole, field)[:, place] for field in Case.__dataclass_fields__))
        for place in places
    ]
    leaves = whole.leaves(torch.float64)
    loss_G = of_groups(leaves, whole, by_sequence=by_sequence)[name]
    expected = gradient(loss_G.sum(), leaves)
    for (found_G, found), place in zip(
        over_ranks(parts, name, by_sequence=by_sequence), places, strict=True
    ):
        torch.testing.assert_close(found_G, loss_G, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(found, expected[:, place], rtol=1e-12, atol=1e-14)


def step_gradient(microbatches: list[Case], name: str, scope: str, *, ranks: int = 1) -> Tensor:
    """The gradient of a training step of ``ranks`` x microbatches, in the order of the sequences.

    A group's weight is 1 / the groups of the step: sequences, or microbatches of each rank, or
    (global) microbatches of all ranks together.
    """
    steps = len(microbatches) // ranks
    of_each: dict[int, Tensor] = {}
    for step in range(steps):
        own = [rank * steps + step for rank in range(ranks)]
        if scope == "global":
            found = over_ranks([microbatches[i] for i in own], name, by_sequence=False)
            of_each |= {i: each / steps for i, (_, each) in zip(own, found, strict=True)}
            continue
        for i in own:
            case, by_sequence = microbatches[i], scope == "sequence"
            leaves = case.leaves(torch.float64)
            loss_G = of_groups(leaves, case, by_sequence=by_sequence)[name]
            groups = sum(len(m.mask_BL) for m in microbatches) if by_sequence else len(microbatches)
            of_each[i] = gradient(loss_G.sum(), leaves) / groups
    return torch.cat([of_each[i] for i in range(len(microbatches))])


def split(case: Case, parts: int) -> list[Case]:
    rows = len(case.mask_BL) // parts
    return [case.rows(slice(i * rows, (i + 1) * rows)) for i in range(parts)]


same = partial(torch.testing.assert_close, rtol=1e-12, atol=1e-15)


@over_losses
@pytest.mark.parametrize("mask", MASKS)
def test_by_sequence_microbatches_and_ranks_do_not_matter(name: str, mask: str) -> None:
    case = make_case(8, 5, 4, 2, mask=mask)
    whole = step_gradient([case], name, "sequence")
    same(step_gradient(split(case, 4), name, "sequence"), whole)
    same(step_gradient(split(case, 4), name, "sequence", ranks=2), whole)


@over_losses
@pytest.mark.parametrize("mask", MASKS)
def test_by_batch_ranks_do_not_matter_but_microbatches_do(name: str, mask: str) -> None:
    """A microbatch is a group. Only a mean over equally many tokens is the same for any groups."""
    case = make_case(8, 5, 4, 2, mask=mask)
    four = step_gradient(split(case, 4), name, "batch")
    same(step_gradient(split(case, 4), name, "batch", ranks=2), four)
    whole = step_gradient([case], name, "batch")
    if mask == "all_padded" or (name == "z" and mask == "none_padded"):
        same(four, whole)
    else:
        assert not torch.allclose(four, whole, rtol=1e-3, atol=1e-6)


@over_losses
@pytest.mark.parametrize("mask", MASKS)
def test_globally_the_ranks_of_a_microbatch_are_one_group(name: str, mask: str) -> None:
    case = make_case(8, 5, 4, 2, mask=mask)
    same(
        step_gradient(split(case, 2), name, "global", ranks=2), step_gradient([case], name, "batch")
    )
    first_of_each, second_of_each = ([0, 1, 4, 5], [2, 3, 6, 7])
    merged = [case.rows(rows) for rows in (first_of_each, second_of_each)]
    one_rank = step_gradient(merged, name, "batch")
    two_ranks = step_gradient(split(case, 4), name, "global", ranks=2)
    same(two_ranks[[*first_of_each, *second_of_each]], one_rank)


# Injection ----------------------------------------------------------------------------------------


def injected(x: Tensor) -> Tensor:
    """3 x, which also carries the gradient 2 x of its squares' sum."""
    return inject(3 * x, x.square().sum())


def test_injection_leaves_every_bit_of_the_carrier() -> None:
    carrier = torch.tensor([1.5, -0.0, torch.nan, torch.inf, 1e-45], requires_grad=True)
    out = inject(carrier, carrier[0].square())
    assert torch.equal(out.view(torch.int32), carrier.view(torch.int32))


@over_runs
def test_an_injected_loss_is_differentiated_once_per_forward(run: Callable) -> None:
    """With the following loss (y * weight).sum(), whose weight must not reach the injected one."""
    torch._dynamo.reset()
    function = run(injected)
    x = torch.tensor([1.0, -2.0, 4.0], requires_grad=True)
    weight = torch.tensor([100.0, 10.0, 1.0])
    for forwards in (1, 2):  # gradient accumulation
        y = function(x)
        assert torch.equal(y, 3 * x)
        (y * weight).sum().backward()
        assert torch.equal(x.grad, forwards * (3 * weight + 2 * x.detach()))


def test_the_loss_may_have_another_dtype_and_parameters_of_its_own() -> None:
    carrier = torch.ones(2, dtype=torch.bfloat16)  # of no parameter: a frozen trunk
    weight = torch.tensor(5.0, dtype=torch.float64, requires_grad=True)
    (inject(carrier, weight.square()).sum() * 7).backward()
    assert weight.grad == 10
    assert weight.grad.dtype == torch.float64
