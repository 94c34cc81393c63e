"""Other projects' expert layers, where they are installed.

For the experts' FFN, each gets every row as a token with one expert (top-1, weight 1), sorted by
expert as our backends get them. Whatever a peer does to its tokens besides the products (sorting,
gathering, scattering) counts towards its time, because its layer begins there.

Only transformers' layers have been run here, on the CPU. The others need CUDA and follow their
published interface; like all contenders, they are timed only once their output is found right.

Legend of the suffixes: :mod:`ezpz_moe.compute.contract`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from importlib import util
from typing import Any

import psutil
import torch
import torch.nn.functional as F
from torch import Tensor

from ezpz_moe.compute.reference import Case
from ezpz_moe.tools.bench.contender import Contender, Prepared, leaves
from ezpz_moe.tools.bench.routed_case import RoutedCase
from ezpz_moe.tools.bench.shapes import Shape

Reasons = Callable[[torch.device, torch.dtype, Shape], list[str]]


def expert_of_rows(case: Case) -> Tensor:
    """Return the expert of each of the R rows."""
    counts_E = case.num_tokens_per_expert_E
    experts_E = torch.arange(len(counts_E), device=counts_E.device)
    return torch.repeat_interleave(experts_E, counts_E)


def _is_installed(module: str, install: str) -> Reasons:
    def why_not(*_: Any) -> list[str]:
        return [] if util.find_spec(module) else [f"{module} is not installed: {install}"]

    return why_not


def _on_cuda(module: str, install: str, capability: tuple[int, int] = (0, 0)) -> Reasons:
    is_installed = _is_installed(module, install)

    def why_not(device: torch.device, dtype: torch.dtype, shape: Shape) -> list[str]:
        reasons = is_installed(device, dtype, shape)
        if device.type != "cuda":
            reasons.append("it needs an NVIDIA GPU: --device cuda")
        elif torch.cuda.is_available() and torch.cuda.get_device_capability(device) < capability:
            reasons.append(f"it needs a GPU of compute capability {capability[0]} or newer")
        if dtype not in (torch.bfloat16, torch.float16):
            reasons.append("it needs half precision: --dtype bfloat16")
        return reasons

    return why_not


_TRANSFORMERS = _is_installed("transformers", "pip install transformers")


def _olmoe_experts(implementation: str, w1_EFD: Tensor, w2_EDF: Tensor, w3_EFD: Tensor) -> Any:
    """Return transformers' OLMoE experts with these weights: ``(x_TD, ids_TK, scores_TK)``."""
    # Peers are imported when they are prepared: none of them is a dependency.
    from transformers.models.olmoe import OlmoeConfig
    from transformers.models.olmoe.modeling_olmoe import OlmoeExperts

    E, hidden_dim, dim = w1_EFD.shape
    config = OlmoeConfig(
        hidden_size=dim, intermediate_size=hidden_dim, num_experts=E, hidden_act="silu"
    )
    # What transformers sets for a whole model, from its argument experts_implementation. The
    # experts' own class takes nothing but a config.
    config._experts_implementation = implementation
    # Built without memory: load_state_dict(assign=True) then takes our tensors as they are.
    with torch.device("meta"):
        experts = OlmoeExperts(config)
    gate_up_proj = torch.cat([w1_EFD, w3_EFD], dim=1)
    experts.load_state_dict({"gate_up_proj": gate_up_proj, "down_proj": w2_EDF}, assign=True)
    return experts


def _transformers_routed(implementation: str) -> Callable[[RoutedCase], Prepared]:
    """Prepare what follows the router in transformers' OLMoE block: dispatch to combination."""

    def prepare(case: RoutedCase) -> Prepared:
        experts = _olmoe_experts(implementation, case.w1_EFD, case.w2_EDF, case.w3_EFD)
        x_TD, scores_TK = leaves(case.x_TD, case.scores_TK)
        return Prepared(
            # In x's dtype, as the block's own router gives them.
            lambda: experts(x_TD, case.ids_TK, scores_TK.to(x_TD.dtype)),
            (*experts.parameters(), x_TD, scores_TK),
            (case.ids_TK,),
        )

    return prepare


def _transformers(implementation: str) -> Callable[[Case], Prepared]:
    """Prepare transformers' OLMoE experts, computed by one of its experts backends."""

    def prepare(case: Case) -> Prepared:
        experts = _olmoe_experts(implementation, case.w1_EFD, case.w2_EDF, case.w3_EFD)
        (x_RD,) = leaves(case.x_RD)
        experts_R1 = expert_of_rows(case).unsqueeze(1)
        weights_R1 = torch.ones_like(experts_R1, dtype=x_RD.dtype)
        return Prepared(
            lambda: experts(x_RD, experts_R1, weights_R1),
            (*experts.parameters(), x_RD),
            (experts_R1, weights_R1),
        )

    return prepare


def _copies_fit(device: torch.device, dtype: torch.dtype, shape: Shape) -> list[str]:
    """Return why transformers' batched_mm has no room for each row's weights and gradients."""
    if reasons := _TRANSFORMERS(device, dtype, shape):
        return reasons
    # Three weights per row, and their gradients.
    needed = 2 * 3 * shape.R * shape.D * shape.F * dtype.itemsize
    free = (
        torch.cuda.mem_get_info(device)[0]
        if device.type == "cuda"
        else psutil.virtual_memory().available
    )
    if needed <= free // 2:
        return []
    return [
        f"it copies its expert's weights for every row, {needed / 2**30:.1f} GiB with their "
        f"gradients, more than half of the free memory: choose a smaller shape"
    ]


