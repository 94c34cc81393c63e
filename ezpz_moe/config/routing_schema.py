"""What a flavor may say in its tables ``[router]`` and ``[balance]``.

docs/reference/routing.md says what each key does; the functions are in :mod:`ezpz_moe.routing`.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Annotated, Literal, Self, get_args

from pydantic import ConfigDict, Field, field_validator, model_validator

from ezpz_moe.config.activated_schema import (
    DEFAULT_CHUNK,
    activated_conflicts,
    chunk_conflicts,
    neighbour_conflicts,
)
from ezpz_moe.config.schedule_schema import Rate, Schedule
from ezpz_moe.config.schema import Data, Steps, mistake
from ezpz_moe.config.similarity_schema import Similarity

DEFAULT_JITTER = 0.01

Experts = Annotated[int, Field(ge=1, le=2**14)]

# The upper bounds here are far above any use, as in flavor_schema.py: they keep a typing mistake
# from becoming a tensor of that size.
_NoExperts = Annotated[int, Field(ge=0, le=2**14)]
_Positive = Annotated[float, Field(gt=0)]
_NotNegative = Annotated[float, Field(ge=0)]


class Router(Data):
    """``[router]``: how a token's experts are chosen."""

    routing: Literal["topk", "sinkhorn", "balanced", "relu"] = "topk"
    # Below 1: from there on an input could vanish or change its sign.
    jitter_noise: Annotated[float, Field(ge=0, lt=1)] = 0.0
    gate_precision: Literal["bfloat16", "float32", "float64"] | None = None
    freeze: bool = False
    temperature: Schedule = Schedule(start=1.0, end=1.0, steps=1)
    activation: Literal["identity", "softplus", "relu_rmsnorm"] = "identity"
    learned_scale: bool = False
    pad_token_id: Annotated[int, Field(ge=0, lt=2**24)] | None = None
    padding: Literal["token", "trailing", "labels"] = "token"
    # Not set: padding is not dispatched where the host can leave it out.
    dispatch_padding: bool | None = None
    null_experts: _NoExperts = 0
    copy_experts: _NoExperts = 0
    constant_experts: _NoExperts = 0
    top_k: Experts | None = None
    keep_top1_score: bool = False
    similarity: Similarity = Similarity()
    sinkhorn_tolerance: _Positive = 1e-4
    sinkhorn_iterations: Steps = 100
    noise: Annotated[float, Field(ge=0, le=1)] = 0.0
    skip_first_n_experts: _NoExperts = 0
    gating_residual: bool = False

    @field_validator("jitter_noise", mode="before")
    @classmethod
    def _is_asked_for(cls, value: object) -> object:
        # jitter_noise = true means the default; without this, true would pass as the number 1.
        return DEFAULT_JITTER if value is True else 0.0 if value is False else value

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        if conflicts := list(_router_conflicts(self)):
            raise mistake("; ".join(conflicts))
        return self

    @property
    def zero_computation_experts(self) -> int:
        """How many of the router's choices need no expert computation."""
        return self.null_experts + self.copy_experts + self.constant_experts

    @property
    def leaves_out(self) -> bool:
        """Whether some choices of a token's are computed by no routed expert."""
        return bool(self.zero_computation_experts) or self.has_unchosen

    @property
    def has_unchosen(self) -> bool:
        """Whether a token has as many choices as there are experts, some of them of none."""
        return self.routing == "relu"

    @property
    def masks_padding(self) -> bool:
        """Whether some tokens may be padding."""
        return self.pad_token_id is not None or self.padding == "labels"

    @property
    def schedules(self) -> dict[str, Schedule]:
        """The schedules that differ from their default, by key. A default changes no bits."""
        values = {key: getattr(self, key) for key in type(self).model_fields}
        return {
            key: value
            for key, value in values.items()
            if isinstance(value, Schedule) and value != type(self).model_fields[key].default
        }

    def choices_of_token(self, num_experts: int, top_k: int) -> int:
        """Return how many choices a token makes, given the model's experts and top-k."""
        if self.has_unchosen:
            return num_experts  # each of them is chosen or not
        return self.top_k or raised_top_k(num_experts, top_k, self.zero_computation_experts)


