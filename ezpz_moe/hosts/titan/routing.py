"""Put a flavor's ``[router]`` and ``[balance]`` into the host's model and training step."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torchtitan.models.common.moe import MoE
from torchtitan.protocols.model_spec import ModelSpec
from torchtitan.tools.logging import logger

from ezpz_moe.config.flavors import Flavor
from ezpz_moe.config.routing_schema import Balance, Router, Scope
from ezpz_moe.config.schedule_schema import Schedule
from ezpz_moe.config.telemetry_schema import Telemetry
from ezpz_moe.hosts.local import local
from ezpz_moe.hosts.titan.activation_checkpointing import keeping_choices
from ezpz_moe.hosts.titan.base import titan
from ezpz_moe.hosts.titan.compiling import make_room
from ezpz_moe.hosts.titan.dispatchers import cuts_padding
from ezpz_moe.hosts.titan.groups import Groups, TokenMask
from ezpz_moe.hosts.titan.labelled import COUNTED
from ezpz_moe.hosts.titan.router import moe_layers, routed
from ezpz_moe.hosts.titan.row_figures import experts_of
from ezpz_moe.hosts.titan.selector import REPORTED, RowCounts
from ezpz_moe.hosts.titan.similar import tell_documents
from ezpz_moe.hosts.titan.zero_computation import dispatch_padding, with_zero_computation
from ezpz_moe.routing.balance import bias_change, value_at
from ezpz_moe.routing.choices import stride_of
from ezpz_moe.routing.counters import apart
from ezpz_moe.routing.padding import tokens_that_count

# The host's own default of `MoE.Config.load_balance_coeff`.
_HOST_RATE = 1e-3


def route(spec: ModelSpec, flavor: Flavor) -> None:
    """Put the flavor's routing into the model's config and the spec's hooks, in place."""
    settings = flavor.router
    # A list, because the loop replaces nodes of the tree that is traversed.
    for _, moe, parent, attribute in list(spec.model.traverse(MoE.Config)):
        dispatcher = moe.routed_experts.token_dispatcher
        cuts = settings.leaves_out or cuts_padding(dispatcher, settings)
        if cuts or flavor.balance.capacity_factor:
            moe = with_zero_computation(moe, settings, flavor.balance)
            setattr(parent, attribute, moe)
        # After the zero-computation experts: they enlarge the gate that this derives from.
        moe.router = routed(moe.router, settings, flavor.balance, flavor.router_group_score)
        moe.load_balance_coeff = _host_rate(moe.load_balance_coeff, flavor.balance)
    if settings.learned_scale:
        spec.state_dict_adapter = None  # the host's does not know the scale
    if settings.similarity.strength:
        tell_documents(spec.model)
    if settings.gating_residual:
        with titan().importing():  # only such a flavor needs this from the host
            from ezpz_moe.hosts.titan.gating_residual import set_gating_residual
        set_gating_residual(spec.model, flavor)
    spec.parallelize_fn = _wiring(spec.parallelize_fn, flavor)
    spec.post_optimizer_build_fn = _bias_hook(spec.post_optimizer_build_fn, flavor)


def _host_rate(rate: float | None, balance: Balance) -> float | None:
    """Return the rate for the host's MoE; with one, it has a bias buffer, and the host its hook."""
    match balance.bias_update:
        case None:
            return rate
        case "none":
            return None
        case _:
            # The host asserts a positive rate. If ours replaces the hook, or there is none, only
            # its being set matters.
            ours = balance.bias_rate.end if balance.bias_rate else rate
            return ours or _HOST_RATE


# --- after the model is parallelized --------------------------------------------------------------


