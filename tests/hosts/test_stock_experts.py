"""The host's own experts, which ``ezpz-moe bench`` measures ours against, with every host."""

import torch

from ezpz_moe.compute.reference import error_bounds, random_case, relative_error, truth
from ezpz_moe.hosts.detect import host


def test_stock_experts_compute_with_the_weights_that_are_given() -> None:
    """Output and gradients are the layer's, and every weight is in the module."""
    case = random_case([5, 0, 9, 4], dim=32, hidden_dim=48, dtype=torch.bfloat16)
    true = truth(case)
    bounds = error_bounds(case, true)
    layer = host().stock_experts()(case.w1_EFD, case.w2_EDF, case.w3_EFD)
    x_RD = case.x_RD.detach().requires_grad_()

    y_RD = layer(x_RD, case.num_tokens_per_expert_E)
    y_RD.backward(case.grad_y_RD)

    assert y_RD.dtype == torch.bfloat16
    assert relative_error(y_RD.detach(), true["y"]) <= bounds["y"]
    assert relative_error(x_RD.grad, true["grad_x"]) <= bounds["grad_x"]
    weights = list(layer.parameters())
    assert sum(each.numel() for each in weights) == 3 * 4 * 32 * 48
    names = ("grad_w1", "grad_w2", "grad_w3")
    squares = sum(each.grad.double().square().sum() for each in weights)
    expected = sum(true[name].square().sum() for name in names)
    assert abs(squares / expected - 1) <= 2 * sum(bounds[name] for name in names)
