"""The compute contract, beside the numbers: autograd, compilers, checkpointing, syncs, memory.

Runs with torch alone, on the CPU and on every accelerator that is present.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from contract_cases import (
    HIDDEN_DIM,
    INSTALLED,
    PATTERNS,
    RECOMPUTING,
    RECOMPUTING_HERE,
    RUNNING,
    assert_same_bits,
    assert_within,
    checkpointing,
    leaves,
    make_case,
    make_product_case,
    over_backends,
    over_devices,
    over_installed,
    run_product,
    usable,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import (
    checkpoint,
)

from ezpz_moe.compute.arguments import NO_BIASES
from ezpz_moe.compute.autograd import KernelBackend
from ezpz_moe.compute.layouts import laid_out_like
from ezpz_moe.compute.plain import plain_loop
from ezpz_moe.compute.reference import Case, LayerCase, error_bounds, random_case, run, truth
from ezpz_moe.tools.bench.measuring import peak_bytes

UNEVEN = PATTERNS["uneven"]
TAIL = PATTERNS["tail_and_empty_last"]
GRADIENTS = ("grad_w1", "grad_w2", "grad_w3", "grad_x")


@over_devices
@over_installed
def test_gradcheck(name: str, device: str) -> None:
    """All gradients against finite differences: right without trusting our own reference."""
    backend = usable(name, device, torch.float64)
    layer = random_case([3, 0, 2], dim=4, hidden_dim=6, tail=1, dtype=torch.float64, device=device)
    layer.x_RD[-1] = 0  # finite differences cannot step from NaN
    counts_E = layer.num_tokens_per_expert_E
    *weights, x_RD = leaves(layer)
    assert torch.autograd.gradcheck(lambda *t: backend.ffn(*t, counts_E), (*weights, x_RD))
    B_EKN = weights[0].detach().transpose(1, 2).requires_grad_()
    offs_E = counts_E.cumsum(0)
    assert torch.autograd.gradcheck(lambda *t: backend.grouped_mm(*t, offs_E), (x_RD, B_EKN))


def _second_order(ffn: Callable, case: Case) -> list[torch.Tensor]:
    """Gradients of the squared norm of the gradients."""
    inputs = leaves(case)
    y_RD = ffn(*inputs, case.num_tokens_per_expert_E)
    first = torch.autograd.grad(y_RD, inputs, case.grad_y_RD, create_graph=True)
    return list(torch.autograd.grad(sum(g.square().sum() for g in first), inputs))


@over_devices
@over_backends
def test_a_second_derivative_is_refused_or_right(name: str, device: str) -> None:
    backend = usable(name, device, torch.float32)
    layer = make_case(PATTERNS["empty_middle"], device)
    if isinstance(backend, KernelBackend):
        with pytest.raises(RuntimeError, match=f"{backend.name}_ffn_backward"):
            _second_order(backend.ffn, layer)
        return
    true = _second_order(plain_loop, layer.to("cpu", torch.float64))
    for value, expected in zip(_second_order(backend.ffn, layer), true, strict=True):
        torch.testing.assert_close(value.cpu().double(), expected, rtol=1e-4, atol=1e-4)


@over_devices
@pytest.mark.parametrize("wanted", range(4), ids=GRADIENTS)
@over_backends
def test_inputs_may_be_frozen(name: str, wanted: int, device: str) -> None:
    """One input alone wants its gradient: the same bits as among all four."""
    backend = usable(name, device, torch.float32)
    layer = make_case(TAIL, device)
    inputs = leaves(layer)
    for index, leaf in enumerate(inputs):
        leaf.requires_grad_(index == wanted)
    backend.ffn(*inputs, layer.num_tokens_per_expert_E).backward(layer.grad_y_RD)
    gradients = [leaf.grad for leaf in inputs]
    assert [gradient is None for gradient in gradients] == [i != wanted for i in range(4)]
    expected = run(backend.ffn, layer)[GRADIENTS[wanted]]
    assert torch.equal(gradients[wanted], expected)


@over_devices
@over_backends
def test_without_autograd_the_same_output(name: str, device: str) -> None:
    backend = usable(name, device, torch.float32)
    layer = make_case(TAIL, device)
    with torch.no_grad():
        y_RD = backend.ffn(*leaves(layer), layer.num_tokens_per_expert_E)
    assert not y_RD.requires_grad
    assert torch.equal(y_RD, run(backend.ffn, layer)["y"])


@over_devices
@pytest.mark.parametrize(
    ("dtype", "native"),
    [
        (torch.float32, "float32"),
        # Where bfloat16 is native, products are written in place, which autocast leaves alone.
        (torch.bfloat16, "float32"),
        (torch.bfloat16, "float32,bfloat16"),
    ],
)
@over_backends
def test_autocast_changes_nothing(
    name: str, dtype: torch.dtype, native: str, device: str, cpu_with
) -> None:
    """Kernels compute in the dtype that they are given; a caller who wants another one casts."""
    cpu_with(native)
    backend = usable(name, device, dtype)
    layer = make_case(TAIL, device, dtype)
    product = make_product_case(TAIL, transposed=True, device=device, dtype=dtype)
    plain = run(backend.ffn, layer) | run_product(backend.grouped_mm, product)
    with torch.autocast(device, torch.bfloat16):
        under_autocast = run(backend.ffn, layer) | run_product(backend.grouped_mm, product)
    assert_same_bits(plain, under_autocast)


# In bfloat16: torch 2.14's stand-in for the shapes of torch._grouped_mm takes nothing wider.
@over_devices
@pytest.mark.parametrize("name", [*RUNNING, *RECOMPUTING_HERE])
def test_a_compiled_graph_serves_every_number_of_rows(name: str, device: str) -> None:
    backend = usable(name, device, torch.bfloat16)
    torch.compiler.reset()
    compiled = torch.compile(backend.ffn, backend="aot_eager", fullgraph=True, dynamic=True)
    run(compiled, make_case(UNEVEN, device, torch.bfloat16))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for pattern in (UNEVEN, TAIL, PATTERNS["balanced"]):
            layer = make_case(pattern, device, torch.bfloat16)
            true = truth(layer)
            assert_within(run(compiled, layer), true, error_bounds(layer, true))


@over_devices
@over_installed
def test_the_seam_compiles(name: str, device: str) -> None:
    backend = usable(name, device, torch.bfloat16)
    torch.compiler.reset()
    compiled = torch.compile(backend.grouped_mm, backend="aot_eager", fullgraph=True, dynamic=True)
    for pattern in (UNEVEN, TAIL):
        product = make_product_case(pattern, transposed=True, device=device, dtype=torch.bfloat16)
        expected = run_product(backend.grouped_mm, product)
        assert_same_bits(expected, run_product(compiled, product))


class _BatchedOutputs(TorchDispatchMode):
    """Collects what batched products are told to write into."""

    def __init__(self) -> None:
        super().__init__()
        self.outs: list[torch.Tensor] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.bmm.out:
            self.outs.append((kwargs or {})["out"])
        return func(*args, **(kwargs or {}))


@over_backends
def test_no_batched_product_is_written_transposed(name: str) -> None:
    """In bfloat16 on the CPU that takes two thousand times as long; gpt_oss has such weights.

    Looked at in float32, in which every CPU writes its products where they are told to be.
    """
    backend = usable(name, "cpu", torch.float32)
    if not isinstance(backend, KernelBackend):
        pytest.skip(f"{name} has no kernels of its own")
    case = make_product_case(UNEVEN, transposed=True)
    backend.compute("mm", case.A_RK, case.B_EKN, case.offs_E)  # auto chooses here
    with _BatchedOutputs() as seen:
        backend.compute("mm_backward", case.grad_C_RN, case.A_RK, case.B_EKN, case.offs_E)
    assert all(out.stride(-1) == 1 for out in seen.outs)


def _operator_arguments(case: Case) -> dict[str, tuple[torch.Tensor, ...]]:
    """Arguments of every operator of a backend, without tail. w1's storage is transposed."""
    w1_EFD, w2_EDF, w3_EFD, x_RD = leaves(case)
    w1_EFD = w1_EFD.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    B_EKN = w2_EDF.detach().requires_grad_()
    counts_E = case.num_tokens_per_expert_E
    offs_E = counts_E.cumsum(0)
    hidden_RF = torch.randn_like(x_RD[:, :1].expand(-1, HIDDEN_DIM), requires_grad=False)
    weights = [tensor.detach() for tensor in (w1_EFD, w2_EDF, w3_EFD)]
    rows = (x_RD.detach(), counts_E, None, hidden_RF, hidden_RF.clone())
    inputs = (w1_EFD, w2_EDF, w3_EFD, *NO_BIASES, x_RD, counts_E, None, "swiglu")
    return {
        "ffn": inputs,
        "ffn_output": inputs,
        "ffn_backward": (case.grad_y_RD, *weights, *NO_BIASES, *rows, "swiglu"),
        "mm": (x_RD, B_EKN, offs_E),
        "mm_backward": (hidden_RF, x_RD.detach(), w1_EFD.detach().transpose(1, 2), offs_E),
    }


