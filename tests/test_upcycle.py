"""``ezpz-moe upcycle``: the function at step 0, what is drawn, and what is refused.

Legend: E = experts, F = an expert's hidden dimension, H = the dense FFN's, D = model dimension,
B, L = batch and sequence, K = experts of a token, R = rows routed to experts.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from ezpz_moe import cli
from ezpz_moe.checkpoints import storage
from ezpz_moe.checkpoints.tensors import find_checkpoint, read_whole, write_checkpoint
from ezpz_moe.errors import EzpzError
from ezpz_moe.flavors import load_flavor
from ezpz_moe.hosts import TITAN_0_3, binding, check_host, presumed_generation
from ezpz_moe.upcycling import Perturbation, weights

pytestmark = pytest.mark.skipif(
    presumed_generation() is not TITAN_0_3, reason="builds models of torchtitan 0.3"
)

D, F, LAYERS, VOCABULARY, EXPERTS = 32, 24, 2, 64, 8

MLA = f"""
vocab_size = {VOCABULARY}
dim = {D}
n_layers = {LAYERS}
n_dense_layers = 0
n_heads = 2
q_lora_rank = 0
kv_lora_rank = 16
qk_nope_head_dim = 8
qk_rope_head_dim = 8
v_head_dim = 8
mscale = 0.7
dense_hidden_dim = {F}
moe_hidden_dim = {F}
num_experts = {EXPERTS}
num_shared_experts = 1
router_top_k = 4
attention = "sdpa"
compute_backend = "for_loop"
[rope]
theta = 10000.0
max_seq_len = 64
scaling = "none"
rope_factor = 1.0
beta_fast = 32.0
beta_slow = 1.0
original_seq_len = 64
"""
NORMALIZED = """router_score_func = "sigmoid"
router_route_norm = true
router_route_scale = 2.5
router_num_expert_groups = 2
router_num_limited_groups = 1
"""
NOT_NORMALIZED = """router_score_func = "softmax"
router_route_norm = false
router_route_scale = 1.5
"""


@pytest.fixture
def qwen3(tmp_path, monkeypatch):
    """A small qwen3 mixture of experts, as a flavor "small"; makes dense models of its family."""
    check_host()
    from torchtitan.models import qwen3 as host
    from torchtitan.models.common import CosSinRoPE

    sizes = {"n_layers": LAYERS, "dim": D, "n_heads": 4, "n_kv_heads": 2, "head_dim": 8}
    rope = CosSinRoPE.Config(dim=8, max_seq_len=64, theta=1e4)

    def moe(attn_backend: str, moe_comm_backend: str = "standard"):
        layers = host._build_qwen3_moe_layers(
            **sizes,
            moe_hidden_dim=F,
            num_experts=EXPERTS,
            top_k=4,
            attn_backend=attn_backend,
            moe_comm_backend=moe_comm_backend,
            rope=rope,
        )
        return _decoder(host.qwen3_configs["debugmodel_moe"](attn_backend), layers)

    def dense(hidden: int = F, n_layers: int = LAYERS, *, tied: bool = False):
        layers = host._build_qwen3_layers(
            **sizes | {"n_layers": n_layers}, hidden_dim=hidden, attn_backend="flex", rope=rope
        )
        model = host.qwen3_configs["debugmodel" if tied else "debugmodel_moe"]("flex")
        return _initialized(_decoder(model, layers))

    monkeypatch.setitem(host.qwen3_configs, "small_moe", moe)
    monkeypatch.setenv("EZPZ_MOE_FLAVORS", str(tmp_path))
    (tmp_path / "small.toml").write_text(
        'base = "qwen3/small_moe"\nattention = "sdpa"\ncompute_backend = "for_loop"\n'
    )
    return dense


def _decoder(config, layers):
    return dataclasses.replace(
        config,
        dim=D,
        vocab_size=VOCABULARY,
        tok_embeddings=dataclasses.replace(
            config.tok_embeddings, num_embeddings=VOCABULARY, embedding_dim=D
        ),
        norm=dataclasses.replace(config.norm, normalized_shape=D),
        lm_head=dataclasses.replace(config.lm_head, in_features=D, out_features=VOCABULARY),
        layers=layers,
    )


def _initialized(config) -> nn.Module:
    """The model with weights large enough that each of its parts matters to the logits."""
    binding("attention").use_sdpa(config)
    torch.manual_seed(0)
    model = config.build()
    model.init_states(buffer_device=torch.device("cpu"))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return model.eval()


def mla_dense(flavor: str) -> nn.Module:
    """The dense model of an MLA flavor: all of its layers have the dense FFN."""
    from torchtitan.models.common import ComplexRoPE
    from torchtitan.models.deepseek_v3 import _build_dsv3_layers

    size = load_flavor(flavor).dimensions.model_dump(exclude={"vocab_size"})
    rope = ComplexRoPE.Config(dim=size["qk_rope_head_dim"], **size.pop("rope"))
    layers = _build_dsv3_layers(
        **size | {"n_dense_layers": LAYERS},
        rope=rope,
        attn_backend="flex",
        moe_comm_backend="standard",
        non_blocking_capacity_factor=None,
    )
    config = binding("models").host_spec(load_flavor(flavor)).model
    return _initialized(dataclasses.replace(config, layers=layers))


def save(model: nn.Module, folder: Path) -> Path:
    folder.mkdir(parents=True)
    write_checkpoint(folder, model.state_dict().items())
    return folder


def run(*arguments: object) -> int:
    return cli.main(["upcycle", *map(str, arguments)])


def refused(capsys, *arguments: object) -> str:
    with pytest.raises(SystemExit) as stopped:
        run(*arguments)
    assert stopped.value.code == 2
    return capsys.readouterr().err


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    metadata = storage.read_metadata(folder)
    return {name: read_whole(folder, metadata, name) for name in metadata.state_dict_metadata}


def upcycled(folder: Path, flavor: str) -> nn.Module:
    """The flavor's real model with the weights that were written."""
    model = binding("models").model_spec(load_flavor(flavor)).model.build()
    model.init_states(buffer_device=torch.device("cpu"))
    model.load_state_dict(tensors(folder))
    return model.eval()