def _wiring(parallelize_fn: Callable[..., Any], flavor: Flavor) -> Callable[..., Any]:
    @functools.wraps(parallelize_fn)
    def parallelize(model: torch.nn.Module, *, parallel_dims: Any, **kwargs: Any) -> Any:
        # Here, because the flags of the command line may still change the policy until now.
        kwargs["ac_config"] = keeping_choices(kwargs["ac_config"])
        if flavor.dimensions is not None:
            make_room(flavor.dimensions)
        model = parallelize_fn(model, parallel_dims=parallel_dims, **kwargs)
        if flavor.balance.capacity_factor:
            logger.warning(f"ezpz_moe: {_drops(flavor)}")
        # One mask object for all layers: setting it once per forward reaches every router.
        mask = TokenMask()
        groups = _groups(flavor.balance, parallel_dims, kwargs["training"], kwargs["parallelism"])
        for module in model.modules():
            if getattr(module, "masked_by", None) is not None:
                module.masked_by = mask
            if isinstance(module, RowCounts):
                module.on = flavor.reported is not None
        for number, moe in moe_layers([model]).items():
            moe.router.groups = groups
            if flavor.reported is not None:
                moe.router.tokens_of_step = _tokens_of_step(
                    parallel_dims, kwargs["training"], kwargs["parallelism"]
                )
                _watch(number, moe, flavor.reported, parallel_dims, _length(parallel_dims, kwargs))
            # A balanced choice ignores the gate, which then has no gradient and no state to resume.
            if flavor.router.freeze or flavor.router.routing == "balanced":
                # Only now: parameters that parallelize_fn lays out again lose requires_grad =
                # False.
                moe.router.gate.requires_grad_(False)
        if flavor.router.masks_padding:
            # With expert parallelism, each rank of a tensor-parallel group routes its part.
            tp = parallel_dims.get_optional_mesh("tp") if parallel_dims.ep_enabled else None
            hook = _masking(mask, flavor.router, _length(parallel_dims, kwargs), tp)
            model.register_forward_pre_hook(hook, with_kwargs=True)
        if flavor.router.dispatch_padding is None and not kwargs["training"].disable_cuda_graphs:
            dispatch_padding(model)  # leaving it out copies a number to the host
        return model

    return parallelize


def _watch(number: int, moe: Any, reported: Telemetry, parallel_dims: Any, length: int) -> None:
    """Have the router of a layer count what is reported; ``length``: tokens of a sequence."""
    router = moe.router
    router.gate.is_counted = True
    if reported.dumped:
        router.is_kept, router.layer = True, number
    if reported.pairs:
        router.stride = stride_of(router.tokens_of_step, length)
    ep_mesh = parallel_dims.get_optional_mesh("ep")
    experts = experts_of(moe)
    # Of a composed layer, the counts of the experts say what goes where.
    if ep_mesh is not None and experts is not None and experts.is_one_node:
        router.ranks = ep_mesh.size()


def _drops(flavor: Flavor) -> str:
    balance = flavor.balance
    return (
        f"[balance] capacity_factor = {balance.capacity_factor:g} of flavor {flavor.name} drops "
        f'what is beyond an expert\'s capacity in training (drop = "{balance.drop}"): there, the '
        f"experts output zero. Its share {REPORTED}."
    )


def _length(parallel_dims: Any, kwargs: dict[str, Any]) -> int:
    """Return the tokens of a sequence."""
    data_ranks = parallel_dims.dp_replicate * parallel_dims.dp_shard
    return titan().sequences(kwargs["training"], kwargs["parallelism"], data_ranks).length


