"""Flavor files of a text, what they say and what is wrong with them; and which flavors to build."""

from __future__ import annotations

from pathlib import Path

import pytest

from ezpz_moe.config.flavors import Flavor, flavor_names, load_flavor
from ezpz_moe.errors import EzpzError

SMALL = ("debugmodel", "qwen3_debugmodel", "gpt_oss_debugmodel")
"""The shipped sizes that are quickly built, even on the meta device."""


VARIANTS = ("", "_sdpa", "_sdpa_for_loop", "_sdpa_batched_mm_padded")
"""Of each size, what is built: the host's attention and ours, with three backends."""


def in_turn(*, shift: int = 0) -> list[object]:
    """Every shipped flavor, for ``parametrize``: of the small sizes each variant, of the others
    one, in turn; the rest is marked ``full``. With another ``shift`` they have other variants."""
    stems = flavor_names()
    chosen = {
        stem + VARIANTS[(number + shift) % len(VARIANTS)] for number, stem in enumerate(stems)
    } | {stem + variant for stem in SMALL for variant in VARIANTS}
    return [
        name if name in chosen else pytest.param(name, marks=pytest.mark.full)
        for name in (stem + variant for stem in stems for variant in VARIANTS)
    ]


def load(folder: Path, text: str, *, inherits: str = "debugmodel", name: str = "mine") -> Flavor:
    """The flavor of this text; the debug model has 8 experts, of which a token uses 3."""
    (folder / f"{name}.toml").write_text(f'inherits = "{inherits}"\n{text}')
    return load_flavor(name, near=folder)


def said(folder: Path, text: str, *, inherits: str = "debugmodel") -> str:
    """What is wrong with a flavor of this text, without the folder's name."""
    with pytest.raises(EzpzError) as error:
        load(folder, text, inherits=inherits)
    return str(error.value).replace(f"{folder}/", "")
