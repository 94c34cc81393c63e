"""A side stream and the current one wait for each other where one reads the other's tensors.

On a stand-in of a device: no test claims anything of a real one.
"""

import pytest
import torch
from stream_cases import Device

from ezpz_moe.compute import side_stream
from ezpz_moe.compute.side_stream import SideStream, has_streams


@pytest.fixture
def device(monkeypatch) -> Device:
    return Device(monkeypatch)


WEIGHT = torch.ones(4, 4, requires_grad=True)


def sum_of_both(device: Device, *, joins: bool = True):
    """``exp(x) @ WEIGHT`` on the side, ``sin(x)`` on the current stream, and their sum."""
    side = SideStream(device)
    x = torch.ones(3, 4) * 2
    started = side.start(lambda x: x.exp() @ WEIGHT, x, [WEIGHT])
    beside = x.sin()
    is_beside = not any(stream.name == "side" for stream in device.main.done)
    return beside + (side.join(started) if joins else started), started, is_beside


def test_all_that_is_read_is_there_and_kept(device):
    with device:
        out, _, is_beside = sum_of_both(device)
    assert out.equal(torch.full((3, 4), 2.0).exp() @ WEIGHT + torch.tensor(2.0).sin())
    assert ("side", "aten::mm") in device.operators
    assert ("main", "aten::sin") in device.operators
    assert is_beside  # the current stream has waited for nothing yet
    assert not device.races
    assert not device.unrecorded()
    assert device.current_stream() is device.main


def test_the_stand_in_sees_what_is_not_awaited(device):
    with device:
        sum_of_both(device, joins=False)
    assert device.races == [("main", "aten::add.Tensor")]
    assert len(device.unrecorded()) == 1


def test_gradients_of_parameters_are_added_up_on_the_current_stream(device, monkeypatch):
    """By a node that is made there, and is still the one when the side stream names it."""

    def noted(parameter):
        edge = torch.autograd.graph.get_gradient_edge(parameter)
        edge.node.metadata["stream"] = device.current_stream().name
        return edge

    monkeypatch.setattr(side_stream, "get_gradient_edge", noted)
    _, started, _ = sum_of_both(device)
    adds_up = next(node for node, _ in started.grad_fn.next_functions if node is not None)
    assert adds_up.name() == "torch::autograd::AccumulateGrad"
    assert adds_up.metadata["stream"] == "main"


def test_without_gradients_there_is_nothing_to_add_up(device):
    with torch.no_grad():
        out, _, _ = sum_of_both(device)
    assert not out.requires_grad


@pytest.mark.parametrize(
    ("device_type", "expected"),
    [("cuda", True), ("xpu", True), ("cpu", False), ("mps", False), ("meta", False)],
)
def test_which_devices_have_streams(device_type, expected):
    assert has_streams(device_type) == expected


def test_a_cpu_has_no_side_stream():
    assert side_stream.side_stream(torch.device("cpu")) is None
