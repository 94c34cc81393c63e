"""Zero-computation experts against their formulas written out.

Legend of the suffixes: :mod:`ezpz_moe.routing`.
"""

from __future__ import annotations

import math
from fractions import Fraction

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ezpz_moe.config.routing_schema import raised_top_k
from ezpz_moe.routing.gate import constant_output, weight_of


@given(st.integers(1, 512), st.integers(0, 512), st.data())
def test_the_raised_top_k_is_the_nearest_whole_number(
    experts: int, zero_experts: int, data: st.DataObject
) -> None:
    top_k = data.draw(st.integers(1, experts))
    raised = raised_top_k(experts, top_k, zero_experts)
    share_of_routed = Fraction(experts, experts + zero_experts)
    assert abs(raised - top_k / share_of_routed) <= Fraction(1, 2)
    assert top_k <= raised <= experts + zero_experts


def test_the_weight_of_a_range_of_experts() -> None:
    ids_BLK = torch.tensor([[[0, 3, 5], [4, 2, 1], [5, 6, 7]]])
    weights_BLK = torch.tensor([[[1.0, 2.0, 4.0], [8.0, 16.0, 32.0], [torch.nan, 1.0, 1.0]]])
    weights_BLK.requires_grad_()
    found_BL1 = weight_of(weights_BLK, ids_BLK, 2, 5)
    assert found_BL1.tolist() == [[[2.0], [24.0], [0.0]]]
    gradient = torch.autograd.grad(found_BL1.sum(), weights_BLK)[0]
    assert gradient.tolist() == [[[0, 1, 0], [1, 1, 0], [0, 0, 0]]]


def constant_case(dtype: torch.dtype) -> tuple[Tensor, ...]:
    """x_BLD, weight_BLC, mix_C2D and vectors_CD of three constant experts."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 3, 4), (2, 3, 3), (3, 2, 4), (3, 4))
    return tuple(torch.randn(*shape, generator=generator).to(dtype) for shape in shapes)


def written_constant(x: list[float], weight: list[float], mix: list, vectors: list) -> list[float]:
    y = [0.0] * len(x)
    for c, w in enumerate(weight):
        a, b = (math.exp(sum(m * v for m, v in zip(row, x, strict=True))) for row in mix[c])
        for d in range(len(x)):
            y[d] += w * (a * x[d] + b * vectors[c][d]) / (a + b)
    return y


def test_constant_experts_are_the_formula_written_out_and_pass_gradcheck() -> None:
    case = constant_case(torch.float64)
    found_BLD = constant_output(*case)
    x_BLD, weight_BLC, mix_C2D, vectors_CD = (each.tolist() for each in case)
    expected_BLD = [
        [written_constant(x, w, mix_C2D, vectors_CD) for x, w in zip(*rows, strict=True)]
        for rows in zip(x_BLD, weight_BLC, strict=True)
    ]
    expected_BLD = torch.tensor(expected_BLD, dtype=torch.float64)
    torch.testing.assert_close(found_BLD, expected_BLD, rtol=1e-13, atol=1e-13)
    assert torch.autograd.gradcheck(constant_output, [each.requires_grad_() for each in case])


def test_a_narrow_input_keeps_its_dtype_beside_wide_parameters() -> None:
    x_BLD, *others = constant_case(torch.float32)
    found_BLD = constant_output(x_BLD.bfloat16(), *others)
    assert found_BLD.dtype == torch.bfloat16
