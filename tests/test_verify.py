"""``ezpz_moe.tools.verify``: usable backends pass, and every way to be wrong has its verdict."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
from contract_cases import ON_THE_CPU

from ezpz_moe.compute import Backend, for_loop, get_backend
from ezpz_moe.compute.backends.for_loop import ForLoop
from ezpz_moe.errors import EzpzError
from ezpz_moe.tools import verify
from ezpz_moe.tools.verify import (
    Check,
    compare,
    cosine,
    plan,
    reasons_against,
    verdict,
    worst,
    worst_of_each,
)

TAIL = Check("for_loop", "cpu", "float32", "ffn", "tail", "swiglu", False)
LEFT_OUT = replace(TAIL, entry="routed", routing="left out")


# Every backend in bfloat16 is in tests/test_contract_activations.py with every activation.
@pytest.mark.parametrize(
    "check",
    [
        each
        for each in plan("cpu", ["float32", "bfloat16"])
        if each.ffn == "swiglu" or (each.dtype, each.backend) == ("float32", "for_loop")
    ],
    ids=str,
)
def test_our_backends_pass(check: Check) -> None:
    rows = compare(check)
    gate = {"w3"} if check.activation not in ("relu2", "gelu") else set()
    biases = {"b1", "b2"} | {each.replace("w", "b") for each in gate} if check.biased else set()
    scores = {"scores"} if check.entry == "routed" else set()
    tensors = {f"grad_{name}" for name in {"w1", "w2", "x"} | gate | biases | scores}
    tensors.add("y" if check.entry == "ffn" else "out")
    assert {row.tensor: row.verdict for row in rows} == dict.fromkeys(tensors, "ok")
    assert all(row.cosine > 0.9999 for row in rows)


def test_the_plan_covers_every_usable_backend_and_routing() -> None:
    checks = plan("cpu", ["bfloat16", "float64"])
    assert {check.backend for check in checks} == set(ON_THE_CPU)
    for dtype in ("bfloat16", "float64"):
        usable = [name for name, against in reasons_against("cpu", dtype).items() if not against]
        for entry, routings in (("ffn", 5), ("routed", 3)):
            of_entry = [each for each in checks if (each.dtype, each.entry) == (dtype, entry)]
            # Five activations besides, and biases with six.
            assert len(of_entry) == (routings + 11) * len(usable)


def test_every_ffn_is_checked_with_every_backend_once() -> None:
    checks = plan("cpu", ["float32"])
    assert len(set(checks)) == len(checks)
    kinds = {"swiglu", "geglu", "reglu", "clamped_swiglu", "relu2", "gelu"}
    for backend, entry in product(ON_THE_CPU, ("ffn", "routed")):
        found = {each.ffn for each in checks if (each.backend, each.entry) == (backend, entry)}
        assert found == kinds | {f"{each} with biases" for each in kinds}


def test_activations_that_are_named_meet_every_routing() -> None:
    checks = plan("cpu", ["float32"], ["relu2", "swiglu"])
    assert {each.activation for each in checks} == {"relu2", "swiglu"}
    assert len(set(checks)) == len(checks) == 8 * 2 * 2 * len(ON_THE_CPU)


def _drops_the_last_token(w1, w2, w3, x, counts):
    y = for_loop(w1, w2, w3, x, counts)
    kept = torch.ones_like(y)
    kept[counts.sum() - 1] = 0
    return y * kept


def _swaps_gate_and_up(w1, w2, w3, x, counts):
    return for_loop(w3, w2, w1, x, counts)


def _forgets_the_tail(w1, w2, w3, x, counts):
    y = for_loop(w1, w2, w3, x, counts).clone()
    y[counts.sum() :] = 1
    return y


def _gives_nan(w1, w2, w3, x, counts):
    return for_loop(w1, w2, w3, x, counts) * torch.nan


def _widens(w1, w2, w3, x, counts):
    return for_loop(w1, w2, w3, x, counts).double()


def _ignores_a_weight(w1, w2, w3, x, counts):
    return for_loop(w1, w2.detach(), w3, x, counts)


def _feeds_empty_experts(w1, w2, w3, x, counts):
    return for_loop(w1, w2, w3, x, counts) + (w2 - w2.detach()).sum()


def _raises(w1, w2, w3, x, counts):
    raise RuntimeError("no such kernel\nsecond line")


def _asserts(w1, w2, w3, x, counts):
    raise AssertionError


@pytest.mark.parametrize(
    ("ffn", "tensor", "verdict"),
    [
        (_drops_the_last_token, "y", "beyond the bound"),
        (_swaps_gate_and_up, "grad_w1", "beyond the bound"),
        (_forgets_the_tail, "y", "tail rows are not zero"),
        (_gives_nan, "grad_x", "beyond the bound"),
        (_widens, "y", "is torch.float64"),
        (_ignores_a_weight, "grad_w2", "is None"),
        (_feeds_empty_experts, "grad_w2", "experts without tokens have a gradient"),
        (_raises, "y", "RuntimeError: no such kernel"),
        (_asserts, "y", "AssertionError"),
    ],
)
def test_a_wrong_backend_is_told(ffn, tensor: str, verdict: str, monkeypatch) -> None:
    monkeypatch.setattr(ForLoop, "ffn", staticmethod(ffn))
    rows = {row.tensor: row for row in compare(TAIL)}
    assert verdict in rows[tensor].verdict
    assert not rows[tensor].ok
    assert len(rows) == 5


def _forgets_the_scores(w1, w2, w3, x, scores, ids, counts, **rows):
    return routed(w1, w2, w3, x, torch.ones_like(scores) + 0 * scores, ids, counts, **rows)


def _rounds_the_output(*inputs, **rows):
    return routed(*inputs, **rows).bfloat16()


def _keeps_one_choice_more(*inputs, num_rows):
    return routed(*inputs, num_rows=num_rows) + 1e-9 * inputs[4].sum()


def _computes_tokens_without_experts(*inputs, **rows):
    return routed(*inputs, **rows) + 1e-9


def routed(*inputs, **rows):
    """for_loop's own, before a test replaces it."""
    return Backend.routed(get_backend("for_loop"), *inputs, **rows)


