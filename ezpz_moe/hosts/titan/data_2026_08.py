"""Provide text for the host's data pipeline: an embedded text, and the user's own file.

The pipeline is the host's. It shuffles and tokenizes documents, and packs them into rows with as
many tokens as a microbatch has. :mod:`ezpz_moe.hosts.documents` reads the texts.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from torchtitan.components.data import (
    ConcatThenSplitPackingConfig,
    DatasetIterationPolicy,
    GrainDataLoader,
    SingleDatasetConfig,
)
from torchtitan.hf_datasets.text_datasets import DATASETS, TextProcessor

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
from ezpz_moe.hosts.titan.chats_2026_08 import chat_config

__all__ = ["DEFAULT_DATASET", "EMBEDDED_TOKENIZER", "dataloader_config", "read_documents"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Documents:
    """One of our own texts as a source for the host's pipeline."""

    dataset: str
    path: str | None

    def build(self, *, dataset_iteration_policy: DatasetIterationPolicy) -> Dataset:
        # Here and not in the config: only the trainer knows how many data-parallel ranks there are.
        check_shares(self.dataset, self.path, dataset_iteration_policy.dp_world_size)
        if self.dataset == DEFAULT_DATASET:
            return load_topics(TOPICS_PATH)
        return read_documents(self.path or "")


def dataloader_config(
    dataset: str | None,
    dataset_path: str | None,
    *,
    job_folder: Path | None,
    infinite: bool = True,
) -> GrainDataLoader.Config:
    """Return the dataloader for ``dataset`` and ``dataset_path``.

    Raises:
        EzpzError: as :func:`ezpz_moe.hosts.documents.find_text`.
    """
    if (dataset or "").lower() == CHAT_FILE:
        return chat_config(dataset_path, job_folder=job_folder, infinite=infinite)
    # Our texts are not registered here, unlike on 0.3: a config can hold its source directly.
    known = [*DATASETS, DEFAULT_DATASET, TEXT_FILE]
    name, path = find_text(dataset, dataset_path, known=known, job_folder=job_folder)
    text = _hosts_own(name, path) if name in DATASETS else _ours(name, path)
    # Training repeats its text, validation reads it once.
    return GrainDataLoader.Config(
        dataset=ConcatThenSplitPackingConfig(dataset=text), repeat=infinite
    )


def _ours(name: str, path: str | None) -> SingleDatasetConfig:
    return SingleDatasetConfig(
        source=Documents(dataset=name, path=path),
        processor=TextProcessor.Config(text_fn=text_of),
        post_filters=(_is_document,),
    )


def _is_document(sample: Any) -> bool:
    # The host's processor returns None for a text of fewer than two tokens.
    return sample is not None


def _hosts_own(name: str, path: str | None) -> SingleDatasetConfig:
    """Return a dataset of the host's registry, read from ``path`` if there is one."""
    text = DATASETS[name]
    if path is None:
        return text
    # data_files names files inside the dataset's usual place, which `path` replaces.
    options = {k: v for k, v in text.source.load_dataset_kwargs.items() if k != "data_files"}
    source = dataclasses.replace(text.source, path=path, load_dataset_kwargs=options)
    return dataclasses.replace(text, source=source)