def _scattermoe(case: Case) -> Prepared:
    from scattermoe.mlp import GLUMLP

    E, hidden_dim, dim = case.w1_EFD.shape
    layer = GLUMLP(dim, hidden_dim, E, top_k=1, activation=torch.nn.SiLU())
    # Each peer stacks gate and up in its own order. A wrong one shows in the output, before timing.
    up_and_gate = torch.cat([case.w3_EFD, case.w1_EFD], dim=1)  # in this order
    layer.experts.weight = torch.nn.Parameter(up_and_gate)
    layer.output_experts.weight = torch.nn.Parameter(case.w2_EDF)
    (x_RD,) = leaves(case.x_RD)
    experts_R1 = expert_of_rows(case).unsqueeze(1)
    weights_R1 = torch.ones_like(experts_R1, dtype=x_RD.dtype)
    weights = (layer.experts.weight, layer.output_experts.weight)
    return Prepared(
        lambda: layer(x_RD, weights_R1, experts_R1), (*weights, x_RD), (weights_R1, experts_R1)
    )


def _megablocks(case: Case) -> Prepared:
    from megablocks.layers.arguments import Arguments
    from megablocks.layers.glu import GroupedGLU

    E, hidden_dim, dim = case.w1_EFD.shape
    dtype, device = case.x_RD.dtype, case.x_RD.device
    layer = GroupedGLU(
        Arguments(
            hidden_size=dim,
            ffn_hidden_size=hidden_dim,
            moe_num_experts=E,
            moe_top_k=1,
            bias=False,
            activation_fn=F.silu,
            mlp_type="glu",
            mlp_impl="grouped",
            fp16=dtype == torch.float16,
            bf16=dtype == torch.bfloat16,
            device=device,
        )
    )
    assert case.w3_EFD is not None  # a SwiGLU
    weights = {
        "w1": case.w1_EFD.flatten(0, 1),
        "v1": case.w3_EFD.flatten(0, 1),
        "w2": case.w2_EDF.transpose(1, 2).flatten(0, 1),
    }
    layer.load_state_dict(weights, assign=True)
    (x_RD,), counts_E = leaves(case.x_RD), case.num_tokens_per_expert_E
    return Prepared(lambda: layer(x_RD, counts_E), (*layer.parameters(), x_RD), (counts_E,))


def _sonicmoe(case: Case) -> Prepared:
    from sonicmoe.enums import ActivationType
    from sonicmoe.functional import moe_general_routing_inputs

    E, R = len(case.num_tokens_per_expert_E), len(case.x_RD)
    interleaved = torch.stack([case.w1_EFD, case.w3_EFD], dim=2).flatten(1, 2)  # gate, up, gate, ..
    gate_up_E2FD, w2_EDF, x_RD = inputs = leaves(interleaved, case.w2_EDF, case.x_RD)
    experts_R = expert_of_rows(case).int()
    rows_R = torch.arange(R, device=x_RD.device, dtype=torch.int32)
    ones_R = torch.ones(R, device=x_RD.device)
    options: dict[str, Any] = {}
    # Only some versions want to be told the stream.
    if "stream_id" in inspect.signature(moe_general_routing_inputs).parameters:
        options["stream_id"] = torch.cuda.current_stream().cuda_stream

    def forward() -> Tensor:
        y_RD, _ = moe_general_routing_inputs(
            x=x_RD,
            router_scores=ones_R,
            token_indices=rows_R,
            expert_indices=experts_R,
            w1=gate_up_E2FD.permute(1, 2, 0),
            b1=None,
            w2=w2_EDF.permute(1, 2, 0),
            b2=None,
            E=E,
            activation_type=ActivationType.SWIGLU,
            **options,
        )
        return y_RD

    return Prepared(forward, inputs, (experts_R, rows_R, ones_R))


PEERS = (
    Contender("transformers_eager", _transformers("eager"), _TRANSFORMERS),
    Contender("transformers_batched_mm", _transformers("batched_mm"), _copies_fit),
    Contender("transformers_grouped_mm", _transformers("grouped_mm"), _TRANSFORMERS),
    Contender(
        "scattermoe",
        _scattermoe,
        _on_cuda("scattermoe", "pip install git+https://github.com/shawntan/scattermoe"),
    ),
    Contender("megablocks", _megablocks, _on_cuda("megablocks", "pip install 'megablocks[gg]'")),
    Contender(
        "sonicmoe",
        _sonicmoe,
        _on_cuda("sonicmoe", "pip install sonic-moe", capability=(9, 0)),
    ),
)

ROUTED_PEERS = (
    Contender("transformers_eager", _transformers_routed("eager"), _TRANSFORMERS),
    Contender("transformers_batched_mm", _transformers_routed("batched_mm"), _copies_fit),
    Contender("transformers_grouped_mm", _transformers_routed("grouped_mm"), _TRANSFORMERS),
)
