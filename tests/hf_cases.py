"""Tiny models of every class of transformers that an export can become, and their logits."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from torchtitan.models import gpt_oss, kimi_k2_7, qwen3
from torchtitan.models.common import ComplexRoPE, CosSinRoPE, Embedding, Linear, RMSNorm
from torchtitan.models.gpt_oss import GptOssModel
from torchtitan.models.gpt_oss.moe import GptOssGroupedExperts, swiglu
from torchtitan.models.kimi_k2_7 import KimiK25Model
from torchtitan.models.qwen3 import Qwen3Model

from ezpz_moe import cli
from ezpz_moe.config.flavors import load_flavor
from ezpz_moe.hosts.detect import host
from ezpz_moe.tools.checkpoints import storage
from ezpz_moe.tools.checkpoints.contents import model_tensors
from ezpz_moe.tools.checkpoints.tensors import read_whole

VOCABULARY, DIM = 2048, 32
LENGTH = 160
"""Longer than the window of gpt_oss, 128."""
_COMPUTED = """
attention = "sdpa"
compute_backend = "for_loop"
expert_precision = "float32"
"""
_MLA = f"""
inherits = "debugmodel"
dim = {DIM}
n_layers = 3
n_heads = 2
kv_lora_rank = 16
qk_nope_head_dim = 8
qk_rope_head_dim = 8
v_head_dim = 12
dense_hidden_dim = 48
moe_hidden_dim = 24
"""
FLAVORS = {
    "deepseek_v2": _MLA + _COMPUTED,
    "deepseek_v3": _MLA
    + _COMPUTED
    + """
q_lora_rank = 12
mscale = 1.0
num_shared_experts = 1
router_score_func = "sigmoid"
router_num_expert_groups = 4
router_num_limited_groups = 2
router_route_norm = true
router_route_scale = 2.5
""",
    "kimi_k2_7": f'base = "kimi_k2_7/tiny"{_COMPUTED}',
    "qwen3_moe": f'base = "qwen3/tiny_moe"{_COMPUTED}',
    "gpt_oss": 'base = "gpt_oss/tiny"\nattention = "sdpa"\ncompute_backend = "for_loop"\n',
}
CLASSES = {
    "deepseek_v2": "DeepseekV2ForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "kimi_k2_7": "DeepseekV3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "gpt_oss": "GptOssForCausalLM",
}


WITH_BIASES = "DeepseekV3ForCausalLM"
"""The class that has a place for selection biases."""


def add_tiny_bases(monkeypatch: pytest.MonkeyPatch) -> None:
    """Add the sizes of kimi, qwen3 and gpt_oss to those that the host knows by name."""
    monkeypatch.setitem(kimi_k2_7.kimi_k2_5_configs, "tiny", _kimi)
    monkeypatch.setitem(qwen3.qwen3_configs, "tiny_moe", _qwen3)
    monkeypatch.setitem(gpt_oss.gptoss_configs, "tiny", _gpt_oss)


def _ends(eps: float) -> dict[str, Any]:
    return {
        "dim": DIM,
        "vocab_size": VOCABULARY,
        "tok_embeddings": Embedding.Config(num_embeddings=VOCABULARY, embedding_dim=DIM),
        "norm": RMSNorm.Config(normalized_shape=DIM, eps=eps),
        "lm_head": Linear.Config(in_features=DIM, out_features=VOCABULARY),
    }


def _kimi(
    attn_backend: str,
    moe_comm_backend: str,
    non_blocking_capacity_factor: float | None = None,
) -> KimiK25Model.Config:
    """The language model of the family, as Moonlight: without groups, queries' rank and YaRN."""
    layers = kimi_k2_7._build_kimi_layers(
        n_layers=3,
        n_dense_layers=1,
        dim=DIM,
        n_heads=2,
        q_lora_rank=0,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=12,
        mscale=1.0,
        dense_hidden_dim=48,
        moe_hidden_dim=24,
        num_experts=8,
        num_shared_experts=2,
        router_top_k=3,
        router_score_func="sigmoid",
        router_route_scale=2.446,
        router_route_norm=True,
        attn_backend=attn_backend,
        moe_comm_backend=moe_comm_backend,
        non_blocking_capacity_factor=non_blocking_capacity_factor,
        rope=ComplexRoPE.Config(dim=8, max_seq_len=512, theta=50000.0),
    )
    return KimiK25Model.Config(**_ends(1e-5), layers=layers)


def _qwen3(attn_backend: str, moe_comm_backend: str = "standard") -> Qwen3Model.Config:
    layers = qwen3._build_qwen3_moe_layers(
        n_layers=2,
        dim=DIM,
        n_heads=4,
        n_kv_heads=2,
        head_dim=16,
        moe_hidden_dim=24,
        num_experts=8,
        top_k=3,
        attn_backend=attn_backend,
        moe_comm_backend=moe_comm_backend,
        rope=CosSinRoPE.Config(dim=16, max_seq_len=512, theta=1e6),
    )
    return Qwen3Model.Config(**_ends(1e-6), layers=layers)


def _gpt_oss(moe_comm_backend: str, attn_backend: str = "varlen") -> GptOssModel.Config:
    rope = CosSinRoPE.Config(
        dim=64,
        max_seq_len=512,
        theta=150000.0,
        scaling="yarn",
        rope_factor=32,
        truncate=False,
        original_seq_len=4096,
    )
    layers = gpt_oss._build_gptoss_layers(
        n_layers=2,
        dim=DIM,
        hidden_dim=24,
        num_experts=8,
        top_k=3,
        load_balance_coeff=1e-3,
        attn_backend=attn_backend,
        moe_comm_backend=moe_comm_backend,
        rope=rope,
    )
    return GptOssModel.Config(**_ends(1e-5), layers=layers)


