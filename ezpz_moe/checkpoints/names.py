"""What a parameter is called in each generation of the host: one table, and what follows from it.

``main`` is upstream's form of September 2026. Before that, upstream's main branch has the names
of 0.3.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache

from ezpz_moe.errors import EzpzError

TITAN_0_2, TITAN_0_3, MAIN = "0.2", "0.3", "main"
GENERATIONS = (MAIN, TITAN_0_3, TITAN_0_2)
"""The newest first, in which order a checkpoint's generation is looked for."""


@dataclass(frozen=True)
class Part:
    """The same dotted part of parameters' names in every generation.

    Attributes:
        titan_0_2: in torchtitan 0.2.
        titan_0_3: from 0.3 on.
        main: since September 2026; None where it is not known.
        half: the place on dim 1 of main's [E, 2, F, D], where main stacks two tensors [E, F, D].
        beside: a part of some name, in every generation, of the checkpoints that this applies to.
    """

    titan_0_2: str
    titan_0_3: str
    main: str | None
    half: int | None = None
    beside: str = ""

    def of(self, generation: str) -> str | None:
        """This part in ``generation``."""
        names = {TITAN_0_2: self.titan_0_2, TITAN_0_3: self.titan_0_3, MAIN: self.main}
        return names[generation]


_ROUTED = "moe.routed_experts"
_INNER = f"{_ROUTED}.inner_experts"
_QKV = "attention.qkv_linear"

PARTS = (
    Part("output.weight", "lm_head.weight", "lm_head.weight"),
    Part("moe.expert_bias", "moe.expert_bias_E", "moe.expert_bias_E"),
    Part("moe.experts.w1", f"{_INNER}.w1_EFD", f"{_ROUTED}.w13.weight", half=0),
    Part("moe.experts.w3", f"{_INNER}.w3_EFD", f"{_ROUTED}.w13.weight", half=1),
    Part("moe.experts.w2", f"{_INNER}.w2_EDF", f"{_ROUTED}.w2.weight"),
    Part("moe.experts.mlp1_weight", f"{_INNER}.mlp1_weight_EGD", None),
    Part("moe.experts.mlp1_bias", f"{_INNER}.mlp1_bias_EG", None),
    Part("moe.experts.mlp2_weight", f"{_INNER}.mlp2_weight_EDF", None),
    Part("moe.experts.mlp2_bias", f"{_INNER}.mlp2_bias_ED", None),
    # Latent attention (deepseek_v3) has a wq too, and it keeps its name.
    Part("attention.wq", f"{_QKV}.wq", f"{_QKV}.wq", beside="wk"),
    Part("attention.wk", f"{_QKV}.wk", f"{_QKV}.wk", beside="wk"),
    Part("attention.wv", f"{_QKV}.wv", f"{_QKV}.wv", beside="wk"),
)


@dataclass(frozen=True)
class Renamed:
    """A name in another generation.

    Attributes:
        name: the new one.
        half: of the two tensors that main stacks, the one that this is; None for all others.
    """

    name: str
    half: int | None = None


Renaming = Callable[[str], tuple[Renamed, ...]]


def generation_of(names: Iterable[str]) -> str | None:
    """The generation whose names these are, by parts that only it has; None if there are none."""
    names = list(names)
    parts = _parts(names)
    for generation in GENERATIONS:
        older = GENERATIONS[GENERATIONS.index(generation) + 1 :] or (TITAN_0_3,)
        own = [part for part in parts if part.of(generation) not in map(part.of, older)]
        patterns = [_pattern(name) for part in own if (name := part.of(generation))]
        if any(pattern.search(name) for pattern in patterns for name in names):
            return generation
    return None


def renaming(names: Iterable[str], source: str, target: str) -> Renaming:
    """What a name of generation ``source`` becomes in ``target``: one name, of w13 two.

    Names that are the same in both, and those of no parameter, stay as they are. The function
    raises :class:`EzpzError` for a parameter whose new name is not known.
    """
    parts = [(_pattern(old), part) for part in _parts(names) if (old := part.of(source))]

    @cache
    def rename(name: str) -> tuple[Renamed, ...]:
        matching = [(pattern, part) for pattern, part in parts if pattern.search(name)]
        if not matching:
            return (Renamed(name),)
        return tuple(_renamed(name, pattern, part) for pattern, part in matching)

    def _renamed(name: str, pattern: re.Pattern, part: Part) -> Renamed:
        if (new := part.of(target)) is None:
            raise EzpzError(f"{name}: what torchtitan {target} has for it is not known.")
        stacked = MAIN in (source, target) and source != target
        return Renamed(pattern.sub(new, name), part.half if stacked else None)

    return rename


def _parts(names: Iterable[str]) -> list[Part]:
    """Those of the table that apply to a checkpoint with these names."""
    words = {word for name in names for word in name.split(".")}
    return [part for part in PARTS if not part.beside or part.beside in words]


def _pattern(part: str) -> re.Pattern:
    return re.compile(rf"(?<![^.]){re.escape(part)}(?![^.])")
