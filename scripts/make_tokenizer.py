"""Train the embedded tokenizer: ``python scripts/make_tokenizer.py``.

A byte-level BPE on the text that every Python brings (``pydoc_data.topics``). Byte-level: any text
can be encoded, nothing is ever unknown. It is small so that the debug model's embedding is, too.
"""

from __future__ import annotations

import json
from pydoc_data.topics import topics

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from ezpz_moe.config.assets import EMBEDDED_TOKENIZER

VOCABULARY_SIZE = 2048
BOS = "<|begin_of_text|>"
EOS = "<|end_of_text|>"


def train() -> Tokenizer:
    """A byte-level BPE with exactly ``VOCABULARY_SIZE`` entries, the special ones included."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((topics[name] for name in sorted(topics)), trainer)
    if tokenizer.get_vocab_size() != VOCABULARY_SIZE:
        raise SystemExit(f"vocabulary: {tokenizer.get_vocab_size()}, wanted {VOCABULARY_SIZE}")
    return tokenizer


def main() -> None:
    EMBEDDED_TOKENIZER.mkdir(parents=True, exist_ok=True)
    train().save(str(EMBEDDED_TOKENIZER / "tokenizer.json"))
    config = {"bos_token": BOS, "eos_token": EOS, "tokenizer_class": "PreTrainedTokenizerFast"}
    text = json.dumps(config, indent=2) + "\n"
    (EMBEDDED_TOKENIZER / "tokenizer_config.json").write_text(text, encoding="utf-8")
    print(f"wrote {EMBEDDED_TOKENIZER} ({VOCABULARY_SIZE} entries)")


if __name__ == "__main__":
    main()
