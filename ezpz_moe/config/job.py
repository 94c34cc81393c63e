"""The trainer's TOML, read and checked key by key before anything heavy is imported.

``load_job`` reports all problems of a file at once. Which keys exist and what they mean is in the
table of a host, which the caller passes; :mod:`ezpz_moe.hosts.jobs` passes that of the installed
host. Nothing here imports torch or the host.

Paths in a job: ``job.dump_folder`` is relative to the working directory, as in the host. Input
files and folders (``hf_assets_path``, ``dataset_path``, ``initial_load_path``) are relative to the
working directory if they exist there, else to the job file's folder.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from ezpz_moe.config.flavors import (
    FOLDER_VARIABLE,
    Flavor,
    flavor_homes,
    flavor_names,
    is_flavor,
    load_flavor,
    split_name,
)
from ezpz_moe.config.foreign_keys import meaning
from ezpz_moe.config.keys import Key, Keys, sections
from ezpz_moe.config.older_keys import SECTIONS as OLDER_SECTIONS
from ezpz_moe.config.older_keys import successor
from ezpz_moe.config.telemetry_schema import Telemetry
from ezpz_moe.config.toml import read_toml
from ezpz_moe.errors import EzpzError, nearest, printable, short

MODEL_NAME = "ezpz_moe"
DENSE_MODELS = ("flux", "llama3", "llama3_ft")
"""Models of torchtitan's that have no size with experts."""
BASES = ("deepseek_v3", "gpt_oss", "qwen3")
"""Models of torchtitan's that a flavor can name as its base, by every generation's name."""
_SAME_WORD = 0.75
"""How alike two words of a key's name are, at least, if one is a slip for the other."""


@dataclass(frozen=True)
class Job:
    """What a job asks of the trainer.

    Attributes:
        flavor: name of the model flavor.
        path: the TOML file; None when a flavor runs without a job.
        values: ``"section.key"`` -> value, for the keys that the file sets.
    """

    flavor: str
    path: Path | None = None
    values: Mapping[str, Any] = field(default_factory=dict)

    @property
    def folder(self) -> Path | None:
        """The folder of the job file; flavors and data are looked up there too."""
        return self.path.parent if self.path else None

    @property
    def source(self) -> str:
        """Where the settings come from, for messages."""
        return str(self.path) if self.path else f"flavor {self.flavor}"

    def resolve(self, location: str) -> str:
        """Return the absolute path of an input; an address (``gs://...``) stays as it is."""
        if "://" in location:
            return location
        path = Path(location).expanduser()
        # The working directory comes first, as in the host: beside the job is only our addition.
        if not path.exists() and self.folder is not None and (self.folder / path).exists():
            path = self.folder / path
        return str(path.absolute())


def load_job(path: str | Path, keys: Keys) -> Job:
    """Read a job file, and check it and that its flavor exists.

    Args:
        path: the TOML file.
        keys: which keys the host takes.

    Raises:
        EzpzError: the file is missing, unreadable or not TOML, or has unknown, outdated or wrong
            keys; the message then names all of them.
    """
    path = Path(path)
    document = read_toml(path)
    if is_flavor(document):
        raise EzpzError(
            f"{path}: is a flavor's file, not a job's. Pass the flavor's name, {path.stem}, "
            f"with {FOLDER_VARIABLE}={path.parent} in the environment, or a job beside the file "
            f'that has [model] flavor = "{path.stem}".'
        )
    # Collect all problems: a file of another host has many, and one per run would be a nuisance.
    values, problems = _checked(document, keys)
    problems += _model_problems(document, values, path.parent)
    if document.get("telemetry") == {} and "telemetry" in keys:
        problems.append(
            '[telemetry]: is empty. Set a key of it, such as detail = "brief", or remove it.'
        )
    if problems:
        raise EzpzError(_report(path, problems))
    return Job(flavor=values["model.flavor"], path=path, values=values)


def find_job(config: str, keys: Keys) -> Job:
    """Return the job that ``--config`` names: the path of a job's TOML, or a flavor.

    Raises:
        EzpzError: as :func:`load_job` and :func:`job_for_flavor`.
    """
    if config.endswith(".toml"):
        return load_job(config, keys)
    try:
        return job_for_flavor(config)
    except EzpzError as error:
        if split_name(config, flavor_names()) is None and (meant := _file_meant(config)):
            raise EzpzError(
                f"{short(config)}: is no flavor, and the path of a job ends in .toml. "
                f"Did you mean {meant!r}?"
            ) from error
        raise


