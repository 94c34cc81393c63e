"""The contract of ``routed``, beside the numbers: autograd, compilers, checkpointing, memory.

Runs with torch alone, on the CPU and on every accelerator that is present.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial

import pytest
import torch
from contract_cases import (
    HIDDEN_DIM,
    INSTALLED,
    RECOMPUTING,
    ROUTINGS,
    assert_same_bits,
    assert_within,
    auto_chooses_at_once,
    checkpointing,
    leaves,
    make_routed_case,
    over_backends,
    over_devices,
    over_installed,
    usable,
)
from test_contract_autograd import HostReads, bytes_saved
from torch.utils.checkpoint import checkpoint

from ezpz_moe.compute import get_backend
from ezpz_moe.compute.arguments import NO_BIASES
from ezpz_moe.compute.autograd import KernelBackend, Operators
from ezpz_moe.compute.reference import (
    RoutedCase,
    error_bounds,
    random_routed_case,
    relative_error,
    run,
    truth,
)
from ezpz_moe.tools.bench.measuring import peak_bytes

UNEVEN, CUT, TAIL = ROUTINGS["uneven"], ROUTINGS["cut"], ROUTINGS["tail"]

_at_once = pytest.fixture(autouse=True)(auto_chooses_at_once)


def with_routed_kernels(name: str, device: str, dtype: torch.dtype) -> KernelBackend:
    """The backend, or a skip where ``routed`` is composed."""
    backend = usable(name, device, dtype)
    if not isinstance(backend, KernelBackend):
        pytest.skip(f"{name} composes a routed layer")
    return backend


@over_devices
@over_installed
def test_gradcheck(name: str, device: str) -> None:
    """All gradients against finite differences: right without trusting our own reference."""
    backend = usable(name, device, torch.float64)
    ids = [(0, 3), (2, 0), (2, 2)]
    case = random_routed_case(
        ids,
        num_experts=3,
        top_k=2,
        num_rows=5,
        dim=4,
        hidden_dim=6,
        dtype=torch.float64,
        device=device,
    )
    assert torch.autograd.gradcheck(partial(case.apply, backend.routed), leaves(case))


def _second_order(routed: Callable, case: RoutedCase) -> tuple[torch.Tensor, ...]:
    """Gradients of the squared norm of the gradients."""
    inputs = leaves(case)
    out_TD = case.apply(routed, *inputs)
    first = torch.autograd.grad(out_TD, inputs, case.grad_out_TD, create_graph=True)
    return torch.autograd.grad(sum(each.square().sum() for each in first), inputs)


@over_devices
@over_backends
def test_a_second_derivative_is_refused_or_right(name: str, device: str) -> None:
    backend = usable(name, device, torch.float32)
    case = make_routed_case(ROUTINGS["idle_experts"], device)
    if isinstance(backend, KernelBackend):
        with pytest.raises(RuntimeError, match=f"{backend.name}_(routed|ffn)_backward"):
            _second_order(backend.routed, case)
        return
    true = _second_order(case.plains[0], case.to("cpu", torch.float64))
    for value, expected in zip(_second_order(backend.routed, case), true, strict=True):
        assert relative_error(value, expected) <= 1e-5


@over_devices
@pytest.mark.parametrize("wanted", range(5))
@over_installed
def test_inputs_may_be_frozen(name: str, wanted: int, device: str) -> None:
    """One input alone wants its gradient: the same bits as among all five."""
    backend = usable(name, device, torch.float32)
    case = make_routed_case(CUT, device)
    inputs = leaves(case)
    for index, leaf in enumerate(inputs):
        leaf.requires_grad_(index == wanted)
    out_TD = case.apply(backend.routed, *inputs)
    out_TD.backward(case.grad_out_TD)
    gradients = [leaf.grad for leaf in inputs]
    assert [gradient is None for gradient in gradients] == [i != wanted for i in range(5)]
    expected = run(backend.routed, case)
    assert torch.equal(out_TD, expected["out"])
    assert torch.equal(gradients[wanted], expected[case.names[1 + wanted]])


@over_devices
@pytest.mark.parametrize("native", ["float32", "float32,bfloat16"])
@over_installed
def test_autocast_changes_nothing(name: str, native: str, device: str, cpu_with) -> None:
    cpu_with(native)
    backend = usable(name, device, torch.bfloat16)
    case = make_routed_case(CUT, device, torch.bfloat16, scores_dtype=torch.float32)
    plain = run(backend.routed, case)
    with torch.autocast(device, torch.bfloat16):
        assert_same_bits(plain, run(backend.routed, case))


# Of our own: compiling takes seconds, and the operators of all backends are built by the same code.
@over_devices
@pytest.mark.parametrize("name", ["for_loop", "for_loop(recompute=true)", "grouped_mm", "auto"])
def test_a_compiled_graph_serves_every_number_of_tokens_and_rows(name: str, device: str) -> None:
    backend = usable(name, device, torch.bfloat16)
    torch.compiler.reset()
    compiled = torch.compile(backend.routed, backend="aot_eager", fullgraph=True, dynamic=True)
    run(compiled, make_routed_case(ROUTINGS["idle_experts"], device, torch.bfloat16))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for routing in (ROUTINGS["repeated"], CUT, TAIL):
            case = make_routed_case(routing, device, torch.bfloat16)
            true = truth(case)
            assert_within(run(compiled, case), true, error_bounds(case, true))


def _operator_arguments(case: RoutedCase) -> dict[str, tuple]:
    """Arguments of every operator. w1's storage is transposed; rows are in float16."""
    w1_EFD, w2_EDF, w3_EFD, x_TD, scores_TK = leaves(case)
    w1_EFD = w1_EFD.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    inputs = (w1_EFD, w2_EDF, w3_EFD, *NO_BIASES, x_TD, scores_TK)
    routing = (case.ids_TK, case.num_tokens_per_expert_E, None, case.num_rows)
    gate_RF, up_RF = (
        torch.randn(case.num_rows, HIDDEN_DIM, device=x_TD.device, dtype=torch.float16)
        for _ in range(2)
    )
    order_R = torch.argsort(case.ids_TK.flatten(), stable=True)[: case.num_rows]
    kept = (case.num_tokens_per_expert_E, None, gate_RF, up_RF, order_R)
    return {
        "routed": (*inputs, *routing, torch.float16, "swiglu"),
        "routed_output": (*inputs, *routing, torch.float16, "swiglu"),
        "routed_backward": (
            *(case.grad_out_TD, *(each if each is None else each.detach() for each in inputs)),
            *(*kept, torch.float16, "swiglu"),
        ),
    }