def _masking(mask: TokenMask, settings: Router, length: int, tp: Any) -> Callable[..., Any]:
    """Return a pre-hook of the model, which sees the batch; the routers see only embeddings.

    Args:
        mask: what it sets.
        settings: the flavor's.
        length: tokens of a sequence.
        tp: the mesh of ranks that each route a part of every sequence; None if a rank has all.
    """

    def before_forward(
        model: torch.nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        kwargs = dict(kwargs)
        counted = kwargs.pop(COUNTED, None)
        if settings.padding != "labels":
            counted = tokens_that_count(local(args[0]), settings, length)
        elif counted is None:
            raise ValueError(
                '[router] padding = "labels": a batch does not say which labels count, because it '
                "is from another data loader than the job's"
            )
        counted = local(counted)
        if tp is not None:  # the last dimension is that of positions, or of folded tokens
            counted = counted.chunk(tp.size(), dim=-1)[tp.get_local_rank()]
        mask.mask_BL = counted
        return args, kwargs

    return before_forward


def _groups(
    balance: Balance, parallel_dims: Any, training: Any, parallelism: Any
) -> dict[Scope, Groups]:
    """Return what the losses are averaged over by scope, and a group's weight in a training step.

    The host sums gradients over ranks and microbatches, and divides their losses by the tokens of
    the whole step. In the same way, a group's loss is divided by the groups of the whole step.
    """
    data_ranks = parallel_dims.dp_replicate * parallel_dims.dp_shard
    sequences = titan().sequences(training, parallelism, data_ranks)
    microbatches = sequences.of_step // sequences.of_microbatch // data_ranks
    of_scopes = {
        "sequence": (sequences.of_step, "cp"),
        "batch": (microbatches * data_ranks, "cp"),
        "global": (microbatches, "loss"),
    }
    # Tensor parallelism: with expert parallelism, each rank routes its part of a sequence. Without
    # it, all ranks route the same tokens, and outside of DTensor the host adds up their gradients.
    same_tokens = not parallel_dims.ep_enabled and parallel_dims.spmd_backend == "spmd_types"
    found: dict[Scope, Groups] = {}
    for scope in balance.of_scopes:
        groups, mesh = of_scopes[scope]
        names = (mesh, "tp") if parallel_dims.ep_enabled else (mesh,)
        spread_over = map(parallel_dims.get_optional_mesh, names)
        found[scope] = Groups(
            by_sequence=scope == "sequence",
            length=sequences.length,
            meshes=tuple(mesh for mesh in spread_over if mesh is not None),
            weight=1 / groups,
            copies=parallel_dims.tp if same_tokens else 1,
        )
    return found


def _tokens_of_step(parallel_dims: Any, training: Any, parallelism: Any) -> int:
    """Return how many tokens a router of this rank sees in a training step."""
    data_ranks = parallel_dims.dp_replicate * parallel_dims.dp_shard
    sequences = titan().sequences(training, parallelism, data_ranks)
    shared_by = parallel_dims.cp * (parallel_dims.tp if parallel_dims.ep_enabled else 1)
    return sequences.of_step // data_ranks * sequences.length // shared_by


def counting_meshes(parallel_dims: Any) -> list[Any]:
    """Return the meshes over which the routers' counters add up to those of all tokens."""
    names = ("loss", "tp") if parallel_dims.ep_enabled else ("loss",)
    return [mesh for mesh in map(parallel_dims.get_optional_mesh, names) if mesh is not None]


# --- the bias -------------------------------------------------------------------------------------


def _bias_hook(host_hook: Callable[..., None] | None, flavor: Flavor) -> Callable[..., None] | None:
    """Return the host's hook if it does what the flavor asks for, or ours for its variants."""
    balance, settings = flavor.balance, flavor.router
    if settings.freeze or settings.routing != "topk":
        # An untrained gate has nothing to balance. If the bias has no effect on the choice, its
        # updates would never end, and topk would follow that bias at inference.
        return None
    rate = balance.bias_rate
    if rate is not None and rate.start == rate.end == 0:
        return None  # the bias is used, and stays as it is
    # The host's own hook whenever possible: its results are then the host's, bit for bit.
    is_the_hosts = balance.bias_update != "proportional" and (rate is None or rate.is_constant)
    # The host's counts include padding tokens, ours do not. It stacks those of all layers, so they
    # must have as many experts.
    is_uneven = flavor.dimensions is not None and flavor.dimensions.is_uneven
    if is_the_hosts and not settings.masks_padding and not is_uneven:
        return host_hook
    by_sign = balance.bias_update != "proportional"

    def register(optimizers: Any, model_parts: Any, parallel_dims: Any) -> None:
        update = _BiasUpdate(model_parts, parallel_dims, rate, by_sign)
        optimizers.register_step_pre_hook(lambda *_, **__: update())

    return register


class _BiasUpdate:
    """Moves the biases of every layer, after the gradients of a step."""

    def __init__(
        self, model_parts: Any, parallel_dims: Any, rate: Schedule | None, by_sign: bool
    ) -> None:
        layers = moe_layers(model_parts).values()
        self.layers = [moe for moe in layers if moe.expert_bias_E is not None]
        self.meshes = counting_meshes(parallel_dims)
        self.rate, self.by_sign = rate, by_sign
        # Telemetry reads the same counters, so they are compared with the last step and not reset.
        self.before_N = self._counts()

    def _counts(self) -> Tensor:
        """Return counts_N of all layers, one after the other: they may have different E."""
        counts = [moe.router.counts_E for moe in self.layers]
        return torch.cat(counts) if counts else torch.zeros(0)

    @torch.no_grad()
    def __call__(self) -> None:
        if not self.layers:
            return
        now_N = self._counts()
        counts_N = now_N - self.before_N
        self.before_N = now_N
        for mesh in self.meshes:
            torch.distributed.all_reduce(counts_N, group=mesh.get_group())
        each = apart(counts_N, [moe.router.counts_E for moe in self.layers])
        for moe, counts_E in zip(self.layers, each, strict=True):
            rate = value_at(self.rate, moe.router.step) if self.rate else moe.load_balance_coeff
            local(moe.expert_bias_E).add_(bias_change(counts_E, rate=rate, by_sign=self.by_sign))
            # The host's hook would reset its own counter; without it, it would grow for the whole
            # run.
            moe.tokens_per_expert_E.zero_()
