"""The compute contract with other activations than SwiGLU, and with biases.

Of the product with backends, dtypes and routings each backend has a part. What does not depend on
the activation is in ``test_contract.py`` and the files beside it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from contract_cases import (
    BACKENDS,
    DEVICES,
    HIDDEN_DIM,
    PATTERNS,
    ROUTINGS,
    assert_same_bits,
    assert_within,
    auto_chooses_at_once,
    leaves,
    make_case,
    make_routed_case,
    new_memory_holds_nan,
    over_devices,
    over_installed,
    usable,
    usable_dtypes,
)
from test_contract_autograd import bytes_saved

from ezpz_moe.compute import get_backend
from ezpz_moe.compute.activations import ACTIVATIONS
from ezpz_moe.compute.arguments import Biases
from ezpz_moe.compute.autograd import KernelBackend
from ezpz_moe.compute.reference import (
    LayerCase,
    error_bounds,
    random_routed_case,
    relative_error,
    run,
    truth,
)

# Activation, and whether there are biases: every activation, and each of the four combinations of
# gate and biases.
FFNS = (
    ("clamped_swiglu", True),
    ("geglu", True),
    ("gelu", True),
    ("swiglu", True),
    ("reglu", False),
    ("relu2", True),
    ("gelu", False),
)
HALVES = (torch.bfloat16, torch.float16)
TAIL, HALF_A_TAIL = PATTERNS["tail_and_empty_last"], ROUTINGS["half_a_tail"]
UNGATED = {"activation": "relu2", "biased": True}

_nan = pytest.fixture(autouse=True)(new_memory_holds_nan)
_at_once = pytest.fixture(autouse=True)(auto_chooses_at_once)


# --- the formulas ---------------------------------------------------------------------------------


def _normal(x: float) -> float:
    """The normal distribution."""
    return (1 + math.erf(x / math.sqrt(2))) / 2


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def _clamped(gate: float, up: float) -> float:
    gate, up = min(gate, 7), max(min(up, 7), -7)
    return gate * _sigmoid(1.702 * gate) * (up + 1)


BY_HAND: dict[str, Callable[[float, float], float]] = {
    "swiglu": lambda gate, up: gate * _sigmoid(gate) * up,
    "geglu": lambda gate, up: gate * _normal(gate) * up,
    "reglu": lambda gate, up: max(gate, 0) * up,
    "clamped_swiglu": _clamped,
    "relu2": lambda gate, up: max(gate, 0) ** 2,
    "gelu": lambda gate, up: gate * _normal(gate),
}
# Both sides of every kink, but not the kinks: 0, and 7 in absolute value.
POINTS = (-9.0, -7.5, -6.5, -2.0, -0.75, -0.1, 0.1, 0.5, 1.3, 3.0, 6.5, 7.5, 9.0)


def test_every_activation_has_a_formula_by_hand() -> None:
    assert BY_HAND.keys() == ACTIVATIONS.keys()


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_formulas_and_derivatives(name: str) -> None:
    """In place and for autograd, against plain Python and central differences of it."""
    activation, by_hand = ACTIVATIONS[name], BY_HAND[name]
    gate, up = torch.cartesian_prod(*[torch.tensor(POINTS, dtype=torch.float64)] * 2).T.contiguous()
    pairs = list(zip(gate.tolist(), up.tolist(), strict=True))
    value = torch.tensor([by_hand(g, u) for g, u in pairs])
    slope_of_gate, slope_of_up = (
        torch.tensor([(by_hand(g + a, u + b) - by_hand(g - a, u - b)) for g, u in pairs]) / 2e-5
        for a, b in ((1e-5, 0), (0, 1e-5))
    )
    leaf, other = gate.clone().requires_grad_(), up.clone().requires_grad_()
    hidden = activation.hidden(leaf, other if activation.is_gated else None)
    torch.testing.assert_close(hidden.detach().float(), value)
    hidden.sum().backward()
    torch.testing.assert_close(leaf.grad.float(), slope_of_gate, atol=1e-5, rtol=1e-5)

    activated = torch.empty_like(gate)
    activation.apply(gate, activated)
    factor = activation.factor(up) if activation.factor else up if activation.is_gated else 1
    torch.testing.assert_close((activated * factor).float(), value)
    grad = torch.ones_like(gate) * factor
    activation.differentiate_(grad, gate)
    torch.testing.assert_close(grad.float(), slope_of_gate, atol=1e-5, rtol=1e-5)
    if activation.is_gated:
        torch.testing.assert_close(other.grad.float(), slope_of_up, atol=1e-5, rtol=1e-5)
        if activation.differentiate_factor_:
            activation.differentiate_factor_(activated, up)
        torch.testing.assert_close(activated.float(), slope_of_up, atol=1e-5, rtol=1e-5)
    else:
        assert not slope_of_up.any()


# --- the numbers ----------------------------------------------------------------------------------


def _parts(*, shift: int) -> Iterator[tuple]:
    """(backend, device, dtype, activation, biased): each backend with the dtypes in turn.

    ``clamped_swiglu`` in no half: whether a row is beyond its limit is then a matter of rounding.
    """
    for number, name in enumerate(BACKENDS):
        for device in DEVICES:
            dtypes = usable_dtypes(name, device)
            for i, (activation, biased) in enumerate(FFNS if dtypes else ()):
                never = HALVES if activation == "clamped_swiglu" else ()
                some = [each for each in dtypes if each not in never]
                yield name, device, some[(number + i + shift) % len(some)], activation, biased


def _words(value: object) -> str | None:
    if isinstance(value, bool):
        return "biased" if value else "unbiased"
    return str(value)[6:] if isinstance(value, torch.dtype) else None


def over_parts(shift: int) -> pytest.MarkDecorator:
    names = ("name", "device", "dtype", "activation", "biased")
    return pytest.mark.parametrize(names, list(_parts(shift=shift)), ids=_words)


def assert_right(entry: Callable, case: LayerCase) -> None:
    """Within the contract's bounds, in the dtypes of the inputs, and zero where it has to be."""
    result, true = run(entry, case), truth(case)
    assert_within(result, true, error_bounds(case, true))
    like = (case.grad_output, *case.inputs)
    assert [value.dtype for value in result.values()] == [each.dtype for each in like]
    for tensor, mask, otherwise in case.zeros():
        assert not result[tensor][mask.to(result[tensor].device)].any(), f"{tensor}: {otherwise}"


