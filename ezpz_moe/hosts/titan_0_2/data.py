"""Provide text for torchtitan 0.2's dataloader: an embedded text, and the user's own file.

Both join the host's own registry (``torchtitan.hf_datasets.text_datasets.DATASETS``, the place that
its documentation names for this). :mod:`ezpz_moe.hosts.documents` reads them.
"""

from __future__ import annotations

from typing import Any

from torchtitan.hf_datasets import DatasetConfig
from torchtitan.hf_datasets.text_datasets import DATASETS, build_text_validation_dataloader
from torchtitan.tools.logging import logger

from ezpz_moe.config.job import Job
from ezpz_moe.errors import EzpzError
from ezpz_moe.hosts.documents import (
    DEFAULT_DATASET,
    TEXT_FILE,
    TOPICS_PATH,
    VALIDATES_ON_TRAINING_TEXT,
    check_validation,
    find_text,
    is_ours,
    load_topics,
    read_documents,
    text_of,
)

_VALIDATION_DATASET = "c4_validation"  # the host's own default


def choose_text(config: Any, job: Job) -> None:
    """Put the datasets and absolute paths that the job means into the host's config.

    Raises:
        EzpzError: unknown dataset, or a file that cannot be read.
    """
    _register_our_texts()
    sections = {"training": config.training}
    if config.validation.enable:
        sections["validation"] = config.validation
        # Our config has no default for it, to tell whether the job names one.
        if not (config.validation.dataset or config.validation.dataset_path):
            _choose_validation_text(config)
    for name, section in sections.items():
        try:
            section.dataset, section.dataset_path = find_text(
                section.dataset, section.dataset_path, known=DATASETS, job_folder=job.folder
            )
        except EzpzError as error:
            raise EzpzError(f"{job.source}: [{name}] {error}") from error


def _choose_validation_text(config: Any) -> None:
    """Validate on the training text if it is ours, else on the host's default."""
    if is_ours(config.training.dataset):
        logger.warning(VALIDATES_ON_TRAINING_TEXT)
        config.validation.dataset = config.training.dataset or DEFAULT_DATASET
        config.validation.dataset_path = config.training.dataset_path
    else:
        config.validation.dataset = _VALIDATION_DATASET


def check_validation_shares(config: Any, ranks: int, tokenizer: Any) -> None:
    """Check a validation of the whole text, ``validation.steps = -1``, on several data ranks.

    Raises:
        EzpzError: the ranks have text for different numbers of steps.
    """
    validation = config.validation
    # The host's datasets are streamed: counting would mean downloading them before the first step.
    if validation.steps != -1 or ranks == 1 or not is_ours(validation.dataset):
        return
    loaders = (
        build_text_validation_dataloader(ranks, rank, tokenizer, config) for rank in range(ranks)
    )
    check_validation([sum(1 for _ in loader) for loader in loaders])


def _register_our_texts() -> None:
    """Add our texts to the host's registry, where the trainer will look them up by name."""
    DATASETS[DEFAULT_DATASET] = DatasetConfig(
        path=TOPICS_PATH, loader=load_topics, sample_processor=text_of
    )
    # No path: the host takes the job's dataset_path in its place.
    DATASETS[TEXT_FILE] = DatasetConfig(path="", loader=read_documents, sample_processor=text_of)
