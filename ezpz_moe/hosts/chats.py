"""Read a file of chats: ``dataset = "chat_file"``. The same for all hosts that train on chats.

A ``.jsonl`` file, which may be compressed (``.jsonl.gz``), has one chat per line, in the form that
most projects share::

    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datasets import Dataset, Split
from pydantic import BaseModel, ValidationError

from ezpz_moe.errors import EzpzError
from ezpz_moe.hosts.our_texts import COMPRESSED, kind_of
from ezpz_moe.hosts.text_files import lines_in, reading, stamped

COLUMN = "messages"
_ROLES = ["user", "assistant"]


class _Message(BaseModel):
    role: str
    content: str


class _Chat(BaseModel):
    messages: list[_Message]


def read_chats(path: str) -> Dataset:
    """Return the chats of a file as an in-memory dataset with the column ``messages``.

    Raises:
        EzpzError: the file is of another kind, cannot be read, is broken (naming the line), has no
            chats, or one that is not a user's message and its answer.
    """
    return _read_chats(*stamped(path))


@functools.lru_cache(maxsize=2)  # the training file and the validation file
def _read_chats(file: Path, mtime_ns: int, size: int) -> Dataset:
    if kind_of(file) != ".jsonl":
        raise EzpzError(
            f"dataset_path = '{file}': a chat_file is a .jsonl file, one chat per line, not "
            f"{file.suffix!r}; it may be compressed ({', '.join(COMPRESSED)})."
        )
    with reading(file):
        chats = list(_chats(file))
    if not chats:
        raise EzpzError(f"dataset_path = '{file}' contains no chats.")
    dataset = Dataset.from_dict({COLUMN: chats}, split=Split.TRAIN)
    dataset.info.dataset_name = file.name  # which the host logs
    return dataset


def messages_of(sample: dict[str, Any]) -> list[dict[str, str]]:
    """Return a chat's messages, for the host."""
    return sample[COLUMN]


def _chats(file: Path) -> Iterator[list[dict[str, str]]]:
    for number, line in lines_in(file):
        where = f"dataset_path = '{file}', line {number}"
        try:
            chat = _Chat.model_validate_json(line)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            key = ".".join(map(str, first["loc"]))
            raise EzpzError(f"{where}: {f'{key}: ' if key else ''}{first['msg']}.") from error
        roles = [each.role for each in chat.messages]
        if roles != _ROLES:
            raise EzpzError(
                f"{where}: has messages of {', '.join(roles) or 'nobody'}. torchtitan trains on "
                "one message of user and one of assistant in a chat: cut longer ones into such "
                "pairs, and write a system's message into the user's."
            )
        yield [each.model_dump() for each in chat.messages]