def raised_top_k(num_experts: int, top_k: int, zero_experts: int) -> int:
    """Return how many choices a token makes among E experts and Z zero-computation experts.

    ``round(k (E + Z) / E)``: about k of them compute when all are used equally.

    Args:
        num_experts: the experts of a layer that compute, E.
        top_k: how many of them a token uses when there are no others, k.
        zero_experts: Z.
    """
    return round(top_k * (num_experts + zero_experts) / num_experts)


Scope = Literal["sequence", "batch", "global"]


class Losses(Data):
    """The balance losses by their keys, each with its coefficient.

    A new one is a key here and a formula in :mod:`ezpz_moe.routing.losses`: whoever else names the
    losses asks this class.
    """

    aux_loss: _NotNegative = 0.0
    mse_loss: _NotNegative = 0.0
    z_loss: _NotNegative = 0.0
    locality_loss: _NotNegative = 0.0
    chunk_loss: _NotNegative = 0.0

    @property
    def coefficients(self) -> dict[str, float]:
        """The coefficients above 0, by loss."""
        values = {key: getattr(self, key) for key in LOSSES}
        return {key: value for key, value in values.items() if value > 0}


LOSSES = tuple(Losses.model_fields)
BALANCING = ("aux_loss", "mse_loss")
"""Those that spread tokens over experts; the z-loss only keeps logits small."""
OF_NEIGHBOURS = ("locality_loss", "chunk_loss")
"""Those that compare neighbouring tokens. Only who asks for one has it computed and reported."""
SCOPES: tuple[Scope, ...] = get_args(Scope)


class Balance(Losses):
    """``[balance]``: what spreads the tokens over the experts.

    Its own losses have ``scope``; a table of a scope, such as ``[balance.batch]``, has more.
    """

    # `global` is a word of Python: in the file and in logs it has no underscore.
    model_config = ConfigDict(serialize_by_alias=True)

    # Of the losses above.
    scope: Scope = "sequence"
    sequence: Losses = Losses()
    batch: Losses = Losses()
    global_: Losses = Field(default=Losses(), alias="global")
    # Not set: "scores" where the layer has a selection bias, "routed" where it has none.
    aux_loss_choice: Literal["scores", "routed"] | None = None
    # Tokens of a chunk; one token alone has no neighbour.
    chunk: Annotated[int, Field(ge=2, le=2**40)] = DEFAULT_CHUNK
    # 0: every expert takes what it gets.
    capacity_factor: _NotNegative = 0.0
    drop: Literal["last", "probability"] = "last"
    min_capacity: Annotated[int, Field(ge=1, le=2**40)] = 1
    # Not set: the model's own. "none" removes the bias, also an inherited one.
    bias_update: Literal["sign", "proportional", "none"] | None = None
    bias_rate: Rate | None = None

    @property
    def of_scopes(self) -> dict[Scope, dict[str, float]]:
        """The coefficients above 0 by scope and loss, of the scopes that have any.

        Without a loss it is ``scope`` alone, with no coefficient: telemetry reports the losses all
        the same.
        """
        tables = self._tables
        if own := self.coefficients:
            tables[self.scope] = own
        return {scope: of for scope, of in tables.items() if of} or {self.scope: {}}

    @property
    def has_losses(self) -> bool:
        return any(self.of_scopes.values())

    @property
    def computed(self) -> tuple[str, ...]:
        """The losses that routers compute: those of neighbours only if a scope asks for them."""
        asked = {loss for of in self.of_scopes.values() for loss in of}
        return tuple(loss for loss in LOSSES if loss in asked or loss not in OF_NEIGHBOURS)

    @property
    def compares_neighbours(self) -> bool:
        return any(loss in OF_NEIGHBOURS for loss in self.computed)

    @property
    def losses_by_key(self) -> dict[str, float]:
        """The coefficients above 0 by their keys below ``[balance]``, such as ``batch.z_loss``."""
        by_key = dict(self.coefficients)
        for scope, of in self._tables.items():
            by_key |= {f"{scope}.{loss}": value for loss, value in of.items()}
        return by_key

    @property
    def _tables(self) -> dict[Scope, dict[str, float]]:
        tables = zip(SCOPES, (self.sequence, self.batch, self.global_), strict=True)
        return {scope: table.coefficients for scope, table in tables}

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        if conflicts := list(_balance_conflicts(self)):
            raise mistake("; ".join(conflicts))
        return self