@over_devices
@pytest.mark.parametrize("operator", ["ffn", "ffn_output", "ffn_backward", "mm", "mm_backward"])
@over_installed
def test_operators_keep_torchs_rules(name: str, operator: str, device: str) -> None:
    """Schema (nothing mutated or aliased), autograd, fake kernels with strides, AOT dispatch.

    The last is the same code for every backend, and slow.
    """
    backend = usable(name, device, torch.float32)
    if not isinstance(backend, KernelBackend):
        pytest.skip(f"{name} composes torch's own operators and registers none")
    arguments = _operator_arguments(make_case(PATTERNS["empty_middle"], device))
    op = getattr(torch.ops.ezpz_moe, f"{name}_{operator}").default
    checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
    if name == "for_loop":
        checks.append("test_aot_dispatch_dynamic")
    torch.library.opcheck(op, (*arguments[operator], *backend.kernel_options), test_utils=checks)


@over_devices
@over_installed
def test_backward_takes_whatever_stands_in_saved_rows_of_the_tail(name: str, device: str) -> None:
    """``auto`` may choose anew between forward and backward, and for_loop leaves them unwritten."""
    backend = usable(name, device, torch.float32)
    if not isinstance(backend, KernelBackend):
        pytest.skip(f"{name} saves what torch's own operators save")
    case = make_case(TAIL, device)
    inputs = (*case.parameters, case.x_RD, case.num_tokens_per_expert_E, None)
    _, gate_RF, up_RF = backend.compute("ffn", *inputs, "swiglu")

    def gradients() -> tuple[torch.Tensor, ...]:
        return backend.compute("ffn_backward", case.grad_y_RD, *inputs, gate_RF, up_RF, "swiglu")

    expected = gradients()
    for saved_RF in (gate_RF, up_RF):
        saved_RF[case.num_tokens_per_expert_E.sum() :] = torch.nan
    assert all(map(torch.equal, gradients(), expected))