def in_float64(model: nn.Module) -> nn.Module:
    """The model in float64, its experts too, which the host computes in bfloat16."""
    model.double()
    for module in model.modules():
        if isinstance(module, binding("experts").HostExperts):
            module.forward = partial(written_out_experts, module)
    return model


def written_out_experts(module, x_RD, num_tokens_per_expert_E):
    rows = x_RD.split(num_tokens_per_expert_E.tolist())
    return torch.cat(
        [
            (nn.functional.silu(x @ module.w1_EFD[e].T) * (x @ module.w3_EFD[e].T))
            @ module.w2_EDF[e].T
            for e, x in enumerate(rows)
        ]
    )


def logits(model: nn.Module) -> torch.Tensor:
    tokens = torch.randint(VOCABULARY, (3, 32), generator=torch.Generator().manual_seed(1))
    positions = torch.arange(32).expand(3, 32)
    with torch.no_grad():
        return model(tokens, positions=positions)


def with_ffn_error(model: nn.Module, change) -> torch.Tensor:
    """The dense model's logits when ``change`` is done to the output of every FFN."""
    from torchtitan.models.common.feed_forward import FeedForward

    ffns = [module for module in model.modules() if isinstance(module, FeedForward)]
    handles = [ffn.register_forward_hook(lambda _, x, y: change(_, x[0], y)) for ffn in ffns]
    changed = logits(model)
    for handle in handles:
        handle.remove()
    return changed


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return torch.linalg.vector_norm(a.double() - b.double()).item()


def assert_same_function(moe: nn.Module, dense: nn.Module, top_k: int = 4) -> None:
    """In float64 they differ by what the sum of the weights, rounded in float32, may differ from 1.

    K scores, their sum, K quotients and the scale each round to half a unit: (K + 3) units at most.
    """
    moe, dense = in_float64(moe), dense.double()
    unit = (top_k + 3) * 2.0**-24
    expected = logits(dense)
    allowed = distance(with_ffn_error(dense, lambda _, x, y: y * (1 + unit)), expected)
    assert distance(logits(moe), expected) <= 2 * allowed
    assert allowed < 1e-4 * torch.linalg.vector_norm(expected)


# The function at step 0 --------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", [1, 2, 4])
def test_the_upcycled_model_computes_what_the_dense_one_does(qwen3, tmp_path, granularity, capsys):
    dense = qwen3(granularity * F)
    save(dense, tmp_path / "dense")
    assert run(tmp_path / "dense", "small", tmp_path / "out", "--router-std", 1) == 0
    assert "the model computes what the dense model does" in capsys.readouterr().out
    moe = upcycled(tmp_path / "out", "small")
    assert_same_function(moe, dense)