def _file_meant(config: str) -> str:
    """Return the TOML that a path without ``.toml`` is a slip for, or the empty string."""
    folder, name = os.path.split(config)
    # Without a folder most are flavors: a file that is only near to one says nothing.
    exact = [f"{config}.toml", f"{os.path.splitext(config)[0]}.toml"]
    if found := next(filter(os.path.isfile, exact), ""):
        return found
    if not os.path.isdir(folder):
        return ""
    near = nearest(name, [file.name for file in Path(folder).glob("*.toml")])
    return os.path.join(folder, near) if near else ""


def job_for_flavor(name: str) -> Job:
    """Return the job that trains a flavor with the host's defaults.

    Raises:
        EzpzError: there is no such flavor, or its file is wrong.
    """
    load_flavor(name)
    return Job(flavor=name)


def flavor_of(job: Job) -> Flavor:
    """Return the job's flavor, with the job's own [telemetry] over the flavor's, key by key.

    Raises:
        EzpzError: there is no such flavor, or its file is wrong.
    """
    flavor = load_flavor(job.flavor, near=job.folder)
    said = {
        key.removeprefix("telemetry."): value
        for key, value in job.values.items()
        if key.startswith("telemetry.")
    }
    if not said:
        return flavor
    telemetry = (flavor.telemetry or Telemetry()).model_copy(update=said)
    return flavor.model_copy(update={"telemetry": telemetry})


def accepts(key: Key, value: Any) -> bool:
    """Return whether ``key`` may hold ``value``."""
    try:
        _adapter(key.type).validate_python(value)
    except ValidationError:
        return False
    return True


def allowed(key: Key) -> str:
    """Return what ``key`` may hold, in words."""
    return _in_words(_adapter(key.type).json_schema())


def _checked(document: Mapping[str, Any], keys: Keys) -> tuple[dict[str, Any], list[str]]:
    """Return the valid ``"section.key"`` values of a file, and one line per problem."""
    known = sections(keys) | OLDER_SECTIONS
    values: dict[str, Any] = {}
    problems: list[str] = []
    # Several keys that are gone for the same reason become one line.
    outdated: dict[tuple[str, str], list[str]] = {}
    for section, name, value in _settings(document, known):
        key = keys.get(section, {}).get(name)
        if key is None:
            problems.append(_unknown(section, name, value, keys))
        # Before the type is asked: a key that is gone has none.
        elif key.message:
            if not is_one_of(key.unless, value):
                outdated.setdefault((section, key.message), []).append(name)
        else:
            try:
                values[f"{section}.{name}"] = _adapter(key.type).validate_python(value)
            except ValidationError:
                problems.append(f"[{section}] {name} = {shown(value)}: must be {allowed(key)}.")
    problems += [
        f"[{section}] {', '.join(names)}: {message}"
        for (section, message), names in outdated.items()
    ]
    return values, problems


def _settings(
    table: Mapping[str, Any], known: set[str], section: str = ""
) -> Iterator[tuple[str, str, Any]]:
    """Yield ``(section, key, value)`` for everything in a file that is not a ``known`` section."""
    for name, value in table.items():
        path = f"{section}.{name}" if section else name
        if path in known and isinstance(value, dict):
            yield from _settings(value, known, path)
        else:
            yield section, printable(name), value


def _unknown(section: str, name: str, value: Any, keys: Keys) -> str:
    """Return why ``section`` has no key ``name``, and what the user may have meant."""
    known = sections(keys)
    path = f"{section}.{name}" if section else name
    if path in known:
        return f"{name} = {shown(value)}: must be a section, [{path}]."
    if not section and isinstance(value, dict | list):
        return f"[{name}]: unknown section.{meaning(name, known, flavor_homes(name))}"
    where = f"[{section}] {name}" if section else f"{name} (outside of any section)"
    if older := successor(path, value, keys):
        return f"{where}: unknown key.{older}"
    # The right key in the wrong section is a common mistake.
    homes = [
        f"in [{home}]"
        for home, rows in keys.items()
        if name in rows and not rows[name].message and accepts(rows[name], value)
    ]
    homes += flavor_homes(name)
    # A name such as "enable" is at home in many sections, and so says nothing.
    near = meaning(
        name, likely(name, value, keys.get(section, {})), homes if len(homes) < 3 else []
    )
    return f"{where}: unknown key.{near}"


def likely(name: str, value: Any, rows: Mapping[str, Key]) -> list[str]:
    """Return the keys that ``name`` may be a slip for.

    Names alike can do the opposite: a slip changes letters of a word, but no word, no digit, and
    not what kind of value there is.

    >>> likely("step", 3, {"steps": own(int)})
    ['steps']
    >>> likely("enable_checkpoint", True, {"enable_first_step_checkpoint": own(bool)})
    []
    """
    return [
        key
        for key, row in rows.items()
        if not row.message and accepts(row, value) and is_slip(name, key)
    ]


