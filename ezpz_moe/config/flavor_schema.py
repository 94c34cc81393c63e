"""What a flavor may say: the keys of its TOML, their types, ranges and combinations."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal, Protocol, Self

from pydantic import Field, field_serializer, field_validator, model_validator

from ezpz_moe.compute.names import name_and_options
from ezpz_moe.config.change_schema import Change
from ezpz_moe.config.init_schema import Init
from ezpz_moe.config.routing_schema import (
    Balance,
    Experts,
    Router,
    routing_conflicts,
    size_conflicts,
)
from ezpz_moe.config.schema import Data, Tokens, Width, mistake
from ezpz_moe.config.telemetry_schema import Telemetry
from ezpz_moe.errors import EzpzError

Attention = Literal["flex", "varlen", "flex_flash", "sdpa"]
ExpertPrecision = Literal["host", "bfloat16", "float32"]
Routed = Literal["one_node", "composed"]
Equal = Literal["flops", "params"]
GroupScore = Literal["top2_sum", "max", "topk_sum"]

_Positive = Annotated[float, Field(gt=0)]


class Rope(Data):
    """Rotary positions: the arguments of the host's ``ComplexRoPE``, except ``dim``."""

    theta: Annotated[float, Field(gt=1)]
    max_seq_len: Tokens
    scaling: Literal["none", "yarn"]
    rope_factor: Annotated[float, Field(ge=1)]
    beta_fast: _Positive
    beta_slow: _Positive
    original_seq_len: Tokens


class Longest(Data):
    """What a flavor with ``base`` may say of its RoPE: how far it reaches.

    Its frequencies stay the host's. Only positions that the host's own model has no table for are
    added, so shorter sequences are the same model.
    """

    max_seq_len: Tokens


class Dimensions(Data):
    """A model's size: the arguments of the host's ``build_mla_moe_layers``, vocabulary and RoPE.

    Without ``router_num_expert_groups`` a token may go to any expert.
    """

    vocab_size: Tokens
    dim: Width
    n_layers: Annotated[int, Field(ge=1, le=2**10)]
    n_dense_layers: Annotated[int, Field(ge=0)]
    n_heads: Width
    # 0: the queries are not compressed.
    q_lora_rank: Annotated[int, Field(ge=0, le=2**20)]
    kv_lora_rank: Width
    qk_nope_head_dim: Width
    # Even, because a rotation turns channels in pairs.
    qk_rope_head_dim: Annotated[Width, Field(multiple_of=2)]
    v_head_dim: Width
    mscale: Annotated[float, Field(ge=0)]
    dense_hidden_dim: Width
    moe_hidden_dim: Width
    num_experts: Experts
    num_shared_experts: Experts
    router_top_k: Experts
    router_score_func: Literal["softmax", "sigmoid", "sqrtsoftplus"]
    router_route_scale: _Positive
    router_route_norm: bool
    router_num_expert_groups: Experts | None = None
    router_num_limited_groups: Experts | None = None
    router_bias: bool = False
    rope: Rope

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        if conflicts := [*_size_conflicts(self), *group_conflicts(self)]:
            raise mistake("; ".join(conflicts))
        return self


