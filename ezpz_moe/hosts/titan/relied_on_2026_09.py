"""List what the binding relies on in torchtitan since September 2026: August's, new experts."""

from ezpz_moe.hosts.reliance import NO_BACKEND, Reliance
from ezpz_moe.hosts.titan.relied_on_2026_08 import RELIED_ON as RELIED_ON_BEFORE
from ezpz_moe.hosts.titan.relied_on_for_experts import SEAM_MOVED

_EXPERTS = "torchtitan.models.common.moe:RoutedExperts"
_LINEAR = "torchtitan.models.common.linear:GroupedLinear"
# August's lines for RoutedExperts go too: the lines below ask more of the same class. Its routed
# layers stay composed and its experts have the host's forward, so that nobody asks where the
# dispatcher sends tokens, nor of what type the counts are.
_NO_LONGER = (
    "torchtitan.models.common.moe:GroupedExperts",
    _EXPERTS,
    "torchtitan.models.common.token_dispatcher:AllToAllTokenDispatcher",
    "torchtitan.distributed.spmd_types:spmd_mesh_size",
    "torchtitan.distributed.utils:get_spmd_backend",
    "torchtitan.distributed.spmd_types:maybe_set_sparse_mesh",
)

RELIED_ON: tuple[Reliance, ...] = (
    Reliance(
        f"{_EXPERTS}.Config",
        used_for="the selector's own Config is a subclass of it, with other linears",
        if_broken=NO_BACKEND,
        fields=("w13", "w2"),
        vital=True,
    ),
    Reliance(
        f"{_EXPERTS}.forward",
        used_for="it computes with the linears; a subclass with another forward is refused",
        if_broken=NO_BACKEND,
        vital=True,
    ),
    Reliance(
        f"{_LINEAR}.Config",
        used_for="the linears' own Config is a subclass of it; the experts' sizes",
        if_broken=NO_BACKEND,
        fields=("group_size", "in_features", "out_features", "num_linears"),
        vital=True,
    ),
    Reliance(
        f"{_LINEAR}._grouped_mm",
        used_for="the seam that a backend replaces in both linears",
        if_broken=SEAM_MOVED.format(""),
        takes=("input_RI", "weight_EOI", "offsets_E"),
    ),
    *(line for line in RELIED_ON_BEFORE if not line.thing.startswith(_NO_LONGER)),
)

STATE_DICT_KEYS = (
    "layers.1.moe.routed_experts.w13.weight",
    "layers.1.moe.routed_experts.w2.weight",
    "layers.1.moe.router.gate.weight",
    "layers.1.moe.expert_bias_E",
)
"""Sample keys of a checkpoint of `debugmodel`: those of a layer with experts."""