class _Float32Experts(GptOssGroupedExperts):
    """gpt_oss's experts without the host's casts to bfloat16."""

    def forward(self, x_RD: torch.Tensor, num_tokens_per_expert_E: torch.Tensor) -> torch.Tensor:
        parts = []
        for e, x in enumerate(x_RD.split(num_tokens_per_expert_E.tolist())):
            hidden = F.linear(x, self.mlp1_weight_EGD[e], self.mlp1_bias_EG[e])
            hidden = swiglu(hidden, limit=self.swiglu_limit)
            parts.append(F.linear(hidden, self.mlp2_weight_EDF[e], self.mlp2_bias_ED[e]))
        return torch.cat(parts)


@dataclass(frozen=True)
class Case:
    """A job with its model, in a folder."""

    kind: str
    folder: Path
    job_name: str = "job.toml"

    @property
    def job(self) -> str:
        return str(self.folder / self.job_name)

    def remap(self, *arguments: object) -> int:
        return cli.main(["ckpt", "remap", *map(str, arguments), "--model", self.job])

    def build(self) -> Any:
        model = host().analysis().build(self.flavor, LENGTH, device="cpu").eval()
        for module in model.modules():
            if isinstance(module, GptOssGroupedExperts):
                module.__class__ = _Float32Experts
        return model

    @property
    def flavor(self) -> Any:
        return load_flavor(self.kind, near=self.folder)

    def logits(
        self, weights: Mapping[str, torch.Tensor], tokens_L: torch.Tensor, step: int = 1
    ) -> torch.Tensor:
        """What the host computes."""
        model = self.build()
        model.load_state_dict(weights)
        host().analysis().at_step(model, step)
        with torch.inference_mode():
            return host().analysis().forward(model, tokens_L, torch.arange(len(tokens_L)))


def make_case(kind: str, folder: Path, extra: str = "") -> Case:
    """Write the job and its flavor; ``extra`` is TOML for the flavor's end."""
    folder.mkdir()
    (folder / "plain.toml").write_text(FLAVORS[kind])
    (folder / f"{kind}.toml").write_text(f'inherits = "plain"\n{extra}')
    (folder / "job.toml").write_text(f'[model]\nname = "ezpz_moe"\nflavor = "{kind}"\n')
    return Case(kind, folder)


def random_weights(case: Case, *, bias: float) -> dict[str, torch.Tensor]:
    """Weights with which everything matters, and selection biases of this standard deviation."""
    generator = torch.Generator().manual_seed(1)

    def draw(name: str, like: torch.Tensor) -> torch.Tensor:
        values = torch.randn(like.shape, generator=generator)
        if "expert_bias" in name:
            return bias * values
        if name == "tok_embeddings.weight":
            return values
        if like.dim() > 1:
            return 1.5 * values * like.shape[-1] ** -0.5
        return 0.3 * values + (1 if "norm" in name else 0)

    return {name: draw(name, tensor) for name, tensor in case.build().state_dict().items()}


def save(weights: Mapping[str, torch.Tensor], folder: Path) -> Path:
    dcp.save(dict(weights), checkpoint_id=folder)
    return folder


def load(folder: Path) -> dict[str, torch.Tensor]:
    """The model of a checkpoint."""
    metadata = storage.read_metadata(folder)
    return {name: read_whole(folder, metadata, name) for name, _ in model_tensors(metadata)}


def changed(folder: Path, target: Path, config: dict[str, Any]) -> Path:
    """A copy of an export with other values in its config."""
    shutil.copytree(folder, target)
    described = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(described | config))
    return target


def with_tensors(folder: Path, target: Path, change: Callable[[dict], dict]) -> Path:
    """A copy of an export with other tensors."""
    shutil.copytree(folder, target)
    (file,) = target.glob("*.safetensors")
    tensors = change(load_file(file))
    save_file(tensors, file, {"format": "pt"})
    weight_map = {"weight_map": dict.fromkeys(tensors, file.name)}
    (target / "model.safetensors.index.json").write_text(json.dumps(weight_map))
    return target


class Exports:
    """What the tests of this file share, made when it is first asked for."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.case = cache(self._case)
        self.plain = cache(self._plain)

    def _case(self, kind: str, extra: str = "") -> Case:
        return make_case(kind, self._new(kind), extra)

    def _plain(self, kind: str) -> tuple[dict[str, torch.Tensor], Path, Path]:
        """Weights without biases, their checkpoint and their export."""
        case = self.case(kind)
        weights = random_weights(case, bias=0.1 if CLASSES[kind] == WITH_BIASES else 0)
        source, target = save(weights, case.folder / "step-7"), case.folder / "hf"
        assert case.remap(source, target, "--to", "hf") == 0
        return weights, source, target

    def _new(self, name: str) -> Path:
        return self._folder / f"{len(list(self._folder.iterdir()))}.{name}"


def tiny_exports(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Exports]:
    """Those of a module, with the sizes of :func:`add_tiny_bases`: it makes a fixture of this."""
    with pytest.MonkeyPatch.context() as patch:
        add_tiny_bases(patch)
        yield Exports(tmp_path_factory.mktemp("hf"))
