"""The names of the texts that :mod:`.documents` reads, without what reading them takes."""

from __future__ import annotations

DEFAULT_DATASET = "pydoc_topics"
TEXT_FILE = "text_file"
CHAT_FILE = "chat_file"  # ezpz_moe.hosts.chats reads it


def is_ours(dataset: str | None) -> bool:
    """Return whether this package reads the dataset, and not the host; None is our default."""
    return (dataset or DEFAULT_DATASET).lower() in (DEFAULT_DATASET, TEXT_FILE, CHAT_FILE)
