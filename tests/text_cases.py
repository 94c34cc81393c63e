"""Tokenizers and texts that do not fit a run."""

import json
from pathlib import Path

from tokenizers import Tokenizer

from ezpz_moe.config.assets import EMBEDDED_TOKENIZER


def tokenizer_with(folder: Path, *added: str) -> Path:
    """The embedded tokenizer with more tokens, in ``folder``."""
    folder.mkdir(exist_ok=True)
    tokenizer = Tokenizer.from_file(str(EMBEDDED_TOKENIZER / "tokenizer.json"))
    tokenizer.add_tokens(list(added))
    tokenizer.save(str(folder / "tokenizer.json"))
    config = (EMBEDDED_TOKENIZER / "tokenizer_config.json").read_text()
    (folder / "tokenizer_config.json").write_text(config)
    return folder


def special_token(folder: Path, token: str) -> None:
    """Let the tokenizer's config alone name one more special token."""
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"pad_token": token}))


UNEQUAL = "\n\n".join([*("a word and another " * 30,) * 3, "short"])
"""Four documents, of which two data-parallel ranks get unequal shares."""
EQUAL = "\n\n".join(("a word and another " * 30,) * 4)
