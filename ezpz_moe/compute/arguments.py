"""Check the arguments of a backend's entry points before a kernel sees them. No device sync.

A kernel that reads out of bounds gives no message at all. Values of counts are checked by
:mod:`.contract`, where looking at them is free.

Legend of the suffixes: :mod:`.contract`.
"""

from typing import NamedTuple

import torch

from ezpz_moe.compute.activations import ACTIVATIONS

_INTEGERS = (torch.int32, torch.int64)


class Biases(NamedTuple):
    """What is added to the products of every expert: b1 to gate, b2 to the output, b3 to up.

    ``b3_EF`` is None with an activation without a gate.
    """

    b1_EF: torch.Tensor
    b2_ED: torch.Tensor
    b3_EF: torch.Tensor | None


NO_BIASES = (None, None, None)


def check_grouped_mm(A_RK: torch.Tensor, B_EKN: torch.Tensor, offs_E: torch.Tensor) -> None:
    """Check ranks, sizes, dtypes and devices for :meth:`Backend.grouped_mm`. No device sync."""
    _check_rank("A_RK", A_RK, 2)
    _check_rank("B_EKN", B_EKN, 3)
    _check_same("B_EKN", B_EKN, "A_RK", A_RK)
    if B_EKN.shape[1] != A_RK.shape[1]:
        raise ValueError(
            f"B_EKN has K = {B_EKN.shape[1]}, but A_RK has K = {A_RK.shape[1]} "
            f"(shapes {tuple(B_EKN.shape)} and {tuple(A_RK.shape)})"
        )
    _check_counts("offs_E", offs_E, B_EKN.shape[0])


def check_ffn(
    w1_EFD: torch.Tensor,
    w2_EDF: torch.Tensor,
    w3_EFD: torch.Tensor | None,
    x_RD: torch.Tensor,
    num_tokens_per_expert_E: torch.Tensor,
    activation: str,
    biases: Biases | None,
    trained_E: torch.Tensor | None,
) -> None:
    """Check ranks, sizes, dtypes and devices for :meth:`Backend.ffn`. No device sync."""
    _check_layer(w1_EFD, w2_EDF, w3_EFD, x_RD, num_tokens_per_expert_E)
    _check_activation(activation, w1_EFD, w3_EFD, biases)
    _check_trained(trained_E, w1_EFD.shape[0])
    _check_same("x", x_RD, "w1", w1_EFD)


def _check_layer(
    w1_EFD: torch.Tensor,
    w2_EDF: torch.Tensor,
    w3_EFD: torch.Tensor | None,
    x_XD: torch.Tensor,
    num_tokens_per_expert_E: torch.Tensor,
) -> None:
    _check_rank("x", x_XD, 2)
    _check_rank("w1", w1_EFD, 3)
    E, F_, D = w1_EFD.shape
    _check_shape("w2", w2_EDF, (E, D, F_), w1_EFD)
    _check_shape("w3", w3_EFD, (E, F_, D), w1_EFD)
    _check_shape("x", x_XD, (x_XD.shape[0], D), w1_EFD)
    _check_same("w2", w2_EDF, "w1", w1_EFD)
    if w3_EFD is not None:
        _check_same("w3", w3_EFD, "w1", w1_EFD)
    _check_counts("num_tokens_per_expert", num_tokens_per_expert_E, E)


def _check_activation(
    activation: str, w1_EFD: torch.Tensor, w3_EFD: torch.Tensor | None, biases: Biases | None
) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}: must be one of {', '.join(ACTIVATIONS)}")
    _check_gate("w3", w3_EFD, activation)
    if biases is None:
        return
    E, F_, D = w1_EFD.shape
    _check_gate("b3", biases.b3_EF, activation)
    for name, bias, size in zip(("b1", "b2", "b3"), biases, (F_, D, F_), strict=True):
        _check_shape(name, bias, (E, size), w1_EFD)
        if bias is not None:
            _check_same(name, bias, "w1", w1_EFD)


def _check_gate(name: str, tensor: torch.Tensor | None, activation: str) -> None:
    is_gated = ACTIVATIONS[activation].is_gated
    if is_gated != (tensor is not None):
        what = "is missing: activation" if is_gated else "must be None: activation"
        gate = "has a gate" if is_gated else "has no gate"
        raise ValueError(f"{name} {what} {activation!r} {gate}")


