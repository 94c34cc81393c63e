"""Read the texts that this package adds to those of the host. The same for all hosts.

- ``pydoc_topics``: the reference topics that ship with Python, one document per paragraph;
- ``text_file``: a file of the user's at ``dataset_path``;
- ``chat_file``: a file of chats at ``dataset_path`` (:mod:`ezpz_moe.hosts.chats`).

Every other name belongs to the host and is passed on unchanged. The documents of a text file are

====================  =============================================================
``.txt``              its paragraphs, separated by blank lines
``.jsonl``            one JSON object per line, its ``"text"``
``.json``             a list of JSON objects, their ``"text"``
``.parquet``          the rows' column ``text``
====================  =============================================================

All but ``.parquet`` may be compressed: ``.jsonl.gz``, ``.jsonl.zst``, and so on.

The host marks the beginning and end of each document. It distributes whole documents over the
data-parallel ranks and never splits one, so a ``.txt`` file is split into paragraphs: one document
would leave the other ranks without data.

Each rank reads the whole file into memory, which finds a mistake anywhere in it before the first
step. Nothing is written to a cache. For a corpus that does not fit, use one that the host streams.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset

from ezpz_moe.errors import EzpzError, did_you_mean
from ezpz_moe.hosts.our_texts import (
    CHAT_FILE,
    DEFAULT_DATASET,
    KNOWN_KINDS,
    TEXT_FILE,
    is_ours,
    kind_of,
)
from ezpz_moe.hosts.text_files import lines_in, reading, stamped, text_in

COLUMN = "text"
TOPICS_PATH = "pydoc_data.topics"


def find_text(
    dataset: str | None,
    dataset_path: str | None,
    *,
    known: Collection[str],
    job_folder: Path | None,
) -> tuple[str, str | None]:
    """Return the name of the dataset, and its absolute path if it is on this disk.

    Without a dataset, the path is a file of the user's. Without either, the embedded text is used.
    A relative path is looked up in the working directory, then next to the job file. The file is
    read here, to stop the run before it starts if there is a mistake in it.

    Args:
        dataset: name from the job, or None.
        dataset_path: path from the job, or None.
        known: names in the host's registry, including ours.
        job_folder: folder of the job file; None without one.

    Raises:
        EzpzError: unknown dataset, or a file that is missing, empty, of an unknown kind or broken.
    """
    # The host looks names up in lower case.
    name = (dataset or (TEXT_FILE if dataset_path else DEFAULT_DATASET)).lower()
    if name not in known:
        raise EzpzError(
            f"dataset = {dataset!r} is unknown.{did_you_mean(name, known)} Known: "
            f"{', '.join(sorted(known))}. For a file of your own, leave dataset out and set "
            "dataset_path."
        )
    if name == DEFAULT_DATASET and dataset_path:
        raise EzpzError(
            f"dataset = {name!r} is the embedded text and takes no dataset_path, "
            f"but dataset_path = {dataset_path!r}. Remove one of the two."
        )
    if name == TEXT_FILE:
        if not dataset_path:
            raise EzpzError(f"dataset = {name!r} needs dataset_path, the path of the file.")
        dataset_path = str(find_file(dataset_path, job_folder))
        read_documents(dataset_path)
    elif dataset_path:  # a folder or file for the host's dataset, or a name on the Hub
        # What is not on this disk passes through unchanged: only the host can look it up.
        found = (place for place in _places(dataset_path, job_folder) if place.exists())
        dataset_path = next((str(place.resolve()) for place in found), dataset_path)
    return name, dataset_path


VALIDATES_ON_TRAINING_TEXT = (
    "ezpz_moe: validation reads the training text, because [validation] names none: its loss says "
    "nothing about other text. For that, set dataset or dataset_path in [validation]"
)


def check_shares(dataset: str, dataset_path: str | None, ranks: int) -> None:
    """Check that our own texts have a document for every data-parallel rank.

    The host would search an empty share forever.

    Raises:
        EzpzError: there are fewer documents than ranks.
    """
    if not is_ours(dataset):
        return
    if dataset.lower() == CHAT_FILE:  # only a flag says so here: a job's chats have another loader
        raise EzpzError(
            f"dataset = {dataset!r}: the job's data are text, which a flag cannot change. Set "
            "[training] dataset in the job."
        )
    path = dataset_path or TOPICS_PATH
    documents = len(load_topics(path) if dataset == DEFAULT_DATASET else read_documents(path))
    if documents < ranks:
        raise EzpzError(
            f"dataset = {dataset!r} ('{path}') has {_count(documents, 'document')} "
            f"for {ranks} data-parallel ranks, but each needs at least one. Use "
            "fewer ranks or more documents (in a .txt file, blank lines separate them)."
        )


def check_validation(steps: Sequence[int]) -> None:
    """Check that a validation over the whole text takes every data-parallel rank as many steps.

    The host leaves the loop where a rank's own text ends. The others would wait in a collective for
    that rank until the communication library aborts the run.

    Args:
        steps: the number of steps for which each rank has text.

    Raises:
        EzpzError: they differ.
    """
    fewest, most = min(steps), max(steps)
    if fewest == most:
        return
    remedy = (
        f"Set validation.steps to {fewest}"
        if fewest
        else "Use more text, shorter sequences or smaller batches"
    )
    raise EzpzError(
        f"validation.steps = -1: the {len(steps)} data-parallel ranks have text for {fewest} to "
        f"{most} steps, because their documents differ in length, and would wait for each other "
        f"forever. {remedy}."
    )


def read_documents(path: str) -> Dataset:
    """Return the documents of a text file as an in-memory dataset with the column ``text``.

    Raises:
        EzpzError: the file is missing, a folder, of an unknown kind, not readable, broken (naming
            the line), without text, or without a column ``text`` of strings.
    """
    return _read_documents(*stamped(path))


@functools.lru_cache(maxsize=2)  # the training file and the validation file
def _read_documents(file: Path, mtime_ns: int, size: int) -> Dataset:
    kind = kind_of(file)
    if kind is None:
        raise EzpzError(
            f"dataset_path = '{file}': unknown kind of file {''.join(file.suffixes[-2:])!r}; "
            f"known: {KNOWN_KINDS}."
        )
    with reading(file):
        dataset = _READERS[kind](file)
    if not any(text.strip() for text in dataset[COLUMN]):
        raise EzpzError(f"dataset_path = '{file}' contains no text.")
    return dataset


def _read_txt(file: Path) -> Dataset:
    return _paragraphs(text_in(file))


def _paragraphs(text: str) -> Dataset:
    """Return one document per paragraph; blank lines separate paragraphs."""
    # [^\S\n] is whitespace except a line break: a line with only spaces counts as blank.
    paragraphs = re.split(r"\n(?:[^\S\n]*\n)+", text)
    return Dataset.from_dict({COLUMN: [p for p in paragraphs if p.strip()]})


def _read_jsonl(file: Path) -> Dataset:
    rows = ((f"line {number}", _parse_json(line, file, number)) for number, line in lines_in(file))
    return _from_rows(rows, file)


def _read_json(file: Path) -> Dataset:
    text = text_in(file)
    # An empty file is not JSON; as a file without text it gets a better message.
    rows = _parse_json(text, file) if text.strip() else []
    if not isinstance(rows, list):
        raise EzpzError(
            f"dataset_path = '{file}' contains {_kind(rows)}, not a list of objects. "
            "For one JSON object per line, name the file .jsonl."
        )
    return _from_rows(((f"item {number}", row) for number, row in enumerate(rows, 1)), file)


def _read_parquet(file: Path) -> Dataset:
    try:
        # The schema first: it is cheap, and a missing column gets our message instead of Arrow's.
        schema = pq.read_schema(file)
        if COLUMN not in schema.names:
            raise _no_column(file, schema.names)
        texts = pq.read_table(file, columns=[COLUMN])[COLUMN]
    except pa.ArrowException as error:
        raise EzpzError(f"dataset_path = '{file}' is broken: {error}") from error
    held = texts.type.value_type if pa.types.is_dictionary(texts.type) else texts.type
    if not any(is_text(held) for is_text in _TEXT_TYPES) or texts.null_count:
        raise EzpzError(
            f"dataset_path = '{file}': column {COLUMN!r} must hold a string in every "
            f"row, but it is {texts.type} with {_count(texts.null_count, 'null')}."
        )
    # Arrow's own column: no copy as Python strings. Dictionaries and views are not among the types
    # that datasets knows.
    plain = (
        texts if held is texts.type and held != pa.string_view() else texts.cast(pa.large_string())
    )
    return Dataset(pa.table({COLUMN: plain}))


_TEXT_TYPES = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)


_READERS: dict[str, Callable[[Path], Dataset]] = {
    ".txt": _read_txt,
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".parquet": _read_parquet,
}


def _parse_json(text: str, file: Path, line: int | None = None) -> Any:
    """Return the value in a file's text, or in one line of it."""
    try:
        # Numbers are only ever named as such, and Python reads none of more than 4300 digits.
        return json.loads(text, parse_int=float)
    except RecursionError as error:
        where = f", line {line}" if line else ""
        raise EzpzError(
            f"dataset_path = '{file}'{where}: lists or objects nest too deeply to be read."
        ) from error
    except json.JSONDecodeError as error:
        raise EzpzError(
            f"dataset_path = '{file}' is broken: line {(line or 1) + error.lineno - 1}, "
            f"column {error.colno}: {error.msg}."
        ) from error


