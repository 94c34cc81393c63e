"""Find what a flavor's ``[router]`` cannot be combined with, in the model and in the job."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torchtitan.distributed.activation_checkpoint import MemoryBudgetAC
from torchtitan.models.common.config_utils import decoder_vocab_size

from ezpz_moe.config.flavor_schema import group_score_conflicts
from ezpz_moe.config.routing_schema import OF_NEIGHBOURS, Router, size_conflicts
from ezpz_moe.hosts.titan.base import titan
from ezpz_moe.hosts.titan.dispatchers import SORTING, host_class
from ezpz_moe.hosts.titan.labelled import is_labelled

_LABELS = 'padding = "labels"'


def router_problems(config: Any, moe: Any, flavor: str) -> Iterator[str]:
    """Yield messages, each with the flavor's key and what excludes it.

    Args:
        config: the host's, of the whole job.
        moe: the config of an MoE layer with the flavor's router.
        flavor: its name.
    """
    settings: Router = moe.router.settings
    checks = (
        _experts,
        _cut_assignments,
        _mask,
        _whole_tensors,
        _host_syncs,
        _shared_sequences,
        _cut_windows,
        _parted_neighbours,
        _forced,
        _drawn_again,
        _residual,
    )
    for problem in (each for check in checks for each in check(config, moe, settings)):
        yield f"flavor {flavor!r}: {problem}"


def _experts(config: Any, moe: Any, settings: Router) -> Iterator[str]:
    """Check sizes: for a flavor with ``base``, only the host's model has them."""
    router = moe.router
    # `choices`, because this router's experts include the zero-computation ones.
    for problem in size_conflicts(settings, choices=router.num_experts, top_k=router.top_k):
        yield f"{problem}."
    for problem in group_score_conflicts(router.group_score, router.num_expert_groups):
        yield f"{problem}."


def _cut_assignments(config: Any, moe: Any, settings: Router) -> Iterator[str]:
    asked = [
        key
        for key, value in (
            ("null_experts", settings.null_experts),
            ("copy_experts", settings.copy_experts),
            ("constant_experts", settings.constant_experts),
            ("dispatch_padding", settings.dispatch_padding is False),
            ('routing = "relu"', settings.has_unchosen),
        )
        if value
    ]
    tables = [f"[router] {' and '.join(asked)}"] if asked else []
    if moe.router.balance.capacity_factor:
        tables.append("[balance] capacity_factor")
    if not tables:
        return
    named = " and ".join(tables)
    if moe.router.num_expert_groups is not None and settings.leaves_out:
        why = (
            "a token has every expert with a score, in whatever group"
            if settings.has_unchosen
            else "zero-computation experts are in no group"
        )
        yield (
            f"{named} cannot be combined with router_num_expert_groups = "
            f"{moe.router.num_expert_groups}: {why}. Remove one."
        )
    # The others send a fixed number of assignments, so the cut-off ones cannot be left out.
    own = host_class(moe.routed_experts.token_dispatcher)
    if own not in SORTING:
        yield (
            f"{named} cannot be combined with the dispatcher {own}, which sends a fixed number of "
            f"assignments per token. Set parallelism.expert_parallel_comm_backend to "
            f'"standard".'
        )
    if settings.constant_experts and config.parallelism.tensor_parallel_degree > 1:
        yield (
            "[router] constant_experts cannot be combined with parallelism.tensor_parallel_degree "
            f"= {config.parallelism.tensor_parallel_degree}: the host lays out only its own "
            "parameters. Use null_experts or copy_experts."
        )


