"""Check the files that a job names: they exist, and the tokenizer fits. The same for all hosts."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ezpz_moe.config.assets import EMBEDDED_TOKENIZER
from ezpz_moe.errors import EzpzError

# What the host's tokenizer can load from; it needs one of these.
_TOKENIZERS = ("tokenizer.json", "vocab.json", "vocab.txt")


def missing_files(hf_assets_path: str, initial_load_path: str | None) -> Iterator[str]:
    """Yield one sentence per missing file; addresses (``gs://...``) are not looked up."""
    if not _has_tokenizer(hf_assets_path):
        yield (
            f"hf_assets_path = {hf_assets_path!r} has no tokenizer (tokenizer.json, or "
            "vocab.json or vocab.txt). Download the model's, or leave the key out to use the "
            "embedded one."
        )
    checkpoint = initial_load_path
    if checkpoint and "://" not in checkpoint and not Path(checkpoint).exists():
        yield f"checkpoint.initial_load_path = {checkpoint!r} does not exist."


def vocabulary_problems(
    build: Callable[[], Any], hf_assets_path: str, vocabulary: int, flavor: str
) -> Iterator[str]:
    """Yield a sentence if the tokenizer can give an ID for which the model has no embedding.

    The first such ID in the text would end the run inside the embedding, perhaps after hours, and
    on a GPU with an assertion that names no token.

    Args:
        build: returns the host's tokenizer in ``hf_assets_path``, as the run will build it.
        hf_assets_path: its folder. Without a tokenizer, :func:`missing_files` says so.
        vocabulary: rows of the model's embedding.
        flavor: the model's name, for the message.
    """
    if not _has_tokenizer(hf_assets_path):
        return
    named = f"hf_assets_path = {hf_assets_path!r}"
    try:
        with _without_remarks():
            largest = largest_token_id(build())
    # The tokenizers library raises a bare Exception, whatever is wrong with a file.
    except Exception as error:
        yield f"{named}: its tokenizer cannot be read: {error}"
        return
    if largest >= vocabulary:
        yield (
            f"{named}: its tokenizer can give the token ID {largest}, but flavor {flavor!r} has a "
            f"vocabulary of {vocabulary}, so its last ID is {vocabulary - 1}. Use the tokenizer "
            f"that belongs to the model, or a flavor whose vocab_size is at least {largest + 1}."
        )


def chat_problems(build: Callable[[], Any], hf_assets_path: str) -> Iterator[str]:
    """Yield a sentence if the tokenizer cannot write a chat.

    Args:
        build: returns the host's tokenizer in ``hf_assets_path``, as the run will build it.
        hf_assets_path: its folder. A tokenizer that cannot be read has none:
            :func:`vocabulary_problems` says so.
    """
    if Path(hf_assets_path) == EMBEDDED_TOKENIZER:
        # Its folder is none that the user has named, or may write to.
        yield (
            "hf_assets_path is not set, and the embedded tokenizer has no chat template, which "
            'dataset = "chat_file" needs. Set [model] hf_assets_path to the folder of the model\'s '
            "own tokenizer."
        )
        return
    try:
        with _without_remarks():
            tokenizer = build()
    # The tokenizers library raises a bare Exception, whatever is wrong with a file.
    except Exception:
        return
    named = f"hf_assets_path = {hf_assets_path!r}"
    try:
        written_chat(tokenizer, [{"role": role, "content": "a"} for role in ("user", "assistant")])
    except EzpzError as error:
        yield f"{named}: {error}"
    if tokenizer.eos_id is None:
        yield f"{named}: its tokenizer names no eos_token, which ends an answer in chats."


def written_chat(tokenizer: Any, messages: list[dict[str, str]], **options: bool) -> str:
    """Return a chat as the host's tokenizer writes it.

    Raises:
        EzpzError: it has no chat template, or one that fails.
    """
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(messages, **options)
    except ValueError as error:
        raise EzpzError(
            "the tokenizer has no chat template. Put its chat_template.jinja beside its "
            "tokenizer_config.json, or set hf_assets_path to the folder of a tokenizer that has "
            "one."
        ) from error
    # A template is a program: it may also add a text to nothing.
    except (TemplateError, TypeError) as error:
        raise EzpzError(f"the tokenizer's chat template fails: {error}") from error


def special_tokens(build: Callable[[], Any], hf_assets_path: str) -> dict[int, str]:
    """Return id -> its name, for the tokens that begin and end a text.

    Args:
        build: returns the host's tokenizer in ``hf_assets_path``, as the run will build it.
        hf_assets_path: its folder. A tokenizer that cannot be read has none:
            :func:`vocabulary_problems` says so.
    """
    if not _has_tokenizer(hf_assets_path):
        return {}
    try:
        with _without_remarks():
            tokenizer = build()
    # The tokenizers library raises a bare Exception, whatever is wrong with a file.
    except Exception:
        return {}
    # The end last: in some tokenizers one token is both, and padding with the end is the usual.
    ids = {"BOS": getattr(tokenizer, "bos_id", None), "EOS": getattr(tokenizer, "eos_id", None)}
    return {number: name for name, number in ids.items() if number is not None}


def largest_token_id(tokenizer: Any) -> int:
    """Return the largest ID that a tokenizer of the host can give, added and special ones included.

    The number of entries would not do: added tokens may have any ID, and leave gaps.
    """
    if hasattr(tokenizer, "get_vocab"):
        return max(tokenizer.get_vocab().values())
    # All that the host's base class promises.
    return tokenizer.get_vocab_size() - 1


def _has_tokenizer(folder: str) -> bool:
    return any((Path(folder) / name).is_file() for name in _TOKENIZERS)


@contextlib.contextmanager
def _without_remarks() -> Iterator[None]:
    """Silence the host, which will say the same when the run builds its tokenizer."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
