"""What the contract tests run over: backends x dtypes x routing patterns x devices.

Of their product every backend has a Latin square (:func:`square`), which catches what the product
does (``scripts/plant_bugs.py`` is the proof) at a tenth of the cost; the tests marked ``full`` have
all of it. A backend is left out on devices that it cannot run on, and one test says why. A device
named in ``EZPZ_MOE_TEST_DEVICES`` (say ``cuda,xpu``) that is absent *fails* a test.

Legend of the shape suffixes: ``ezpz_moe.compute.contract``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import pytest
import torch
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from ezpz_moe.compute import Backend, backend_names, get_backend, tuning
from ezpz_moe.compute.contract import missing_device
from ezpz_moe.compute.reference import (
    Case,
    LayerCase,
    RoutedCase,
    random_case,
    random_routed_case,
    relative_error,
)
from ezpz_moe.compute.registry import options_of

DIM, HIDDEN_DIM = 32, 48  # unequal, so that a swapped matrix shows; multiples of 16 bytes
CPU = torch.device("cpu")
INSTALLED = backend_names()
RECOMPUTING = [
    f"{name}(recompute=true)" for name in INSTALLED if "recompute" in options_of(get_backend(name))
]
ON_THE_CPU = [name for name in INSTALLED if not get_backend(name).why_not(CPU, torch.bfloat16)]
OTHERS_WITHOUT_DROPS = [
    f"{name}(capacity_factor=64.0)" if get_backend(name).drops_tokens else name
    for name in ON_THE_CPU
    if name != "grouped_mm"
]
"""Each backend beside the host's own path that runs on the CPU, so that no token is dropped."""
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
COUNT_DTYPES = (torch.int32, torch.int64)
REQUESTED_DEVICES = [
    name for name in os.environ.get("EZPZ_MOE_TEST_DEVICES", "").split(",") if name
]
DEVICES = [
    "cpu",
    *(name for name in ("cuda", "xpu") if missing_device(torch.device(name)) is None),
]


def usable_dtypes(name: str, device: str) -> list[torch.dtype]:
    """Those of ``DTYPES`` in which the backend runs there."""
    backend, dims = get_backend(name), (DIM, HIDDEN_DIM)
    return [
        dtype for dtype in DTYPES if not backend.why_not(torch.device(device), dtype, dims=dims)
    ]


def _running(names: Sequence[str]) -> list[str]:
    """Those that run on some device here."""
    return [name for name in names if any(usable_dtypes(name, device) for device in DEVICES)]


RUNNING, RECOMPUTING_HERE = _running(INSTALLED), _running(RECOMPUTING)
BACKENDS = [
    *RUNNING,
    *RECOMPUTING_HERE,
    "batched_mm_padded(max_padding=1e9)",
    "batched_mm_padded(max_padding=2.0, recompute=true)",
    "auto(among='for_loop batched_mm_padded')",
]


@dataclass(frozen=True)
class Pattern:
    """A routing: tokens of every expert, and rows after them that no expert owns."""

    counts: tuple[int, ...]
    tail: int = 0


PATTERNS = {
    "balanced": Pattern((8, 8, 8, 8)),
    "uneven": Pattern((13, 3, 22, 7)),
    "one_token_each": Pattern((1, 1, 1, 1)),
    "empty_first": Pattern((0, 9, 5, 11)),
    "empty_middle": Pattern((7, 0, 0, 12)),
    "empty_last": Pattern((6, 14, 8, 0)),
    "more_experts_than_tokens": Pattern((0, 1, 0, 0, 2, 0, 0, 0, 1, 0)),
    "one_hot": Pattern((0, 0, 40, 0)),
    "two_uneven_runs": Pattern((5, 4, 40, 5, 4)),
    "one_expert": Pattern((17,)),
    "one_expert_and_tail": Pattern((5,), tail=3),
    "tail": Pattern((5, 9, 3, 6), tail=7),
    "tail_and_empty_last": Pattern((5, 0, 9, 0), tail=2),
    "all_zero": Pattern((0, 0, 0, 0), tail=6),
    "no_rows": Pattern((0, 0, 0, 0)),
    "one_expert_no_rows": Pattern((0,)),
    "no_experts": Pattern(()),
    "no_experts_and_tail": Pattern((), tail=3),
}

over_backends = pytest.mark.parametrize("name", BACKENDS)
over_installed = pytest.mark.parametrize("name", RUNNING)  # where options make no difference
over_devices = pytest.mark.parametrize("device", DEVICES)
over_patterns = pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
over_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])