def _mask(config: Any, moe: Any, settings: Router) -> Iterator[str]:
    if not settings.masks_padding:
        return
    pad_token_id, by_labels = settings.pad_token_id, settings.padding == "labels"
    named = f"[router] {_LABELS if by_labels else f'pad_token_id = {pad_token_id}'}"
    vocabulary = decoder_vocab_size(config.model_spec)
    if pad_token_id is not None and pad_token_id >= vocabulary:
        yield (
            f"[router] pad_token_id = {pad_token_id}: the model knows only tokens below "
            f"{vocabulary}, so nothing would be padding. Name the token that the tokenizer pads "
            f"with."
        )
    parallelism = config.parallelism
    if parallelism.pipeline_parallel_degree > 1:
        yield (
            f"{named} cannot be combined with parallelism.pipeline_parallel_degree = "
            f"{parallelism.pipeline_parallel_degree}: only the first stage sees the tokens, and "
            "none knows whose microbatch it recomputes. Set the degree to 1, or remove the key: "
            "padding is then routed and counted like text."
        )
    if settings.padding != "token" and parallelism.context_parallel_degree > 1:
        yield (
            f'[router] padding = "{settings.padding}" cannot be combined with '
            f"parallelism.context_parallel_degree = {parallelism.context_parallel_degree}: a rank "
            'sees only part of its sequences. Use padding = "token".'
        )
    if by_labels:
        yield from _unlabelled(config, named)


def _unlabelled(config: Any, named: str) -> Iterator[str]:
    if not is_labelled(config.dataloader):
        yield (
            f"{named} cannot be combined with the data loader "
            f"{type(config.dataloader)._owner.__name__}: labels reach the routers only by a loader "
            'of ours. Give its config to ezpz_moe.data.labelled, or use padding = "trailing".'
        )


def _whole_tensors(config: Any, moe: Any, settings: Router) -> Iterator[str]:
    """Refuse choices of our own on distributed tensors: only the host's choice works on those."""
    parallelism = config.parallelism
    backend, degree = parallelism.spmd_backend, parallelism.tensor_parallel_degree
    # full_dtensor distributes everything, partial_dtensor what tensor parallelism cuts.
    is_distributed = backend == "full_dtensor" or (backend != "spmd_types" and degree > 1)
    strength = settings.similarity.strength
    if is_distributed and (settings.routing != "topk" or strength):
        asked = f'routing = "{settings.routing}"'
        if strength:
            asked = f"similarity.strength = {strength:g}"
        yield (
            f"[router] {asked} cannot be combined with "
            f"parallelism.spmd_backend = {backend!r}"
            f"{' and tensor parallelism' if backend != 'full_dtensor' else ''}, where a "
            f'router\'s tensors are distributed. Set parallelism.spmd_backend to "spmd_types".'
        )


def _shared_sequences(config: Any, moe: Any, settings: Router) -> Iterator[str]:
    """Refuse sequence groups if a rank's folded tokens may come from any part of any sequence."""
    parallelism, scopes = config.parallelism, moe.router.balance.of_scopes
    cp, tp = parallelism.context_parallel_degree, parallelism.tensor_parallel_degree
    ranks_share = cp > 1 or (tp > 1 and parallelism.expert_parallel_degree > 1)
    # A host that folds the batch has one dimension for the tokens of a sequence, others two.
    is_folded = len(titan().one_sequence(1)) == 1
    if is_folded and ranks_share and "sequence" in scopes:
        degrees = (
            f"parallelism.context_parallel_degree = {cp}"
            if cp > 1
            else "parallelism.tensor_parallel_degree and expert_parallel_degree both above 1"
        )
        yield (
            f'[balance] scope = "sequence" cannot be combined with {degrees} on this torchtitan, '
            'where ranks share the tokens of all sequences. Set [balance] scope to "batch", or '
            "move the losses of [balance.sequence] to [balance.batch]."
        )


def _cut_windows(config: Any, moe: Any, settings: Router) -> Iterator[str]:
    """Refuse windows of earlier tokens where a rank routes only a part of each sequence."""
    if not (strength := settings.similarity.strength):
        return
    parallelism = config.parallelism
    cp, tp = parallelism.context_parallel_degree, parallelism.tensor_parallel_degree
    named = f"[router] similarity.strength = {strength:g} cannot be combined with parallelism."
    why = "a rank's router does not see the tokens before its part of a sequence"
    if cp > 1:
        yield f"{named}context_parallel_degree = {cp}: {why}. Set it to 1, or remove the key."
    if tp > 1 and parallelism.expert_parallel_degree > 1:
        yield (
            f"{named}tensor_parallel_degree and expert_parallel_degree both above 1: {why}. Set "
            "one of them to 1, or remove the key."
        )


