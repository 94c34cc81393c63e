"""Scores averaged over similar earlier tokens: the formula, what sees what, costs, refusals.

Legend of the suffixes: :mod:`ezpz_moe.routing`.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from flavor_files import load
from router_cases import UPSTREAM, flat, moe_of, router_of, small_model, tokens
from routing_cases import U, over_runs
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ezpz_moe.config.similarity_schema import Similarity
from ezpz_moe.errors import EzpzError
from ezpz_moe.hosts.detect import host
from ezpz_moe.hosts.titan.similar import averaged_scores
from ezpz_moe.routing.similarity import averaged, documents_of
from ezpz_moe.tools.checkpoints.huggingface.routers import router_differences

B, L, D, E = 2, 21, 6, 5
SIZES = [(1, 2), (5, 64), (L, 2), (L, 7), (L, 8), (L, 20), (L, L), (L, 64)]
"""Tokens and windows: of one token, in one block, and in blocks that the last does not fill."""
TABLE = "[router.similarity]\nstrength = {}\nwindow = {}\n"


def positions(length: int) -> Tensor:
    """positions_BL: of one document in the first sequence, of documents of 9 in the second."""
    places_L = torch.arange(length)
    return torch.stack([places_L, places_L % 9])


def case(length: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(length)
    scores_BLE = torch.randn(B, length, E, generator=draw, dtype=torch.float64).softmax(-1)
    x_BLD = torch.randn(B, length, D, generator=draw, dtype=torch.float64)
    return tuple(each.to(dtype).requires_grad_() for each in (scores_BLE, x_BLD))


def cosine(x: list[float], other: list[float]) -> float:
    dot = math.fsum(a * b for a, b in zip(x, other, strict=True))
    return dot / math.hypot(*x) / math.hypot(*other)


def written(scores_BLE: Tensor, x_BLD: Tensor, places_BL: Tensor, of: Similarity) -> Tensor:
    """Token by token, in Python's floats."""
    found_BLE = torch.zeros_like(scores_BLE, dtype=torch.float64)
    for b, x_LD in enumerate(x_BLD.tolist()):
        for i, x in enumerate(x_LD):
            # Back to the document's beginning, but no further than the window.
            seen = range(max(i - int(places_BL[b, i]), i - of.window + 1), i + 1)
            cosines = [cosine(x, x_LD[j]) for j in seen]
            shares = [math.exp(each / of.temperature) for each in cosines]
            for e in range(E):
                of_e = scores_BLE[b, :, e].tolist()
                pairs = zip(shares, seen, strict=True)
                mean = math.fsum(share * of_e[j] for share, j in pairs) / math.fsum(shares)
                found_BLE[b, i, e] = (1 - of.strength) * of_e[i] + of.strength * mean
    return found_BLE


def dense(scores_BLE: Tensor, x_BLD: Tensor, documents_BL: Tensor, of: Similarity) -> Tensor:
    """With a matrix of all tokens with all: the plain way, whose error is the yardstick."""
    unit_BLD = x_BLD / x_BLD.norm(dim=-1, keepdim=True)
    back_LL = torch.arange(x_BLD.shape[1]).unsqueeze(-1) - torch.arange(x_BLD.shape[1])
    seen_BLL = documents_BL.unsqueeze(-1) == documents_BL.unsqueeze(-2)
    seen_BLL = seen_BLL & (back_LL >= 0) & (back_LL < of.window)
    logits_BLL = unit_BLD @ unit_BLD.mT / of.temperature
    shares_BLL = logits_BLL.masked_fill(~seen_BLL, -torch.inf).softmax(-1)
    return (1 - of.strength) * scores_BLE + of.strength * shares_BLL @ scores_BLE


@pytest.mark.parametrize(("length", "window"), SIZES)
@pytest.mark.parametrize("strength", [0.3, 1.0])
def test_scores_are_those_written_out(length: int, window: int, strength: float) -> None:
    """A cosine of D products of normalized elements is off by (2D + 6) u, its share by twice that.

    Over the temperature; the sums of the window's positive shares and scores add 2W + 8 roundings.
    """
    of = Similarity(strength=strength, window=window, temperature=0.5)
    scores_BLE, x_BLD = case(length, torch.float32)
    found_BLE = averaged(scores_BLE, x_BLD, documents_of(positions(length)), of)
    assert found_BLE.dtype == torch.float32
    relative = (2 * (2 * D + 7) / of.temperature + 2 * min(window, length) + 8) * U
    expected_BLE = written(scores_BLE.detach(), x_BLD.detach(), positions(length), of)
    assert ((found_BLE - expected_BLE).abs() <= relative * expected_BLE).all()


