"""What ``[init]`` and ``router_bias`` make the layers' weights start with."""

from pathlib import Path

import pytest
import torch
from test_models import leaves

from ezpz_moe.config.flavors import load_flavor
from ezpz_moe.errors import EzpzError
from ezpz_moe.hosts.detect import check_host

check_host()  # before torchtitan is imported: it chooses the device

from ezpz_moe.config.flavor_schema import Flavor  # noqa: E402
from ezpz_moe.hosts.counts import counts_at_hand  # noqa: E402
from ezpz_moe.hosts.titan.architecture import architecture  # noqa: E402
from ezpz_moe.hosts.titan.models import host_spec, model_spec  # noqa: E402
from ezpz_moe.hosts.titan.parameters import summarize  # noqa: E402

SMALL = {
    "deepseek_v3": 'base = "deepseek_v3/debugmodel"\n[change]\nn_layers = 4\n',
    "qwen3": 'base = "qwen3/debugmodel_moe"\n[change]\nn_layers = 3\nnum_experts = 8\n',
    "gpt_oss": 'base = "gpt_oss/debugmodel"\n[change]\nn_layers = 3\nmoe_hidden_dim = 96\n',
}
OUTPUTS = ("attention.wo.", "shared_experts.w2.", "feed_forward.w2.", "w2_EDF", "mlp2_weight")


def flavor_of(folder: Path, text: str) -> Flavor:
    (folder / "mine.toml").write_text(text)
    return load_flavor("mine", near=folder)


def drawn(flavor: Flavor) -> dict[str, torch.Tensor]:
    """The weights that a run would start with."""
    torch.manual_seed(0)
    model = model_spec(flavor).model.build()
    model.init_states()
    return {name: tensor.detach() for name, tensor in model.named_parameters()}


def deviation(weight: torch.Tensor, expected: float) -> float:
    """How far its standard deviation is from ``expected``, in standard errors of that estimate."""
    return abs(float(weight.std()) / expected - 1) * (2 * weight.numel()) ** 0.5


def matrices(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Those of the layers, without norms and biases."""
    return {
        name: weight
        for name, weight in weights.items()
        if name.startswith("layers.") and weight.dim() > 1 and "bias" not in name
    }


@pytest.mark.parametrize("family", SMALL)
def test_every_matrix_of_the_layers_has_the_deviation_that_is_asked_for(
    family: str, tmp_path: Path
) -> None:
    """In qwen3 the fused projection of queries, keys and values hides its initializer."""
    text = f'{SMALL[family]}[init]\nstd = 0.005\nresidual = "depth"\n'
    for name, weight in matrices(drawn(flavor_of(tmp_path, text))).items():
        layer = int(name.split(".")[1])
        is_output = any(part in name for part in OUTPUTS)
        expected = 0.005 / (2 * (layer + 1)) ** 0.5 if is_output else 0.005
        assert deviation(weight, expected) < 6, name


def test_std_alone_keeps_what_the_host_shrinks(tmp_path: Path) -> None:
    host = drawn(flavor_of(tmp_path, SMALL["qwen3"]))
    ours = drawn(flavor_of(tmp_path, f"{SMALL['qwen3']}[init]\nstd = 0.04\n"))
    of_layers = matrices(host)
    for name, weight in host.items():
        twice = 2 if name in of_layers else 1
        torch.testing.assert_close(ours[name], twice * weight, rtol=1e-6, atol=0)


def test_experts_are_drawn_as_torch_draws_a_linear_layer(tmp_path: Path) -> None:
    """Within 1/sqrt(fan in) of one expert; torch's own function would count all as one kernel."""
    text = f'{SMALL["qwen3"]}[init]\nexperts = "kaiming_uniform"\nresidual = "none"\n'
    weights = drawn(flavor_of(tmp_path, text))
    experts = {name: weight for name, weight in weights.items() if "inner_experts" in name}
    assert len(experts) == 9
    for weight in experts.values():
        bound = weight.shape[-1] ** -0.5
        assert 0.999 * bound < weight.abs().max() <= bound
        assert deviation(weight, bound / 3**0.5) < 6
    assert deviation(weights["layers.2.moe.router.gate.weight"], 0.02) < 6


def test_experts_can_have_another_distribution_than_the_rest(tmp_path: Path) -> None:
    text = f'{SMALL["deepseek_v3"]}[init]\nexperts = "normal"\n'
    nodes = dict(leaves(host_spec(flavor_of(tmp_path, text)).model))
    of_host = dict(leaves(host_spec(flavor_of(tmp_path, SMALL["deepseek_v3"])).model))
    differing = {path for path in nodes if nodes[path] != of_host[path]}
    assert differing == {
        f".layers.{layer}.moe.routed_experts.inner_experts.param_init.{name}"
        for layer in (1, 2, 3)
        for name in ("w1_EFD", "w2_EDF", "w3_EFD")
    }
    path = ".layers.2.moe.routed_experts.inner_experts.param_init.w2_EDF"
    assert nodes[path] == (torch.nn.init.normal_, (), of_host[path][2])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("std = 0.0", "init.std = 0.0: should be greater than 0"),
        ('experts = "kaiming"', "Did you mean 'kaiming_uniform'?"),
        ("residuals = 1", "unknown key 'init.residuals'. Did you mean 'residual'?"),
    ],
)
def test_a_mistake_is_named(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(EzpzError) as error:
        flavor_of(tmp_path, f'inherits = "debugmodel"\n[init]\n{text}\n')
    assert message in str(error.value)


def test_a_gate_with_a_bias_starts_at_zero_and_is_counted(tmp_path: Path) -> None:
    with_bias = flavor_of(tmp_path, 'inherits = "debugmodel"\nrouter_bias = true\n')
    weights = drawn(with_bias)
    biases = [weight for name, weight in weights.items() if name.endswith("router.gate.bias")]
    assert len(biases) == 5
    assert not any(bias.any() for bias in biases)
    counted = summarize(with_bias)
    assert counted == counts_at_hand(with_bias)
    assert counted.total == summarize(load_flavor("debugmodel")).total + 5 * 8
    assert architecture(with_bias).besides == ("routers with a bias (router_bias)",)
    assert architecture(flavor_of(tmp_path, SMALL["gpt_oss"])).besides == (), "its class has one"
