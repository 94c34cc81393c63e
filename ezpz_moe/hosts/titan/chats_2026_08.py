"""Refuse a file of chats: since August 2026 the host's chat data have another form, not bound."""

from pathlib import Path
from typing import NoReturn

from ezpz_moe.errors import EzpzError
from ezpz_moe.hosts.our_texts import CHAT_FILE


def chat_config(dataset_path: str | None, *, job_folder: Path | None, infinite: bool) -> NoReturn:
    """Raise an EzpzError that says so."""
    raise EzpzError(
        f"dataset = {CHAT_FILE!r} needs torchtitan 0.3: the chat data of this one are not bound. "
        'Write each chat as one text, and train on that: .jsonl with "text".'
    )
