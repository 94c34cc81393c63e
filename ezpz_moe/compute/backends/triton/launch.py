"""The contract's six kernels as launches of :mod:`.kernels`. No device-host sync.

Legend of the suffixes: :mod:`ezpz_moe.compute.contract`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ezpz_moe.compute.backends.triton import kernels, tuning
from ezpz_moe.compute.biases import bias_columns, bias_gradient, score_gradients, sums_like
from ezpz_moe.compute.contract import offsets_of_counts, offsets_on_device
from ezpz_moe.compute.dispatch import row_order
from ezpz_moe.compute.layouts import laid_out_like
from ezpz_moe.compute.learning import has_gradients

# The kernels' name for rows that are read and written in place.
_IN_PLACE = 0


def _slots(R: int, E: int, N: int) -> Callable[[dict[str, int]], tuple[int]]:
    """Return the grid of a kernel over rows: see :mod:`.kernels`."""
    return lambda meta: ((R // meta["BLOCK_R"] + E + 1) * triton.cdiv(N, meta["BLOCK_N"]),)


# R_BUCKET is the key under which tile sizes are remembered; the kernels compute with R.
def _sizes(E: int, R: int, K: int, N: int) -> tuple[int, ...]:
    """Return E, R, R_BUCKET, K, N."""
    return E, R, triton.next_power_of_2(max(R, 1)), K, N


def _block_e(E: int) -> int:
    # tl.arange needs a power of two.
    return triton.next_power_of_2(E + 1)  # one more, for the tail


def _on_device(trained_E: Tensor | None, offs_E: Tensor) -> Tensor | None:
    if trained_E is None:
        return None
    return trained_E.to(offs_E.device, torch.int32, non_blocking=True)


@dataclass(frozen=True)
class _Rows:
    """The rows of a layer: their experts, and in a routed layer their choices.

    Attributes:
        number: R, tail rows included.
        offs_E: inclusive offsets of the experts' rows, on the device.
        order_R: which choice each row is.
        score_C: the choices' scores; C = T * K choices, one token's after the other's.
        top_k: K, or _IN_PLACE: then nobody reads order and scores, and they are any tensors.
        trained_E: int32, on the device: above 0 for the experts whose parameters learn; None if all
            do.
    """

    number: int
    offs_E: Tensor
    order_R: Tensor
    score_C: Tensor
    top_k: int
    trained_E: Tensor | None = None

    @staticmethod
    def in_place(rows_RX: Tensor, offs_E: Tensor, trained_E: Tensor | None = None) -> "_Rows":
        trained_E = _on_device(trained_E, offs_E)
        return _Rows(rows_RX.shape[0], offs_E, offs_E, offs_E, _IN_PLACE, trained_E)

    @staticmethod
    def of_choices(
        order_R: Tensor, scores_TK: Tensor, counts_E: Tensor, trained_E: Tensor | None = None
    ) -> "_Rows":
        offs_E = offsets_of_counts(counts_E, order_R)
        # Contiguous, because the kernels read scores without a stride, and flatten() may be a view.
        score_C = scores_TK.flatten().contiguous()
        trained_E = _on_device(trained_E, offs_E)
        return _Rows(len(order_R), offs_E, order_R, score_C, scores_TK.shape[1], trained_E)

    def written(self, like: Tensor, columns: int, dtype: torch.dtype | None = None) -> Tensor:
        """Return memory for a kernel's output that is in the order of choices, or in place."""
        if self.top_k == _IN_PLACE or self.number == len(self.score_C):
            return like.new_empty(self.number, columns, dtype=dtype)
        # Choices that are no rows have no program that writes them.
        return like.new_zeros(len(self.score_C), columns, dtype=dtype)


