"""The contract that every expert backend keeps, and checks of its arguments.

Shape suffixes, as torchtitan writes them:
    T = tokens; K = experts of a token (top-k); R = routed tokens, sorted by expert;
    E = local experts; D = model dimension; F = hidden dimension of an expert;
    K, N in a product = its inner and outer dimension; C = columns of a bias as a product.

What a backend promises, whatever the routing:

- output and all gradients (x, weights, biases, and the scores of a routed layer) equal the float64
reference within twice the error of the plain loop in the same dtype, plus 1e-6 of the tensor's
scale;
- rows beyond the sum of the counts (*tail rows*) get exactly zero, as outputs and as input
gradients, even if the tail of x holds NaN;
- an expert without tokens gets gradients of exact zeros, never None (FSDP reduces them), and its
weights and biases change nothing, even if they hold NaN;
- an expert that does not learn gets gradients of exact zeros, and changes no other gradient;
- without rows, or without experts, the result is still a function of every input;
- a token of a routed layer changes no other token's output or gradient, even if it holds NaN; a
choice beyond ``num_rows`` changes nothing, and its score gets exactly zero;
- the result has x's dtype; inputs do not change; a rerun gives the same bits;
- a second differentiation is right or refused, never silently wrong.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._subclasses import FakeTensor

from ezpz_moe.compute.activations import ACTIVATIONS
from ezpz_moe.compute.arguments import NO_BIASES, Biases, check_ffn, check_grouped_mm, check_routed
from ezpz_moe.compute.biases import bias_columns, bias_matrices
from ezpz_moe.compute.dispatch import row_order
from ezpz_moe.compute.learning import of_trained


class Backend(ABC):
    """One way to compute routed experts. Stateless; a subclass is one file in ``backends/``.

    A backend with options is a frozen dataclass; the options are its fields, all with defaults.
    ``compute_backend = "for_loop(recompute=true)"`` sets one.

    Attributes:
        name: what ``compute_backend`` says, without options.
        summary: one line for tables and logs.
        host_syncs: whether forward copies the token counts to the host, which a CUDA graph cannot
            capture.
        static_shapes: whether no intermediate has a shape that depends on the routing.
        drops_tokens: whether tokens beyond a capacity are left out.
        pads: whether it computes rows that carry no token.
    """

    name: str
    summary: str
    host_syncs: bool
    static_shapes: bool
    drops_tokens: bool = False
    pads: bool = False

    @property
    def lossless(self) -> "Backend":
        """The same backend, with options that drop nothing: its numbers can then be checked."""
        return self

    @property
    def chosen(self) -> tuple[str, ...]:
        """The backends that compute in its place in this process; none unless it chooses."""
        return ()

    @property
    def has_routed_kernel(self) -> bool:
        """Whether :meth:`routed` is a kernel of its own, not composed of dispatch and experts."""
        return type(self)._routed is not Backend._routed

    def __deepcopy__(self, memo: dict[int, Any]) -> "Backend":
        return self  # stateless: a copied model (pipeline stages) uses the same backend

    def why_not(
        self, device: torch.device, dtype: torch.dtype, *, dims: Sequence[int] = ()
    ) -> list[str]:
        """Return every reason why this backend cannot run, with its remedy; empty means usable.

        Args:
            device: where to compute the experts; it has to exist on this machine.
            dtype: what the kernels compute in.
            dims: sizes of the products' dimensions (D and F, as far as known).
        """
        if not dtype.is_floating_point:
            return [f"{dtype} is not a floating-point type: use torch.bfloat16 or torch.float32"]
        missing = missing_device(device)
        return [missing] if missing else self._why_not(device, dtype, dims)

    def grouped_mm(
        self, A_RK: torch.Tensor, B_EKN: torch.Tensor, offs_E: torch.Tensor
    ) -> torch.Tensor:
        """Multiply every row by its expert's matrix: ``C[r] = A[r] @ B[expert of r]``.

        Args:
            A_RK: rows sorted by expert.
            B_EKN: one matrix per expert, any strides (commonly a transposed view).
            offs_E: int32 or int64, inclusive cumulative row counts, as for torch._grouped_mm:
            expert e owns the rows ``offs[e - 1] : offs[e]``.

        Returns:
            C_RN in A's dtype.

        Raises:
            ValueError, TypeError: an argument does not fit; the message names it.
        """
        check_grouped_mm(A_RK, B_EKN, offs_E)
        if not B_EKN.shape[0]:
            return _without_experts(A_RK, B_EKN.shape[2], B_EKN)
        return self._grouped_mm(A_RK, B_EKN, offs_E)

    def ffn(
        self,
        w1_EFD: torch.Tensor,
        w2_EDF: torch.Tensor,
        w3_EFD: torch.Tensor | None,
        x_RD: torch.Tensor,
        num_tokens_per_expert_E: torch.Tensor,
        *,
        activation: str = "swiglu",
        biases: Biases | None = None,
        trained_E: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Compute the whole expert FFN: ``(silu(x @ w1.T) * (x @ w3.T)) @ w2.T``, row by row.

        Args:
            w1_EFD, w2_EDF, w3_EFD: gate, down and up projection of every expert; w3 is None with
                an activation without a gate.
            x_RD: routed tokens sorted by expert, and possibly tail rows after them.
            num_tokens_per_expert_E: int32 or int64 counts, on x's device or on the host.
            activation: what to put in the place of SwiGLU, a name in :data:`.ACTIVATIONS`.
            biases: what to add to each product.
            trained_E: bool, on the host: the experts whose parameters learn. The gradients of the
                others are zeros, and no product is computed for them. All, if not given.

        Returns:
            y_RD in x's dtype; tail rows are zero.

        Raises:
            ValueError, TypeError: an argument does not fit; the message names it.
        """
        weights, counts_E = (w1_EFD, w2_EDF, w3_EFD), num_tokens_per_expert_E
        check_ffn(*weights, x_RD, counts_E, activation, biases, trained_E)
        if not w1_EFD.shape[0]:
            return _without_experts(x_RD, x_RD.shape[1], *weights, *(biases or ()))
        return self._ffn(*weights, x_RD, counts_E, activation, biases, trained_E)

    def routed(
        self,
        w1_EFD: torch.Tensor,
        w2_EDF: torch.Tensor,
        w3_EFD: torch.Tensor | None,
        x_TD: torch.Tensor,
        scores_TK: torch.Tensor,
        ids_TK: torch.Tensor,
        num_tokens_per_expert_E: torch.Tensor,
        *,
        num_rows: int | None = None,
        dtype: torch.dtype | None = None,
        activation: str = "swiglu",
        biases: Biases | None = None,
        trained_E: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Compute a whole routed layer: every token's experts, weighted by its scores, summed.

        ``out[t] = sum over k of scores[t, k] * ffn(x[t])``, each with the weights of expert
        ``ids[t, k]``. Whether a score multiplies the output of an expert or its hidden rows is the
        backend's choice: on paper both are the same.

        Args:
            w1_EFD, w2_EDF, w3_EFD: as in :meth:`ffn`.
            x_TD: tokens, in any floating dtype.
            scores_TK: weights of each token's experts, in any floating dtype.
            ids_TK: int32 or int64, at least 0, each token's experts. One may be chosen more than
                once.
            num_tokens_per_expert_E: int32 or int64, how often each expert is among the first
                ``num_rows`` of the sorted ids, on x's device or on the host. Nobody compares the
                two, which would cost a device sync.
            num_rows: R, if fewer than T * K: the choices with the highest ids, which may be ids of
                no expert, are left out. Ids of no expert among the others are rows of the tail.
            dtype: what rows are computed in, that of the weights by default. Weights in another are
                cast for the products alone: a kernel of its own keeps no copy for backward.
            activation, biases, trained_E: as in :meth:`ffn`.

        Returns:
            out_TD in x's dtype.

        Raises:
            ValueError, TypeError: an argument does not fit; the message names it.
        """
        rows = ids_TK.numel() if num_rows is None else num_rows
        weights = (w1_EFD, w2_EDF, w3_EFD)
        dtype = dtype or w1_EFD.dtype
        tokens = (x_TD, scores_TK, ids_TK, num_tokens_per_expert_E)
        check_routed(*weights, *tokens, rows, dtype, activation, biases, trained_E)
        if not w1_EFD.shape[0]:
            return _without_experts(x_TD, x_TD.shape[1], *weights, *(biases or ()), scores_TK[:0])
        return self._routed(*weights, *tokens, rows, dtype, activation, biases, trained_E)

    def rows_used(
        self, num_tokens_per_expert_E: torch.Tensor, num_rows: int
    ) -> torch.Tensor | None:
        """Return what :meth:`ffn` computes and drops for these counts. Telemetry asks.

        Args:
            num_tokens_per_expert_E: int32 or int64 counts, on any device.
            num_rows: R, tail rows included.

        Returns:
            int64 [2]: rows computed, and tokens dropped; None if the backend does not say. No
            device sync if ``host_syncs`` is false, else one copy of the counts.
        """
        return None

    def _why_not(self, device: torch.device, dtype: torch.dtype, dims: Sequence[int]) -> list[str]:
        """Return further reasons, beyond a missing device or a dtype that is not floating-point."""
        return []

    @abstractmethod
    def _grouped_mm(
        self, A_RK: torch.Tensor, B_EKN: torch.Tensor, offs_E: torch.Tensor
    ) -> torch.Tensor: ...

    def _ffn(
        self,
        w1_EFD: torch.Tensor,
        w2_EDF: torch.Tensor,
        w3_EFD: torch.Tensor | None,
        x_RD: torch.Tensor,
        num_tokens_per_expert_E: torch.Tensor,
        activation: str,
        biases: Biases | None,
        trained_E: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Compose products; differentiable because :meth:`_grouped_mm` is."""
        parameters = (w1_EFD, w2_EDF, w3_EFD, *(biases or NO_BIASES))
        w1_EFD, w2_EDF, w3_EFD, b1_EF, b2_ED, b3_EF = of_trained(parameters, trained_E)
        # int32, because torch._grouped_mm takes no other offsets; cumsum alone would give int64.
        offs_E = torch.cumsum(num_tokens_per_expert_E, dim=0, dtype=torch.int32)

        def product(
            rows_RX: torch.Tensor, weights_EYX: torch.Tensor, bias_EY: torch.Tensor | None
        ) -> torch.Tensor:
            out_RY = self._grouped_mm(rows_RX, weights_EYX.transpose(-2, -1), offs_E)
            if bias_EY is None:
                return out_RY
            ones_RC = bias_columns(rows_RX.new_ones(rows_RX.shape[0]), rows_RX.dtype)
            return out_RY + self._grouped_mm(ones_RC, bias_matrices(bias_EY, rows_RX.dtype), offs_E)

        gate_RF = product(x_RD, w1_EFD, b1_EF)
        up_RF = None if w3_EFD is None else product(x_RD, w3_EFD, b3_EF)
        return product(ACTIVATIONS[activation].hidden(gate_RF, up_RF), w2_EDF, b2_ED)

    def _routed(
        self,
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
        trained_E: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Compose dispatch, experts and combination, as the host does."""
        order_R = row_order(ids_TK, num_rows)
        token_R, score_R = order_R // ids_TK.shape[1], scores_TK.flatten()[order_R]
        cast = [None if each is None else each.to(dtype) for each in (w3_EFD, *(biases or ()))]
        weights = (w1_EFD.to(dtype), w2_EDF.to(dtype), cast[0])
        x_RD, counts_E = x_TD[token_R].to(dtype), num_tokens_per_expert_E
        cast_biases = biases and Biases(*cast[1:])
        y_RD = self._ffn(*weights, x_RD, counts_E, activation, cast_biases, trained_E)
        # Weighted in the scores' dtype, which is float32 where rows are in half of it.
        weighted_RD = (y_RD * score_R.unsqueeze(1)).to(x_TD.dtype)
        # A copy to each choice's place, not an addition to each token: adding needs atomics on a
        # device, and a rerun then gives other bits.
        choices_CD = x_TD.new_zeros(ids_TK.numel(), x_TD.shape[1])
        choices_CD = choices_CD.index_copy(0, order_R, weighted_RD)
        return choices_CD.view(*ids_TK.shape, x_TD.shape[1]).sum(1)


# Here and not in the backends: kernels and the libraries below them may rely on a first expert.
def _without_experts(
    rows_RX: torch.Tensor, columns: int, *weights_EX: torch.Tensor | None
) -> torch.Tensor:
    """Return zero rows that depend on every input: their gradients are then zeros, not None."""
    nothing = sum((each.sum() for each in weights_EX if each is not None), rows_RX[:0].sum())
    return rows_RX.new_zeros(rows_RX.shape[0], columns) + nothing


def missing_device(device: torch.device) -> str | None:
    """Return why ``device`` does not exist here, or None. Meta tensors and the CPU always exist."""
    if device.type in ("cpu", "meta"):
        return None
    module = getattr(torch, device.type, None)
    # A device module is torch.<type> (torch.cuda, torch.xpu); torch.npu exists once torch_npu is
    # imported.
    if module is None or not module.is_available():
        return (
            f"this machine has no usable {device.type} device (torch.{device.type}.is_available() "
            f"is false): install a torch built for it, or choose another device"
        )
    if device.index is not None and device.index >= module.device_count():
        return f"there is no {device}: torch counts {module.device_count()} {device.type} devices"
    return None


def _to_host(counts_E: torch.Tensor) -> list[int]:
    # Without this the copy itself fails, with a CUDA error that names neither the cause nor a
    # remedy.
    if counts_E.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "this expert backend copies the token counts to the host, which a CUDA graph cannot "
            "capture: turn CUDA graphs off (torchtitan: --training.disable_cuda_graphs), or "
            "choose a backend without host syncs (grouped_mm)"
        )
    return counts_E.tolist()


def counts_on_host(num_tokens_per_expert_E: torch.Tensor, num_rows: int) -> list[int]:
    """Return the counts as Python integers. ONE device-to-host copy if they are on a device.

    Raises:
        ValueError: a negative count, or more tokens than rows.
    """
    counts = _to_host(num_tokens_per_expert_E)
    if any(count < 0 for count in counts):
        raise ValueError(f"num_tokens_per_expert has a negative count: {counts}")
    if sum(counts) > num_rows:
        raise ValueError(
            f"num_tokens_per_expert sums to {sum(counts)}, but there are only {num_rows} rows"
        )
    return counts


def counts_of_offsets(offs_E: torch.Tensor, num_rows: int) -> list[int]:
    """Turn inclusive cumulative offsets into counts. ONE device-to-host copy.

    Raises:
        ValueError: the offsets fall, or go beyond the rows.
    """
    offsets = _to_host(offs_E)
    # Not strict: the leading 0 makes the first list one longer.
    counts = [end - start for start, end in zip([0, *offsets], offsets, strict=False)]
    if any(count < 0 for count in counts):
        raise ValueError(f"offs_E must start at or above 0 and never fall: {offsets}")
    if offsets and offsets[-1] > num_rows:
        raise ValueError(f"offs_E ends at {offsets[-1]}, but A_RK has only {num_rows} rows")
    return counts


def check_where_free(
    check: Callable[[torch.Tensor, int], object], counts_E: torch.Tensor, rows_RX: torch.Tensor
) -> None:
    """Check the counts' values if that needs no device sync: for backends that have none.

    Args:
        check: :func:`counts_on_host` or :func:`counts_of_offsets`, which raise.
    """
    # While torch.compile traces, or a run is estimated, the counts have no values.
    has_values = not (torch.compiler.is_compiling() or isinstance(counts_E, FakeTensor))
    if counts_E.device.type == "cpu" and has_values:
        check(counts_E, rows_RX.shape[0])


def offsets_on_device(offs_E: torch.Tensor, rows_RX: torch.Tensor) -> torch.Tensor:
    """Return the offsets, contiguous, on the rows' device. On a CPU, check them; never copy to it.

    Raises:
        ValueError: on the CPU, what :func:`counts_of_offsets` raises.
    """
    check_where_free(counts_of_offsets, offs_E, rows_RX)
    # Contiguous, because the Triton kernels read offsets without a stride.
    return offs_E.to(rows_RX.device, non_blocking=True).contiguous()


def offsets_of_counts(counts_E: torch.Tensor, rows_RX: torch.Tensor) -> torch.Tensor:
    """Return inclusive offsets, int64, on the rows' device; like :func:`offsets_on_device`.

    Raises:
        ValueError: on the CPU, what :func:`counts_on_host` raises.
    """
    check_where_free(counts_on_host, counts_E, rows_RX)
    return torch.cumsum(counts_E.to(rows_RX.device, non_blocking=True).contiguous(), dim=0)
