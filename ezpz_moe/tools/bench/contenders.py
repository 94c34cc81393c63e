"""Our backends, the host's own layer, and references, ready to be measured.

All compute the expert layer from the same values, except ``dense``, which is the limit.

Legend of the suffixes: :mod:`ezpz_moe.compute.contract`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ezpz_moe.compute import backend_names, get_backend
from ezpz_moe.compute.activations import ACTIVATIONS
from ezpz_moe.compute.arguments import NO_BIASES, Biases
from ezpz_moe.compute.reference import Case
from ezpz_moe.errors import EzpzError
from ezpz_moe.tools.bench.contender import Contender, Prepared, leaves, named, prepared
from ezpz_moe.tools.bench.peers import PEERS
from ezpz_moe.tools.bench.results import DENSE, INDEXED, PRODUCTS, SINGLE_BUFFER, STOCK
from ezpz_moe.tools.bench.shapes import Shape


def backends(specs: Sequence[str]) -> list[Contender]:
    """Return the named backends; without names, all that are installed.

    Raises:
        EzpzError: a named backend does not exist, has no such option, or does not load. (If an
            installed backend that is not named does not load, that becomes its reason.)
    """
    # Load them first: a misspelt name must not show after minutes of measuring.
    for spec in specs:
        get_backend(spec)
    return [_backend(spec) for spec in specs or backend_names()]


def others(names: Sequence[str]) -> list[Contender]:
    """Return what the backends are compared with; without names, everything but ``single_buffer``.

    Raises:
        EzpzError: there is no such contender.
    """
    without_a_name = {each.name: each for each in (*_REFERENCES, *PEERS)}
    known = without_a_name | {_SINGLE_BUFFER.name: _SINGLE_BUFFER}
    # Without names: all but single_buffer, which is too slow under skew to run unasked.
    return named(names, known) or list(without_a_name.values())


def broken(spec: str) -> Contender | None:
    """Return a contender that says why a backend does not load; None if it does.

    A package that does not load affects only its own backend.
    """
    try:
        get_backend(spec)
    except EzpzError as error:
        reasons = [str(error)]
        return Contender(spec, _not_reached, lambda *_: reasons, is_backend=True)
    return None


def _backend(spec: str) -> Contender:
    if one := broken(spec):
        return one
    backend = get_backend(spec)
    return Contender(
        spec,
        prepared(backend.ffn),
        lambda device, dtype, shape: backend.why_not(device, dtype, dims=(shape.D, shape.F)),
        declares_syncs=backend.host_syncs,
        may_drop=backend.drops_tokens,
        is_backend=True,
        any_ffn=True,
    )


def _not_reached(case: Any) -> Prepared:
    raise AssertionError("a contender is prepared only where it is usable")


def indexed(
    w1_EFD: Tensor,
    w2_EDF: Tensor,
    w3_EFD: Tensor | None,
    x_RD: Tensor,
    counts_E: Tensor,
    *,
    activation: str = "swiglu",
    biases: Biases | None = None,
) -> Tensor:
    """Run the loop one writes first. Each ``w[e]`` gets a gradient as large as all of [E, F, D]."""
    outputs, start = [], 0
    parameters = (w1_EFD, w2_EDF, w3_EFD, *(biases or NO_BIASES))
    for e, count in enumerate(counts_E.tolist()):
        w1_FD, w2_DF, w3_FD, b1_F, b2_D, b3_F = (p if p is None else p[e] for p in parameters)
        x_nD = x_RD[start : start + count]
        gate_nF = F.linear(x_nD, w1_FD, b1_F)
        up_nF = w3_FD if w3_FD is None else F.linear(x_nD, w3_FD, b3_F)
        outputs.append(F.linear(ACTIVATIONS[activation].hidden(gate_nF, up_nF), w2_DF, b2_D))
        start += count
    return torch.cat(outputs)


def stock_products(
    w1_EFD: Tensor,
    w2_EDF: Tensor,
    w3_EFD: Tensor | None,
    x_RD: Tensor,
    counts_E: Tensor,
    *,
    activation: str = "swiglu",
    biases: Biases | None = None,
) -> Tensor:
    """Compute the products of torchtitan's layer in the given dtype; biases as its gpt_oss does."""
    # int32, because _grouped_mm takes the ends of the experts' rows in no other dtype.
    offs_E = torch.cumsum(counts_E, dim=0, dtype=torch.int32)

    def product(rows_RX: Tensor, weight_EYX: Tensor, bias_EY: Tensor | None) -> Tensor:
        out_RY = torch._grouped_mm(rows_RX, weight_EYX.transpose(-2, -1), offs=offs_E)
        if bias_EY is None:
            return out_RY
        return out_RY + bias_EY.repeat_interleave(counts_E, dim=0, output_size=len(rows_RX))

    b1_EF, b2_ED, b3_EF = biases or NO_BIASES
    gate_RF = product(x_RD, w1_EFD, b1_EF)
    up_RF = w3_EFD if w3_EFD is None else product(x_RD, w3_EFD, b3_EF)
    return product(ACTIVATIONS[activation].hidden(gate_RF, up_RF), w2_EDF, b2_ED)


