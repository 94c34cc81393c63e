"""Check that the files a job names exist. The same for all hosts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

# What the host's tokenizer can load from; it needs one of these.
_TOKENIZERS = ("tokenizer.json", "vocab.json", "vocab.txt")


def missing_files(hf_assets_path: str, initial_load_path: str | None) -> Iterator[str]:
    """Yield one sentence per missing file; addresses (``gs://...``) are not looked up."""
    if not any((Path(hf_assets_path) / name).is_file() for name in _TOKENIZERS):
        yield (
            f"hf_assets_path = {hf_assets_path!r} has no tokenizer (tokenizer.json, or "
            "vocab.json or vocab.txt). Download the model's, or leave the key out to use the "
            "embedded one."
        )
    checkpoint = initial_load_path
    if checkpoint and "://" not in checkpoint and not Path(checkpoint).exists():
        yield f"checkpoint.initial_load_path = {checkpoint!r} does not exist."
