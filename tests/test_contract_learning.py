"""The compute contract where some experts are frozen: their gradients are zeros, and cost nothing.

Runs with torch alone, on the CPU and on every accelerator that is present.
"""

from __future__ import annotations

import dataclasses
from functools import partial

import pytest
import torch
from contract_cases import (
    DIM,
    HIDDEN_DIM,
    PATTERNS,
    ROUTINGS,
    assert_same_bits,
    assert_within,
    leaves,
    make_case,
    make_routed_case,
    over_backends,
    over_devices,
    over_installed,
    usable,
)
from torch.utils._python_dispatch import TorchDispatchMode

from ezpz_moe.compute import get_backend, tuning
from ezpz_moe.compute.autograd import KernelBackend
from ezpz_moe.compute.backends import for_loop
from ezpz_moe.compute.reference import LayerCase, error_bounds, run, truth

CASES = {
    "uneven": lambda device: make_case(PATTERNS["uneven"], device),
    "empty_middle": lambda device: make_case(PATTERNS["empty_middle"], device),
    "tail_and_empty_last": lambda device: make_case(PATTERNS["tail_and_empty_last"], device),
    "relu2_with_biases": lambda device: make_case(
        PATTERNS["tail"], device, activation="relu2", biased=True
    ),
    "routed": lambda device: make_routed_case(ROUTINGS["uneven"], device),
    "routed_tail": lambda device: make_routed_case(ROUTINGS["tail"], device),
    "routed_with_biases": lambda device: make_routed_case(ROUTINGS["cut"], device, biased=True),
}
TRAINED = torch.tensor([False, True, True, False])
over_cases = pytest.mark.parametrize("make", CASES.values(), ids=CASES)


@pytest.fixture(autouse=True)
def _auto_chooses_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "_TURNS", 1)


def _entry(case: LayerCase, name: str, device: str):
    backend = usable(name, device, torch.float32)
    return backend.routed if hasattr(case, "scores_TK") else backend.ffn


def _of_parameters(case: LayerCase) -> tuple[str, ...]:
    return tuple(name for name in case.names if name[5:7] in ("w1", "w2", "w3", "b1", "b2", "b3"))


@over_devices
@over_cases
@over_backends
def test_frozen_experts_have_gradients_of_zeros(name: str, make, device: str) -> None:
    """And what else there is has the bits that it has when all learn."""
    case = make(device)
    entry = _entry(case, name, device)
    found, everything = run(partial(entry, trained_E=TRAINED), case), run(entry, case)
    true, bounds = truth(case), error_bounds(case, truth(case))
    of_parameters = _of_parameters(case)
    assert len(of_parameters) >= 3
    for each in of_parameters:
        assert true[each][~TRAINED].any()
        true[each][~TRAINED] = 0
        assert not found[each][~TRAINED].any()
    assert_within(found, true, bounds)
    others = {each: found[each] for each in case.names if each not in of_parameters}
    assert_same_bits(others, everything)


@over_devices
@pytest.mark.parametrize("make", [CASES["uneven"], CASES["routed_tail"]], ids=["ffn", "routed"])
@over_backends
def test_frozen_parameters_have_no_gradient(name: str, make, device: str) -> None:
    case = make(device)
    entry = _entry(case, name, device)
    inputs = leaves(case)
    parameters = sum(each is not None for each in case.parameters)
    for leaf in inputs[:parameters]:
        leaf.requires_grad_(False)
    case.apply(entry, *inputs).backward(case.grad_output)
    assert [leaf.grad is None for leaf in inputs[:parameters]] == [True] * parameters
    everything = run(entry, case)
    names = case.names[1 + parameters :]
    gradients = {each: leaf.grad for each, leaf in zip(names, inputs[parameters:], strict=True)}
    assert_same_bits(gradients, everything)


class _Products(TorchDispatchMode):
    """Adds up the multiplications of matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.multiplications = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        product = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.bmm):
            self.multiplications += product.numel() * args[0].shape[-1]
        if func.overloadpacket is torch.ops.aten.addmm_:
            self.multiplications += product.numel() * args[1].shape[-1]
        return product


@pytest.mark.parametrize(("trained_E", "rows"), [(None, 45), (TRAINED, 25), (torch.empty(0), 0)])
def test_what_is_frozen_is_not_computed(trained_E: torch.Tensor | None, rows: int) -> None:
    """Backward: three products of all rows, and one of each weight and of the rows that learn."""
    case = make_case(PATTERNS["uneven"])
    compute = get_backend("for_loop").compute
    trained_E = trained_E if trained_E is None else trained_E.bool()
    inputs = (*case.parameters, case.x_RD, case.num_tokens_per_expert_E, trained_E)
    _, *saved = compute("ffn", *inputs, "swiglu")
    with _Products() as counted:
        compute("ffn_backward", case.grad_y_RD, *inputs, *saved, "swiglu")
    assert counted.multiplications == DIM * HIDDEN_DIM * 3 * (45 + rows)


@pytest.mark.parametrize("make", [CASES["uneven"], CASES["routed_tail"]], ids=["ffn", "routed"])
def test_a_frozen_layer_computes_no_gradient_of_a_parameter(
    make, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make("cpu")
    asked = []

    def watched(groups, left, right, like_EMN: torch.Tensor) -> torch.Tensor:
        asked.append(like_EMN)
        return torch.zeros_like(like_EMN)

    monkeypatch.setattr(for_loop._Loop, "weight_gradient", watched)
    for learns, expected in ((True, 3), (False, 0)):
        inputs = leaves(case)
        for leaf in inputs[:3]:
            leaf.requires_grad_(learns)
        asked.clear()
        case.apply(_entry(case, "for_loop", "cpu"), *inputs).backward(case.grad_output)
        assert len(asked) == expected


def test_a_capacity_stays_that_of_all_rows() -> None:
    """What was dropped in forward has no gradient, whoever learns."""
    backend = get_backend("batched_mm_capacity(capacity_factor=1.0)")
    case = make_case(PATTERNS["uneven"])
    everything = run(backend.ffn, case)
    found = run(partial(backend.ffn, trained_E=TRAINED), case)
    for each in _of_parameters(case):
        everything[each][~TRAINED] = 0
    assert_same_bits(found, everything)


@over_devices
@over_installed
def test_a_compiled_layer_freezes_the_same(name: str, device: str) -> None:
    case = make_case(PATTERNS["uneven"], device)
    backend = usable(name, device, torch.float32)
    if not isinstance(backend, KernelBackend):
        pytest.skip(f"{name} composes torch's own operators")
    compiled = torch.compile(backend.ffn, fullgraph=True, backend="aot_eager")
    for trained_E in (TRAINED, ~TRAINED):
        with torch._dynamo.config.patch(error_on_recompile=trained_E is not TRAINED):
            found = run(partial(compiled, trained_E=trained_E), case)
        assert_same_bits(run(partial(backend.ffn, trained_E=trained_E), case), found)


@pytest.mark.parametrize(
    ("trained_E", "message"),
    [
        (torch.ones(3, dtype=torch.bool), "trained_E must be bool and of 4 experts"),
        (torch.ones(4), "not torch.float32"),
    ],
)
def test_a_wrong_choice_is_named(trained_E: torch.Tensor, message: str) -> None:
    case = dataclasses.replace(make_case(PATTERNS["uneven"]))
    with pytest.raises(ValueError, match=message):
        run(partial(get_backend("for_loop").ffn, trained_E=trained_E), case)
