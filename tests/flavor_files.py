"""Flavor files of a text, what they say and what is wrong with them."""

from __future__ import annotations

from pathlib import Path

import pytest

from ezpz_moe.errors import EzpzError
from ezpz_moe.flavors import Flavor, load_flavor


def load(folder: Path, text: str, *, inherits: str = "debugmodel", name: str = "mine") -> Flavor:
    """The flavor of this text; the debug model has 8 experts, of which a token uses 3."""
    (folder / f"{name}.toml").write_text(f'inherits = "{inherits}"\n{text}')
    return load_flavor(name, near=folder)


def said(folder: Path, text: str, *, inherits: str = "debugmodel") -> str:
    """What is wrong with a flavor of this text, without the folder's name."""
    with pytest.raises(EzpzError) as error:
        load(folder, text, inherits=inherits)
    return str(error.value).replace(f"{folder}/", "")