def _parted_neighbours(config: Any, moe: Any, settings: Router) -> Iterator[str]:
    """Refuse losses that compare neighbouring tokens if these are on several ranks."""
    parallelism, asked = config.parallelism, moe.router.balance.losses_by_key
    compared = [key for key in asked if key.endswith(OF_NEIGHBOURS)]
    if not compared:
        return
    cp, tp = parallelism.context_parallel_degree, parallelism.tensor_parallel_degree
    if cp > 1 or (tp > 1 and parallelism.expert_parallel_degree > 1):
        degrees = (
            f"parallelism.context_parallel_degree = {cp}"
            if cp > 1
            else "parallelism.tensor_parallel_degree and expert_parallel_degree both above 1"
        )
        yield (
            f"[balance] {compared[0]} cannot be combined with {degrees}: a token's neighbours are "
            "then on another rank. Set the degree to 1, or remove the loss."
        )


def _host_syncs(config: Any, moe: Any, settings: Router) -> Iterator[str]:
    # Each of these reads a number on the host, which a captured graph cannot.
    drops = moe.router.balance.capacity_factor
    cuts = settings.leaves_out or settings.dispatch_padding is False or drops
    if config.training.disable_cuda_graphs or not (cuts or settings.routing == "sinkhorn"):
        return
    is_sinkhorn = settings.routing == "sinkhorn"
    what = 'routing = "sinkhorn"' if is_sinkhorn else "leaving assignments out"
    table = "[balance] capacity_factor" if drops and not is_sinkhorn else "[router]"
    yield (
        f"{table}: {what} copies a number to the host, which a CUDA graph cannot capture. Leave "
        f"training.disable_cuda_graphs out, or set it to true."
    )


def _forced(config: Any, moe: Any, settings: Router) -> Iterator[str]:
    if settings.routing != "topk" and config.debug.moe_force_load_balance:
        yield (
            f'[router] routing = "{settings.routing}" cannot be combined with '
            "debug.moe_force_load_balance = true: both say which experts a token goes to. Remove "
            "one."
        )


def _drawn_again(config: Any, moe: Any, settings: Router) -> Iterator[str]:
    """Refuse random numbers that would differ when a block is recomputed."""
    policy = config.activation_checkpoint
    drawn = [key for key in ("jitter_noise", "noise") if getattr(settings, key)]
    # None: nothing is recomputed.
    if not drawn or policy is None:
        return
    named = f"[router] {drawn[0]} = {getattr(settings, drawn[0])} cannot be combined with"
    why = "the gradient would use other random numbers than the forward pass. Choose"
    if isinstance(policy, MemoryBudgetAC.Config):  # torch's partitioner draws new numbers
        yield f'{named} activation_checkpoint.mode = "memory_budget": {why} another mode.'
    elif not policy.preserve_rng_state:
        yield f"{named} activation_checkpoint.preserve_rng_state = false: {why} true."


def _residual(config: Any, moe: Any, settings: Router) -> Iterator[str]:
    """Refuse what splits the layers, or has no place for their map of logits."""
    if not settings.gating_residual:
        return
    named, degree = "[router] gating_residual = true", config.parallelism.pipeline_parallel_degree
    if degree > 1:
        yield (
            f"{named} cannot be combined with parallelism.pipeline_parallel_degree = {degree}: a "
            "stage sends only the residual stream to the next, without the logits of its last "
            "layer. Set the degree to 1, or remove the key."
        )
    for key in ("initial_load_in_hf", "last_save_in_hf"):
        if getattr(config.checkpoint, key, False):
            yield (
                f"checkpoint.{key} = true: Hugging Face's formats have no place for the maps of "
                f"{named}. Set it to false."
            )
