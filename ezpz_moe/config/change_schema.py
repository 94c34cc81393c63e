"""What ``[change]`` may say: the sizes and scores of a model of the host's that ``base`` names."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from ezpz_moe.config.routing_schema import Experts
from ezpz_moe.config.schema import Data, Tokens, Width, mistake

_KEPT = {
    "the projections of attention and their initial values are made for the base's heads": (
        *("n_heads", "n_kv_heads", "head_dim", "mscale"),
        *("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"),
    ),
    "which layers have experts, and what a shared expert is, is the base's own": (
        "moe_layers",
        "shared_hidden_dim",
        "shared_gate",
    ),
}
"""Why not -> the keys of sizes that a base keeps."""


class Change(Data):
    """``[change]``: what differs from ``base``, by the names that a flavor of its own sizes has.

    None keeps the base's value.
    """

    vocab_size: Tokens | None = None
    dim: Width | None = None
    n_layers: Annotated[int, Field(ge=1, le=2**10)] | None = None
    n_dense_layers: Annotated[int, Field(ge=0)] | None = None
    dense_hidden_dim: Width | None = None
    moe_hidden_dim: Width | None = None
    num_experts: Experts | None = None
    num_shared_experts: Experts | None = None
    router_top_k: Experts | None = None
    router_score_func: Literal["softmax", "sigmoid", "sqrtsoftplus"] | None = None
    router_route_scale: Annotated[float, Field(gt=0)] | None = None
    router_route_norm: bool | None = None
    router_num_expert_groups: Experts | None = None
    router_num_limited_groups: Experts | None = None
    router_bias: bool | None = None

    @model_validator(mode="before")
    @classmethod
    def _keeps_the_rest(cls, value: Any) -> Any:
        for why, keys in _KEPT.items() if isinstance(value, dict) else ():
            if kept := sorted(set(keys) & value.keys()):
                raise mistake(
                    f"{', '.join(kept)} cannot be changed: {why}. Remove it, or describe the whole "
                    "model by its sizes, without base"
                )
        return value

    @property
    def values(self) -> dict[str, Any]:
        """What it says, by key."""
        return self.model_dump(exclude_none=True)

    @property
    def scores_otherwise(self) -> bool:
        """Whether experts or their groups get a score that the host does not know."""
        groups = self.router_num_expert_groups
        is_each_a_group = groups is not None and groups == self.num_experts
        return self.router_score_func == "sqrtsoftplus" or is_each_a_group