@over_devices
@pytest.mark.parametrize("operator", ["routed", "routed_output", "routed_backward"])
@over_installed
def test_operators_keep_torchs_rules(name: str, operator: str, device: str) -> None:
    """Schema (nothing mutated or aliased), autograd, fake kernels with strides, AOT dispatch.

    The last is the same code for every backend, and slow.
    """
    backend = with_routed_kernels(name, device, torch.float16)
    arguments = _operator_arguments(make_routed_case(ROUTINGS["idle_experts"], device))
    op = getattr(torch.ops.ezpz_moe, f"{name}_{operator}").default
    inputs = (*arguments[operator], *backend.kernel_options)
    checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
    if name == "for_loop":
        checks.append("test_aot_dispatch_dynamic")
    torch.library.opcheck(op, inputs, test_utils=checks)


@over_devices
@over_installed
def test_backward_takes_whatever_stands_in_saved_rows_of_the_tail(name: str, device: str) -> None:
    """``auto`` may choose anew between forward and backward, and for_loop leaves them unwritten."""
    backend = with_routed_kernels(name, device, torch.float32)
    case = make_routed_case(TAIL, device)
    counts_E = case.num_tokens_per_expert_E
    _, gate_RF, up_RF, order_R = backend.compute(
        "routed",
        *(*case.parameters, case.x_TD, case.scores_TK),
        *(case.ids_TK, counts_E, None, case.num_rows, torch.float32, "swiglu"),
    )

    def gradients() -> tuple[torch.Tensor, ...]:
        kept = (*case.parameters, case.x_TD, case.scores_TK, counts_E, None)
        kept = (*kept, gate_RF, up_RF, order_R, torch.float32, "swiglu")
        return backend.compute("routed_backward", case.grad_out_TD, *kept)

    expected = gradients()
    for saved_RF in (gate_RF, up_RF):
        saved_RF[counts_E.sum() :] = torch.nan
    assert all(map(torch.equal, gradients(), expected))


