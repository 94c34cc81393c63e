"""The ``npu`` backend through a stand-in for ``torch_npu.npu_grouped_matmul``.

No NPU is needed. The stand-in has the documented signature, refuses what the documentation refuses
and computes with torch on the CPU. What is not documented it answers with NaN, so that relying on
it shows.
"""

from __future__ import annotations

import importlib.machinery
import subprocess
import sys
import types

import pytest
import test_contract as contract
import test_contract_autograd as contract_autograd
import test_contract_routed as contract_routed
import test_contract_routed_autograd as contract_routed_autograd
import torch
from contract_cases import (
    PATTERNS,
    ROUTINGS,
    assert_same_bits,
    make_case,
    square,
)

from ezpz_moe.compute import get_backend
from ezpz_moe.compute.backends.npu import Npu
from ezpz_moe.compute.reference import run

CPU = torch.device("cpu")
TAKEN = (torch.float32, torch.bfloat16, torch.float16)

over_options = pytest.mark.parametrize("name", ["npu", "npu(recompute=true)"])


def npu_grouped_matmul(
    x, weight, *, bias=None, scale=None, offset=None, antiquant_scale=None, antiquant_offset=None,
    per_token_scale=None, group_list=None, activation_input=None, activation_quant_scale=None,
    activation_quant_offset=None, split_item=0, group_type=-1, group_list_type=0, act_type=0,
    output_dtype=None, tuning_config=None,
):  # fmt: skip
    """The documented function for one x, one weight and a tensor of offsets."""
    (x,), (weight,) = x, weight
    assert x.dtype == weight.dtype
    assert x.dtype in TAKEN
    assert x.numel()
    assert weight.numel()
    assert split_item in (2, 3), "0 and 1 return a list of as many results as weights"
    assert group_list_type == 0
    assert group_list.dtype == torch.int64
    assert group_list.dim() == 1
    assert len(group_list) <= 1024
    ends = group_list.tolist()
    assert ends[0] >= 0
    assert ends == sorted(ends)
    rows = list(map(slice, [0, *ends], ends))
    if group_type == 0:
        return [_by_rows(x, weight, rows)]
    assert group_type == 2, "1 is not supported, -1 takes no group_list"
    return [_by_terms(x, weight, rows)]


def _by_rows(x: torch.Tensor, weight: torch.Tensor, rows: list[slice]) -> torch.Tensor:
    assert x.is_contiguous(), "x cannot be transposed"
    assert weight.dim() == 3
    assert weight.is_contiguous() or weight.transpose(1, 2).is_contiguous()
    assert len(weight) == len(rows)
    assert rows[-1].stop == len(x), "the last offset has to be the rows of x"
    return torch.cat([x[mine] @ matrix for mine, matrix in zip(rows, weight, strict=True)])


def _by_terms(x: torch.Tensor, weight: torch.Tensor, rows: list[slice]) -> torch.Tensor:
    assert x.T.is_contiguous(), "x has to be transposed"
    assert weight.dim() == 2
    assert weight.is_contiguous(), "weight cannot be transposed"
    assert rows[-1].stop == x.shape[1] == len(weight)
    result = x.new_full((len(rows), len(x), weight.shape[1]), torch.nan)
    for mine, matrix in zip(rows, result, strict=True):
        if mine.stop > mine.start:  # of a group without terms nothing is said
            torch.mm(x[:, mine], weight[mine], out=matrix)
    return result