def square(
    name: str, device: str, dtypes: Sequence[torch.dtype], *, shift: int = 0
) -> Iterator[tuple[str, str, torch.dtype, torch.dtype, Pattern]]:
    """(name, device, dtype, dtype of the counts, pattern): every pattern once, the dtypes in turn.

    With another ``shift`` a pattern meets other dtypes.
    """
    for i, pattern in enumerate(PATTERNS.values()):
        dtype = dtypes[(i + shift) % len(dtypes)]
        yield name, device, dtype, COUNT_DTYPES[(i // len(dtypes) + shift) % 2], pattern


def squares(
    names: Sequence[str], *, shift: int = 0
) -> Iterator[tuple[str, str, torch.dtype, torch.dtype, Pattern]]:
    """Those of every backend and device, each backend with a shift of its own."""
    for number, name in enumerate(names):
        for device in DEVICES:
            if dtypes := usable_dtypes(name, device):
                yield from square(name, device, dtypes, shift=shift + number)


def in_words(value: object) -> str | None:
    """Part of a test's name: of a dtype, a layout, a pattern."""
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, bool):
        return "view" if value else "contiguous"
    return next((name for name, pattern in PATTERNS.items() if pattern is value), None)


over_squares = pytest.mark.parametrize(
    ("name", "device", "dtype", "count_dtype", "pattern"), list(squares(BACKENDS)), ids=in_words
)
_OF_PRODUCTS = [name for name in BACKENDS if name not in RECOMPUTING]  # where it changes nothing
over_squares_and_layouts = pytest.mark.parametrize(
    ("name", "device", "dtype", "count_dtype", "pattern", "transposed"),
    [
        (*case, transposed)
        for transposed in (True, False)
        for case in squares(_OF_PRODUCTS, shift=1 + transposed)
    ],
    ids=in_words,
)


def usable(name: str, device: str, dtype: torch.dtype) -> Backend:
    """The backend as it drops nothing, or a skip that says every reason why it cannot run there."""
    backend = get_backend(name).lossless
    reasons = backend.why_not(torch.device(device), dtype, dims=(DIM, HIDDEN_DIM))
    if reasons:
        pytest.skip(f"{name}: {'; '.join(reasons)}")
    return backend


def make_case(
    pattern: Pattern, device: str = "cpu", dtype: torch.dtype = torch.float32, **ffn
) -> Case:
    """A random expert layer with that routing; the tail of x and idle experts' weights hold NaN.

    ``ffn``: ``activation`` and ``biased``, SwiGLU without biases by default.
    """
    return random_case(
        list(pattern.counts),
        dim=DIM,
        hidden_dim=HIDDEN_DIM,
        tail=pattern.tail,
        dtype=dtype,
        device=device,
        **ffn,
    )


def leaves(case: LayerCase) -> list[torch.Tensor]:
    """The inputs of the case that have gradients, as fresh leaves that want them."""
    return [tensor.detach().clone().requires_grad_() for tensor in case.inputs]


@dataclass(frozen=True)
class Routing:
    """Every token's experts, how many experts there are, and how many choices are left out."""

    ids: tuple[tuple[int, ...], ...]
    experts: int
    cut: int = 0
    top_k: int = 2


ROUTINGS = {
    "balanced": Routing(tuple((t % 4, (t + 1) % 4) for t in range(8)), 4),
    "uneven": Routing(
        ((2, 0, 1), (2, 3, 0), (1, 2, 0), (0, 2, 1), (2, 3, 1), (3, 2, 0), (0, 3, 2)), 4, top_k=3
    ),
    "one_choice": Routing(((1,), (0,), (3,), (1,), (1,), (2,), (1,)), 4, top_k=1),
    "one_hot": Routing(((2,),) * 9, 4, top_k=1),
    "idle_experts": Routing(((1, 3), (3, 1), (1, 3), (3, 1), (3, 1)), 5),
    "repeated": Routing(((1, 1), (0, 2), (2, 2), (1, 0), (0, 0), (1, 1)), 3),
    "every_expert": Routing(((0, 1, 2), (2, 1, 0), (1, 0, 2), (0, 2, 1)), 3, top_k=3),
    "one_expert": Routing(((0,),) * 5, 1, top_k=1),
    # Ids of no expert: left out, or rows of the tail.
    "cut": Routing(((4, 0), (1, 4), (4, 4), (2, 0), (0, 3), (4, 5)), 4, cut=5),
    "cut_to_some_of_an_expert": Routing(((1, 2), (2, 0), (2, 2), (1, 2), (3, 2)), 3, cut=3),
    "tail": Routing(((4, 0), (1, 4), (4, 4), (2, 0), (0, 3), (4, 5)), 4),
    "half_a_tail": Routing(((3, 0), (1, 3), (3, 3), (2, 0), (0, 3), (3, 3)), 3, cut=4),
    "all_cut": Routing(((4, 4), (5, 4), (4, 4)), 4, cut=6),
    "no_tokens": Routing((), 4),
    "no_experts": Routing(((0, 1), (1, 0), (2, 0)), 0, cut=6),
    "no_experts_and_tail": Routing(((0, 1), (1, 0), (2, 0)), 0),
}


def make_routed_case(
    routing: Routing,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    x_dtype: torch.dtype | None = None,
    scores_dtype: torch.dtype | None = None,
    **ffn,
) -> RoutedCase:
    """A random routed layer; idle experts' weights and tokens without experts hold NaN.

    Its tokens are the routing's, eight times: of a score's gradient there is one number for each
    choice, and the luck of a few roundings must not decide.
    """
    return random_routed_case(
        8 * routing.ids,
        num_experts=routing.experts,
        top_k=routing.top_k,
        num_rows=8 * (len(routing.ids) * routing.top_k - routing.cut),
        dim=DIM,
        hidden_dim=HIDDEN_DIM,
        dtype=dtype,
        x_dtype=x_dtype,
        scores_dtype=scores_dtype,
        device=device,
        **ffn,
    )


@dataclass(frozen=True)
class ProductCase:
    """Inputs of the grouped product and the gradient that arrives at its output."""

    A_RK: torch.Tensor
    B_EKN: torch.Tensor
    offs_E: torch.Tensor
    grad_C_RN: torch.Tensor

    def true(self) -> ProductCase:
        """The same product in float64 on the CPU."""
        A_RK, B_EKN, grad_C_RN = (
            tensor.cpu().double() for tensor in (self.A_RK, self.B_EKN, self.grad_C_RN)
        )
        return ProductCase(A_RK, B_EKN, self.offs_E.cpu(), grad_C_RN)


def make_product_case(
    pattern: Pattern, *, transposed: bool, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> ProductCase:
    """A grouped product: ``B`` a transposed view, as experts hold their weights, or contiguous."""
    layer = make_case(pattern, device, dtype)
    rows = layer.x_RD.shape[0]
    B_EKN = layer.w1_EFD.transpose(1, 2) if transposed else layer.w2_EDF
    A_RK = layer.x_RD
    generator = torch.Generator().manual_seed(1)
    grad_C_RN = torch.randn(rows, HIDDEN_DIM, generator=generator).to(device, dtype)
    return ProductCase(A_RK, B_EKN, layer.num_tokens_per_expert_E.cumsum(0), grad_C_RN)


def plain_product(A_RK: torch.Tensor, B_EKN: torch.Tensor, offs_E: torch.Tensor) -> torch.Tensor:
    """The grouped product as one would write it on a blackboard; tail rows are zero."""
    ends = [0, *offs_E.tolist()]
    products = [A_RK[i:j] @ B_KN for (i, j), B_KN in zip(pairwise(ends), B_EKN, strict=True)]
    products.append(A_RK.new_zeros(len(A_RK) - ends[-1], B_EKN.shape[2]))
    # Adds zero. Without experts, what remains is then still a function of both.
    return torch.cat(products) + A_RK[:0].sum() + B_EKN[:0].sum()


def run_product(grouped_mm: Callable, case: ProductCase) -> dict[str, torch.Tensor]:
    """Output and the two gradients of a grouped product."""
    A_RK, B_EKN = (tensor.detach().requires_grad_() for tensor in (case.A_RK, case.B_EKN))
    C_RN = grouped_mm(A_RK, B_EKN, case.offs_E)
    grad_A_RK, grad_B_EKN = torch.autograd.grad(C_RN, (A_RK, B_EKN), case.grad_C_RN)
    return {"C": C_RN.detach(), "grad_A": grad_A_RK, "grad_B": grad_B_EKN}


def assert_within(
    values: dict[str, torch.Tensor], true: dict[str, torch.Tensor], bounds: dict[str, float]
) -> None:
    """Every tensor is within its bound of the truth; NaN is not."""
    for name, value in values.items():
        error = relative_error(value, true[name])
        assert error <= bounds[name], f"{name}: relative error {error:.3g} > {bounds[name]:.3g}"


def assert_same_bits(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    """The same values everywhere; NaN equals NaN."""
    for name, value in first.items():
        same = torch.equal(value.nan_to_num(nan=-7e3), second[name].nan_to_num(nan=-7e3))
        assert same, f"{name}: not the same bits"


def new_memory_holds_nan(request: pytest.FixtureRequest) -> Iterator[None]:
    """So that an element that nobody writes shows, whatever the memory held before. On the CPU.

    A module makes an autouse fixture of this, and of the next.
    """
    device = getattr(request.node, "callspec", None) and request.node.callspec.params.get("device")
    torch.use_deterministic_algorithms(device == "cpu", warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def auto_chooses_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever is chosen, the numbers have to be right and the promises kept."""
    monkeypatch.setattr(tuning, "_TURNS", 1)


def checkpointing(selective: bool) -> dict[str, Callable]:
    """What ``checkpoint`` takes, for the whole function or as a trainer's selective one."""
    if not selective:
        return {}
    return {"context_fn": partial(create_selective_checkpoint_contexts, _save_products)}


def _save_products(ctx, op, *args, **kwargs) -> CheckpointPolicy:
    """Keep products, recompute the rest."""
    expensive = any(word in str(op) for word in ("mm", "ffn", "routed"))
    return CheckpointPolicy.MUST_SAVE if expensive else CheckpointPolicy.PREFER_RECOMPUTE
