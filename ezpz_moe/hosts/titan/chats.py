"""Provide a file of chats for the host's own chat data.

The host writes a chat by the tokenizer's template, learns the answers alone (labels of the prompt
are ignored), and packs whole chats into a sequence.
"""

# No `from __future__ import annotations`: the host reads the fields of Config at run time.

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from torchtitan.components.dataloader import ParallelAwareDataloader
from torchtitan.hf_datasets.text_datasets import ChatDataset
from torchtitan.tools.logging import logger

from ezpz_moe.errors import EzpzError
from ezpz_moe.hosts.chats import messages_of, read_chats
from ezpz_moe.hosts.documents import find_file
from ezpz_moe.hosts.job_files import written_chat
from ezpz_moe.hosts.our_texts import CHAT_FILE


class ChatFileDataLoader(ParallelAwareDataloader):
    """The host's dataloader with its chat data, of a file of the user's."""

    @dataclass(kw_only=True, slots=True)
    class Config(ParallelAwareDataloader.Config):
        dataset: str = CHAT_FILE

        infinite: bool = True
        """Whether to repeat the chats."""

        def __post_init__(self) -> None:
            if self.dataset != CHAT_FILE:
                raise ValueError(
                    f"dataloader.dataset = {self.dataset!r}: the job's data are chats, which a "
                    "flag cannot change. Set [training] dataset in the job."
                )

    def __init__(
        self,
        config: Config,
        *,
        dp_world_size: int,
        dp_rank: int,
        tokenizer: Any,
        seq_len: int,
        local_batch_size: int,
        snapshot_every_n_steps: int | None = 1,
        **_: Any,
    ) -> None:
        chats = _that_fit(config.dataset_path or "", tokenizer, seq_len, dp_world_size)
        data = ChatDataset(
            dataset=chats,
            tokenizer=tokenizer,
            sample_processor=messages_of,
            seq_len=seq_len,
            dp_rank=dp_rank,
            dp_world_size=dp_world_size,
            infinite=config.infinite,
        )
        super().__init__(
            data,
            dp_rank=dp_rank,
            dp_world_size=dp_world_size,
            num_workers=config.num_workers,
            persistent_workers=config.persistent_workers,
            pin_memory=config.pin_memory,
            prefetch_factor=config.prefetch_factor,
            snapshot_every_n_steps=snapshot_every_n_steps,
            batch_size=local_batch_size,
        )


def chat_config(
    dataset_path: str | None, *, job_folder: Path | None, infinite: bool
) -> ChatFileDataLoader.Config:
    """Return the dataloader for a file of chats, which is read here to find every mistake in it.

    Raises:
        EzpzError: there is no such file; and as :func:`ezpz_moe.hosts.chats.read_chats`.
    """
    if not dataset_path:
        raise EzpzError(f"dataset = {CHAT_FILE!r} needs dataset_path, the path of the file.")
    file = str(find_file(dataset_path, job_folder))
    read_chats(file)
    return ChatFileDataLoader.Config(dataset_path=file, infinite=infinite)


def _that_fit(path: str, tokenizer: Any, seq_len: int, ranks: int) -> Dataset:
    """Return the chats that are no longer than a sequence, and say how many are left out.

    The host leaves longer ones out too, in silence, and looks forever for one that fits.

    Raises:
        EzpzError: there are fewer than data-parallel ranks.
    """
    chats = read_chats(path)
    fitting = [row for row, sample in enumerate(chats) if _labels(sample, tokenizer) <= seq_len]
    if (left_out := len(chats) - len(fitting)) and fitting:
        logger.warning(
            f"ezpz_moe: {left_out} of {len(chats)} chats in {path} are longer than "
            f"{seq_len} tokens, a sequence, and left out"
        )
    if len(fitting) < ranks:
        raise EzpzError(
            f"dataset_path = '{path}': {len(fitting)} of its {len(chats)} chats have at most "
            f"{seq_len} tokens, and each of {ranks} data-parallel ranks needs one. Use longer "
            "sequences or more chats."
        )
    return chats.select(fitting)


def _labels(sample: dict[str, Any], tokenizer: Any) -> int:
    """Return how many labels the host makes of a chat: one fewer than tokens."""
    text = written_chat(tokenizer, messages_of(sample)).rstrip("\n")
    tokens = tokenizer.encode(text, add_bos=True, add_eos=False)
    return len(tokens) - (tokens[-1] == tokenizer.eos_id)