def gradients(function, inputs: tuple[Tensor, Tensor], documents_BL: Tensor, of: Similarity):
    found_BLE = function(*inputs, documents_BL, of)
    draw = torch.Generator().manual_seed(3)
    grad_BLE = torch.randn(found_BLE.shape, generator=draw, dtype=torch.float64).to(found_BLE)
    return torch.autograd.grad(found_BLE, inputs, grad_BLE)


def off(found: Tensor, true: Tensor) -> float:
    return ((found.double() - true).norm() / true.norm()).item()


@pytest.mark.parametrize(("length", "window"), SIZES[2:])
def test_gradients_are_those_of_the_plain_formula(length: int, window: int) -> None:
    """In float64 to the order of sums, of at most 2 L D terms; in float32 as well as the plain."""
    of = Similarity(strength=0.7, window=window)
    documents_BL = documents_of(positions(length))
    true = gradients(dense, case(length), documents_BL, of)
    ours = gradients(averaged, case(length), documents_BL, of)
    for found, expected in zip(ours, true, strict=True):
        assert off(found, expected) <= 2 * length * D * 2.0**-53 / of.temperature
    in_float32 = case(length, torch.float32)
    plain = gradients(dense, in_float32, documents_BL, of)
    ours = gradients(averaged, in_float32, documents_BL, of)
    for found, yardstick, expected in zip(ours, plain, true, strict=True):
        assert off(found, expected) <= 2 * off(yardstick, expected) + 1e-6


@over_runs
def test_it_is_the_same_compiled_and_computed_again(run) -> None:
    of = Similarity(strength=0.7, window=8)
    found, expected = [], []
    for function, gradients_of in ((run(averaged), found), (averaged, expected)):
        inputs = case(L)
        function(*inputs, documents_of(positions(L)), of).square().sum().backward()
        gradients_of += [each.grad for each in inputs]
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


def test_bfloat16_inputs_are_compared_in_float32() -> None:
    """Also under an autocast, as a trainer without FSDP has it."""
    of = Similarity(strength=0.5, window=8)
    scores_BLE, x_BLD = (each.detach() for each in case(L, torch.float32))
    x_BLD, documents_BL = x_BLD.bfloat16(), documents_of(positions(L))
    expected_BLE = dense(scores_BLE.double(), x_BLD.double(), documents_BL, of)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found_BLE = averaged(scores_BLE, x_BLD, documents_BL, of)
    assert off(found_BLE, expected_BLE) <= (2 * (2 * D + 7) / of.temperature + 2 * 8 + 8) * U


def test_a_token_of_zeros_has_finite_gradients() -> None:
    scores_BLE, x_BLD = case(L)
    zeros_BLD = torch.zeros_like(x_BLD, requires_grad=True)
    of = Similarity(strength=1.0, window=4)
    found = gradients(averaged, (scores_BLE, zeros_BLD), documents_of(positions(L)), of)
    assert all(each.isfinite().all() for each in found)


# What sees what -----------------------------------------------------------------------------------


@pytest.mark.parametrize("t", [0, 6, 7, 8, L - 1])
def test_a_token_changes_what_follows_it_within_its_window_and_document(t: int) -> None:
    of = Similarity(strength=1.0, window=7)
    inputs = [each.detach() for each in case(L)]
    documents_BL = documents_of(positions(L))
    before_BLE = averaged(*inputs, documents_BL, of)
    for each in inputs:
        each[1, t] = each[1, t].flip(-1)
    is_changed_BL = (averaged(*inputs, documents_BL, of) != before_BLE).any(-1)
    expected_BL = torch.zeros(B, L, dtype=torch.bool)
    expected_BL[1, t : min(t + 7, t - t % 9 + 9)] = True
    assert torch.equal(is_changed_BL, expected_BL)


