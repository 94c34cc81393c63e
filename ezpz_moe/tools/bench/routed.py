"""Who computes a whole routed layer: dispatch, experts and combination.

A backend computes it twice: as its own, by ``Backend.routed``, and *composed*, with its expert FFN
between the host's dispatch and combination. The host's layer is what both are compared with.

Legend of the suffixes: :mod:`ezpz_moe.compute.contract`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from ezpz_moe.compute import backend_names, get_backend
from ezpz_moe.compute.contract import Backend
from ezpz_moe.compute.native import is_emulated
from ezpz_moe.errors import EzpzError
from ezpz_moe.hosts.detect import host
from ezpz_moe.hosts.stock_dispatch import stock_dispatcher
from ezpz_moe.tools.bench.contender import Contender, Prepared, leaves, named
from ezpz_moe.tools.bench.contenders import broken, products_why_not, stock_products
from ezpz_moe.tools.bench.measuring import saved_bytes
from ezpz_moe.tools.bench.peers import ROUTED_PEERS
from ezpz_moe.tools.bench.results import COPY, STOCK
from ezpz_moe.tools.bench.routed_case import RoutedCase, empty_routed_case
from ezpz_moe.tools.bench.shapes import Shape

Experts = Callable[[Tensor, Tensor], Tensor]
"""``(x_RD, counts_E) -> y_RD``"""


def backends(specs: Sequence[str]) -> list[Contender]:
    """Return the named backends, as their own layer and composed; without names, all installed.

    Without names, each is there with ``recompute=true`` as well, where it has that option.

    Raises:
        EzpzError: as :func:`.contenders.backends`.
    """
    for spec in specs:
        get_backend(spec)
    return [each for spec in specs or _all_specs() for each in _of_backend(spec)]


def others(names: Sequence[str]) -> list[Contender]:
    """Return what the backends are compared with; without names, all.

    Raises:
        EzpzError: there is no such contender.
    """
    known = {each.name: each for each in (*_REFERENCES, *ROUTED_PEERS)}
    return named(names, known) or list(known.values())


def stock_saved_bytes(shape: Shape) -> int | None:
    """Return the bytes that the host's layer, in bfloat16, saves for backward.

    None without a host, or with an FFN that its layer does not compute. Nothing is computed, so
    this holds for every size, and where bfloat16 is emulated.
    """
    if not shape.is_plain or _without_host():
        return None
    if products_why_not(torch.device("cpu"), torch.bfloat16, shape):
        return None
    return saved_without_computing(_stock, shape, torch.bfloat16)


def saved_without_computing(
    prepare: Callable[[RoutedCase], Prepared], shape: Shape, dtype: torch.dtype
) -> int:
    """Return the bytes that a contender's forward saves for backward, by tensors without memory."""
    return saved_bytes(prepare(empty_routed_case(shape, dtype)))[0]


def _all_specs() -> Iterator[str]:
    for name in backend_names():
        yield name
        if not broken(name) and hasattr(get_backend(name), "recompute"):
            yield f"{name}(recompute=true)"


def _of_backend(spec: str) -> list[Contender]:
    """Return the backend's own layer, and the composed one."""
    if one := broken(spec):
        return [one]
    backend = get_backend(spec)

    def why_not(device: torch.device, dtype: torch.dtype, shape: Shape) -> list[str]:
        return backend.why_not(device, dtype, dims=(shape.D, shape.F))

    own = Contender(
        spec,
        _one_node(backend),
        why_not,
        declares_syncs=backend.host_syncs,
        may_drop=backend.drops_tokens,
        is_backend=True,
        any_ffn=True,
    )
    composed = replace(
        own,
        name=f"{spec} composed",
        prepare=lambda case: _around(partial(_experts, backend.ffn), case),
        why_not=lambda *where: _without_host() + why_not(*where),
    )
    # Without a kernel of its own, `routed` is composed as well.
    return [own, composed] if backend.has_routed_kernel else [composed]


def _one_node(backend: Backend) -> Callable[[RoutedCase], Prepared]:
    def prepare(case: RoutedCase) -> Prepared:
        own, constants = case.as_leaves(), (case.ids_TK, case.num_tokens_per_expert_E)
        tokens = (own.x_TD, own.scores_TK)
        return Prepared(
            lambda: backend.routed(*own.weights, *tokens, *constants, **own.options),
            (*own.parameters, *tokens),
            constants,
        )

    return prepare


def _experts(ffn: Callable[..., Tensor], case: RoutedCase) -> tuple[Experts, tuple[Tensor, ...]]:
    own = case.as_leaves()
    return lambda x_RD, counts_E: ffn(*own.weights, x_RD, counts_E, **own.options), own.parameters


def _around(
    make: Callable[[RoutedCase], tuple[Experts, tuple[Tensor, ...]]], case: RoutedCase
) -> Prepared:
    """Prepare experts between the host's dispatch and combination, as its ``RoutedExperts`` does.

    Args:
        make: ``case -> (experts, their parameters)``.
    """
    experts, parameters = make(case)
    x_TD, scores_TK = leaves(case.x_TD, case.scores_TK)
    ids_TK, counts_E = constants = (case.ids_TK, case.num_tokens_per_expert_E)
    dispatcher = stock_dispatcher(len(counts_E), ids_TK.shape[1])

    def forward() -> Tensor:
        x_RD, counts, metadata = dispatcher.dispatch(x_TD, scores_TK, ids_TK, counts_E)
        return dispatcher.combine(experts(x_RD, counts), metadata, x_TD)

    return Prepared(forward, (*parameters, x_TD, scores_TK), constants)


def _without_host() -> list[str]:
    """Return why the host's dispatch and experts cannot be had; empty if they can."""
    try:
        stock_dispatcher(num_experts=1, top_k=1)
        host().stock_experts()
    except EzpzError as error:
        return [str(error)]
    return []


def _stock(case: RoutedCase) -> Prepared:
    """Prepare the installed torchtitan's own routed layer."""

    def experts(case: RoutedCase) -> tuple[Experts, tuple[Tensor, ...]]:
        layer = host().stock_experts()(case.w1_EFD, case.w2_EDF, case.w3_EFD)
        return layer, tuple(layer.parameters())

    return _around(experts, case)


def _copy(case: RoutedCase) -> Prepared:
    """Prepare the same in the case's dtype, or in float32 where that is emulated."""
    case = case.to(_computed_in(case.x_TD.device, case.x_TD.dtype))
    return _around(partial(_experts, stock_products), case)


def _computed_in(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if is_emulated(device, dtype) else dtype


def _stock_why_not(device: torch.device, dtype: torch.dtype, shape: Shape) -> list[str]:
    if reasons := _without_host():
        return reasons
    stands_in = f"{COPY}, a copy of its forward made for this benchmark"
    if dtype != torch.bfloat16:
        return [f"torchtitan's layer casts to bfloat16; for {dtype}, {stands_in}, stands in for it"]
    if is_emulated(device, dtype):
        return [
            f"torchtitan's layer casts to bfloat16, which this CPU emulates: {stands_in} in "
            f"float32, stands in for its time; its bytes are counted in bfloat16, without computing"
        ]
    return products_why_not(device, dtype, shape)


def _copy_why_not(device: torch.device, dtype: torch.dtype, shape: Shape) -> list[str]:
    return _without_host() or products_why_not(device, _computed_in(device, dtype), shape)


_REFERENCES = (
    Contender(STOCK, _stock, _stock_why_not),
    Contender(COPY, _copy, _copy_why_not, any_ffn=True),
)
