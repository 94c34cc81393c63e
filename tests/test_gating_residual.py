"""Routers that see the logits of the layer before: formula, what they cost, what is refused.

A model is compared in float64 with its formula as on a blackboard; what remains is the order of
sums.
"""

import dataclasses
from pathlib import Path

import pytest
import torch
from config_cases import config
from flavor_files import load, said
from router_cases import UPSTREAM, small_model
from torchtitan.distributed.activation_checkpoint import FullAC, SelectiveAC

from ezpz_moe.compute.reference import relative_error
from ezpz_moe.config.flavors import FOLDER_VARIABLE
from ezpz_moe.errors import EzpzError
from ezpz_moe.hosts.counts import counts_at_hand
from ezpz_moe.hosts.detect import host
from ezpz_moe.hosts.titan.activation_checkpointing import keeping_choices, keeping_products
from ezpz_moe.hosts.titan.base import titan
from ezpz_moe.hosts.titan.models import model_spec
from ezpz_moe.hosts.titan.upcycling import target
from ezpz_moe.hosts.titan_0_2.since_0_3 import refuse_later_keys
from ezpz_moe.tools.checkpoints.huggingface.routers import router_differences

D, B, L = 32, 2, 16
# A dense layer before, between and after those with experts, which have other numbers of them.
SIZES = f"""
n_layers = 6
moe_layers = [1, 3, 4]
num_experts = [4, 8, 5]
router_top_k = 2
dim = {D}
moe_hidden_dim = 24
dense_hidden_dim = 24
n_heads = 2
kv_lora_rank = 16
qk_nope_head_dim = 8
qk_rope_head_dim = 8
v_head_dim = 8
compute_backend = "for_loop"
"""

MAPS = {
    "layers.3.moe.router.gate.residual.weight": (8, 4),
    "layers.4.moe.router.gate.residual.weight": (5, 8),
}
RESIDUAL = "[router]\ngating_residual = true\n"
HEAT = "temperature = 2\n"
ONE_LAYER = "n_dense_layers = 5\n"


def built(folder: Path, keys: str, dtype=torch.float64):
    """A model whose maps are drawn like its gates."""
    model = small_model(folder, SIZES + keys)
    draw = torch.Generator().manual_seed(2)
    for name, each in model.named_parameters():
        each.data = each.data.to(dtype)
        if ".residual." in name:
            each.data = torch.randn(each.shape, generator=draw).to(dtype) / each.shape[1] ** 0.5
        if ".router.gate.weight" in name:
            each.data *= 20  # or all experts would be alike
    for module in model.modules():
        if hasattr(module, "computed_in"):
            module.computed_in = dtype
    return knowing_the_length(model)


def knowing_the_length(model):
    """Routers are told by the trainer how long a sequence is."""
    for module in model.modules():
        for groups in getattr(module, "groups", {}).values():
            groups.length = L
    return model


def tokens(seed: int = 1):
    drawn = torch.randint(0, 2000, (B, L), generator=torch.Generator().manual_seed(seed))
    shape = (B, *titan().one_sequence(L)[1:]) if len(titan().one_sequence(L)) == 2 else (B * L,)
    return drawn.reshape(shape), torch.arange(L).repeat(B).reshape(shape)