def _multiply(
    A_RK: Tensor,
    B_EKN: Tensor,
    rows: _Rows,
    C_XN: Tensor,
    second: tuple[Tensor, Tensor] | None = None,
    bias_EN: Tensor | None = None,
) -> Tensor:
    """Compute ``C[r] = A[r] @ B[e]``, plus the product of a second pair of the same sizes.

    C is in the order of choices, unless rows are in place. A bias is added, times the scores.
    """
    B_EKN = B_EKN.to(A_RK.dtype)
    # Without a second pair the kernel does not read these; it only needs valid pointers.
    A2_RK, B2_EKN = second or (A_RK, B_EKN)
    B2_EKN = B2_EKN.to(A_RK.dtype)
    E, K, N = B_EKN.shape
    strides = (A_RK, B_EKN, A2_RK, B2_EKN, C_XN)
    kernels.multiply[_slots(rows.number, E, N)](
        A_RK, B_EKN, A2_RK, B2_EKN, _contiguous(bias_EN, C_XN), rows.offs_E, rows.order_R,
        rows.score_C, C_XN,
        *_sizes(E, rows.number, K, N), *(stride for each in strides for stride in each.stride()),
        SECOND=second is not None, BIASED=bias_EN is not None, TOP_K=rows.top_k,
        BLOCK_E=_block_e(E),
    )  # fmt: skip
    return C_XN


def _weight_gradient(left_RK: Tensor, right_XN: Tensor, rows: _Rows, grad_EKN: Tensor) -> Tensor:
    """Write ``left[rows].T @ right[rows]`` per expert into ``grad``, any strides, and return it.

    ``right`` is of tokens, [T, N], unless rows are in place.
    """
    E, K, N = grad_EKN.shape
    kernels.weight_gradient[
        lambda meta: (E * triton.cdiv(K, meta["BLOCK_R"]) * triton.cdiv(N, meta["BLOCK_N"]),)
    ](
        left_RK, right_XN, rows.offs_E, rows.order_R,
        rows.offs_E if rows.trained_E is None else rows.trained_E, grad_EKN,
        *_sizes(E, rows.number, K, N), *left_RK.stride(), *right_XN.stride(), *grad_EKN.stride(),
        SOME=rows.trained_E is not None, TOP_K=rows.top_k,
    )  # fmt: skip
    return grad_EKN


class _Experts(NamedTuple):
    """The parameters of a layer, in the order of the contract's kernels, and its activation."""

    w1_EFD: Tensor
    w2_EDF: Tensor
    w3_EFD: Tensor | None
    b1_EF: Tensor | None
    b2_ED: Tensor | None
    b3_EF: Tensor | None
    activation: str

    @property
    def constants(self) -> dict[str, Any]:
        """What kernels are compiled for."""
        return {"GATED": self.w3_EFD is not None, "ACTIVATION": self.activation}


def _contiguous(bias_EX: Tensor | None, like: Tensor) -> Tensor:
    """Return the bias as kernels read it; if there is none any tensor, which they do not read."""
    return like if bias_EX is None else bias_EX.to(like.dtype).contiguous()