@pytest.mark.parametrize(
    ("wrong", "tensor", "verdict"),
    [
        (_forgets_the_scores, "grad_scores", "beyond the bound"),
        (_rounds_the_output, "out", "is torch.bfloat16"),
        (_keeps_one_choice_more, "grad_scores", "choices without rows have a gradient"),
        (_computes_tokens_without_experts, "out", "tokens without experts are not zero"),
    ],
)
def test_a_wrong_routed_layer_is_told(wrong, tensor: str, verdict: str, monkeypatch) -> None:
    monkeypatch.setattr(ForLoop, "routed", staticmethod(wrong))
    rows = {row.tensor: row for row in compare(LEFT_OUT)}
    assert verdict in rows[tensor].verdict
    assert not rows[tensor].ok
    assert len(rows) == 6


def test_a_figure_that_is_no_number_is_none(monkeypatch) -> None:
    monkeypatch.setattr(ForLoop, "ffn", staticmethod(_gives_nan))
    row = compare(TAIL)[0]
    assert (row.max_abs_error, row.relative_error, row.cosine) == (None, None, None)


def test_the_worst_row_is_the_failed_one() -> None:
    row = compare(TAIL)[0]
    near = replace(row, relative_error=0.9 * row.bound)
    failed = replace(row, relative_error=0.0, verdict="tail rows are not zero")
    assert worst([row, near]) is near
    assert worst([failed, near]) is failed


def test_the_table_has_the_worst_tensor_of_all_ffns_for_each_routing() -> None:
    row = compare(TAIL)[0]
    failed = replace(row, activation="gelu", biased=True, verdict="tail rows are not zero")
    elsewhere = replace(row, routing="balanced")
    assert worst_of_each([row, failed, elsewhere]) == [failed, elsewhere]


def test_a_backend_that_ignores_the_activation_is_told(monkeypatch) -> None:
    def ignores(*inputs, activation="swiglu", biases=None):
        return for_loop(*inputs, biases=biases)

    monkeypatch.setattr(ForLoop, "ffn", staticmethod(ignores))
    assert all(row.ok for row in compare(TAIL))
    assert not all(row.ok for row in compare(replace(TAIL, activation="geglu")))


def test_cosine_of_zeros() -> None:
    zero, one = torch.zeros(3), torch.tensor([0.0, 2.0, 0.0])
    assert cosine(zero, zero) == 1
    assert cosine(one, zero) == 0
    assert cosine(one, -one) == -1


@pytest.mark.parametrize(
    ("device", "parts"),
    [
        ("abacus", ["'abacus'", "cpu"]),
        ("meta", ["meta", "use cpu"]),
        ("hpu", ["no backend can run on hpu", "for_loop", "batched_mm_padded", "hpu device"]),
    ],
)
def test_a_device_that_cannot_be_verified(device: str, parts: list[str]) -> None:
    with pytest.raises(EzpzError) as caught:
        plan(device, ["float32"])
    assert all(part in str(caught.value) for part in parts)


def test_a_package_that_does_not_load_concerns_its_own_backend(monkeypatch) -> None:
    def load(name: str):
        if name == "for_loop":
            raise EzpzError("cannot be loaded")
        return get_backend(name)

    monkeypatch.setattr(verify, "get_backend", load)
    reasons = reasons_against("cpu", "float32")
    assert reasons["for_loop"] == ["cannot be loaded"]
    assert reasons["batched_mm_padded"] == []


def test_the_verdict_names_what_to_train_with() -> None:
    (good, *_), broken = compare(TAIL), "beyond the bound"
    others = replace(good, backend="grouped_mm")
    assert verdict([good]) == (
        "for_loop agrees with float64 on cpu, swiglu, without biases: 0 of 1 tensors are wrong."
    )
    relu2 = replace(others, activation="relu2", biased=True)
    assert verdict([good, others, relu2]) == (
        "for_loop and grouped_mm agree with float64 on cpu, swiglu and relu2, "
        "without biases and with biases: 0 of 3 tensors are wrong."
    )
    assert verdict([good, replace(good, verdict=broken), others]) == (
        "Do not train with for_loop on cpu: 1 of 3 tensors are wrong; "
        "grouped_mm agrees with float64 on cpu, swiglu, without biases."
    )
    assert verdict([good, others, replace(relu2, verdict=broken)]) == (
        "Do not train with grouped_mm (relu2 with biases) on cpu: 1 of 3 tensors are wrong; "
        "for_loop agrees with float64 on cpu, swiglu and relu2, without biases and with biases."
    )
    assert verdict([replace(good, verdict=broken)]) == (
        "Do not train with for_loop on cpu: 1 of 1 tensors are wrong."
    )
