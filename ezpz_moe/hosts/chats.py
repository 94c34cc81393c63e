"""Read a file of chats: ``dataset = "chat_file"``. The same for all hosts that train on chats.

A ``.jsonl`` file has one chat per line, in the form that most projects share::

    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datasets import Dataset, Split
from pydantic import BaseModel, ValidationError

from ezpz_moe.errors import EzpzError

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
    file = Path(path)
    if file.suffix.lower() != ".jsonl":
        raise EzpzError(
            f"dataset_path = '{file}': a chat_file is a .jsonl file, one chat per line, not "
            f"{file.suffix!r}."
        )
    try:
        # -sig drops the byte order mark that Windows editors write.
        text = file.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise EzpzError(f"dataset_path = '{file}' cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise EzpzError(
            f"dataset_path = '{file}' is not UTF-8 text: byte {error.start} ({error.reason})."
        ) from error
    chats = list(_chats(file, text))
    if not chats:
        raise EzpzError(f"dataset_path = '{file}' contains no chats.")
    dataset = Dataset.from_dict({COLUMN: chats}, split=Split.TRAIN)
    dataset.info.dataset_name = file.name  # which the host logs
    return dataset


def messages_of(sample: dict[str, Any]) -> list[dict[str, str]]:
    """Return a chat's messages, for the host."""
    return sample[COLUMN]


def _chats(file: Path, text: str) -> Iterator[list[dict[str, str]]]:
    # Not splitlines(): it also splits at U+2028 and others, which JSON allows inside a string.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
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
