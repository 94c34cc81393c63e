"""Small dense models and mixtures of experts of the host's, and how their functions compare.

Legend: B = sequences, L = their length, E = experts, F = an expert's hidden dimension, H = the
dense FFN's, D = model dimension, K = experts of a token, R = rows routed to experts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from ezpz_moe import cli
from ezpz_moe.compute.plain import plain_routed
from ezpz_moe.config.flavors import load_flavor
from ezpz_moe.hosts.detect import check_host
from ezpz_moe.hosts.titan.base import titan
from ezpz_moe.tools.checkpoints import storage
from ezpz_moe.tools.checkpoints.tensors import read_whole, write_checkpoint

D, F, LAYERS, VOCABULARY, EXPERTS = 32, 24, 2, 64, 8
TOKENS_BL = torch.randint(VOCABULARY, (3, 32), generator=torch.Generator().manual_seed(1))

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


def small_qwen3(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., nn.Module]:
    """Make a small qwen3 mixture of experts, the flavor "small"; what makes dense ones like it."""
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
        return initialized(_decoder(model, layers))

    monkeypatch.setitem(host.qwen3_configs, "small_moe", moe)
    monkeypatch.setenv("EZPZ_MOE_FLAVORS", str(folder))
    (folder / "small.toml").write_text(
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


def initialized(config) -> nn.Module:
    """The model with weights large enough that each of its parts matters to the logits."""
    from ezpz_moe.hosts.titan.attention import use_sdpa

    use_sdpa(config)
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
    check_host()  # before torchtitan is imported: it chooses the device
    from torchtitan.models.common import ComplexRoPE
    from torchtitan.models.deepseek_v3 import _build_dsv3_layers

    ours = {"vocab_size", "moe_layers", "shared_hidden_dim", "shared_gate", "router_bias"}
    size = load_flavor(flavor).dimensions.model_dump(exclude=ours)
    of_experts = dict.fromkeys(("num_experts", "router_top_k", "moe_hidden_dim"), 1)
    rope = ComplexRoPE.Config(dim=size["qk_rope_head_dim"], **size.pop("rope"))
    layers = _build_dsv3_layers(
        **size | of_experts | {"n_dense_layers": LAYERS},
        rope=rope,
        attn_backend="flex",
        moe_comm_backend="standard",
        non_blocking_capacity_factor=None,
    )
    from ezpz_moe.hosts.titan.models import host_spec

    config = host_spec(load_flavor(flavor)).model
    return initialized(dataclasses.replace(config, layers=layers))


def run(*arguments: object) -> int:
    return cli.main(["upcycle", *map(str, arguments)])


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    with pytest.raises(SystemExit) as stopped:
        run(*arguments)
    assert stopped.value.code == 2
    return capsys.readouterr().err


def save(model: nn.Module, folder: Path) -> Path:
    folder.mkdir(parents=True)
    write_checkpoint(folder, model.state_dict().items())
    return folder


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    metadata = storage.read_metadata(folder)
    return {name: read_whole(folder, metadata, name) for name in metadata.state_dict_metadata}


def upcycled(folder: Path, flavor: str) -> nn.Module:
    """The flavor's real model with the weights that were written."""
    from ezpz_moe.hosts.titan.models import model_spec

    model = model_spec(load_flavor(flavor)).model.build()
    model.init_states(buffer_device=torch.device("cpu"))
    model.load_state_dict(tensors(folder))
    return model.eval()


def in_float64(model: nn.Module) -> nn.Module:
    """The model in float64, its experts too, which the host computes in bfloat16."""
    model.double()
    for module in model.modules():
        if isinstance(module, titan().experts().HostExperts):
            module.forward = partial(written_out_experts, module)
    return model


def written_out_experts(module, x_RD, num_tokens_per_expert_E, choices=None):
    weights = (module.w1_EFD, module.w2_EDF, module.w3_EFD)
    if choices is not None:  # the whole routed layer, whose tokens these are
        routing = (choices.scores_TK, choices.ids_TK, num_tokens_per_expert_E)
        return plain_routed(*weights, x_RD, *routing, num_rows=choices.num_rows)
    rows = x_RD.split(num_tokens_per_expert_E.tolist())
    return torch.cat(
        [
            (nn.functional.silu(x @ module.w1_EFD[e].T) * (x @ module.w3_EFD[e].T))
            @ module.w2_EDF[e].T
            for e, x in enumerate(rows)
        ]
    )


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS_BL, positions=torch.arange(32).expand(3, 32))


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