def _from_rows(rows: Iterator[tuple[str, Any]], file: Path) -> Dataset:
    """Build a dataset from ``rows``, pairs of where a row is in the file and the row."""
    texts = []
    for where, row in rows:
        if not isinstance(row, dict):
            raise EzpzError(
                f"dataset_path = '{file}', {where}: {_kind(row)}, not an object "
                f'such as {{"{COLUMN}": "..."}}.'
            )
        if COLUMN not in row:
            raise _no_column(file, list(row), where)
        if not isinstance(row[COLUMN], str):
            raise EzpzError(
                f"dataset_path = '{file}', {where}: {COLUMN!r} is "
                f"{_kind(row[COLUMN])}, not a string."
            )
        try:
            row[COLUMN].encode()
        except UnicodeEncodeError as error:  # JSON can contain half of a surrogate pair
            raise EzpzError(f"dataset_path = '{file}', {where}: {error.reason}.") from error
        texts.append(row[COLUMN])
    # Strings of one column: other keys of an object would only take memory.
    return Dataset.from_dict({COLUMN: texts})


def _no_column(file: Path, found: list[str], where: str = "") -> EzpzError:
    return EzpzError(
        f"dataset_path = '{file}'{where and f', {where}'} has no column {COLUMN!r}; "
        f"found: {', '.join(map(repr, found)) or 'none'}."
        + f' For chats, set dataset = "{CHAT_FILE}".'
        * ("messages" in found)
    )


