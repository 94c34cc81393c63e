"""Provide text for the host's dataloader: an embedded text, and the user's own file.

Both join the host's own registry (``torchtitan.hf_datasets.text_datasets.DATASETS``, the place that
its documentation names for this). :mod:`ezpz_moe.hosts.documents` reads them.
"""

# No `from __future__ import annotations`: the host reads the fields of Config at run time.

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchtitan.hf_datasets import DatasetConfig
from torchtitan.hf_datasets.text_datasets import DATASETS, HuggingFaceTextDataLoader

from ezpz_moe.config.assets import EMBEDDED_TOKENIZER
from ezpz_moe.hosts.documents import (
    CHAT_FILE,
    DEFAULT_DATASET,
    TEXT_FILE,
    TOPICS_PATH,
    check_shares,
    find_text,
    load_topics,
    read_documents,
    text_of,
)
from ezpz_moe.hosts.titan.base import titan

__all__ = ["DEFAULT_DATASET", "EMBEDDED_TOKENIZER", "dataloader_config", "read_documents"]


class TextDataLoader(HuggingFaceTextDataLoader):
    """The host's dataloader, with a check that our own texts have a document for every rank."""

    @dataclass(kw_only=True, slots=True)
    class Config(HuggingFaceTextDataLoader.Config):
        # Nothing new, but its own: the host builds the class that a Config is nested in.
        pass

    def __init__(self, config: Config, *, dp_world_size: int, **kwargs: Any) -> None:
        # Here and not in the config: only the trainer knows how many data-parallel ranks there are.
        check_shares(config.dataset, config.dataset_path, dp_world_size)
        super().__init__(config, dp_world_size=dp_world_size, **kwargs)


def dataloader_config(
    dataset: str | None,
    dataset_path: str | None,
    *,
    job_folder: Path | None,
    infinite: bool = True,
) -> Any:
    """Return the dataloader for ``dataset`` and ``dataset_path``.

    Raises:
        EzpzError: as :func:`ezpz_moe.hosts.documents.find_text`, or of chats that cannot be read.
    """
    if (dataset or "").lower() == CHAT_FILE:
        with titan().importing():  # only such a job needs this from the host
            from ezpz_moe.hosts.titan.chats import chat_config
        return chat_config(dataset_path, job_folder=job_folder, infinite=infinite)
    _register_our_texts()
    known = [*DATASETS, CHAT_FILE]
    name, path = find_text(dataset, dataset_path, known=known, job_folder=job_folder)
    return TextDataLoader.Config(dataset=name, dataset_path=path, infinite=infinite)


def _register_our_texts() -> None:
    """Add our texts to the host's registry, where the trainer will look them up by name."""
    DATASETS[DEFAULT_DATASET] = DatasetConfig(
        path=TOPICS_PATH, loader=load_topics, sample_processor=text_of
    )
    # No path: the host takes the job's dataset_path in its place.
    DATASETS[TEXT_FILE] = DatasetConfig(path="", loader=read_documents, sample_processor=text_of)