@over_parts(shift=0)
def test_ffn_of_any_activation_equals_float64(
    name: str, device: str, dtype: torch.dtype, activation: str, biased: bool
) -> None:
    case = make_case(TAIL, device, dtype, activation=activation, biased=biased)
    assert_right(usable(name, device, dtype).ffn, case)


@over_parts(shift=1)
def test_routed_of_any_activation_equals_float64(
    name: str, device: str, dtype: torch.dtype, activation: str, biased: bool
) -> None:
    scores_dtype = torch.float32 if dtype in HALVES else dtype
    case = make_routed_case(
        HALF_A_TAIL,
        device,
        dtype,
        scores_dtype=scores_dtype,
        activation=activation,
        biased=biased,
    )
    assert_right(usable(name, device, dtype).routed, case)


@over_devices
@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("routing", ["all_cut", "no_tokens", "no_experts"])
def test_without_rows_biases_have_gradients_of_zero(name: str, routing: str, device: str) -> None:
    case = make_routed_case(ROUTINGS[routing], device, **UNGATED)
    assert_right(usable(name, device, torch.float32).routed, case)


@over_devices
@over_installed
def test_nan_stays_with_its_token(name: str, device: str) -> None:
    backend = usable(name, device, torch.float32)
    case = make_routed_case(ROUTINGS["uneven"], device, **UNGATED)
    sound = run(backend.routed, case)
    x_TD = case.x_TD.clone()
    x_TD[3] = torch.nan
    result = run(backend.routed, dataclasses.replace(case, x_TD=x_TD))
    others = [token for token in range(len(x_TD)) if token != 3]
    for key in ("out", "grad_x", "grad_scores"):
        assert result[key][3].isnan().any()
        assert torch.equal(result[key][others], sound[key][others]), key


