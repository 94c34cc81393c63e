"""Shared experts on a stream of their own: order, results, what is refused, what a log says.

The order is tested on a stand-in of a device (``stream_cases``): no test claims anything of a real
one.
"""

import dataclasses
import logging

import pytest
import torch
from config_cases import config
from dialect import SINCE_2026_08
from router_cases import UPSTREAM, flat, moe_of, small_model, tokens
from stream_cases import Device
from torch.autograd.graph import get_gradient_edge
from torch.utils.checkpoint import checkpoint

from ezpz_moe.compute import side_stream
from ezpz_moe.compute.reference import relative_error
from ezpz_moe.compute.side_stream import SideStream
from ezpz_moe.config.flavors import FOLDER_VARIABLE, load_flavor
from ezpz_moe.errors import EzpzError
from ezpz_moe.hosts.detect import host
from ezpz_moe.hosts.titan import overlap_conflicts
from ezpz_moe.hosts.titan.models import model_spec
from ezpz_moe.hosts.titan.overlap_conflicts import what_it_overlaps

if SINCE_2026_08:
    pytest.skip("about the binding to torchtitan 0.3", allow_module_level=True)

D = 32
SMALL = f"""
dim = {D}
moe_hidden_dim = 48
dense_hidden_dim = 24
shared_hidden_dim = 40
n_heads = 2
kv_lora_rank = 16
qk_nope_head_dim = 8
qk_rope_head_dim = 8
v_head_dim = 8
compute_backend = "for_loop"
"""
OVERLAP = "overlap_shared_experts = true\n"
OTHERS = 'shared_gate = true\nffn_activation = "geglu"\nmoe_latent_dim = 16\n'


def flavor(folder, keys: str, like: str = 'inherits = "debugmodel"'):
    (folder / "mine.toml").write_text(f'{like}\nattention = "sdpa"\n{keys}\n')
    return load_flavor("mine", near=folder)


@pytest.fixture
def layers(request, tmp_path):
    """A layer that overlaps and the same without, in float64, with the same values."""
    more = getattr(request, "param", "")
    overlapping, plain = (
        moe_of(small_model(tmp_path, f"{SMALL}{keys}{more}")).double() for keys in (OVERLAP, "")
    )
    plain.load_state_dict(overlapping.state_dict())
    for moe in (overlapping, plain):
        moe.routed_experts.inner_experts.computed_in = torch.float64
    return overlapping, plain


def beside(layer, device: Device) -> None:
    """Have the layer's shared experts computed on a side stream of this device."""
    side = SideStream(device)
    layer.side_stream = lambda of_x: side


def results(layer, x, out) -> dict[str, torch.Tensor]:
    wanted = dict(layer.named_parameters()) | {"x": x}
    draw = torch.Generator().manual_seed(3)
    grad = torch.randn(out.shape, generator=draw, dtype=out.dtype)
    found = torch.autograd.grad(out, list(wanted.values()), grad)
    return {"out": out.detach(), **dict(zip(wanted, found, strict=True))}


class Failure(Exception):
    pass


def fail(*_) -> None:
    raise Failure


def an_input() -> torch.Tensor:
    return flat(tokens(D)).double().requires_grad_()


# Order --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layers", "recomputes"),
    [("", False), (OTHERS, True), ('routed = "composed"\n', True)],
    ids=["plain", "others", "composed"],
    indirect=["layers"],
)
def test_on_two_streams_a_layer_is_the_hosts(layers, monkeypatch, recomputes):
    """To the last bit, but for the gradient of x, whose three parts are added up in another order.

    Both ways two additions round, in float64, sums that are hardly larger than the result. Only
    forward is watched, and once more where it is recomputed: on a CPU autograd has no streams.
    """
    overlapping, plain = layers
    beside(overlapping, device := Device(monkeypatch))

    def layer(x):
        with device:
            return overlapping(x * 1)  # made on the current stream, as by the layer before

    x, same_x = an_input(), an_input()
    out = checkpoint(layer, x, use_reentrant=False) if recomputes else layer(x)
    ours, theirs = results(overlapping, x, out), results(plain, same_x, plain(same_x))
    assert device.operators.count(("main", "aten::topk")) == 1 + recomputes
    assert ours.keys() == theirs.keys()
    assert relative_error(ours.pop("x"), theirs["x"]) <= 2 * 4 * 2.0**-53
    for name, value in ours.items():
        assert value.equal(theirs[name]), name
    assert not device.races
    assert not device.unrecorded()


