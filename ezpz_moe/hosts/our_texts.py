"""The names of the texts that :mod:`.documents` reads, without what reading them takes."""

from __future__ import annotations

from pathlib import Path

DEFAULT_DATASET = "pydoc_topics"
TEXT_FILE = "text_file"
CHAT_FILE = "chat_file"  # ezpz_moe.hosts.chats reads it
KINDS = (".txt", ".jsonl", ".json", ".parquet")
"""Endings that say how a text file is read."""
COMPRESSED = (".gz", ".zst", ".bz2", ".lz4")
"""Endings that may follow, except after .parquet, which is compressed inside."""
KNOWN_KINDS = f"{', '.join(KINDS)}; each but .parquet also with {', '.join(COMPRESSED)}"


def kind_of(file: Path) -> str | None:
    """Return which of :data:`KINDS` a text file is, by its name; None for any other."""
    name = file.name.lower()
    for ending in COMPRESSED:
        if name.endswith(ending):
            kind = Path(name.removesuffix(ending)).suffix
            return kind if kind in KINDS and kind != ".parquet" else None
    kind = Path(name).suffix
    return kind if kind in KINDS else None


def is_ours(dataset: str | None) -> bool:
    """Return whether this package reads the dataset, and not the host; None is our default."""
    return (dataset or DEFAULT_DATASET).lower() in (DEFAULT_DATASET, TEXT_FILE, CHAT_FILE)