@over_devices
@over_installed
def test_a_score_times_a_bias_is_not_rounded(name: str, device: str) -> None:
    """Scores in float32 that bfloat16 would round down, by 2e-3 in the mean.

    The experts' outputs are their biases alone.
    """
    backend = usable(name, device, torch.bfloat16)
    case = make_routed_case(
        ROUTINGS["uneven"], device, torch.bfloat16, torch.float32, torch.float32, **UNGATED
    )
    grid_TK = (1 + torch.rand_like(case.scores_TK)).bfloat16().float()
    w2_EDF = torch.zeros_like(case.w2_EDF)
    case = dataclasses.replace(case, scores_TK=grid_TK + 0.45 * 2**-7, w2_EDF=w2_EDF)
    result, true = run(backend.routed, case), truth(case)
    for key in ("out", "grad_b2"):
        value = result[key].cpu().double()
        length = (torch.sum(value * true[key]) / true[key].square().sum()).item()
        assert length == pytest.approx(1, abs=1e-3), key


@over_devices
@over_installed
def test_biases_are_cast_for_the_products_alone(name: str, device: str) -> None:
    """The bits of parameters that the caller casts; b2's gradient, a sum of two, is more exact."""
    backend = usable(name, device, torch.bfloat16)
    case = make_routed_case(ROUTINGS["idle_experts"], device, activation="geglu", biased=True)

    def outside(*arguments: torch.Tensor, biases: Biases, **others) -> torch.Tensor:
        weights, rest = arguments[:3], arguments[3:]
        cast = Biases(*(each.bfloat16() for each in biases))
        return backend.routed(*(each.bfloat16() for each in weights), *rest, biases=cast, **others)

    inside = partial(backend.routed, dtype=torch.bfloat16)
    result, expected = run(inside, case), run(outside, case)
    of_b2 = result.pop("grad_b2")
    # Who multiplies in float32 has these gradients in float32: a caller's are rounded once more.
    for key in ("grad_w1", "grad_w2", "grad_w3", "grad_b1", "grad_b3"):
        result[key] = result[key].bfloat16().float()
    assert_same_bits(result, expected)
    assert relative_error(of_b2, expected["grad_b2"].double()) <= 2**-8


# --- autograd, compilers, memory ------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["clamped_swiglu", "gelu"])
def test_gradcheck(activation: str) -> None:
    """All gradients against finite differences: right without trusting our own reference."""
    case = random_routed_case(
        [(0, 3), (2, 0), (2, 2)],
        num_experts=3,
        top_k=2,
        num_rows=5,
        dim=2,
        hidden_dim=3,
        dtype=torch.float64,
        activation=activation,
        biased=True,
    )
    routed = partial(case.apply, get_backend("for_loop").routed)
    assert torch.autograd.gradcheck(routed, leaves(case))


def test_a_second_derivative_through_composed_biases() -> None:
    case = make_case(PATTERNS["empty_middle"], activation="clamped_swiglu", biased=True)

    def second(compute: Callable, case: LayerCase) -> tuple[torch.Tensor, ...]:
        inputs = leaves(case)
        first = torch.autograd.grad(
            case.apply(compute, *inputs), inputs, case.grad_output, create_graph=True
        )
        squares = sum(each.square().sum() for each in first)
        return torch.autograd.grad(squares, inputs, materialize_grads=True)  # none depends on b2

    true = second(case.plains[0], case.to("cpu", torch.float64))
    for value, expected in zip(second(get_backend("grouped_mm").ffn, case), true, strict=True):
        assert relative_error(value, expected) <= 1e-5