def reported_loss(loss: str, scope: Scope, scopes: Collection[Scope]) -> str:
    """Return a loss's name in telemetry: with its scope if a run has several ``scopes``."""
    return loss if len(scopes) == 1 else f"{loss}_{scope}"


LOSSES_OF_SCOPES = tuple(reported_loss(loss, scope, SCOPES) for scope in SCOPES for loss in LOSSES)
REPORTED_LOSSES = (*LOSSES, *LOSSES_OF_SCOPES)
"""Every name that a balance loss may have in telemetry."""


def routing_conflicts(router: Router, balance: Balance) -> Iterator[str]:
    """Yield what one of the two tables says that the other one excludes."""
    losses = balance.losses_by_key
    balancing = {key: losses[key] for key in losses if key.endswith(BALANCING)}
    if router.routing == "sinkhorn" and balancing:
        yield (
            f'router.routing = "sinkhorn" excludes {_settings(balancing, "balance.")}: its '
            "assignment is doubly stochastic and thus balanced already. Remove the loss (set it to "
            '0 if it is inherited), or route with "topk"'
        )
    # "none" is the way out of an inherited update, so it conflicts with nothing.
    bias = [] if balance.bias_update == "none" else ["bias_update"]
    moved = _settings(_changed(balance, bias), "balance.")
    if router.routing == "sinkhorn" and moved:
        yield (
            f'router.routing = "sinkhorn" chooses without the selection bias: {moved} would move '
            'it further and further, unchecked. Remove it; if it is inherited, set it to "none"'
        )
    yield from neighbour_conflicts(router, balance)
    changed = " and ".join(filter(None, (_settings(losses, "balance."), moved)))
    if router.routing == "balanced" and changed:
        yield (
            f'router.routing = "balanced" ignores the scores: {changed} would have no '
            'effect. Remove it; if it is inherited, set a loss to 0 and bias_update to "none"'
        )


def size_conflicts(router: Router, *, choices: int, top_k: int) -> Iterator[str]:
    """Yield what does not fit a layer in which a token chooses ``top_k`` of ``choices``.

    The choices include zero-computation experts.
    """
    zero_experts, skipped = router.zero_computation_experts, router.skip_first_n_experts
    # Only the top-k of this table: the model's own is checked with the model's sizes.
    if router.top_k is not None and top_k > choices:
        yield (
            f"router.top_k = {router.top_k} exceeds the {choices} available experts: "
            f"{choices - zero_experts} routed and {zero_experts} zero-computation ones"
        )
    if skipped and choices - skipped < top_k:
        yield (
            f"router.skip_first_n_experts = {skipped} leaves {max(choices - skipped, 0)} of "
            f"{choices} experts, but a token uses {top_k}"
        )