def test_and_in_bfloat16_with_the_backend_that_trains(qwen3, tmp_path):
    """No further from it than twice the dense model whose FFNs are computed in bfloat16."""
    dense = qwen3(2 * F)
    save(dense, tmp_path / "dense")
    run(tmp_path / "dense", "small", tmp_path / "out")
    expected = logits(dense)

    def in_bfloat16(ffn, x, _):
        w1, w2, w3 = (getattr(ffn, name).weight.bfloat16() for name in ("w1", "w2", "w3"))
        x = x.bfloat16()
        return ((nn.functional.silu(x @ w1.T) * (x @ w3.T)) @ w2.T).float()

    allowed = distance(with_ffn_error(dense, in_bfloat16), expected)
    assert distance(logits(upcycled(tmp_path / "out", "small")), expected) <= 2 * allowed
    assert allowed < 0.02 * torch.linalg.vector_norm(expected)


def test_with_shared_experts_groups_and_a_scale(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("EZPZ_MOE_FLAVORS", str(tmp_path))
    (tmp_path / "mla.toml").write_text(NORMALIZED + MLA)
    dense = mla_dense("mla")
    save(dense, tmp_path / "dense")
    assert run(tmp_path / "dense", "mla", tmp_path / "out", "--router-std", 1) == 0
    said = capsys.readouterr().out
    assert "w2 of the experts is multiplied by 0.4" in said
    assert "Shared experts: w2 is zero" in said
    moe = upcycled(tmp_path / "out", "mla")
    shared = moe.layers["1"].moe.shared_experts
    assert shared.w1.weight.std() > 0  # or it would never learn
    assert_same_function(moe, dense)


def test_without_normalized_weights_the_output_is_what_is_said(tmp_path, monkeypatch, capsys):
    """Each layer's FFN, times the sum of the token's weights over that of equal scores."""
    monkeypatch.setenv("EZPZ_MOE_FLAVORS", str(tmp_path))
    (tmp_path / "mla.toml").write_text(NOT_NORMALIZED + MLA)
    dense = mla_dense("mla").double()
    save(dense.float(), tmp_path / "dense")
    run(tmp_path / "dense", "mla", tmp_path / "out", "--router-std", 0.3)
    said = capsys.readouterr().out
    assert "does not compute exactly what the dense model does" in said
    assert "they sum to 0.5 where all scores are equal, and to up to 1" in said
    moe, dense = in_float64(upcycled(tmp_path / "out", "mla")), dense.double()
    x_BLD = torch.randn(2, 16, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    layer = moe.layers["0"].moe
    weights_BLK, _, _ = layer.router(x_BLD)
    factor_BL1 = weights_BLK.double().sum(-1, keepdim=True) / (1.5 * 0.5)
    assert factor_BL1.min() > 1.05  # the router does prefer some
    expected_BLD = factor_BL1 * dense.layers["0"].feed_forward(x_BLD)
    bound = (4 + 3) * 2.0**-24
    assert distance(layer(x_BLD), expected_BLD) <= bound * torch.linalg.vector_norm(expected_BLD)


# What is drawn -----------------------------------------------------------------------------------


def dense_ffn() -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(3)
    shapes = {"w1": (40, 30), "w2": (30, 40), "w3": (40, 30)}
    return {part: 0.1 + 0.3 * torch.randn(s, generator=draw) for part, s in shapes.items()}


def made(part: str, **perturbation) -> torch.Tensor:
    return weights.experts(
        dense_ffn()[part],
        "layers.0",
        part,
        num_experts=8,
        granularity=1,
        scale=1.0,
        perturbation=Perturbation(**perturbation),
    )


def test_noise_is_relative_and_every_expert_has_its_own():
    for part, dense in dense_ffn().items():
        relative = (made(part, noise=0.05) - dense) / dense.std()
        # Of n values the mean has the deviation std / sqrt(n) and the std has std / sqrt(2n).
        n = relative[0].numel()
        for expert in relative:
            assert abs(expert.mean().item()) < 5 * 0.05 / n**0.5
            assert abs(expert.std().item() / 0.05 - 1) < 5 / (2 * n) ** 0.5
        correlation = torch.corrcoef(relative.flatten(1)) - torch.eye(8)
        assert correlation.abs().max() < 5 / n**0.5


def test_reinit_draws_the_same_channels_of_all_three_weights_anew():
    dense = dense_ffn()
    changed = {}
    for part in dense:
        new = made(part, reinit=0.25)
        by_channel = (new != dense[part]).all(dim=1 if part == "w2" else 2)
        touched = (new != dense[part]).any(dim=1 if part == "w2" else 2)
        assert torch.equal(by_channel, touched)  # whole channels, and the others bit for bit
        changed[part] = touched
        for e, drawn in enumerate(touched):
            index = (e, slice(None), drawn) if part == "w2" else (e, drawn)
            values, before = new[index], dense[part][index[1:]]
            n = values.numel()
            assert abs(values.mean() - before.mean()).item() < 5 * before.std().item() / n**0.5
            assert abs(values.std() / before.std() - 1).item() < 5 / (2 * n) ** 0.5
    assert changed["w1"].sum(1).tolist() == [10] * 8
    assert torch.equal(changed["w1"], changed["w2"])
    assert torch.equal(changed["w1"], changed["w3"])
    assert len({tuple(each.tolist()) for each in changed["w1"]}) == 8


def test_a_seed_is_the_same_bits_and_another_seed_others():
    same = [made("w1", noise=0.1, reinit=0.5, seed=7) for _ in range(2)]
    assert torch.equal(*same)
    assert not torch.equal(same[0], made("w1", noise=0.1, reinit=0.5, seed=8))


def test_the_parts_of_a_copy_have_the_same_router_row():
    drawn = weights.router(
        torch.Size((64, 4096)), "layers.0", granularity=4, perturbation=Perturbation(router_std=0.5)
    )
    of_copies = drawn.unflatten(0, (16, 4))
    assert torch.equal(of_copies, of_copies[:, :1].expand_as(of_copies))
    assert abs(of_copies[:, 0].std().item() / 0.5 - 1) < 5 / (2 * 16 * 4096) ** 0.5
    assert len(of_copies[:, 0].unique(dim=0)) == 16


# What is read ------------------------------------------------------------------------------------


def test_safetensors_give_the_same_as_a_checkpoint(qwen3, tmp_path, capsys):
    dense = qwen3(2 * F, tied=True)
    save(dense, tmp_path / "run" / "checkpoint" / "step-3")
    adapter = binding("huggingface").adapter(load_flavor("small"))
    state = dense.state_dict()
    del state["lm_head.weight"]  # tied to the embeddings: such files do not have it
    keys = adapter.to_hf(state) | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    (tmp_path / "hf").mkdir()
    save_file({key: each.clone() for key, each in keys.items()}, tmp_path / "hf/model.safetensors")
    assert run(tmp_path / "run", "small", tmp_path / "a", "--noise", 0.1) == 0
    assert "step-3" in capsys.readouterr().out
    assert run(tmp_path / "hf", "small", tmp_path / "b", "--noise", 0.1) == 0
    assert "lm_head.weight: a copy of tok_embeddings.weight" in capsys.readouterr().out
    a, b = tensors(tmp_path / "a"), tensors(tmp_path / "b")
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_the_newest_step_of_a_run_is_taken(qwen3, tmp_path):
    for step in (9, 100, 20):
        save(qwen3(), tmp_path / "checkpoint" / f"step-{step}")
    (tmp_path / "checkpoint" / "step-200").mkdir()  # being written: it has no metadata
    newest = tmp_path / "checkpoint" / "step-100"
    assert find_checkpoint(tmp_path) == find_checkpoint(newest.parent) == newest
    assert find_checkpoint(newest.with_name("step-9")).name == "step-9"
    with pytest.raises(EzpzError, match=r"no \.metadata"):
        find_checkpoint(newest.with_name("step-200"))


# What is refused ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dense", "said"),
    [
        (
            {"hidden": 36},
            "layers.0.feed_forward.w1.weight is [36, 32], and "
            "layers.0.moe.routed_experts.inner_experts.w1_EFD of flavor small is [8, 24, 32]",
        ),
        ({"hidden": 72}, "becomes 3 experts of hidden dimension 24"),
        ({"hidden": F, "n_layers": 3}, "has layers.2.attention.k_norm.weight"),
        ({"hidden": F, "n_layers": 1}, "has no layers.1.feed_forward.w1.weight"),
    ],
)
def test_models_that_do_not_fit(qwen3, tmp_path, capsys, dense, said):
    save(qwen3(**dense), tmp_path / "dense")
    assert said in refused(capsys, tmp_path / "dense", "small", tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_a_copy_does_not_span_groups_of_experts(tmp_path, monkeypatch, capsys):
    """A token limited to some groups could not choose such a copy whole."""
    monkeypatch.setenv("EZPZ_MOE_FLAVORS", str(tmp_path))
    groups = NORMALIZED.replace("expert_groups = 2", "expert_groups = 4")
    groups = groups.replace("limited_groups = 1", "limited_groups = 2")
    wide = MLA.replace(f"dense_hidden_dim = {F}", f"dense_hidden_dim = {4 * F}")
    (tmp_path / "mla.toml").write_text(groups + wide)
    save(mla_dense("mla"), tmp_path / "dense")
    said = refused(capsys, tmp_path / "dense", "mla", tmp_path / "out")
    assert "the experts of a group of flavor mla, 2, has to be a multiple of 4" in said


def test_a_tensor_of_another_shape_is_named(qwen3, tmp_path, capsys):
    state = qwen3().state_dict()
    state["norm.weight"] = torch.ones(16)
    (tmp_path / "dense").mkdir()
    write_checkpoint(tmp_path / "dense", state.items())
    said = refused(capsys, tmp_path / "dense", "small", tmp_path / "out")
    assert "norm.weight is [16] there, and norm.weight of flavor small is [32]" in said


def test_a_mixture_of_experts_is_no_dense_model(qwen3, tmp_path, capsys):
    save(qwen3(), tmp_path / "dense")
    run(tmp_path / "dense", "small", tmp_path / "out")
    said = refused(capsys, tmp_path / "out", "small", tmp_path / "again")
    assert "is a mixture of experts already" in said
    assert "exists already" in refused(capsys, tmp_path / "dense", "small", tmp_path / "out")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--noise", "-1"], "--noise -1.0"),
        (["--noise", "nan"], "--noise nan"),
        (["--router-std", "inf"], "--router-std inf"),
        (["--reinit", "1.5"], "--reinit 1.5"),
    ],
)
def test_flags_out_of_range(qwen3, tmp_path, capsys, flags, said):
    assert said in refused(capsys, tmp_path / "dense", "small", tmp_path / "out", *flags)


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ("null_experts = 2", "null_experts, copy_experts, constant_experts"),
        ('routing = "sinkhorn"', 'routing = "sinkhorn"'),
        ('activation = "softplus"', 'activation = "softplus"'),
    ],
)
def test_a_router_whose_weights_are_others(qwen3, tmp_path, table, said):
    from ezpz_moe.upcycling.target import check_routing

    text = (tmp_path / "small.toml").read_text()
    (tmp_path / "other.toml").write_text(f"{text}[router]\n{table}\n")
    with pytest.raises(EzpzError, match=r"other\.toml: \[router\]") as refusal:
        check_routing(load_flavor("other"))
    assert said in str(refusal.value)


