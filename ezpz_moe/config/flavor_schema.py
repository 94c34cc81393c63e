"""What a flavor may say: the keys of its TOML, their types, ranges and combinations."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal, Protocol, Self

from pydantic import Field, field_serializer, field_validator, model_validator

from ezpz_moe.compute.names import name_and_options
from ezpz_moe.config.change_schema import Change
from ezpz_moe.config.init_schema import Init
from ezpz_moe.config.layer_sizes import (
    ExpertsByLayer,
    LayerSizes,
    MoeLayers,
    WidthByLayer,
    length_conflicts,
    moe_layer_numbers,
    place_conflicts,
    sizes_of,
)
from ezpz_moe.config.rope_schema import Longest, Rope
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
Activation = Literal["swiglu", "geglu", "reglu", "relu2", "gelu", "clamped_swiglu"]

_Positive = Annotated[float, Field(gt=0)]


class Dimensions(Data):
    """A model's size: the arguments of the host's ``build_mla_moe_layers``, vocabulary and RoPE.

    Without ``router_num_expert_groups`` a token may go to any expert. The experts' sizes may differ
    from layer to layer: ``layer_sizes`` has them.
    """

    vocab_size: Tokens
    dim: Width
    n_layers: Annotated[int, Field(ge=1, le=2**10)]
    # Either this, or which layers have experts. All layers: a dense model.
    n_dense_layers: Annotated[int, Field(ge=0)] | None = None
    moe_layers: MoeLayers | None = None
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
    moe_hidden_dim: WidthByLayer
    num_experts: ExpertsByLayer
    # One FFN as wide as so many experts, or as `shared_hidden_dim` says; 0: there is none.
    num_shared_experts: Annotated[int, Field(ge=0, le=2**14)] | None = None
    shared_hidden_dim: Width | None = None
    shared_gate: bool = False
    router_top_k: ExpertsByLayer
    router_score_func: Literal["softmax", "sigmoid", "sqrtsoftplus"]
    router_route_scale: _Positive
    router_route_norm: bool
    router_num_expert_groups: Experts | None = None
    router_num_limited_groups: Experts | None = None
    router_bias: bool = False
    rope: Rope

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        conflicts = [*_size_conflicts(self), *limit_conflicts(self)]
        # The shared FFN is as wide as experts, whose widths must be clear by then.
        if conflicts := conflicts or list(_shared_conflicts(self)):
            raise mistake("; ".join(conflicts))
        return self

    @property
    def moe_layer_numbers(self) -> tuple[int, ...]:
        """The layers with experts."""
        return moe_layer_numbers(self.n_layers, self.n_dense_layers, self.moe_layers)

    @property
    def layer_sizes(self) -> dict[int, LayerSizes]:
        """Layer number -> the sizes of its routed experts, for every layer that has any."""
        numbers = self.moe_layer_numbers
        said = (self.num_experts, self.router_top_k, self.moe_hidden_dim)
        each_L = zip(*(sizes_of(one, len(numbers)) for one in said), strict=True)
        return {number: LayerSizes(*of) for number, of in zip(numbers, each_L, strict=True)}

    @property
    def is_uneven(self) -> bool:
        """Whether layers have experts of different sizes."""
        return len(set(self.layer_sizes.values())) > 1

    def shared_width(self, moe_hidden_dim: int) -> int:
        """Return the hidden size of a layer's shared FFN; 0 if there is none.

        Args:
            moe_hidden_dim: that of the layer's routed experts.
        """
        if self.shared_hidden_dim is not None:
            return self.shared_hidden_dim
        return moe_hidden_dim * (self.num_shared_experts or 0)


class Flavor(Data):
    """A model, and how its routed experts and its attention are computed.

    The model is either ``dimensions``, built like the host's deepseek_v3, or ``base``, one of the
    host's own as ``"module/flavor"``. ``attention = None`` leaves the attention to the host.
    ``expert_precision = None`` keeps the host's cast to bfloat16, except on a CPU that only
    emulates bfloat16: there it means float32. ``routed = "one_node"`` asks for dispatch, experts
    and combination as one operator wherever that is possible; elsewhere they stay the host's.
    ``ffn_activation`` is that of dense layers and shared experts, ``expert_activation`` that of
    routed experts.
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
    # Not dimensions, as no model of the host's has them: they may stand beside `base` too.
    expert_activation: Activation = "swiglu"
    expert_bias: bool = False
    moe_latent_dim: Width | None = None
    router_scores: Literal["after", "before"] = "after"
    ffn_activation: Activation = "swiglu"
    overlap_shared_experts: bool = False
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
            for where, of in _by_size(size):
                found = size_conflicts(
                    self.router,
                    choices=of.num_experts + self.router.zero_computation_experts,
                    top_k=self.router.choices_of_token(of.num_experts, of.top_k),
                )
                conflicts += [f"{conflict}{where}" for conflict in found]
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
        if self.is_dense:  # a baseline keeps the [change] of its experts
            return False
        # By value: a table that repeats the defaults leaves the host's routers in place.
        own = self.router != Router() or self.balance != Balance() or self.scores_otherwise
        # The host's update of the selection bias stacks the counts of all layers.
        is_uneven = self.dimensions is not None and self.dimensions.is_uneven
        return own or is_uneven or self.telemetry is not None

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
            or size.router_num_expert_groups in {of.num_experts for of in size.layer_sizes.values()}
        )

    @property
    def computes_otherwise(self) -> bool:
        """Whether experts or dense FFNs have a formula that the host does not know."""
        of_ffns = (self.expert_activation, self.ffn_activation, self.expert_bias)
        of_layers = (self.moe_latent_dim, self.router_scores)
        return (*of_ffns, *of_layers) != ("swiglu", "swiglu", False, None, "after")

    @property
    def other_ffns(self) -> list[str]:
        """What experts and dense FFNs have that the host's lack, in words."""
        found = {
            f"experts that compute {self.expert_activation}": self.expert_activation != "swiglu",
            "experts with biases": self.expert_bias,
            f"experts in a latent of {self.moe_latent_dim}": self.moe_latent_dim,
            "scores on the inputs of experts": self.router_scores == "before",
            f"FFNs that compute {self.ffn_activation}": self.ffn_activation != "swiglu",
            "a gate of its shared experts": self.dimensions and self.dimensions.shared_gate,
        }
        return [part for part, is_there in found.items() if is_there]

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