@over_devices
@pytest.mark.parametrize("name", ["for_loop", "grouped_mm"])
def test_a_compiled_graph_serves_every_number_of_tokens_and_rows(name: str, device: str) -> None:
    backend = usable(name, device, torch.bfloat16)
    torch.compiler.reset()
    compiled = torch.compile(backend.routed, backend="aot_eager", fullgraph=True, dynamic=True)
    run(compiled, make_routed_case(ROUTINGS["idle_experts"], device, torch.bfloat16, **UNGATED))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for routing in (ROUTINGS["repeated"], ROUTINGS["cut"]):
            assert_right(compiled, make_routed_case(routing, device, torch.bfloat16, **UNGATED))


def _operator_arguments(case: LayerCase) -> dict[str, tuple]:
    parameters = [each if each is None else each.requires_grad_() for each in case.parameters]
    tokens = (case.x_TD.requires_grad_(), case.scores_TK.requires_grad_())
    counts_E, rows, last = case.num_tokens_per_expert_E, case.num_rows, (torch.float32, "relu2")
    gate_RF, up_RF = torch.randn(rows, HIDDEN_DIM), torch.empty(rows, 0)
    order_R = torch.argsort(case.ids_TK.flatten(), stable=True)[:rows]
    inputs = [each if each is None else each.detach() for each in (*parameters, *tokens)]
    return {
        "routed": (*parameters, *tokens, case.ids_TK, counts_E, None, rows, *last),
        "routed_backward": (
            *(case.grad_out_TD, *inputs, counts_E, None, gate_RF, up_RF, order_R, *last),
        ),
    }


@pytest.mark.parametrize("operator", ["routed", "routed_backward"])
def test_operators_keep_torchs_rules(operator: str) -> None:
    """Without a gate and with biases: arguments that are None, and a list of as many gradients."""
    arguments = _operator_arguments(make_routed_case(ROUTINGS["idle_experts"], **UNGATED))[operator]
    torch.library.opcheck(getattr(torch.ops.ezpz_moe, f"for_loop_{operator}").default, arguments)


@over_devices
@over_installed
def test_without_a_gate_one_tensor_is_held_for_backward(name: str, device: str) -> None:
    backend = usable(name, device, torch.float32)
    if not isinstance(backend, KernelBackend):
        pytest.skip(f"{name} composes torch's own operators, whose autograd saves what it wants")
    case = make_case(PATTERNS["balanced"], device, **UNGATED)
    inputs = (*case.inputs, case.num_tokens_per_expert_E)
    kept = len(case.x_RD) * HIDDEN_DIM * case.x_RD.itemsize
    assert bytes_saved(backend.ffn, case) == sum(tensor.nbytes for tensor in inputs) + kept


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"activation": "silu"}, ValueError, "^activation is 'silu': must be one of swiglu, geglu"),
        ({"w3_EFD": None}, ValueError, "^w3 is missing: activation 'swiglu' has a gate$"),
        ({"activation": "gelu"}, ValueError, "^w3 must be None: activation 'gelu' has no gate$"),
        ({"b3_EF": None}, ValueError, "^b3 is missing: activation 'swiglu' has a gate$"),
        (
            {"activation": "gelu", "w3_EFD": None},
            ValueError,
            "^b3 must be None: activation 'gelu' has no gate$",
        ),
        ({"b1_EF": torch.zeros(4, 32)}, ValueError, r"^b1 has shape \(4, 32\); .* be \(4, 48\)"),
        ({"b2_ED": torch.zeros(4, 48)}, ValueError, r"^b2 has shape \(4, 48\); .* be \(4, 32\)"),
        ({"b3_EF": torch.zeros(48)}, ValueError, r"^b3 has shape \(48,\); .* be \(4, 48\)"),
        ({"b2_ED": torch.zeros(4, 32).half()}, TypeError, "^b2 is torch.float16, but w1 is"),
    ],
)
@pytest.mark.parametrize("entry", ["ffn", "routed"])
def test_a_wrong_argument_is_named(entry: str, wrong: dict, error: type, message: str) -> None:
    backend = get_backend("for_loop")
    case = (make_case if entry == "ffn" else make_routed_case)(
        (PATTERNS if entry == "ffn" else ROUTINGS)["uneven"], biased=True
    )
    with pytest.raises(error, match=message):
        run(getattr(backend, entry), dataclasses.replace(case, **wrong))
