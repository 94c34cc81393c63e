"""What routers add to a layer, compiled as the host compiles it and recomputed: the eager values.

And frozen experts. In one process; ``test_latent_runs.py`` compiles what else experts add, between
two ranks.
"""

from types import SimpleNamespace

import pytest
import torch
from dialect import ON_0_2, SINCE_2026_08
from layer_cases import SMALL, E
from router_cases import RELU, small_model
from trainer_runs import AOT

if ON_0_2 or SINCE_2026_08:
    pytest.skip("about the binding to torchtitan 0.3", allow_module_level=True)

from torchtitan.config import CompileConfig
from torchtitan.distributed.activation_checkpoint import SelectiveAC
from torchtitan.distributed.compile import apply_compile

from ezpz_moe.compute.reference import relative_error
from ezpz_moe.hosts.titan.activation_checkpointing import keeping_choices, keeping_products
from ezpz_moe.hosts.titan.selector import Selector

B, L = 2, 16
LEARNS = torch.arange(E) < 5
"""Which experts do: backends compute no gradient for the others."""
ROUTERS = {
    "relu": f"{RELU}chunk = 4",
    "similarity": """
[router.similarity]
strength = 0.5
window = 6
""",
    "gating residual": """
[router]
gating_residual = true
""",
}
OF_THE_ROUTER = {
    "relu": "layers.0.moe.router.gate.scale_E",
    "similarity": "layers.0.moe.router.gate.weight",
    "gating residual": "layers.1.moe.router.gate.residual.weight",
}


@pytest.fixture(autouse=True)
def _compilers_settings_are_the_tests_own():
    """The host's function sets two for the whole process; no program is left for other tests."""
    with torch._dynamo.config.patch():
        yield
    torch.compiler.reset()


def built(folder, router: str):
    """As few layers, all with experts, as have what the router does; in float32."""
    layers = 2 if "residual" in router else 1
    sizes = f"n_layers = {layers}\nmoe_layers = {list(range(layers))}\n"
    backend = 'compute_backend = "for_loop"\nexpert_precision = "float32"\n'
    model = small_model(folder, f"{SMALL}{sizes}{backend}{ROUTERS[router]}")
    draw = torch.Generator().manual_seed(2)
    for name, each in model.named_parameters():
        if ".router.gate." in name:  # a scale of one and maps of zero would hide what they do
            each.data = 1 + torch.randn(each.shape, generator=draw) / 4
    for module in model.modules():  # which the trainer tells
        for groups in getattr(module, "groups", {}).values():
            groups.length = L
        if isinstance(module, Selector):
            module.trained_E = LEARNS
    return model


def gradients(model) -> dict[str, torch.Tensor]:
    drawn = torch.randint(0, 2000, (B, L), generator=torch.Generator().manual_seed(1))
    positions = torch.arange(L).remainder(10).repeat(B, 1)  # a document ends within a sequence
    loss = model(drawn, positions).float().logsumexp(-1).sum()
    names, parameters = zip(*model.named_parameters(), strict=True)
    found = torch.autograd.grad(loss, parameters)
    plain = (name.replace("_checkpoint_wrapped_module.", "") for name in names)
    return dict(zip(plain, found, strict=True))


@pytest.mark.parametrize("router", ROUTERS)
def test_a_compiled_router_has_the_eager_gradients(tmp_path, router):
    """Whole layers are one program each, which passes on all that a router remembers."""
    model = built(tmp_path, router)
    eager = gradients(model)
    keeping_products(keeping_choices(SelectiveAC.Config())).build(dump_folder="").apply(model)
    apply_compile(
        model,
        compile_config=CompileConfig(enable=True, backend=AOT[-1]),
        parallel_dims=SimpleNamespace(tp_enabled=False),
    )
    compiled = gradients(model)
    assert eager[OF_THE_ROUTER[router]].any()
    experts = [each for name, each in compiled.items() if name.endswith(("w1_EFD", "w2_EDF"))]
    assert experts
    for gradient_EX in experts:
        assert gradient_EX[LEARNS].any()
        assert not gradient_EX[~LEARNS].any()
    for name, gradient in eager.items():
        # Sums over the tokens and a layer's width, in float32.
        assert relative_error(compiled[name], gradient.double()) <= B * L * 2.0**-24, name