@over_devices
@pytest.mark.parametrize("selective", [False, True], ids=("full", "selective"))
@over_backends
def test_activation_checkpointing_gives_the_same_bits(
    name: str, selective: bool, device: str
) -> None:
    backend = usable(name, device, torch.float32)

    def checkpointed(*args: torch.Tensor) -> torch.Tensor:
        return checkpoint(backend.ffn, *args, use_reentrant=False, **checkpointing(selective))

    layer = make_case(TAIL, device)
    assert_same_bits(run(backend.ffn, layer), run(checkpointed, layer))


@pytest.mark.parametrize("name", [*INSTALLED, *RECOMPUTING])
def test_meta_tensors_have_no_values_to_read(name: str) -> None:
    """``host_syncs = False`` is a promise that the counts stay where they are."""
    backend = usable(name, "meta", torch.bfloat16)
    if backend.host_syncs:
        pytest.skip(f"{name} says that it reads the counts on the host")
    layer = make_case(UNEVEN, "cpu", torch.bfloat16)
    inputs = [leaf.detach().to("meta").requires_grad_() for leaf in leaves(layer)]
    y_RD = backend.ffn(*inputs, layer.num_tokens_per_expert_E.to("meta"))
    y_RD.backward(torch.empty_like(y_RD))
    assert [leaf.grad.shape for leaf in inputs] == [leaf.shape for leaf in inputs]