def gradients(loss, model) -> dict[str, torch.Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def loss_of(logits):
    draw = torch.Generator().manual_seed(3)
    return (logits * torch.randn(logits.shape, generator=draw, dtype=torch.float64)).sum()


def ffn(of, x):
    g = x @ of.w1.weight.T
    return (g / (1 + torch.exp(-g)) * (x @ of.w3.weight.T)) @ of.w2.weight.T


def on_the_blackboard(model, drawn, positions, heat: float):
    """The model's output, layer by layer, with G_j = W_j x_j + M_j G_(j-1)."""
    x, before = model.tok_embeddings(drawn), None
    for layer in model.layers.values():
        x = x + layer.attention(layer.attention_norm(x), None, positions)
        h = layer.ffn_norm(x)
        if not layer.moe_enabled:
            x = x + ffn(layer.feed_forward, h)
            continue
        gate, of = layer.moe.router.gate, layer.moe.routed_experts.inner_experts
        logits = h @ gate.weight.T
        if before is not None:
            logits = logits + before @ gate.residual.weight.T
        before, scores = logits, (logits / heat).softmax(-1)
        ids = scores.topk(2).indices
        x = x + ffn(layer.moe.shared_experts, h)
        for expert in range(scores.shape[-1]):
            g = h @ of.w1_EFD[expert].T
            out = (g / (1 + torch.exp(-g)) * (h @ of.w3_EFD[expert].T)) @ of.w2_EDF[expert].T
            x = x + scores[..., expert, None] * (ids == expert).any(-1, keepdim=True) * out
    return model.lm_head(model.norm(x))


@pytest.mark.filterwarnings("ignore:In CPU autocast")
@pytest.mark.parametrize("keys", ["", HEAT, 'gate_precision = "float64"\n'])
def test_a_model_is_its_formula(tmp_path, keys):
    """Outputs and all gradients: those of gates and maps go through the layers behind too."""
    model = built(tmp_path, RESIDUAL + keys)
    ours = model(*tokens())
    true = on_the_blackboard(model, *tokens(), heat=2.0 if keys == HEAT else 1.0)
    found, wanted = (gradients(loss_of(each), model) for each in (ours, true))
    assert found.keys() >= MAPS.keys()
    # Each of six layers adds up at most so many terms, and passes on the errors of those before.
    bound = 6 * B * L * D * 2.0**-53
    assert relative_error(ours, true) <= bound
    for name, value in found.items():
        assert wanted[name].abs().max() > 0, name
        assert relative_error(value, wanted[name]) <= bound, name


@pytest.mark.filterwarnings("ignore:In CPU autocast")
def test_maps_begin_as_zero_and_the_model_as_the_hosts(tmp_path):
    """To the last bit, with the gradients of all that the host has; the maps' own are not zero."""
    with_maps = small_model(tmp_path, SIZES + RESIDUAL)
    without = small_model(tmp_path, SIZES)
    state = without.state_dict()
    missing, unexpected = with_maps.load_state_dict(state, strict=False)
    assert (set(missing), unexpected) == (MAPS.keys(), [])
    found = dict(with_maps.named_parameters())
    assert {name: tuple(found[name].shape) for name in MAPS} == MAPS
    assert not any(found[name].any() for name in MAPS)
    ours, theirs = (loss_of(model(*tokens()).double()) for model in (with_maps, without))
    assert torch.equal(ours, theirs)
    ours, theirs = gradients(ours, with_maps), gradients(theirs, without)
    assert all(ours[name].any() for name in MAPS)
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())


@pytest.mark.filterwarnings("ignore:In CPU autocast")
@pytest.mark.parametrize("policy", [FullAC, SelectiveAC])
def test_a_recomputed_layer_has_what_it_was_given(tmp_path, policy):
    """Also where a second microbatch has been computed before the first one's backward."""
    model = built(tmp_path, RESIDUAL)
    wanted = [gradients(loss_of(model(*tokens(seed))), model) for seed in (1, 2)]
    own = keeping_products(keeping_choices(policy.Config()))
    own.build(dump_folder="").apply(model)
    losses = [loss_of(model(*tokens(seed))) for seed in (1, 2)]
    for loss, before in zip(losses, wanted, strict=True):
        for name, value in gradients(loss, model).items():
            plain = name.replace("_checkpoint_wrapped_module.", "")
            assert torch.equal(value, before[plain]), name


@pytest.mark.filterwarnings("ignore:In CPU autocast")
def test_no_gate_keeps_what_it_has_passed_on(tmp_path):
    """Which would keep the graph of a microbatch until the next one."""
    model = built(tmp_path, RESIDUAL)
    model(*tokens())
    gates = [layer.moe.router.gate for layer in model.layers.values() if layer.moe_enabled]
    assert [(gate.previous_XP, gate.sum_XE, gate.logits_BLE) for gate in gates] == [(None,) * 3] * 3


@pytest.mark.filterwarnings("ignore:In CPU autocast")
def test_a_map_has_the_gates_precision(tmp_path):
    model = built(tmp_path, f'{RESIDUAL}gate_precision = "float64"\n', torch.float32)
    seen = []
    for layer in model.layers.values():
        if layer.moe_enabled:
            layer.moe.router.gate.register_forward_hook(lambda *each: seen.append(each[-1].dtype))
    model(*tokens())
    assert seen == [torch.float64] * 3


# Sizes --------------------------------------------------------------------------------------------