def is_slip(name: str, key: str) -> bool:
    """Return whether ``name`` is ``key`` with letters of a word changed, added or missing."""
    words, others = ([*filter(None, re.split(r"[-_\W]+", each.lower()))] for each in (name, key))
    if "".join(words) == "".join(others):
        return True
    digits = [re.findall(r"\d", each) for each in (name, key)]
    return (
        len(words) == len(others)
        and digits[0] == digits[1]
        and all(map(_is_same_word, words, others))
    )


def _is_same_word(word: str, other: str) -> bool:
    """Return whether two words differ by a slip, or one is short for the other."""
    short, long = sorted((word, other), key=len)
    is_short = len(short) >= 3 and long.startswith(short)
    return is_short or SequenceMatcher(None, word, other).ratio() >= _SAME_WORD


def _model_problems(
    document: Mapping[str, Any], values: Mapping[str, Any], folder: Path
) -> Iterator[str]:
    """Yield the problems of ``[model]`` other than unknown keys and wrong types."""
    model = document.get("model", {})
    if not isinstance(model, dict):
        return  # reported already
    if "name" not in model:
        yield f'[model] name is missing: write name = "{MODEL_NAME}".'
    # A name of the wrong type is not among the values: that problem is reported already.
    elif (name := values.get("model.name", MODEL_NAME)) != MODEL_NAME:
        yield (
            f'[model] name = {shown(name)}: must be "{MODEL_NAME}" for this trainer module. '
            f"{_of_another_model(name)}"
        )
    if "flavor" not in model:
        yield "[model] flavor is missing: name the model to train; `ezpz-moe flavors` lists them."
    elif (flavor := values.get("model.flavor")) is not None:
        try:
            load_flavor(flavor, near=folder)
        except EzpzError as error:
            yield f"[model] flavor = {shown(flavor)}: {error}"


def _of_another_model(name: str) -> str:
    if name in DENSE_MODELS:
        return (
            f"torchtitan's {name} is dense: it has no routed experts, and only those are computed "
            "here. Train it with torchtitan alone, or name one of `ezpz-moe flavors`."
        )
    if name not in BASES:
        return "The model is named by its flavor: `ezpz-moe flavors` lists them."
    return (
        "To train another of torchtitan's mixtures of experts, choose a flavor: a TOML file with "
        f'base = "{name}/<its flavor>"; see docs/reference/flavors.md. `ezpz-moe convert` makes '
        "such a job of one of torchtitan 0.2's."
    )


def _report(path: Path, problems: list[str]) -> str:
    if len(problems) == 1:
        return f"{path}: {problems[0]}"
    return "\n  ".join([f"{path}: {len(problems)} problems", *problems])


def is_one_of(values: tuple[Any, ...], value: Any) -> bool:
    """Return whether ``value`` is one of ``values``, type included: in Python False == 0."""
    return any(type(value) is type(other) and value == other for other in values)


# Building an adapter takes far longer than validating with it.
@cache
def _adapter(type_: Any) -> TypeAdapter[Any]:
    return TypeAdapter(type_, config=ConfigDict(strict=True, allow_inf_nan=False))


_NOUNS = {
    "integer": "an integer",
    "number": "a number",
    "string": "a string",
    "boolean": "true or false",
}
_LIMITS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}


def _in_words(schema: Mapping[str, Any]) -> str:
    """Put a JSON schema in words: "an integer >= 1", "-1 or ...", "one of ...", "a list ..."."""
    if "anyOf" in schema:
        return " or ".join(map(_in_words, schema["anyOf"]))
    if "const" in schema:
        return shown(schema["const"])
    if "enum" in schema:
        return f"one of {', '.join(map(shown, schema['enum']))}"
    if schema["type"] == "object":
        return f"a table, each value {_in_words(schema['additionalProperties'])}"
    if schema["type"] == "array":
        empty = "non-empty " if schema.get("minItems") else ""
        return f"a {empty}list, each entry {_in_words(schema['items'])}"
    if "pattern" in schema:  # the type Text of the table of keys
        return "a non-empty string"
    limits = " and ".join(f"{sign} {schema[k]}" for k, sign in _LIMITS.items() if k in schema)
    return f"{_NOUNS[schema['type']]} {limits}".rstrip()


def shown(value: Any) -> str:
    """Return a value as TOML writes it, shortened."""
    # default=str, because TOML has dates and times, which JSON lacks.
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
