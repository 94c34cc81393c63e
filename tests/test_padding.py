"""``batched_mm_padded``: what it pads, and what it says of it."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch
from contract_cases import PATTERNS, Pattern, make_case, over_patterns

from ezpz_moe.compute import get_backend
from ezpz_moe.compute.layouts import is_transposed
from ezpz_moe.compute.reference import run
from ezpz_moe.errors import EzpzError

SKEWED = Pattern((3, 60, 0, 4, 4, 4, 30, 1, 0), tail=5)


class _Products:
    """Rows that go through products of torch, and how many launches these are."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.launches, self.rows = 0, 0
        for name, rows in (("mm", lambda A: A.shape[0]), ("bmm", lambda A: A[..., 0].numel())):
            monkeypatch.setattr(torch, name, self._counted(getattr(torch, name), rows))

    def _counted(self, product, rows):
        def counted(A: torch.Tensor, *arguments, **more):
            self.launches += 1
            self.rows += rows(A)
            return product(A, *arguments, **more)

        return counted


@over_patterns
@pytest.mark.parametrize(
    "options", ["", "(max_padding=0)", "(max_padding=1.5)", "(max_padding=1e9)"]
)
def test_it_computes_the_rows_that_it_says(
    options: str, pattern: Pattern, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = get_backend(f"batched_mm_padded{options}")
    case = make_case(pattern)
    computed, dropped = backend.rows_used(case.num_tokens_per_expert_E, len(case.x_RD)).tolist()
    assert dropped == 0
    products = _Products(monkeypatch)
    with torch.no_grad():
        backend.ffn(case.w1_EFD, case.w2_EDF, case.w3_EFD, case.x_RD, case.num_tokens_per_expert_E)
    assert products.rows == 3 * computed
    given = sum(pattern.counts)
    assert given <= computed <= (1 + backend.max_padding) * given
    if options == "(max_padding=1e9)":
        assert products.launches == 3 * bool(given)


def test_more_padding_is_fewer_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(SKEWED)
    launches = []
    for bound in (0, 0.3, 1.5, 1000):
        products = _Products(monkeypatch)
        with torch.no_grad():
            get_backend(f"batched_mm_padded(max_padding={bound})").ffn(
                case.w1_EFD, case.w2_EDF, case.w3_EFD, case.x_RD, case.num_tokens_per_expert_E
            )
        launches.append(products.launches // 3)
        monkeypatch.undo()
    assert launches[0] == 5  # the three experts with 4 rows are one
    assert launches[-1] == 1
    assert launches == sorted(launches, reverse=True)
    assert len(set(launches)) == 4


def test_an_even_routing_copies_no_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products read and write the rows in place."""

    def refuse(*arguments, **more):
        raise AssertionError("rows are copied")

    for copying in ("index_select", "repeat_interleave"):
        monkeypatch.setattr(torch, copying, refuse)
    backend = get_backend("batched_mm_padded")
    run(backend.ffn, make_case(PATTERNS["balanced"]))
    with pytest.raises(AssertionError, match="rows are copied"):
        run(get_backend("batched_mm_padded(max_padding=9)").ffn, make_case(SKEWED))


def test_no_batched_product_is_written_into_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU that takes a thousand times as long in bfloat16."""
    written = []

    def watched(A, B, *, out, product=torch.bmm):
        written.append(out)
        return product(A, B, out=out)

    monkeypatch.setattr(torch, "bmm", watched)
    case = make_case(PATTERNS["balanced"])
    case = dataclasses.replace(case, x_RD=case.x_RD.T.contiguous().T)
    result = run(get_backend("batched_mm_padded").ffn, case)
    assert written
    assert not any(is_transposed(out_gCN) for out_gCN in written)
    assert result["grad_x"].stride() == case.x_RD.stride()


@pytest.mark.parametrize("value", ["-0.1", "1e999", "true", "'much'"])
def test_a_bound_that_is_none(value: str) -> None:
    with pytest.raises(EzpzError, match=re.escape("max_padding = ")):
        get_backend(f"batched_mm_padded(max_padding={value})")