def _check_shape(
    name: str, tensor: torch.Tensor | None, shape: tuple[int, ...], w1_EFD: torch.Tensor
) -> None:
    if tensor is not None and tensor.shape != shape:
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}; "
            f"with w1 of shape (E, F, D) = {tuple(w1_EFD.shape)} it must be {shape}"
        )


def check_routed(
    w1_EFD: torch.Tensor,
    w2_EDF: torch.Tensor,
    w3_EFD: torch.Tensor | None,
    x_TD: torch.Tensor,
    scores_TK: torch.Tensor,
    ids_TK: torch.Tensor,
    num_tokens_per_expert_E: torch.Tensor,
    num_rows: int,
    dtype: torch.dtype,
    activation: str,
    biases: Biases | None,
    trained_E: torch.Tensor | None,
) -> None:
    """Check ranks, sizes, dtypes and devices for :meth:`Backend.routed`. No device sync."""
    if not dtype.is_floating_point:
        raise TypeError(f"dtype must be a floating-point type, not {dtype}")
    _check_layer(w1_EFD, w2_EDF, w3_EFD, x_TD, num_tokens_per_expert_E)
    _check_activation(activation, w1_EFD, w3_EFD, biases)
    _check_trained(trained_E, w1_EFD.shape[0])
    _check_rank("ids", ids_TK, 2)
    if ids_TK.dtype not in _INTEGERS:
        raise TypeError(f"ids must be int32 or int64, not {ids_TK.dtype}")
    if ids_TK.shape[0] != x_TD.shape[0]:
        raise ValueError(f"ids are of {ids_TK.shape[0]} tokens, but x has {x_TD.shape[0]}")
    if scores_TK.shape != ids_TK.shape:
        raise ValueError(
            f"scores have shape {tuple(scores_TK.shape)}, but ids {tuple(ids_TK.shape)}"
        )
    for name, tensor in (("x", x_TD), ("scores", scores_TK)):
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must have a floating-point dtype, not {tensor.dtype}")
    for name, tensor in (("x", x_TD), ("scores", scores_TK), ("ids", ids_TK)):
        _check_device(name, tensor, "w1", w1_EFD)
    if not 0 <= num_rows <= ids_TK.numel():
        raise ValueError(f"num_rows is {num_rows}: must be between 0 and T * K = {ids_TK.numel()}")


def _check_trained(trained_E: torch.Tensor | None, num_experts: int) -> None:
    if trained_E is None:
        return
    if trained_E.dtype != torch.bool or trained_E.shape != (num_experts,):
        raise ValueError(
            f"trained_E must be bool and of {num_experts} experts, not {trained_E.dtype} of shape "
            f"{tuple(trained_E.shape)}"
        )
    # Reading it is free in host memory alone.
    if not (trained_E.is_cpu or trained_E.is_meta):
        raise ValueError(f"trained_E is on {trained_E.device}: it must be in host memory")


def _check_rank(name: str, tensor: torch.Tensor, rank: int) -> None:
    if tensor.dim() != rank:
        raise ValueError(f"{name} must have {rank} dimensions, not shape {tuple(tensor.shape)}")


def _check_same(name: str, tensor: torch.Tensor, model: str, other: torch.Tensor) -> None:
    if tensor.dtype != other.dtype:
        raise TypeError(
            f"{name} is {tensor.dtype}, but {model} is {other.dtype}: cast them to one dtype "
            f"(torchtitan computes experts in torch.bfloat16)"
        )
    _check_device(name, tensor, model, other)


def _check_device(name: str, tensor: torch.Tensor, model: str, other: torch.Tensor) -> None:
    if tensor.device != other.device:
        raise ValueError(f"{name} is on {tensor.device}, but {model} is on {other.device}")


def _check_counts(name: str, counts_E: torch.Tensor, num_experts: int) -> None:
    _check_rank(name, counts_E, 1)
    if counts_E.dtype not in _INTEGERS:
        raise TypeError(f"{name} must be int32 or int64, not {counts_E.dtype}")
    if counts_E.shape[0] != num_experts:
        raise ValueError(
            f"{name} has {counts_E.shape[0]} entries, but the weights have {num_experts} experts"
        )