class Flavor(Data):
    """A model, and how its routed experts and its attention are computed.

    The model is either ``dimensions``, built like the host's deepseek_v3, or ``base``, one of the
    host's own as ``"module/flavor"``. ``attention = None`` leaves the attention to the host.
    ``expert_precision = None`` keeps the host's cast to bfloat16, except on a CPU that only
    emulates bfloat16: there it means float32. ``routed = "one_node"`` asks for dispatch, experts
    and combination as one operator wherever that is possible; elsewhere they stay the host's.
    """

    name: str
    source: Path
    base: str | None = None
    attention: Attention | None = None
    compute_backend: str = "grouped_mm"
    expert_precision: ExpertPrecision | None = None
    routed: Routed = "one_node"
    dimensions: Dimensions | None = None
    # The next two beside `base` alone; a size has its own.
    change: Change | None = None
    rope: Longest | None = None
    # Not a dimension, as no model of the host's has it: it may stand beside `base` too.
    router_group_score: GroupScore = "top2_sum"
    # Shared defaults are safe: all tables are frozen.
    router: Router = Router()
    balance: Balance = Balance()
    telemetry: Telemetry | None = None
    init: Init = Init()
    # The flavor with experts whose cost this dense model has, and which of its costs.
    dense_baseline_of: Flavor | None = None
    equal: Equal = "flops"

    @model_validator(mode="after")
    def _changes_a_base(self) -> Self:
        if self.change is not None and self.base is None:
            raise mistake(
                "[change] says what differs from base, and there is no base: the keys of a model's "
                "own sizes stand at the top of the file"
            )
        return self

    @model_validator(mode="after")
    def _routes_in_one_way(self) -> Self:
        conflicts = list(routing_conflicts(self.router, self.balance))
        # The sizes of a `base` are the host's: its binding asks the same questions once the model
        # is known.
        if size := self.dimensions:
            conflicts += group_score_conflicts(
                self.router_group_score, size.router_num_expert_groups
            )
            conflicts += size_conflicts(
                self.router,
                choices=size.num_experts + self.router.zero_computation_experts,
                top_k=self.router.choices_of_token(size.num_experts, size.router_top_k),
            )
        if conflicts:
            raise mistake("; ".join(conflicts))
        return self

    @model_validator(mode="after")
    def _computes_in_that_precision(self) -> Self:
        if self.compute_backend == "grouped_mm" and self.expert_precision not in (None, "host"):
            raise mistake(
                f"expert_precision = {self.expert_precision!r} cannot be combined with "
                "compute_backend = 'grouped_mm', which reproduces torchtitan's own results bit "
                "for bit. Choose another backend, such as 'for_loop', or remove expert_precision"
            )
        return self

    @property
    def is_dense(self) -> bool:
        """Whether no layer has experts."""
        size = self.dimensions
        all_dense = size is not None and size.n_dense_layers == size.n_layers
        return self.dense_baseline_of is not None or all_dense

    @property
    def is_routed(self) -> bool:
        """Whether the flavor asks the routers for anything that the host's own do not do."""
        # By value: a table that repeats the defaults leaves the host's routers in place.
        own = self.router != Router() or self.balance != Balance() or self.scores_otherwise
        return own or self.telemetry is not None

    @property
    def scores_otherwise(self) -> bool:
        """Whether experts or their groups have a score that the host does not know."""
        if self.router_group_score != "top2_sum":
            return True
        if self.change is not None:
            return self.change.scores_otherwise
        size = self.dimensions
        return size is not None and (
            size.router_score_func == "sqrtsoftplus"
            or size.num_experts == size.router_num_expert_groups
        )

    @property
    def reported(self) -> Telemetry | None:
        """What the run reports about experts; with losses or drops it always reports something."""
        is_asked_for = self.balance.has_losses or self.balance.capacity_factor
        return self.telemetry or (Telemetry() if is_asked_for else None)

    @property
    def is_watched(self) -> bool:
        """Whether the routers have to know the step, or have to report what they did."""
        rate = self.balance.bias_rate
        schedules = [*self.router.schedules.values(), *([rate] if rate else [])]
        return self.reported is not None or not all(each.is_constant for each in schedules)

    @field_serializer("dense_baseline_of")
    def _by_name(self, flavor: Flavor | None) -> str | None:
        return None if flavor is None else flavor.name

    @field_validator("base")
    @classmethod
    def _names_module_and_flavor(cls, base: str | None) -> str | None:
        if base is not None:
            module, _, upstream = base.partition("/")
            if not module.isidentifier() or not upstream:
                raise mistake('should be "module/flavor", for example "qwen3/30B-A3B"')
        return base

    @field_validator("compute_backend")
    @classmethod
    def _is_installed(cls, name: str) -> str:
        try:
            # Only the name and the form. A backend can name its options only once it is imported,
            # which may need torch.
            name_and_options(name)
        except EzpzError as error:
            raise mistake(str(error)) from None
        return name


def group_score_conflicts(group_score: GroupScore, groups: int | None) -> Iterator[str]:
    """Yield why a score for groups has no effect on a model with so many of them."""
    if group_score != "top2_sum" and groups is None:
        yield (
            f'router_group_score = "{group_score}" has no effect, as the experts are in no groups '
            "(router_num_expert_groups); remove it"
        )


def _size_conflicts(size: Dimensions) -> Iterator[str]:
    if size.n_dense_layers > size.n_layers:
        yield f"n_dense_layers ({size.n_dense_layers}) must not exceed n_layers ({size.n_layers})"
    if size.router_top_k > size.num_experts:
        yield (
            f"router_top_k ({size.router_top_k}) must not exceed num_experts ({size.num_experts})"
        )
    # Equal ones are Kimi-K2's: one boundary, which the host rounds to two.
    if size.rope.beta_slow > size.rope.beta_fast:
        yield (
            f"rope.beta_slow ({size.rope.beta_slow}) must not exceed "
            f"rope.beta_fast ({size.rope.beta_fast})"
        )


class Grouped(Protocol):
    """Sizes that say how experts are grouped."""

    @property
    def num_experts(self) -> int: ...
    @property
    def router_top_k(self) -> int: ...
    @property
    def router_num_expert_groups(self) -> int | None: ...
    @property
    def router_num_limited_groups(self) -> int | None: ...


def group_conflicts(size: Grouped) -> Iterator[str]:
    """Yield why experts cannot be grouped like that."""
    groups, limited = size.router_num_expert_groups, size.router_num_limited_groups
    if groups is None and limited is None:
        return
    if groups is None or limited is None:
        yield "router_num_expert_groups and router_num_limited_groups must be set together"
        return
    if limited > groups:
        yield (
            f"router_num_limited_groups ({limited}) must not exceed "
            f"router_num_expert_groups ({groups})"
        )
    if size.num_experts % groups:
        yield (
            f"num_experts ({size.num_experts}) must be a multiple of router_num_expert_groups "
            f"({groups})"
        )
    elif size.router_top_k > limited * (size.num_experts // groups):
        yield (
            f"router_top_k ({size.router_top_k}) must not exceed the "
            f"{limited * (size.num_experts // groups)} experts of {limited} groups"
        )