@pytest.mark.parametrize("layers", ["", OTHERS], ids=["plain", "others"], indirect=True)
def test_what_is_computed_where(layers, monkeypatch):
    """The FFN alone beside, once, and queued before anything else of the layer."""
    overlapping, _ = layers
    beside(overlapping, device := Device(monkeypatch))
    x = an_input()
    with device, torch.no_grad():
        overlapping(x)
    streams = [stream for stream, _ in device.operators]
    on_side = [name for stream, name in device.operators if stream == "side"]
    assert streams[0] == "side"
    assert streams.count("side") == streams.index("main")
    shared = overlapping.shared_experts
    linears = [each for each in shared.modules() if isinstance(each, torch.nn.Linear)]
    assert sum(name in ("aten::mm", "aten::addmm") for name in on_side) == len(linears)


def test_backward_begins_with_the_routed_experts(layers, monkeypatch):
    """What a checkpoint recomputes in backward is then recomputed on the current stream."""
    overlapping, _ = layers
    beside(overlapping, Device(monkeypatch))
    (routed, _), (shared, _) = overlapping(an_input()).grad_fn.next_functions
    # Autograd runs what was made last first.
    assert routed._sequence_nr() > shared._sequence_nr()


def test_gradients_of_the_ffn_are_added_up_on_the_current_stream(layers, monkeypatch):
    """As those of all that FSDP reads while backward runs."""
    overlapping, _ = layers
    beside(overlapping, device := Device(monkeypatch))
    added_up_on = []

    def noted(parameter):
        added_up_on.append((parameter, device.current_stream()))
        return get_gradient_edge(parameter)

    monkeypatch.setattr(side_stream, "get_gradient_edge", noted)
    overlapping(an_input())
    parameters = list(overlapping.shared_experts.parameters())
    assert len(added_up_on) == len(parameters)
    for (noted_one, stream), parameter in zip(added_up_on, parameters, strict=True):
        assert noted_one is parameter
        assert stream is device.main


def test_hooks_of_the_shared_experts_see_one_call(layers, monkeypatch):
    overlapping, _ = layers
    beside(overlapping, Device(monkeypatch))
    seen = []
    overlapping.shared_experts.register_forward_hook(lambda *call: seen.append(call))
    overlapping(an_input())
    assert len(seen) == 1


def test_a_failure_leaves_nothing_for_the_next_call(layers, monkeypatch):
    """As does a checkpoint, which ends its recomputation with an exception."""
    overlapping, plain = layers
    beside(overlapping, Device(monkeypatch))
    monkeypatch.setattr(overlapping.router, "forward", fail)
    x = an_input()
    with pytest.raises(Failure):
        overlapping(x)
    x = x * 2
    assert overlapping.shared_experts(x).equal(plain.shared_experts(x))


def test_on_a_cpu_all_bits_are_the_hosts(layers):
    overlapping, plain = layers
    x, same_x = an_input(), an_input()
    ours = results(overlapping, x, overlapping(x))
    theirs = results(plain, same_x, plain(same_x))
    assert all(value.equal(theirs[name]) for name, value in ours.items())


# The flavor ---------------------------------------------------------------------------------------


def test_it_costs_nothing(tmp_path):
    found, plain = flavor(tmp_path, OVERLAP), flavor(tmp_path, "")
    assert host().summarize(found) == host().summarize(plain)
    ours, theirs = (host().anatomy().anatomy(each, 16) for each in (found, plain))
    assert (ours.costs, ours.host_flops) == (theirs.costs, theirs.host_flops)