@over_devices
@over_installed
def test_rows_of_an_expert_are_in_the_order_of_tokens(name: str, device: str) -> None:
    """As the host's are: what one saves, another one's backward reads."""
    backend = with_routed_kernels(name, device, torch.float32)
    case = make_routed_case(CUT, device)
    routing = (case.ids_TK, case.num_tokens_per_expert_E, None, case.num_rows)
    tokens = (*case.parameters, case.x_TD, case.scores_TK)
    *_, order_R = backend.compute("routed", *tokens, *routing, torch.float32, "swiglu")
    ids = case.ids_TK.flatten().tolist()
    assert order_R.tolist() == sorted(range(len(ids)), key=ids.__getitem__)[: case.num_rows]


@over_devices
@pytest.mark.parametrize("selective", [False, True], ids=("full", "selective"))
@over_installed
def test_activation_checkpointing_gives_the_same_bits(
    name: str, selective: bool, device: str
) -> None:
    backend = usable(name, device, torch.float32)

    def checkpointed(*inputs: torch.Tensor, num_rows: int) -> torch.Tensor:
        routed = partial(backend.routed, num_rows=num_rows)
        return checkpoint(routed, *inputs, use_reentrant=False, **checkpointing(selective))

    case = make_routed_case(CUT, device)
    assert_same_bits(run(backend.routed, case), run(checkpointed, case))


@pytest.mark.parametrize("name", [*INSTALLED, *RECOMPUTING])
def test_meta_tensors_have_no_values_to_read(name: str) -> None:
    """``host_syncs = False`` is a promise that counts and ids stay where they are."""
    backend = usable(name, "meta", torch.bfloat16)
    if backend.host_syncs:
        pytest.skip(f"{name} says that it reads the counts on the host")
    case = make_routed_case(CUT, dtype=torch.bfloat16).to("meta", torch.bfloat16)
    inputs = [tensor.requires_grad_() for tensor in case.inputs]
    case.apply(backend.routed, *inputs).backward(case.grad_out_TD)
    assert [leaf.grad.shape for leaf in inputs] == [leaf.shape for leaf in inputs]


@over_devices
@over_backends
def test_counts_are_copied_to_the_host_once_per_pass(
    name: str, device: str, monkeypatch: pytest.MonkeyPatch, cpu_with
) -> None:
    cpu_with("float32,bfloat16,float16")
    backend = usable(name, device, torch.bfloat16)
    if device == "cpu" and not backend.host_syncs:
        pytest.skip(f"{name} never copies counts; on the CPU it looks at them, which is free there")
    case = make_routed_case(UNEVEN, device, torch.bfloat16)
    run(backend.routed, case)  # first-call set-up may sync
    inputs, forward, backward = leaves(case), HostReads(), HostReads()
    with forward.watch(device, monkeypatch):
        out_TD = case.apply(backend.routed, *inputs)
    with backward.watch(device, monkeypatch):
        out_TD.backward(case.grad_out_TD)
    expected = 1 if backend.host_syncs else 0
    if backend.name == "auto":  # those of the one that it chose: on CUDA perhaps none
        assert max(forward.count, backward.count) <= expected
    else:
        assert (forward.count, backward.count) == (expected, expected)


@over_devices
@pytest.mark.parametrize("routing", ["balanced", "one_hot", "cut"])
@over_backends
def test_memory_held_for_backward(name: str, routing: str, device: str) -> None:
    """The inputs, the order and two [R, F], whatever the skew: no rows of x or y, no padding."""
    backend = with_routed_kernels(name, device, torch.float32)
    case = make_routed_case(ROUTINGS[routing], device)
    inputs = (*case.inputs, case.num_tokens_per_expert_E)
    order = case.num_rows * torch.int64.itemsize
    kept = 0 if backend.recompute else 2 * case.num_rows * HIDDEN_DIM * case.x_TD.itemsize
    expected = sum(tensor.nbytes for tensor in inputs) + order + kept
    assert bytes_saved(backend.routed, case) == expected