class HostReads:
    """How often values went from tensors to the host.

    On CUDA torch itself reports every synchronising call. Elsewhere it is counted how often
    Python asks a tensor for its values.
    """

    _DOORS = ("tolist", "item", "numpy", "__bool__", "__int__", "__index__", "__iter__")

    def __init__(self) -> None:
        self.count = 0

    @contextlib.contextmanager
    def watch(self, device: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        if device == "cuda":
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                torch.cuda.set_sync_debug_mode("warn")
                try:
                    yield
                finally:
                    torch.cuda.set_sync_debug_mode("default")
            self.count += sum("synchronizing CUDA" in str(warning.message) for warning in caught)
            return
        with monkeypatch.context() as patch:
            for door in self._DOORS:
                patch.setattr(torch.Tensor, door, self._counted(getattr(torch.Tensor, door)))
            yield

    def _counted(self, read: Callable) -> Callable:
        def counted(tensor: torch.Tensor, *args, **kwargs):
            self.count += 1
            return read(tensor, *args, **kwargs)

        return counted


@over_devices
@over_backends
def test_counts_are_copied_to_the_host_once_per_pass(
    name: str, device: str, monkeypatch: pytest.MonkeyPatch, cpu_with
) -> None:
    # Where a CPU emulates it, grouped_mm_fused reads its counts for every product, free of waiting.
    cpu_with("float32,bfloat16,float16")
    # bfloat16: in other dtypes torch._grouped_mm itself loops over the experts on CUDA
    backend = usable(name, device, torch.bfloat16)
    if device == "cpu" and not backend.host_syncs:
        pytest.skip(f"{name} never copies counts; on the CPU it looks at them, which is free there")
    expected = 1 if backend.host_syncs else 0
    layer = make_case(UNEVEN, device, torch.bfloat16)
    inputs, counts_E = leaves(layer), layer.num_tokens_per_expert_E
    backend.ffn(*inputs, counts_E).backward(layer.grad_y_RD)  # first-call set-up may sync
    forward, backward = HostReads(), HostReads()
    with forward.watch(device, monkeypatch):
        y_RD = backend.ffn(*inputs, counts_E)
    with backward.watch(device, monkeypatch):
        y_RD.backward(layer.grad_y_RD)
    if backend.name == "auto":  # those of the one that it chose: on CUDA perhaps none
        assert max(forward.count, backward.count) <= expected
    else:
        assert (forward.count, backward.count) == (expected, expected)


@over_devices
@over_backends
def test_a_cuda_graph_replays_with_other_counts(name: str, device: str) -> None:
    """Forward and backward captured once; every replay reads the counts of that moment."""
    if device != "cuda":
        pytest.skip("CUDA graphs need a CUDA device")
    backend = usable(name, device, torch.bfloat16)
    if backend.host_syncs:
        pytest.skip(f"{name} copies counts to the host, which no CUDA graph can capture")
    layer = make_case(UNEVEN, device, torch.bfloat16)
    inputs, counts_E = leaves(layer), layer.num_tokens_per_expert_E

    def step() -> tuple[torch.Tensor, ...]:
        y_RD = backend.ffn(*inputs, counts_E)
        return y_RD, *torch.autograd.grad(y_RD, inputs, layer.grad_y_RD)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # what is compiled or tuned is so before the capture
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(2):
        counts_E.copy_(counts_E.flip(0))
        graph.replay()
        for value, expected in zip(captured, step(), strict=True):
            assert torch.equal(value, expected)


def bytes_saved(compute: Callable, case: LayerCase) -> int:
    """Bytes that autograd keeps between forward and backward, every storage once."""
    saved: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        case.apply(compute, *leaves(case))
    return sum(saved.values())


@over_devices
@pytest.mark.parametrize("pattern", ["balanced", "one_hot"])
@over_backends
def test_memory_held_for_backward(name: str, pattern: str, device: str) -> None:
    """The inputs and two [R, F], whatever the skew, or the inputs alone: no padding is kept."""
    backend = usable(name, device, torch.float32)
    if not isinstance(backend, KernelBackend):
        pytest.skip(f"{name} composes torch's own operators, whose autograd saves what it wants")
    case = make_case(PATTERNS[pattern], device)
    inputs = (case.w1_EFD, case.w2_EDF, case.w3_EFD, case.x_RD, case.num_tokens_per_expert_E)
    rows = len(case.x_RD)
    kept = 0 if backend.recompute else 2 * rows * HIDDEN_DIM
    expected = sum(tensor.nbytes for tensor in inputs) + kept * case.x_RD.itemsize
    assert bytes_saved(backend.ffn, case) == expected


def test_a_gradient_that_lies_right_needs_no_second_one() -> None:
    gradient, model = torch.ones(4, 8, 16), torch.zeros(4, 8, 16)
    assert laid_out_like(gradient, model) is gradient
    assert peak_bytes(lambda: laid_out_like(gradient, model), torch.device("cpu")) == 0
    transposed = model.transpose(1, 2).contiguous().transpose(1, 2)
    assert laid_out_like(gradient, transposed).stride() == transposed.stride()