def test_a_base_that_can(tmp_path):
    found = flavor(tmp_path, OVERLAP, UPSTREAM["deepseek_v3"])
    assert moe_of(host().build_on_meta(found)).overlaps_shared_experts


@pytest.mark.parametrize(
    ("keys", "like"),
    [
        (f"{OVERLAP}num_shared_experts = 0", 'inherits = "debugmodel"'),
        (OVERLAP, UPSTREAM["qwen3"]),
        (OVERLAP, UPSTREAM["gpt_oss"]),
    ],
)
def test_without_shared_experts_it_is_refused(tmp_path, keys, like):
    with pytest.raises(EzpzError) as refused:
        model_spec(flavor(tmp_path, keys, like))
    said = "overlap_shared_experts = true has no effect: the layers of this model have no shared"
    assert str(refused.value).startswith(f"{tmp_path / 'mine.toml'}: {said}")


@pytest.mark.parametrize("value", ["1", '"yes"'])
def test_a_value_that_is_none(tmp_path, value):
    with pytest.raises(EzpzError, match=r"mine\.toml: overlap_shared_experts = "):
        flavor(tmp_path, f"overlap_shared_experts = {value}")


def test_a_dense_flavor_has_no_use_for_it(tmp_path):
    with pytest.raises(EzpzError, match="overlap_shared_experts would have no effect"):
        flavor(tmp_path, f"n_dense_layers = 6\n{OVERLAP}")


# The job ------------------------------------------------------------------------------------------


def compiled(job) -> None:
    job.compile.enable = True


def loss_compiled(job) -> None:
    job.compile = dataclasses.replace(job.compile, enable=True, components=["loss"])


def tensor_parallel(job) -> None:
    job.parallelism.tensor_parallel_degree = 2


def captured(job) -> None:
    job.training.disable_cuda_graphs = False


def fused(job) -> None:
    job.override.imports = ["torchtitan.overrides.fused_swiglu.fused_swiglu"]


def another_layer(job) -> None:
    job.override.imports = ["others_overrides.mixture"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (compiled, "with compile.enable = true: "),
        (tensor_parallel, "with parallelism.tensor_parallel_degree = 2: "),
        (captured, "with training.disable_cuda_graphs = false: "),
        (fused, "fused_swiglu: it replaces model_spec.model.layers.1.moe.shared_experts"),
        (another_layer, "mixture: it replaces model_spec.model.layers.2.moe.shared_experts"),
    ],
)
def test_settings_that_it_excludes(tmp_path, monkeypatch, capsys, change, said):
    flavor(tmp_path, OVERLAP)
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    job = config("mine")
    change(job)
    with pytest.raises(SystemExit):  # as of the command line
        dataclasses.replace(job)
    error = capsys.readouterr().err
    assert "flavor 'mine': overlap_shared_experts = true cannot be combined with " in error
    assert said in error
    assert "or remove overlap_shared_experts from the flavor." in error


def test_settings_that_it_does_not(tmp_path, monkeypatch):
    flavor(tmp_path, OVERLAP)
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    loss_compiled(job := config("mine"))
    dataclasses.replace(job)
    compiled(plain := config("debugmodel_sdpa"))
    dataclasses.replace(plain)


def test_the_log_says_that_a_cpu_changes_nothing(tmp_path, monkeypatch, caplog):
    flavor(tmp_path, OVERLAP)
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    with caplog.at_level(logging.INFO):
        config("mine")
        config("debugmodel_sdpa")
    said = [line for line in caplog.messages if "overlap_shared_experts" in line]
    assert said == [
        "ezpz_moe: flavor mine: overlap_shared_experts = true changes nothing on the cpu, which "
        "has no streams: shared experts are computed after the routed ones, as without it"
    ]


def test_the_log_says_where_they_are_computed(tmp_path, monkeypatch):
    monkeypatch.setattr(overlap_conflicts.utils, "device_type", "xpu")
    said = what_it_overlaps(flavor(tmp_path, OVERLAP))
    assert said.endswith(": shared experts are computed on a xpu stream of their own")