def _by_size(size: Dimensions) -> Iterator[tuple[str, LayerSizes]]:
    """Yield every size of experts once, after where it is: nothing if all layers have it."""
    first: dict[LayerSizes, int] = {}
    for number, of in size.layer_sizes.items():
        first.setdefault(of, number)
    for of, number in first.items():
        yield (f" in layer {number}" if len(first) > 1 else ""), of


def _size_conflicts(size: Dimensions) -> Iterator[str]:
    layers = (size.n_layers, size.n_dense_layers, size.moe_layers)
    said = {key: getattr(size, key) for key in ("num_experts", "router_top_k", "moe_hidden_dim")}
    unclear = [*place_conflicts(*layers)]
    unclear += [] if unclear else length_conflicts(said, len(moe_layer_numbers(*layers)))
    yield from unclear
    for where, of in () if unclear else _by_size(size):
        if of.top_k > of.num_experts:
            yield (
                f"router_top_k ({of.top_k}) must not exceed num_experts ({of.num_experts}){where}"
            )
        yield from group_conflicts(size, of.num_experts, of.top_k, where)
    # Equal ones are Kimi-K2's: one boundary, which the host rounds to two.
    if size.rope.beta_slow > size.rope.beta_fast:
        yield (
            f"rope.beta_slow ({size.rope.beta_slow}) must not exceed "
            f"rope.beta_fast ({size.rope.beta_fast})"
        )


def _shared_conflicts(size: Dimensions) -> Iterator[str]:
    number, width = size.num_shared_experts, size.shared_hidden_dim
    if number is None and width is None:
        yield "num_shared_experts is missing: 0 means no shared experts"
    elif number is not None and width is not None:
        hidden = (of.hidden_dim for of in size.layer_sizes.values())
        if other := next((each for each in hidden if number * each != width), None):
            yield (
                f"shared_hidden_dim ({width}) is not num_shared_experts times moe_hidden_dim "
                f"({number} x {other}); set one of the two"
            )
    elif size.shared_gate and not (number or width):
        yield (
            "shared_gate = true has no effect without shared experts; remove it, or set "
            "num_shared_experts"
        )


class Grouped(Protocol):
    """A model that says how its experts are grouped."""

    @property
    def router_num_expert_groups(self) -> int | None: ...
    @property
    def router_num_limited_groups(self) -> int | None: ...


def group_conflicts(size: Grouped, num_experts: int, top_k: int, where: str = "") -> Iterator[str]:
    """Yield why so many experts of a layer cannot be grouped like that."""
    groups, limited = size.router_num_expert_groups, size.router_num_limited_groups
    # Whatever else is wrong of both is said once, of the model.
    if groups is None or limited is None or limited > groups:
        return
    if num_experts % groups:
        yield (
            f"num_experts ({num_experts}) must be a multiple of router_num_expert_groups "
            f"({groups}){where}"
        )
    elif top_k > limited * (num_experts // groups):
        yield (
            f"router_top_k ({top_k}) must not exceed the "
            f"{limited * (num_experts // groups)} experts of {limited} groups{where}"
        )


def limit_conflicts(size: Grouped) -> Iterator[str]:
    """Yield why a token's groups cannot be limited like that."""
    groups, limited = size.router_num_expert_groups, size.router_num_limited_groups
    if (groups is None) != (limited is None):
        yield "router_num_expert_groups and router_num_limited_groups must be set together"
    elif groups is not None and limited is not None and limited > groups:
        yield (
            f"router_num_limited_groups ({limited}) must not exceed "
            f"router_num_expert_groups ({groups})"
        )