def test_experts_with_biases_have_no_dense_ffn(tmp_path, capsys):
    said = refused(capsys, tmp_path, "gpt_oss_debugmodel", tmp_path / "out")
    assert "GptOssGroupedExperts" in said
    assert "no SwiGLU FFN" in said


# Training ----------------------------------------------------------------------------------------


@pytest.mark.train
def test_training_starts_with_the_dense_models_loss(tmp_path):
    """The host's dense qwen3 is trained, upcycled, and trained on: both runs see the same batch."""
    import dialect
    from trainer_runs import train

    dialect.write_text(tmp_path)
    short = [*dialect.SHORT, "--dataloader.dataset-path", str(tmp_path / "text")]
    dense = [
        *("--module", "qwen3", "--config", "qwen3_debugmodel", *short),
        *("--hf-assets-path", str(dialect.EMBEDDED_TOKENIZER)),
        *("--override.imports", "ezpz_moe.overrides.sdpa", "--checkpoint.enable"),
    ]
    (tmp_path / "job.toml").write_text(
        '[model]\nname = "ezpz_moe"\nflavor = "qwen3_debugmodel_sdpa_for_loop"\n'
        '[training]\ndataset = "c4_test"\n'
    )
    first = [*dense, "--training.steps", "3"]
    (record,) = train({"dense": first}, tmp_path, ranks=1)["dense"]
    assert run(tmp_path / "dense", "qwen3_debugmodel", tmp_path / "moe") == 0
    one = ["--training.steps", "1", "--checkpoint.initial-load-path"]
    newest = str(find_checkpoint(tmp_path / "dense"))
    on = {
        "dense_on": [*dense, *one, newest],
        "moe_on": [
            *dialect.job(tmp_path / "job.toml", *short, "--checkpoint.enable"),
            *one,
            str(tmp_path / "moe"),
        ],
    }
    records = train(on, tmp_path, ranks=1)
    (of_dense,), (of_moe,) = (records[name][0]["losses"] for name in on)
    assert of_dense < record["losses"][0] - 0.3, "the dense model has learnt too little to tell"
    # Both compute in bfloat16, whose relative rounding is 2^-9; a loss is a mean over 64 tokens.
    assert abs(of_moe - of_dense) < 2.0**-9 * of_dense
