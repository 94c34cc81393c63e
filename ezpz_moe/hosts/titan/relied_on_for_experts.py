"""List what the binding relies on in torchtitan 0.3's layers: experts, dispatch, initial values."""

from ezpz_moe.hosts.reliance import NO_BACKEND, NO_FLAVOR, Reliance
from ezpz_moe.hosts.titan.relied_on_in_part import NO_ROUTER

SEAM_MOVED = (
    "the seam moved: backends other than grouped_mm cannot be bound{}; training with the stock "
    "path still works"
)
_NO_EXPERT_PARALLELISM = (
    'expert parallelism needs routed = "composed" in the flavor; everything else still trains'
)
_EXCHANGE = ("pg", "input_splits", "output_splits")
_NOT_COUNTED = "`ezpz-moe flavors`, `show` and `doctor JOB.toml` cannot count a model's parameters"

EXPERTS = (
    Reliance(
        "torchtitan.models.common.moe:GroupedExperts.Config",
        used_for="the selector's own Config is a subclass of it",
        if_broken=NO_BACKEND,
        fields=("dim", "hidden_dim", "num_experts"),
        vital=True,
    ),
    Reliance(
        "torchtitan.models.common.moe:GroupedExperts._grouped_mm",
        # Not vital: only models with experts like gpt_oss's go through it.
        used_for="the seam that a backend replaces in experts other than SwiGLU (gpt_oss)",
        if_broken=SEAM_MOVED.format(" to experts other than SwiGLU"),
        takes=("A", "B_t", "offs"),
    ),
    Reliance(
        "torchtitan.models.common.moe:GroupedExperts.forward",
        used_for="a backend computes the whole SwiGLU FFN in its place",
        if_broken=NO_BACKEND,
        # The host looks up how inputs are sharded by these names.
        takes=("x_RD", "num_tokens_per_expert_E"),
        vital=True,
    ),
    Reliance(
        "torchtitan.models.common.moe:RoutedExperts",
        used_for="holds the experts under its own name in every state-dict key",
        if_broken="checkpoints of this host have other keys",
        vital=True,
    ),
    Reliance(
        "torchtitan.models.common.moe:RoutedExperts.Config",
        used_for="the node of a routed layer, which is replaced with its experts",
        if_broken=NO_BACKEND,
        fields=("inner_experts", "token_dispatcher"),
        vital=True,
    ),
    Reliance(
        "torchtitan.models.common.moe:RoutedExperts.forward",
        used_for="dispatch, experts and combination, which a backend computes as one node",
        if_broken=NO_BACKEND,
        vital=True,
    ),
    Reliance(
        "torchtitan.models.common.token_dispatcher:AllToAllTokenDispatcher",
        used_for="telling whether tokens stay on their rank, and sending them to others around "
        "a layer that is one node",
        if_broken=NO_BACKEND,
        has=("dispatch", "combine", "_local_reorder"),
        sets=("ep_mesh",),
        vital=True,
    ),
    *(
        Reliance(
            f"torchtitan.models.common.token_dispatcher:AllToAllTokenDispatcher.{method}",
            used_for="its collective, for tokens that go once to each rank",
            if_broken=_NO_EXPERT_PARALLELISM,
            takes=takes,
        )
        for method, takes in (
            ("_token_count_exchange", ("num_local_tokens_per_expert_E", "pg", "ep_size")),
            ("_dispatch_token_exchange", _EXCHANGE),
            ("_combine_token_exchange", _EXCHANGE),
        )
    ),
    Reliance(
        "torchtitan.distributed.spmd_types:maybe_set_sparse_mesh",
        used_for="the mesh that the host has set while experts compute",
        if_broken=NO_BACKEND,
        vital=True,
    ),
    Reliance(
        "torchtitan.distributed.spmd_types:spmd_mesh_size",
        used_for="telling the host's type checker what the counts are, without expert parallelism",
        if_broken=NO_BACKEND,
        takes=("axis_name",),
        vital=True,
    ),
    Reliance(
        "torchtitan.distributed.utils:get_spmd_backend",
        used_for="the same: whether types are checked",
        if_broken=NO_BACKEND,
        vital=True,
    ),
    Reliance(
        "torchtitan.models.common.moe:MoE.Config",
        used_for="counting parameters by layer, and changing the router",
        if_broken=f"{_NOT_COUNTED}; {NO_ROUTER}",
        fields=("num_experts", "routed_experts", "router", "load_balance_coeff", "shared_experts"),
    ),
    Reliance(
        "torchtitan.protocols.module:Module._init_self_parameters",
        used_for="the selector is a Module too; it logs the backend when its weights are made",
        if_broken=NO_BACKEND,
        vital=True,
    ),
    Reliance(
        "torchtitan.protocols.model:BaseModel.init_states",
        used_for="the root of a job's model starts on several CPU ranks as on one",
        if_broken=NO_FLAVOR,
        takes=("buffer_device",),
        vital=True,
    ),
)