def _places(dataset_path: str, job_folder: Path | None) -> list[Path]:
    """Return where to look up a path: in the working directory, then next to the job file."""
    path = Path(dataset_path).expanduser()
    # `folder / path` is `path` itself if that is absolute.
    return [folder / path for folder in (Path.cwd(), job_folder) if folder is not None]


def find_file(dataset_path: str, job_folder: Path | None) -> Path:
    """Return the absolute path of the first of its places where the file exists.

    Raises:
        EzpzError: it exists in none.
    """
    tried = _places(dataset_path, job_folder)
    for candidate in tried:
        if candidate.is_file():
            return candidate.resolve()
    folder = next((candidate for candidate in tried if candidate.is_dir()), None)
    places = " or ".join(dict.fromkeys(f"'{candidate}'" for candidate in tried))
    raise EzpzError(
        f"dataset_path = {dataset_path!r} "
        + (f"is a folder ('{folder}'); name one file." if folder else f"does not exist: {places}.")
    )


def _kind(value: Any) -> str:
    """Name the kind of a JSON value, in JSON's terms."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean"}
    return "null" if value is None else names.get(type(value), "a number")


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def load_topics(path: str) -> Dataset:
    """Return the embedded text; ``path`` is only what the host displays for it."""
    # In a fixed random order: neighbouring paragraphs are so similar that, in the original order,
    # the loss of a step would say more about its topic than about the training.
    return _paragraphs("\n\n".join(topics[name] for name in sorted(topics))).shuffle(seed=0)


def text_of(sample: dict[str, Any]) -> str:
    """Return a document's text, for the host."""
    return sample[COLUMN]