@over_devices
@over_backends
def test_weights_are_cast_for_the_products_alone(name: str, device: str) -> None:
    """The bits of weights that the caller casts, without their copies in memory until backward."""
    backend = with_routed_kernels(name, device, torch.bfloat16)
    case = make_routed_case(ROUTINGS["idle_experts"], device)
    inside = partial(backend.routed, dtype=torch.bfloat16)

    def outside(*arguments: torch.Tensor, **rows: int) -> torch.Tensor:
        weights, others = arguments[:3], arguments[3:]
        return backend.routed(*(each.bfloat16() for each in weights), *others, **rows)

    found = run(inside, case)
    # Who multiplies in float32 has these gradients in float32: a caller's are rounded once more.
    of_weights = {
        each: found[each].bfloat16().float() for each in ("grad_w1", "grad_w2", "grad_w3")
    }
    assert_same_bits(found | of_weights, run(outside, case))
    inputs = (*case.inputs, case.num_tokens_per_expert_E)
    order = case.num_rows * torch.int64.itemsize
    kept = 0 if backend.recompute else 2 * case.num_rows * HIDDEN_DIM * torch.bfloat16.itemsize
    expected = sum(tensor.nbytes for tensor in inputs) + order + kept
    assert bytes_saved(inside, case) == expected


@pytest.mark.parametrize("name", ["for_loop", "batched_mm_padded", "grouped_mm_fused"])
def test_a_cpu_holds_no_second_stack_of_weights(name: str) -> None:
    """Beyond the gradients of the weights, a step has room for less than one stack in bfloat16."""
    case = random_routed_case(
        [(expert, expert + 1) for expert in range(15)],
        num_experts=16,
        top_k=2,
        dim=256,
        hidden_dim=256,
    )
    routed = partial(usable(name, "cpu", torch.bfloat16).routed, dtype=torch.bfloat16)
    inputs, stack = leaves(case), case.w1_EFD.numel() * torch.bfloat16.itemsize

    def step() -> tuple[torch.Tensor, ...]:
        out_TD = case.apply(routed, *inputs)
        return torch.autograd.grad(out_TD, inputs, case.grad_out_TD)

    of_gradients = 3 * case.w1_EFD.nbytes
    assert of_gradients < peak_bytes(step, torch.device("cpu")) < of_gradients + stack


def test_kernels_of_another_package_may_be_annotated_in_strings_and_name_their_arguments() -> None:
    """As every module with ``from __future__ import annotations``, this one too."""
    own = get_backend("for_loop").operators.kernels

    def ffn(
        a: torch.Tensor,
        b: torch.Tensor,
        c: torch.Tensor | None,
        d: torch.Tensor | None,
        e: torch.Tensor | None,
        f: torch.Tensor | None,
        rows: torch.Tensor,
        counts: torch.Tensor,
        learns: torch.Tensor | None,
        between: str,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return own.ffn(a, b, c, d, e, f, rows, counts, learns, between)

    def routed(
        a: torch.Tensor,
        b: torch.Tensor,
        c: torch.Tensor | None,
        d: torch.Tensor | None,
        e: torch.Tensor | None,
        f: torch.Tensor | None,
        tokens: torch.Tensor,
        scores: torch.Tensor,
        ids: torch.Tensor,
        counts: torch.Tensor,
        learns: torch.Tensor | None,
        rows: int,
        kind: torch.dtype,
        between: str,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        first = (a, b, c, d, e, f)
        chosen = (ids, counts, learns)
        return own.routed(*first, tokens, scores, *chosen, rows, kind, between)

    Operators("of_another", dataclasses.replace(own, ffn=ffn, routed=routed))
    results = {
        name: len(getattr(torch.ops.ezpz_moe, f"of_another_{name}").default._schema.returns)
        for name in ("ffn", "ffn_output", "routed", "routed_output")
    }
    assert results == {"ffn": 3, "ffn_output": 1, "routed": 4, "routed_output": 2}
