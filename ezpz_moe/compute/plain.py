"""Expert layers as one would write them on a blackboard, expert by expert.

Written for reading, not for speed: slices, ``@`` and autograd, sharing nothing with a backend.
Legend of the suffixes: :mod:`.contract`. n = rows of one expert.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ezpz_moe.compute.arguments import NO_BIASES, Biases


def _clamped_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
    return gate * torch.sigmoid(1.702 * gate) * (up + 1)


GATED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "swiglu": lambda gate, up: F.silu(gate) * up,
    "geglu": lambda gate, up: F.gelu(gate) * up,
    "reglu": lambda gate, up: F.relu(gate) * up,
    "clamped_swiglu": _clamped_swiglu,
}
_UNGATED: dict[str, Callable[[Tensor], Tensor]] = {
    "relu2": lambda hidden: F.relu(hidden) ** 2,
    "gelu": F.gelu,
}


class _Expert(NamedTuple):
    """One expert's parameters."""

    w1_FD: Tensor
    w2_DF: Tensor
    w3_FD: Tensor | None
    b1_F: Tensor | None
    b2_D: Tensor | None
    b3_F: Tensor | None

    def hidden(self, x_nD: Tensor, activation: str) -> Tensor:
        gate_nF = _linear(x_nD, self.w1_FD, self.b1_F)
        if self.w3_FD is None:
            return _UNGATED[activation](gate_nF)
        return GATED[activation](gate_nF, _linear(x_nD, self.w3_FD, self.b3_F))

    def output(self, hidden_nF: Tensor) -> Tensor:
        return _linear(hidden_nF, self.w2_DF, self.b2_D)


def _linear(x_nX: Tensor, weight_YX: Tensor, bias_Y: Tensor | None) -> Tensor:
    return x_nX @ weight_YX.T if bias_Y is None else x_nX @ weight_YX.T + bias_Y


def _experts(*parameters: Tensor | None) -> list[_Expert]:
    first = parameters[0]
    assert first is not None
    nothing = [None] * len(first)
    of_experts = (nothing if each is None else each.unbind() for each in parameters)
    return [_Expert(*each) for each in zip(*of_experts, strict=True)]


def plain_loop(
    w1_EFD: Tensor,
    w2_EDF: Tensor,
    w3_EFD: Tensor | None,
    x_RD: Tensor,
    counts_E: Tensor,
    *,
    activation: str = "swiglu",
    biases: Biases | None = None,
) -> Tensor:
    """Compute the expert FFN as one would write it on a blackboard; tail rows are zero."""
    counts = counts_E.tolist()
    # The tail is never multiplied, since it may hold NaN.
    *chunks_RD, tail_RD = x_RD.split([*counts, len(x_RD) - sum(counts)])
    parameters = (w1_EFD, w2_EDF, w3_EFD, *(biases or NO_BIASES))
    outputs_RD = [
        expert.output(expert.hidden(x_nD, activation))
        for x_nD, expert in zip(chunks_RD, _experts(*parameters), strict=True)
    ]
    # Adds zero. Without experts, what remains is then still a function of every input.
    nothing = sum(each[:0].sum() for each in (*parameters, x_RD) if each is not None)
    return torch.cat([*outputs_RD, torch.zeros_like(tail_RD)]) + nothing


def plain_routed(
    w1_EFD: Tensor,
    w2_EDF: Tensor,
    w3_EFD: Tensor | None,
    x_TD: Tensor,
    scores_TK: Tensor,
    ids_TK: Tensor,
    counts_E: Tensor,
    *,
    num_rows: int,
    scores_first: bool = False,
    activation: str = "swiglu",
    biases: Biases | None = None,
) -> Tensor:
    """Compute the routed layer as one would write it on a blackboard, expert by expert.

    Args:
        scores_first: apply the scores to the hidden rows, not to the outputs of the experts.
    """
    is_row_TK = are_rows(ids_TK, len(w1_EFD), num_rows).to(ids_TK.device)
    parameters = (w1_EFD, w2_EDF, w3_EFD, *(biases or NO_BIASES))
    # Adds zero: the result is a function of every input, whatever the routing.
    inputs = (*parameters, x_TD, scores_TK)
    out_TD = torch.zeros_like(x_TD) + sum(each[:0].sum() for each in inputs if each is not None)
    for number, expert in enumerate(_experts(*parameters)):
        token_n, choice_n = torch.where(is_row_TK & (ids_TK == number))
        x_nD, score_n1 = x_TD[token_n].to(w1_EFD.dtype), scores_TK[token_n, choice_n].unsqueeze(1)
        hidden_nF = expert.hidden(x_nD, activation)
        if scores_first:
            y_nD = (hidden_nF * score_n1).to(w1_EFD.dtype) @ expert.w2_DF.T
            if expert.b2_D is not None:
                y_nD = y_nD + score_n1 * expert.b2_D
        else:
            y_nD = expert.output(hidden_nF) * score_n1
        out_TD = out_TD.index_add(0, token_n, y_nD.to(out_TD.dtype))
    return out_TD


def are_rows(ids_TK: Tensor, num_experts: int, num_rows: int) -> Tensor:
    """Return whether a choice is a row of an expert: [T, K], on the CPU."""
    ids = ids_TK.flatten().tolist()
    kept = sorted(range(len(ids)), key=ids.__getitem__)[:num_rows]  # sorted() is stable
    is_row = torch.zeros(len(ids), dtype=torch.bool)
    is_row[[choice for choice in kept if ids[choice] < num_experts]] = True
    return is_row.view(ids_TK.shape)
