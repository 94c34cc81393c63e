"""The names of parameters in each generation of the host: one table, and what follows from it.

2026_09 is upstream's form since September 2026. Before that, upstream used the names of 0.3.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from functools import cache

from ezpz_moe.tools.checkpoints.layouts import Half, InTurn, Layout

TITAN_0_2, TITAN_0_3, TITAN_2026_09 = "0.2", "0.3", "2026_09"
GENERATIONS = (TITAN_2026_09, TITAN_0_3, TITAN_0_2)
"""Newest first: the order in which a checkpoint's generation is searched for."""

_FORMER_NAMES = {"main": TITAN_2026_09}
"""Former name of a generation -> its name of today."""


def current_name(generation: str) -> str:
    """Return a generation's current name, given that or a former one."""
    return _FORMER_NAMES.get(generation, generation)


@dataclass(frozen=True)
class Part:
    """One dotted part of parameter names, in every generation.

    Attributes:
        titan_0_2: in torchtitan 0.2.
        titan_0_3: from 0.3 on.
        titan_2026_09: since September 2026.
        layout: how the newest tensor holds the older one; None if they are the same.
    """

    titan_0_2: str
    titan_0_3: str
    titan_2026_09: str
    layout: Layout | None = None

    def of(self, generation: str) -> str:
        """Return this part in ``generation``."""
        return {
            TITAN_0_2: self.titan_0_2,
            TITAN_0_3: self.titan_0_3,
            TITAN_2026_09: self.titan_2026_09,
        }[generation]


_ROUTED = "moe.routed_experts"
_INNER = f"{_ROUTED}.inner_experts"
_QKV = "attention.qkv_linear"

PARTS = (
    Part("output.weight", "lm_head.weight", "lm_head.weight"),
    Part("moe.expert_bias", "moe.expert_bias_E", "moe.expert_bias_E"),
)
"""Used by every model."""

EXPERTS = (
    Part("moe.experts.w1", f"{_INNER}.w1_EFD", f"{_ROUTED}.w13.weight", Half(0)),
    Part("moe.experts.w3", f"{_INNER}.w3_EFD", f"{_ROUTED}.w13.weight", Half(1)),
    Part("moe.experts.w2", f"{_INNER}.w2_EDF", f"{_ROUTED}.w2.weight"),
)
"""Used by every model except gpt_oss."""

_GPT_OSS_BIAS = Part("moe.experts.mlp2_bias", f"{_INNER}.mlp2_bias_ED", f"{_ROUTED}.w2.bias")
GPT_OSS_EXPERTS = (
    Part(
        "moe.experts.mlp1_weight",
        f"{_INNER}.mlp1_weight_EGD",
        f"{_ROUTED}.w13.weight",
        InTurn(dims=3),
    ),
    Part("moe.experts.mlp1_bias", f"{_INNER}.mlp1_bias_EG", f"{_ROUTED}.w13.bias", InTurn(dims=2)),
    Part("moe.experts.mlp2_weight", f"{_INNER}.mlp2_weight_EDF", f"{_ROUTED}.w2.weight"),
    _GPT_OSS_BIAS,
)
"""Used by gpt_oss, which is recognized by its biases."""

_WK = Part("attention.wk", f"{_QKV}.wk", f"{_QKV}.wk")
ATTENTION = (
    Part("attention.wq", f"{_QKV}.wq", f"{_QKV}.wq"),
    _WK,
    Part("attention.wv", f"{_QKV}.wv", f"{_QKV}.wv"),
)
"""Used by models with wk; latent attention (deepseek_v3) has a wq too, but keeps its name."""


@dataclass(frozen=True)
class Renamed:
    """A name in another generation.

    Attributes:
        name: the new one.
        layout: how the newest tensor holds the older one; None if they are the same.
    """

    name: str
    layout: Layout | None = None


Renaming = Callable[[str], tuple[Renamed, ...]]


def generation_of(names: Iterable[str]) -> str | None:
    """Return the generation that uses these names, told by parts that only it has; else None."""
    # An iterable may be good for one pass only, and each pattern goes through all names.
    names = list(names)
    parts = _parts(names)
    # Names that several generations share say nothing: look for those that only this one has.
    for generation in GENERATIONS:
        # The oldest generation has none below it, so its names are compared with the next newer
        # ones.
        older = GENERATIONS[GENERATIONS.index(generation) + 1 :] or (TITAN_0_3,)
        own = [part for part in parts if part.of(generation) not in map(part.of, older)]
        patterns = [_pattern(part.of(generation)) for part in own]
        if any(pattern.search(name) for pattern in patterns for name in names):
            return generation
    return None


def renaming(names: Iterable[str], source: str, target: str) -> Renaming:
    """Return a function from a name of ``source`` to its names in ``target``, two of them for w13.

    Names that are the same in both, and those that are not parameters, stay unchanged.
    """
    parts = [(_pattern(part.of(source)), part) for part in _parts(names)]

    # Asked several times for each name, and every answer tries all patterns.
    @cache
    def rename(name: str) -> tuple[Renamed, ...]:
        matching = [(pattern, part) for pattern, part in parts if pattern.search(name)]
        if not matching:
            return (Renamed(name),)
        return tuple(_renamed(name, pattern, part) for pattern, part in matching)

    def _renamed(name: str, pattern: re.Pattern, part: Part) -> Renamed:
        other_layout = TITAN_2026_09 in (source, target) and source != target
        return Renamed(pattern.sub(part.of(target), name), part.layout if other_layout else None)

    return rename


def experts_of_0_3_alone(names: Collection[str]) -> str | None:
    """Return the name of a parameter of experts that no other generation computes; else None.

    Those of a flavor's ``expert_bias``, and of an ``expert_activation`` without a gate.
    """
    for name in names:
        if name.endswith(f"{_INNER}.b2_ED"):
            return name
        stem = name.removesuffix("w2_EDF")
        is_down = stem != name and stem.endswith(f"{_INNER}.")
        if is_down and f"{stem}w1_EFD" in names and f"{stem}w3_EFD" not in names:
            return name
    return None


def _parts(names: Iterable[str]) -> list[Part]:
    """Return the parts, of any generation, that apply to a checkpoint with these names."""
    names = list(names)

    def there(part: Part) -> bool:
        patterns = [_pattern(part.of(generation)) for generation in GENERATIONS]
        return any(pattern.search(name) for pattern in patterns for name in names)

    # Since 2026_09 both families have the same names for weights. Only gpt_oss has biases.
    experts = GPT_OSS_EXPERTS if there(_GPT_OSS_BIAS) else EXPERTS
    return [*PARTS, *experts, *(ATTENTION if there(_WK) else ())]


def _pattern(part: str) -> re.Pattern:
    # Match whole dotted parts only: `wq` must not match `wq_a`.
    return re.compile(rf"(?<![^.]){re.escape(part)}(?![^.])")