def products_why_not(device: torch.device, dtype: torch.dtype, shape: Shape) -> list[str]:
    """Return why :func:`stock_products` cannot run."""
    return get_backend("grouped_mm").why_not(device, dtype, dims=(shape.D, shape.F))


def _dense(case: Case) -> Prepared:
    """Prepare one FFN over all rows, with the first expert's weights: the same number of FLOPs."""
    # Clone: a view would keep all experts' weights in memory.
    w1_FD, w2_DF, *up = leaves(
        *(each[0].clone() for each in case.parameters[:3] if each is not None)
    )
    (x_RD,), hidden = leaves(case.x_RD), ACTIVATIONS[case.activation].hidden

    def forward() -> Tensor:
        # Without biases, which are no products: this is the limit.
        return hidden(x_RD @ w1_FD.T, x_RD @ up[0].T if up else None) @ w2_DF.T

    return Prepared(forward, (w1_FD, w2_DF, *up, x_RD))


def _stock(case: Case) -> Prepared:
    """Prepare the installed torchtitan's own routed experts."""
    # Imported here: without torchtitan the other contenders can still be measured.
    from ezpz_moe.hosts.detect import host

    (x_RD,), counts_E = leaves(case.x_RD), case.num_tokens_per_expert_E
    layer = host().stock_experts()(case.w1_EFD, case.w2_EDF, case.w3_EFD)
    return Prepared(lambda: layer(x_RD, counts_E), (*layer.parameters(), x_RD), (counts_E,))


def _stock_why_not(device: torch.device, dtype: torch.dtype, shape: Shape) -> list[str]:
    from ezpz_moe.hosts.detect import host

    if dtype != torch.bfloat16:
        return [f"torchtitan's layer casts to bfloat16; for {dtype}, {PRODUCTS} stands in for it"]
    try:
        host().stock_experts()
    except EzpzError as error:
        return [str(error)]
    return products_why_not(device, dtype, shape)


def _single_buffer(case: Case) -> Prepared:
    """Prepare all experts as one run of ``batched_mm_padded``, however much padding that is."""
    return prepared(get_backend(_UNBOUNDED).ffn)(case)


def _single_buffer_why_not(device: torch.device, dtype: torch.dtype, shape: Shape) -> list[str]:
    return get_backend(_UNBOUNDED).why_not(device, dtype, dims=(shape.D, shape.F))


_UNBOUNDED = "batched_mm_padded(max_padding=1e9)"

_REFERENCES = (
    Contender(STOCK, _stock, _stock_why_not),
    Contender(PRODUCTS, prepared(stock_products), products_why_not, any_ffn=True),
    Contender(INDEXED, prepared(indexed), lambda *_: [], declares_syncs=True, any_ffn=True),
    Contender(
        DENSE, _dense, lambda *_: [], declares_syncs=False, computes_layer=False, any_ffn=True
    ),
)

# Every expert padded to the busiest one: what ``batched_mm_padded`` avoids. Under skew this takes
# many times the others' time and memory, so it is measured on request only.
_SINGLE_BUFFER = Contender(
    SINGLE_BUFFER, _single_buffer, _single_buffer_why_not, declares_syncs=True, any_ffn=True
)