def _router_conflicts(router: Router) -> Iterator[str]:
    for routing, keys in {
        "sinkhorn": ("sinkhorn_tolerance", "sinkhorn_iterations"),
        "balanced": ("noise", "skip_first_n_experts"),
    }.items():
        if routing != router.routing and (changed := _changed(router, keys)):
            defaults = " and ".join(f"{key} = {Router.model_fields[key].default}" for key in keys)
            yield (
                f"{_with_verb(changed, 'has', 'have')} no effect with routing = "
                f'"{router.routing}", only with '
                f'"{routing}"; remove it, or if it is inherited set {defaults}'
            )
    if router.routing == "balanced" and (changed := _changed(router, ("jitter_noise",))):
        yield (
            f'{_settings(changed)} has no effect with routing = "balanced", which has its own '
            "noise; remove it, or if it is inherited set it to 0"
        )
    if router.gating_residual and router.routing == "balanced":
        yield (
            'gating_residual = true has no effect with routing = "balanced", which ignores the '
            "logits; remove it, or if it is inherited set it to false"
        )
    if router.gating_residual and router.freeze:
        yield (
            "gating_residual = true begins as the gate alone, and freeze = true would leave it so; "
            "remove one of them, or if it is inherited set it to false"
        )
    yield from activated_conflicts(router)
    zero_computation = ("null_experts", "copy_experts", "constant_experts")
    if router.routing != "topk" and (changed := _changed(router, zero_computation)):
        yield f'{_with_verb(changed, "needs", "need")} routing = "topk", not "{router.routing}"'
    if router.routing != "topk" and (strength := router.similarity.strength):
        yield (
            f'similarity.strength = {strength:g} needs routing = "topk", not "{router.routing}", '
            "which does not choose by a token's own scores; remove one, or if it is inherited set "
            "similarity = { strength = 0, window = 64, temperature = 0.2 }"
        )
    if router.top_k is not None and not router.zero_computation_experts:
        yield (
            f"top_k = {router.top_k} applies only with zero-computation experts; without them the "
            "model's own top-k holds (router_top_k)"
        )
    # An inherited pad_token_id cannot be removed, so it may stand beside "labels".
    if router.padding == "trailing" and router.pad_token_id is None:
        yield 'padding = "trailing" needs pad_token_id, which says which tokens are padding'
    elif router.dispatch_padding is False and not router.masks_padding:
        yield (
            "dispatch_padding = false needs pad_token_id, which says which tokens are padding, or "
            'padding = "labels"'
        )


def _balance_conflicts(balance: Balance) -> Iterator[str]:
    # bias_update = "none" may keep a bias_rate: a flavor cannot remove a rate that it inherits.
    if balance.bias_rate is not None and balance.bias_update is None:
        yield (
            'bias_rate has no effect without bias_update = "sign" or "proportional"; set '
            'bias_update (models of torchtitan have "sign" by themselves), or remove bias_rate'
        )
    if not balance.capacity_factor and (changed := _changed(balance, ("drop", "min_capacity"))):
        yield (
            f"{_with_verb(changed, 'has', 'have')} no effect without capacity_factor. Set it, or "
            "remove the rest; what is inherited can be set to "
            'drop = "last" and min_capacity = 1'
        )
    yield from chunk_conflicts(balance)
    own, scope = balance.coefficients, balance.scope
    of_tables = {key: value for key, value in balance.losses_by_key.items() if "." in key}
    same = {key: value for key, value in of_tables.items() if key.startswith(f"{scope}.")}
    if own and same:
        yield (
            f'{_settings(own)} with scope = "{scope}", and {_settings(same)}: these are losses of '
            f"one scope. Put all of them into [balance.{scope}]; if some are inherited, set those "
            "to 0"
        )
    if of_tables and not own and scope != Balance.model_fields["scope"].default:
        yield (
            f'scope = "{scope}" has no effect without a loss beside it, and '
            f"{_with_verb(of_tables, 'has its', 'have their')} own. Remove it; if it is inherited, "
            'set scope = "sequence"'
        )


def _settings(values: Mapping[str, object], table: str = "") -> str:
    return " and ".join(f"{table}{key} = {json.dumps(value)}" for key, value in values.items())


def _with_verb(values: Mapping[str, object], one: str, several: str) -> str:
    return f"{_settings(values)} {one if len(values) == 1 else several}"


def _changed(data: Data, keys: Iterable[str]) -> dict[str, object]:
    """Return those of ``keys`` that differ from their default, with their values.

    The value decides, not whether a key is present: a flavor can reset what it inherits to the
    default, but it cannot remove it.
    """
    fields = type(data).model_fields
    values = {key: getattr(data, key) for key in keys}
    return {key: value for key, value in values.items() if value != fields[key].default}