@pytest.fixture
def torch_npu(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """The stand-in as an installed torch_npu, and a backend that takes the CPU for an NPU."""
    module = types.ModuleType("torch_npu")
    module.__spec__ = importlib.machinery.ModuleSpec("torch_npu", None)
    module.npu_grouped_matmul = npu_grouped_matmul
    monkeypatch.setitem(sys.modules, "torch_npu", module)
    return module


@pytest.fixture
def _on_the_cpu(torch_npu: types.ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Npu, "_why_not", lambda self, device, dtype, dims: [])


@pytest.mark.usefixtures("_on_the_cpu")
class TestNumerics:
    """The contract's own tests, called with the stand-in in place."""

    @pytest.mark.parametrize("name", ["npu", "npu(recompute=true)"])
    def test_numbers(self, name: str) -> None:
        """A square for the FFN, and one for each layout of a product."""
        for case in square(name, "cpu", TAKEN):
            contract.test_ffn_equals_float64(*case)
        for shift, transposed in ((1, False), (2, True)):
            for case in square(name, "cpu", TAKEN, shift=shift):
                contract.test_grouped_mm_equals_float64(*case, transposed)

    @over_options
    def test_routed_layers(self, name: str) -> None:
        for number, routing in enumerate(ROUTINGS):
            dtype = TAKEN[number % len(TAKEN)]
            contract_routed.test_routed_equals_float64(
                name, "cpu", (dtype, dtype, torch.float32), routing
            )
        contract_routed.test_routed_takes_any_strides(name, 1, "cpu")

    @contract.over_strides
    def test_strides(self, shift: int) -> None:
        contract.test_ffn_takes_any_strides("npu", shift, "cpu")
        contract.test_grouped_mm_takes_any_strides("npu", shift, "cpu")

    def test_strides_of_counts_and_offsets(self) -> None:
        contract.test_counts_and_offsets_take_any_strides("npu", "cpu")

    def test_an_expanded_gradient(self) -> None:
        contract.test_an_expanded_gradient_is_taken("npu", "cpu")

    @over_options
    def test_a_rerun_gives_the_same_bits(self, name: str) -> None:
        contract.test_a_rerun_gives_the_same_bits(name, torch.float32, "cpu")

    @over_options
    def test_inputs_are_not_changed(self, name: str) -> None:
        contract.test_inputs_are_not_changed(name, "cpu")

    @pytest.mark.parametrize("operator", ["ffn", "ffn_backward", "mm", "mm_backward"])
    def test_operators_keep_torchs_rules(self, operator: str) -> None:
        contract_autograd.test_operators_keep_torchs_rules("npu", operator, "cpu")

    @pytest.mark.parametrize("operator", ["routed", "routed_output", "routed_backward"])
    def test_operators_of_a_routed_layer_keep_torchs_rules(self, operator: str) -> None:
        contract_routed_autograd.test_operators_keep_torchs_rules("npu", operator, "cpu")

    def test_saved_rows_of_the_tail(self) -> None:
        contract_routed_autograd.test_backward_takes_whatever_stands_in_saved_rows_of_the_tail(
            "npu", "cpu"
        )
        contract_autograd.test_backward_takes_whatever_stands_in_saved_rows_of_the_tail(
            "npu", "cpu"
        )

    def test_recomputing_gives_the_same_bits(self) -> None:
        layer = make_case(PATTERNS["tail"])
        saved, recomputed = get_backend("npu"), get_backend("npu(recompute=true)")
        assert_same_bits(run(saved.ffn, layer), run(recomputed.ffn, layer))


def test_weights_are_never_copied(torch_npu: types.ModuleType) -> None:
    """Forward and backward read the same storage, through a transposed view where it is needed."""
    layer = make_case(PATTERNS["uneven"])
    storages = {
        tensor.untyped_storage().data_ptr(): name
        for name, tensor in vars(layer).items()
        if name.startswith("w")
    }
    read = []

    def watched(x, weight, **options):
        if options["group_type"] == 0:
            read.append(storages.get(weight[0].untyped_storage().data_ptr()))
        return npu_grouped_matmul(x, weight, **options)

    torch_npu.npu_grouped_matmul = watched
    run(get_backend("npu").ffn, layer)
    assert read == ["w1_EFD", "w3_EFD", "w2_EDF", "w2_EDF", "w1_EFD", "w3_EFD"]


def test_nothing_is_imported_before_the_first_product() -> None:
    program = (
        "import sys; from ezpz_moe.compute import get_backend; backend = get_backend('npu')\n"
        "import torch; backend.why_not(torch.device('cpu'), torch.float32)\n"
        "print('torch_npu' in sys.modules)"
    )
    output = subprocess.check_output([sys.executable, "-c", program], text=True)
    assert output.strip() == "False"


def test_every_reason_against_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_npu", None)
    monkeypatch.setattr("ezpz_moe.compute.backends.npu.find_spec", lambda name: None)
    place, package, dtype, dim = get_backend("npu").why_not(
        CPU, torch.float64, dims=(64, 65536, 65536)
    )
    assert "runs on Ascend NPUs, not on cpu" in place
    assert "torch_npu is not installed" in package
    assert "not torch.float64" in dtype
    assert "not 65536" in dim


def _device(kind: str) -> torch.device:
    """As an NPU's: torch knows no such device without torch_npu."""
    return types.SimpleNamespace(type=kind, index=None)  # type: ignore[return-value]


def test_an_npu_with_torch_npu_is_usable(torch_npu: types.ModuleType) -> None:
    backend = get_backend("npu")
    assert backend._why_not(_device("npu"), torch.bfloat16, (2048, 1408)) == []
    del torch_npu.npu_grouped_matmul
    (reason,) = backend._why_not(_device("npu"), torch.bfloat16, ())
    assert "has no npu_grouped_matmul: update it" in reason


def test_a_torch_npu_that_does_not_load_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ezpz_moe.compute.backends.npu.find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, "torch_npu", None)  # import then raises ImportError
    (reason,) = get_backend("npu")._why_not(_device("npu"), torch.float16, ())
    assert "torch_npu cannot be imported" in reason