def logits(model, tokens_L: Tensor) -> Tensor:
    part = host().analysis()
    model.is_masked = False
    with torch.no_grad():
        return part.forward(model.eval(), tokens_L, torch.arange(len(tokens_L)))


@pytest.mark.parametrize("t", [1, 8, 20])
def test_a_model_says_nothing_before_the_token_that_differs(tmp_path: Path, t: int) -> None:
    """And continues a text as a pass over it does: ``generate`` computes every prefix anew."""
    model = small_model(tmp_path, TABLE.format(0.9, 8))
    draw = torch.Generator().manual_seed(0)
    tokens_L = torch.randint(2000, (24,), generator=draw)
    whole_LV = logits(model, tokens_L)
    other_L = tokens_L.clone()
    other_L[t] += 1
    other_LV = logits(model, other_L)
    assert torch.equal(other_LV[:t], whole_LV[:t])
    assert not torch.equal(other_LV[t:], whole_LV[t:])
    torch.testing.assert_close(logits(model, tokens_L[:t]), whole_LV[:t], rtol=1e-3, atol=1e-4)


def test_strength_0_has_the_hosts_bits(tmp_path: Path) -> None:
    tokens_L = torch.arange(24)
    plain = small_model(tmp_path, "")
    off = small_model(tmp_path, "[router.similarity]\nstrength = 0.0\n")
    assert torch.equal(logits(plain, tokens_L), logits(off, tokens_L))
    averaging = small_model(tmp_path, TABLE.format(1.0, 8))
    assert averaging.state_dict().keys() == plain.state_dict().keys()
    assert not torch.equal(logits(averaging, tokens_L), logits(plain, tokens_L))


@pytest.mark.parametrize("base", ["flavor", *UPSTREAM])
def test_a_models_router_averages_within_the_documents_of_its_positions(
    tmp_path: Path, base: str
) -> None:
    """Then it adds the bias; a token's weights are its experts' averaged scores."""
    keys = {} if base == "flavor" else {"base": UPSTREAM[base]}
    model = small_model(tmp_path, TABLE.format(0.8, 7), **keys).eval()
    moe, seen = moe_of(model), {}
    moe.expert_bias_E = torch.linspace(0, 0.05, moe.router.num_experts)
    moe.router.register_forward_hook(lambda _, x, out: seen.update(x=x[0], out=out))
    moe.router.gate.register_forward_hook(lambda _, __, out: seen.update(logits=out))
    places_BL = flat(positions(L))
    with torch.no_grad():
        model(flat(torch.arange(B * L).view(B, L)), positions=places_BL)
    act = {"softmax": lambda x: x.softmax(-1), "sigmoid": torch.sigmoid}[moe.router.score_func]
    own_BLE = act(seen["logits"].float()).view(B, L, -1)
    of = Similarity(strength=0.8, window=7)
    x_BLD = seen["x"].view(B, L, -1).float()
    expected_BLE = dense(own_BLE, x_BLD, documents_of(places_BL.view(B, L)), of).flatten(0, 1)
    weights_TK, ids_TK, scores_TE = (each.view(B * L, -1) for each in seen["out"])
    torch.testing.assert_close(scores_TE, expected_BLE, rtol=1e-4, atol=1e-6)
    chosen_TK = (scores_TE + moe.expert_bias_E).topk(moe.router.top_k, -1).indices
    assert torch.equal(chosen_TK.sort(-1).values, ids_TK.sort(-1).values)
    kept_TK = scores_TE.gather(-1, ids_TK)
    if moe.router.route_norm:
        kept_TK = kept_TK / kept_TK.sum(-1, keepdim=True)
    torch.testing.assert_close(weights_TK, kept_TK * moe.router.route_scale)


def test_a_router_by_itself_says_what_it_lacks(tmp_path: Path) -> None:
    router = router_of(small_model(tmp_path, TABLE.format(0.5, 8)))
    x_BLD = flat(tokens(256))
    with pytest.raises(ValueError, match="has not been told of its tokens' documents"):
        router(x_BLD)
    router.positions = None
    router(x_BLD)
    with pytest.raises(ValueError, match="has not been told"):  # those of one pass alone
        router(x_BLD)
    router.positions = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"needs a position for each of .* tokens, not \(2, 3\)"):
        router(x_BLD)


