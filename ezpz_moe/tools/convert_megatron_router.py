"""Put the router's arguments of Megatron-Core into lines of a flavor, for :mod:`.convert_megatron`.

Its losses "aux_loss" and "seq_aux_loss" have our units; "global_aux_loss" is 1 / data-parallel
ranks of ours (``tests/test_peers_formulas.py``).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ezpz_moe.errors import EzpzError, printable
from ezpz_moe.tools.convert_foreign import Line, Loss, balance_lines, number

_DROPS = {"probs": "probability", "position": "last"}
_SCOPES = {"aux_loss": "batch", "seq_aux_loss": "sequence", "global_aux_loss": "global"}


class Routing:
    """The lines of the router's options, and what became of keys.

    Attributes:
        lost: keys that have no line, with the reason.
        used: keys that have no line, and change the number in another's.
    """

    def __init__(self, source: Path, values: Mapping[str, Any]) -> None:
        self._source, self._values = source, values
        self.lost: dict[str, str] = {}
        self.used: dict[str, str] = {}
        self.lines = [
            *self._groups(),
            *self._router(),
            *self._balance(),
            *self._capacity(),
            *self._bias(),
        ]

    def _router(self) -> Iterator[Line]:
        if "sinkhorn" in self._types:
            yield Line("router.routing", "sinkhorn", "moe_router_load_balancing_type")
        if noise := number(self._source, self._values, "moe_input_jitter_eps"):
            yield Line("router.jitter_noise", noise, "moe_input_jitter_eps")
        precision = {"fp32": "float32", "fp64": "float64"}.get(self._said("moe_router_dtype"), "")
        if precision:
            yield Line("router.gate_precision", precision, "moe_router_dtype")

    def _balance(self) -> Iterator[Line]:
        losses = list(self._losses())
        yield from balance_lines(losses)
        has_choice = any(each.name == "aux_loss" and each.coefficient for each in losses)
        # With a selection bias, "scores" is the default here too.
        if has_choice and self.experts_that_rank and not self._has_bias:
            yield Line("balance.aux_loss_choice", "scores", "Megatron counts without groups")

    def _losses(self) -> Iterator[Loss]:
        coefficients = _items(self._values["moe_aux_loss_coeff"])
        if len(coefficients) == 1:
            coefficients *= len(self._types)
        if len(coefficients) != len(self._types):
            raise EzpzError(
                f"{self._source}: moe_aux_loss_coeff has {len(coefficients)} values, "
                f"moe_router_load_balancing_type {len(self._types)}."
            )
        # Megatron takes the first coefficient where a type stands there twice.
        wanted: dict[str, float] = {}
        for kind, each in zip(self._types, coefficients, strict=True):
            value = number(self._source, {"moe_aux_loss_coeff": each}, "moe_aux_loss_coeff")
            wanted.setdefault(kind, value)
        yield from (self._loss(kind, each) for kind, each in wanted.items() if kind in _SCOPES)
        unknown = [kind for kind in wanted if kind not in (*_SCOPES, "sinkhorn", "none")]
        if unknown:
            self.lost["moe_router_load_balancing_type"] = f"there is no {', '.join(unknown)} here"
        z_loss = number(self._source, self._values, "moe_z_loss_coeff")
        yield Loss("z_loss", "batch", z_loss, "moe_z_loss_coeff")

    def _loss(self, kind: str, coefficient: float) -> Loss:
        comment, ranks = f"moe_aux_loss_coeff = {coefficient:g} of {kind}", 1.0
        if kind == "global_aux_loss" and coefficient:
            ranks = number(self._source, self._values, "data_parallel_size")
            if not ranks:
                raise EzpzError(
                    f"{self._source}: {kind}: Megatron's is 1 / data-parallel ranks of ours. Add "
                    "the number of ranks that it trained on, data_parallel_size: N."
                )
            self.used["data_parallel_size"] = "divides moe_aux_loss_coeff of global_aux_loss"
            comment += f", times 1 / data-parallel ranks = 1 / {ranks:g}"
        return Loss("aux_loss", _SCOPES[kind], coefficient / ranks, comment)

    def _capacity(self) -> Iterator[Line]:
        # None and numbers below 0 mean that there is no capacity.
        factor = self._values.get("moe_expert_capacity_factor")
        if isinstance(factor, int | float) and factor < 0:
            return
        if factor := number(self._source, self._values, "moe_expert_capacity_factor"):
            yield Line("balance.capacity_factor", factor, "moe_expert_capacity_factor")
            policy = self._said("moe_token_drop_policy")
            if policy not in _DROPS:
                raise EzpzError(
                    f"{self._source}: moe_token_drop_policy = {printable(repr(policy))}: must be "
                    f"{' or '.join(_DROPS)}."
                )
            yield Line("balance.drop", _DROPS[policy], "moe_token_drop_policy")

    def _bias(self) -> Iterator[Line]:
        if not self._has_bias:
            yield Line("balance.bias_update", "none", "no moe_router_enable_expert_bias")
            return
        yield Line("balance.bias_update", "sign", "moe_router_enable_expert_bias")
        rate = number(self._source, self._values, "moe_router_bias_update_rate", 1e-3)
        yield Line("balance.bias_rate", rate, "moe_router_bias_update_rate")

    def _groups(self) -> Iterator[Line]:
        """Yield what ranks a token's groups of experts: the sum of its best scores."""
        best = self.experts_that_rank
        if best not in (0, 2):
            comment = f"top-k / moe_router_group_topk = {best}"
            yield Line("router_group_score", "topk_sum", comment)
        is_softmax = self._said("moe_router_score_function") == "softmax"
        # With one expert, logit and score put groups into the same order.
        if best > 1 and is_softmax and not self._values.get("moe_router_pre_softmax"):
            self.lost["moe_router_group_topk"] = (
                f"Megatron ranks a group by the logits of its {best} best experts, ezpz_moe by "
                "their scores"
            )

    @property
    def experts_that_rank(self) -> int:
        """How many of its experts a group is ranked by; 0 without a limit to groups."""
        groups, limited, top_k = (
            int(number(self._source, self._values, key))
            for key in ("moe_router_num_groups", "moe_router_group_topk", "moe_router_topk")
        )
        return max(1, top_k // limited) if groups > 1 and limited else 0

    @property
    def _has_bias(self) -> bool:
        return self._values.get("moe_router_enable_expert_bias") is True

    @property
    def _types(self) -> list[str]:
        types = _items(self._values["moe_router_load_balancing_type"])
        return [printable(str(each)) for each in types]

    def _said(self, key: str) -> str:
        return str(self._values.get(key))


def as_number(value: Any) -> Any:
    """Return a number that stands there as text: YAML takes 1e-4, without a point, for that."""
    if isinstance(value, list):
        return [as_number(each) for each in value]
    if not isinstance(value, str):
        return value
    if re.fullmatch(r"[+-]?[0-9]{1,18}", value):
        return int(value)
    is_number = re.fullmatch(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?", value)
    return float(value) if is_number else value


def _items(value: Any) -> list[Any]:
    """Return the values of an argument that may have several: a list, or text with spaces."""
    if isinstance(value, str):
        return [as_number(each) for each in value.split()]
    return value if isinstance(value, list) else [value]