def _gate_and_up(
    experts: _Experts, x_XD: Tensor, rows: _Rows, hidden_RF: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Compute gate and up, [R, 0] without a gate; if hidden is given, write hidden rows into it."""
    E, F, D = experts.w1_EFD.shape
    w1_EFD = experts.w1_EFD.to(x_XD.dtype)
    gate_RF, up_RF = x_XD.new_empty(rows.number, F), x_XD.new_empty(rows.number, 0)
    w3_EFD = w1_EFD
    if experts.w3_EFD is not None:
        w3_EFD, up_RF = experts.w3_EFD.to(x_XD.dtype), torch.empty_like(gate_RF)
    kernels.gate_and_up[_slots(rows.number, E, F)](
        x_XD, w1_EFD, w3_EFD, _contiguous(experts.b1_EF, x_XD), _contiguous(experts.b3_EF, x_XD),
        rows.offs_E, rows.order_R, rows.score_C, gate_RF, up_RF,
        gate_RF if hidden_RF is None else hidden_RF,
        *_sizes(E, rows.number, D, F), *x_XD.stride(), *w1_EFD.stride(), *w3_EFD.stride(),
        HIDDEN_TOO=hidden_RF is not None, BIASED=experts.b1_EF is not None, **experts.constants,
        TOP_K=rows.top_k, BLOCK_E=_block_e(E),
    )  # fmt: skip
    return gate_RF, up_RF


def _experts(experts: _Experts, x_XD: Tensor, rows: _Rows) -> tuple[Tensor, Tensor, Tensor]:
    """Return y, gate and up, in two launches: what ends in hidden rows; the product with w2."""
    # Not kept for backward, which computes it again from two tiles that it loads anyway.
    hidden_RF = x_XD.new_empty(rows.number, experts.w1_EFD.shape[1])
    gate_RF, up_RF = _gate_and_up(experts, x_XD, rows, hidden_RF)
    y_XD = rows.written(x_XD, x_XD.shape[1])
    w2_EFD = experts.w2_EDF.transpose(1, 2)
    return _multiply(hidden_RF, w2_EFD, rows, y_XD, bias_EN=experts.b2_ED), gate_RF, up_RF


def _experts_backward(
    experts: _Experts,
    grad_y_XD: Tensor,
    x_XD: Tensor,
    rows: _Rows,
    gate_RF: Tensor | None,
    up_RF: Tensor | None,
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Return the gradients of parameters and x, and parts of the scores' gradients to add up.

    Five launches, or six without gate and up; four, or five, without a gate; three more with
    biases. Holds three [R, F], or two.
    """
    if gate_RF is None or up_RF is None:
        gate_RF, up_RF = _gate_and_up(experts, x_XD, rows, None)
    w1_EFD, w2_EDF, w3_EFD, *_ = experts
    E, D, F = w2_EDF.shape
    hidden_RF, grad_gate_RF, grad_up_RF = map(torch.empty_like, (gate_RF, gate_RF, up_RF))
    # The kernels cast what they load to no other dtype.
    w2_in_rows_dtype_EDF = w2_EDF.to(gate_RF.dtype)
    parts = triton.cdiv(F, tuning.NARROWEST) if rows.top_k else 0
    grad_score_XP = rows.written(gate_RF, parts, torch.float32)
    kernels.hidden_gradients[_slots(rows.number, E, F)](
        grad_y_XD, w2_in_rows_dtype_EDF, gate_RF, up_RF, rows.offs_E, rows.order_R, rows.score_C,
        hidden_RF, grad_gate_RF, grad_up_RF, grad_score_XP,
        *_sizes(E, rows.number, D, F), *grad_y_XD.stride(), *w2_in_rows_dtype_EDF.stride(),
        **experts.constants, TOP_K=rows.top_k, PART=tuning.NARROWEST, BLOCK_E=_block_e(E),
    )  # fmt: skip
    of_parameters: list[Tensor] = []
    if has_gradients(rows.trained_E):
        gradients = (grad_gate_RF, hidden_RF, grad_up_RF)
        of_parameters = _parameter_gradients(experts, gradients, grad_y_XD, x_XD, rows)
    # Both paths to x in one sum: no [R, D] in between, and one rounding.
    second, grad_x_XD = None if w3_EFD is None else (grad_up_RF, w3_EFD), rows.written(x_XD, D)
    _multiply(grad_gate_RF, w1_EFD, rows, grad_x_XD, second)
    return of_parameters, grad_x_XD, grad_score_XP


def _parameter_gradients(
    experts: _Experts,
    of_hidden: tuple[Tensor, Tensor, Tensor],
    grad_y_XD: Tensor,
    x_XD: Tensor,
    rows: _Rows,
) -> list[Tensor]:
    """Return the gradients of weights, then of biases. ``of_hidden``: of gate, hidden itself, of
    up.
    """
    grad_gate_RF, hidden_RF, grad_up_RF = of_hidden
    w1_EFD, w2_EDF, w3_EFD, *_ = experts
    found = list(map(torch.empty_like, (w1_EFD, w2_EDF)))
    _weight_gradient(grad_gate_RF, x_XD, rows, found[0])
    _weight_gradient(hidden_RF, grad_y_XD, rows, found[1].transpose(1, 2))
    if w3_EFD is not None:
        found.append(_weight_gradient(grad_up_RF, x_XD, rows, torch.empty_like(w3_EFD)))
    if experts.b1_EF is not None:
        found += _bias_gradients(experts, grad_gate_RF, grad_y_XD, grad_up_RF, rows)
    return found


def _bias_gradients(
    experts: _Experts, grad_gate_RF: Tensor, grad_y_XD: Tensor, grad_up_RF: Tensor, rows: _Rows
) -> list[Tensor]:
    """Return the gradients of b1, b2, and b3 if there is one: sums over an expert's rows."""
    dtype = grad_y_XD.dtype
    ones_X = grad_y_XD.new_ones(grad_y_XD.shape[0])
    factor_R = rows.score_C[rows.order_R] if rows.top_k else ones_X

    def of_rows(left_RY: Tensor, right_XY: Tensor, bias_EY: Tensor, *, swap: bool) -> Tensor:
        sums_EYC = torch.empty_like(sums_like(bias_EY, dtype))
        _weight_gradient(left_RY, right_XY, rows, sums_EYC.transpose(1, 2) if swap else sums_EYC)
        return bias_gradient(sums_EYC, bias_EY)

    ones_XC, factor_RC = bias_columns(ones_X, dtype), bias_columns(factor_R, dtype)
    assert experts.b1_EF is not None
    assert experts.b2_ED is not None
    found = [of_rows(grad_gate_RF, ones_XC, experts.b1_EF, swap=False)]
    found.append(of_rows(factor_RC, grad_y_XD, experts.b2_ED, swap=True))
    if experts.b3_EF is not None:
        found.append(of_rows(grad_up_RF, ones_XC, experts.b3_EF, swap=False))
    return found


def mm(A_RK: Tensor, B_EKN: Tensor, offs_E: Tensor) -> Tensor:
    """Multiply rows by their expert's matrix, in one launch."""
    # Triton launches on the current device, which need not be the tensors'.
    with torch.cuda.device_of(A_RK):
        rows = _Rows.in_place(A_RK, offsets_on_device(offs_E, A_RK))
        return _multiply(A_RK, B_EKN, rows, A_RK.new_empty(A_RK.shape[0], B_EKN.shape[2]))


def mm_backward(
    grad_C_RN: Tensor, A_RK: Tensor, B_EKN: Tensor, offs_E: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the gradients of A and B, in two launches."""
    with torch.cuda.device_of(A_RK):
        rows = _Rows.in_place(A_RK, offsets_on_device(offs_E, A_RK))
        grad_A_RK = _multiply(grad_C_RN, B_EKN.transpose(1, 2), rows, torch.empty_like(A_RK))
        return grad_A_RK, _weight_gradient(A_RK, grad_C_RN, rows, torch.empty_like(B_EKN))


def ffn(
    w1_EFD: Tensor,
    w2_EDF: Tensor,
    w3_EFD: Tensor | None,
    b1_EF: Tensor | None,
    b2_ED: Tensor | None,
    b3_EF: Tensor | None,
    x_RD: Tensor,
    counts_E: Tensor,
    trained_E: Tensor | None,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the FFN, in two launches."""
    experts = _Experts(w1_EFD, w2_EDF, w3_EFD, b1_EF, b2_ED, b3_EF, activation)
    with torch.cuda.device_of(x_RD):
        return _experts(experts, x_RD, _Rows.in_place(x_RD, offsets_of_counts(counts_E, x_RD)))


def ffn_backward(
    grad_y_RD: Tensor,
    w1_EFD: Tensor,
    w2_EDF: Tensor,
    w3_EFD: Tensor | None,
    b1_EF: Tensor | None,
    b2_ED: Tensor | None,
    b3_EF: Tensor | None,
    x_RD: Tensor,
    counts_E: Tensor,
    trained_E: Tensor | None,
    gate_RF: Tensor | None,
    up_RF: Tensor | None,
    activation: str,
) -> list[Tensor]:
    """Return all gradients, in the launches of :func:`_experts_backward`."""
    experts = _Experts(w1_EFD, w2_EDF, w3_EFD, b1_EF, b2_ED, b3_EF, activation)
    with torch.cuda.device_of(x_RD):
        rows = _Rows.in_place(x_RD, offsets_of_counts(counts_E, x_RD), trained_E)
        of_parameters, grad_x_RD, _ = _experts_backward(
            experts, grad_y_RD, x_RD, rows, gate_RF, up_RF
        )
        return [*of_parameters, laid_out_like(grad_x_RD, x_RD)]


def routed(
    w1_EFD: Tensor,
    w2_EDF: Tensor,
    w3_EFD: Tensor | None,
    b1_EF: Tensor | None,
    b2_ED: Tensor | None,
    b3_EF: Tensor | None,
    x_TD: Tensor,
    scores_TK: Tensor,
    ids_TK: Tensor,
    counts_E: Tensor,
    trained_E: Tensor | None,
    num_rows: int,
    dtype: torch.dtype,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute the routed layer, in two launches and what torch needs to sort and to add up."""
    experts = _Experts(w1_EFD, w2_EDF, w3_EFD, b1_EF, b2_ED, b3_EF, activation)
    with torch.cuda.device_of(x_TD):
        order_R = row_order(ids_TK, num_rows)
        rows = _Rows.of_choices(order_R, scores_TK, counts_E)
        y_XD, gate_RF, up_RF = _experts(experts, x_TD.to(dtype), rows)
        return _sum_by_token(y_XD, x_TD), gate_RF, up_RF, order_R


def routed_backward(
    grad_out_TD: Tensor,
    w1_EFD: Tensor,
    w2_EDF: Tensor,
    w3_EFD: Tensor | None,
    b1_EF: Tensor | None,
    b2_ED: Tensor | None,
    b3_EF: Tensor | None,
    x_TD: Tensor,
    scores_TK: Tensor,
    counts_E: Tensor,
    trained_E: Tensor | None,
    gate_RF: Tensor | None,
    up_RF: Tensor | None,
    order_R: Tensor,
    dtype: torch.dtype,
    activation: str,
) -> list[Tensor]:
    """Return all gradients, in the launches of :func:`_experts_backward` and torch's sums."""
    experts = _Experts(w1_EFD, w2_EDF, w3_EFD, b1_EF, b2_ED, b3_EF, activation)
    with torch.cuda.device_of(x_TD):
        rows = _Rows.of_choices(order_R, scores_TK, counts_E, trained_E)
        of_parameters, grad_x_XD, grad_score_XP = _experts_backward(
            experts, grad_out_TD.to(dtype), x_TD.to(dtype), rows, gate_RF, up_RF
        )
        grad_x_TD, grad_score_C = _sum_by_token(grad_x_XD, x_TD), grad_score_XP.sum(1)
        if b2_ED is not None:
            token_R = order_R // rows.top_k
            of_b2_R = score_gradients(grad_out_TD, b2_ED.to(dtype), token_R, counts_E)
            grad_score_C += torch.zeros_like(grad_score_C).index_copy_(0, order_R, of_b2_R)
        grad_scores_TK = grad_score_C.view(scores_TK.shape).to(scores_TK.dtype)
        return [*of_parameters, grad_x_TD, laid_out_like(grad_scores_TK, scores_TK)]


def _sum_by_token(rows_CD: Tensor, like_TD: Tensor) -> Tensor:
    """Add up the K neighbouring rows of every token; dtype and layout are those of ``like``."""
    (C, D), T = rows_CD.shape, like_TD.shape[0]
    # Half dtypes are added up in float32 and rounded once, to like's dtype.
    wider = torch.promote_types(rows_CD.dtype, like_TD.dtype)
    out_TD = rows_CD.view(T, C // max(T, 1), D).sum(1, dtype=wider)
    return laid_out_like(out_TD.to(like_TD.dtype), like_TD)