def test_folded_sequences_are_told_apart_by_their_positions() -> None:
    of = Similarity(strength=0.5, window=8)
    scores_BLE, x_BLD = (each.detach() for each in case(L))
    folded = (each.flatten(0, 1) for each in (scores_BLE, x_BLD, positions(L)))
    expected_BLE = averaged_scores(scores_BLE, x_BLD, positions(L), of)
    torch.testing.assert_close(averaged_scores(*folded, of), expected_BLE.flatten(0, 1))


# Costs --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("length", "window"), [(32, 8), (40, 16), (8, 64)])
def test_flops_are_hand_sums_and_what_torch_counts(
    tmp_path: Path, length: int, window: int
) -> None:
    """Blocks of w tokens with themselves, and all but the first with the one before."""
    plain = load(tmp_path, 'n_layers = 2\nattention = "sdpa"', name="plain")
    own = load(tmp_path, TABLE.format(0.5, window), name="similar", inherits="plain")
    anatomies = [host().anatomy().anatomy(each, length) for each in (own, plain)]
    router, before = (each.costs["router"] for each in anatomies)
    pairs = {(32, 8): 7 * 8 * 8, (40, 16): 5 * 16 * 16, (8, 64): 8 * 8}[length, window]
    dim, experts = plain.dimensions.dim, plain.dimensions.num_experts
    found = 2 * pairs * (dim + experts)
    assert (router.forward - before.forward) * length == pytest.approx(found, rel=1e-12)
    assert router.parameters == before.parameters
    scores_1LE, x_1LD = (
        torch.rand(1, length, width, requires_grad=True) for width in (experts, dim)
    )
    documents_1L = torch.zeros(1, length, dtype=torch.int64)
    forward, backward = FlopCounterMode(display=False), FlopCounterMode(display=False)
    with forward:
        out_1LE = averaged(scores_1LE, x_1LD, documents_1L, own.router.similarity)
    with backward:
        out_1LE.sum().backward()
    assert forward.get_total_flops() == found
    assert backward.get_total_flops() == 2 * found


# What may be said ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("strength = 1.5", "router.similarity.strength = 1.5: should be less than or equal to 1."),
        ("strength = 0.5\nwindow = 1", "router.similarity.window = 1: should be greater than"),
        ("strength = 0.5\ntemperature = 0", "router.similarity.temperature = 0: should be greater"),
        ("strenght = 0.5", "unknown key 'router.similarity.strenght'. Did you mean 'strength'?"),
        ("window = 16", "[router.similarity] window = 16 without strength: nothing is averaged. "),
        (
            'strength = 0.5\n[router]\nrouting = "sinkhorn"',
            '[router] similarity.strength = 0.5 needs routing = "topk", not "sinkhorn"',
        ),
        (
            'strength = 0.5\n[router]\nrouting = "balanced"',
            '[router] similarity.strength = 0.5 needs routing = "topk", not "balanced"',
        ),
    ],
)
def test_mistakes_name_the_file_the_key_and_a_remedy(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(EzpzError) as refused:
        load(tmp_path, f"[router.similarity]\n{text}")
    assert str(refused.value).startswith(f"{tmp_path / 'mine.toml'}: ")
    assert said in str(refused.value)


def test_a_number_is_no_table_and_a_misplaced_key_finds_its_own(tmp_path: Path) -> None:
    with pytest.raises(EzpzError, match=r"router\.similarity = 0\.5: should be a table"):
        load(tmp_path, "[router]\nsimilarity = 0.5")
    with pytest.raises(EzpzError, match=r"belongs in \[router\.similarity\]"):
        load(tmp_path, "[router]\nstrength = 0.5")


def test_it_is_inherited_key_by_key_and_turned_off_by_0(tmp_path: Path) -> None:
    load(tmp_path, TABLE.format(0.5, 16), name="parent")
    child = load(tmp_path, "[router]\nsimilarity = { strength = 0.25 }", inherits="parent")
    assert child.router.similarity == Similarity(strength=0.25, window=16)
    off = load(tmp_path, TABLE.format(0.0, 64), inherits="parent")
    assert off.router.similarity == Similarity()


def test_no_class_of_transformers_computes_it(tmp_path: Path) -> None:
    assert list(router_differences(load(tmp_path, TABLE.format(0.5, 16)), 3)) == [
        "router.similarity.strength = 0.5"
    ]