def test_parameters_and_flops_are_hand_sums(tmp_path):
    """The host's own count, the basis of its MFU, has them too."""
    found, plain = load(tmp_path, SIZES + RESIDUAL), load(tmp_path, SIZES, name="plain")
    summary, without = host().summarize(found), host().summarize(plain)
    assert summary == counts_at_hand(found)
    maps = 8 * 4 + 5 * 8
    assert summary.total - without.total == maps == summary.active - without.active
    ours, theirs = (host().anatomy().anatomy(each, L) for each in (found, plain))
    costs, others = ours.costs["router"], theirs.costs["router"]
    assert costs.parameters - others.parameters == maps == costs.active - others.active
    assert costs.forward - others.forward == 2 * maps
    assert ours.host_flops - theirs.host_flops == 6 * maps


def test_zero_computation_experts_have_logits_too(tmp_path):
    model = small_model(tmp_path, f"{SIZES}{RESIDUAL}null_experts = 2\n")
    maps = {name: tuple(each.shape) for name, each in model.named_parameters() if name in MAPS}
    assert maps == {name: (rows + 2, columns + 2) for name, (rows, columns) in MAPS.items()}


@pytest.mark.filterwarnings("ignore:In CPU autocast")
@pytest.mark.parametrize("base", UPSTREAM)
def test_models_of_the_hosts(tmp_path, base):
    """Of which all layers have experts, or all but the first."""
    model = knowing_the_length(small_model(tmp_path, RESIDUAL, UPSTREAM[base]))
    layers = [layer for layer in model.layers.values() if layer.moe_enabled]
    residuals = [layer.moe.router.gate.residual for layer in layers]
    assert residuals[0] is None
    assert None not in residuals[1:]
    model(*tokens()).float().sum().backward()
    assert all(residual.weight.grad.any() for residual in residuals[1:])


def test_an_upcycled_model_has_maps_of_zero(tmp_path):
    """With which it computes the dense model's function."""
    layers = target(load(tmp_path, RESIDUAL)).layers
    maps = [any("residual" in name for name in layer.zeros) for layer in layers]
    assert maps == [False, True, True, True, True]


# What is refused ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            'gating_residual = true\nrouting = "balanced"',
            '[router] gating_residual = true has no effect with routing = "balanced", which '
            "ignores the logits; remove it, or if it is inherited set it to false.",
        ),
        (
            "gating_residual = true\nfreeze = true",
            "[router] gating_residual = true begins as the gate alone, and freeze = true would "
            "leave it so; remove one of them, or if it is inherited set it to false.",
        ),
        ("gating_residual = 1", "router.gating_residual = 1: should be a valid boolean."),
    ],
)
def test_what_does_not_go_with_it(tmp_path, keys, message):
    assert said(tmp_path, f"[router]\n{keys}") == f"mine.toml: {message}"


@pytest.mark.parametrize(("layers", "number"), [(2, "1 layer has experts")])
def test_a_layer_with_none_before_it(tmp_path, layers, number):
    flavor = load(tmp_path, f"n_layers = {layers}\n{RESIDUAL}")
    with pytest.raises(EzpzError) as refused:
        model_spec(flavor)
    assert str(refused.value) == (
        f"{tmp_path / 'mine.toml'}: [router] gating_residual = true has no effect: only {number}, "
        "and none before it. Remove it."
    )


def in_stages(config) -> None:
    config.parallelism = dataclasses.replace(config.parallelism, pipeline_parallel_degree=2)


def save_as_hf(config) -> None:
    config.checkpoint.last_save_in_hf = True


def begin_from_hf(config) -> None:
    config.checkpoint.initial_load_in_hf = True


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            in_stages,
            "flavor 'mine': [router] gating_residual = true cannot be combined with "
            "parallelism.pipeline_parallel_degree = 2: a stage sends only the residual stream",
        ),
        (save_as_hf, "checkpoint.last_save_in_hf = true: Hugging Face's formats have no place"),
        (begin_from_hf, "checkpoint.initial_load_in_hf = true: Hugging Face's formats have no"),
    ],
)
def test_settings_that_it_excludes(tmp_path, monkeypatch, capsys, change, message):
    load(tmp_path, f'attention = "sdpa"\n{RESIDUAL}')
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    changed = config("mine")
    change(changed)
    with pytest.raises(SystemExit):  # as of the command line
        dataclasses.replace(changed)
    assert message in capsys.readouterr().err


def test_no_class_of_transformers_has_it(tmp_path):
    assert list(router_differences(load(tmp_path, RESIDUAL), step=1)) == [
        "router.gating_residual = true"
    ]


def test_torchtitan_0_2_has_no_such_routers(tmp_path):
    with pytest.raises(EzpzError, match=r"mine\.toml: \[router\], .* need torchtitan 0\.3"):
        refuse_later_keys(load(tmp_path, RESIDUAL))
