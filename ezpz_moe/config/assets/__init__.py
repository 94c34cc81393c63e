"""Files that ship with the package."""

from __future__ import annotations

from pathlib import Path

EMBEDDED_TOKENIZER = Path(__file__).parent / "tokenizer"
"""Folder of the small tokenizer (2048 entries) that needs no download; see
``scripts/make_tokenizer.py``."""
