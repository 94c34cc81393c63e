"""What stands beside exported safetensors: config, tokenizer, generation defaults, model card."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from ezpz_moe import __version__
from ezpz_moe.config.flavors import Flavor
from ezpz_moe.errors import EzpzError
from ezpz_moe.hosts.job_files import vocabulary_problems
from ezpz_moe.hosts.untested import installed_pair
from ezpz_moe.tools.checkpoints.huggingface.config import TransformersClass
from ezpz_moe.tools.checkpoints.huggingface.files import CONFIG

GENERATION = "generation_config.json"
_TOKENIZER = "tokenizer.json"
_TOKENIZER_CONFIG = "tokenizer_config.json"
_TOKENIZER_FILES = (
    _TOKENIZER,
    _TOKENIZER_CONFIG,
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
)
_SPECIAL = ("bos_token", "eos_token", "pad_token")


@dataclass(frozen=True)
class Origin:
    """Where exported weights come from.

    Attributes:
        step: of the checkpoint; None if it is not known.
        dtype: of the parameters.
        parameters: how many numbers were written.
        left_out: what the card says about tensors that were not written; empty if there are none.
    """

    flavor: Flavor
    step: int | None
    dtype: torch.dtype
    parameters: int
    left_out: str


def check_tokenizer(folder: Path, vocabulary: int, flavor: str) -> None:
    """Check that ``folder`` holds a tokenizer for the model, which the host reads alike.

    Without ``tokenizer.json``, the host makes one of ``vocab.json`` or ``vocab.txt`` by rules of
    its own, and transformers by those of a class, or not at all.

    Args:
        folder: ``hf_assets_path``.
        vocabulary: rows of the model's embedding: each ID of the tokenizer needs one.
        flavor: the model's name, for the message.

    Raises:
        EzpzError: it does not.
    """
    if not (folder / _TOKENIZER).is_file():
        raise EzpzError(
            f"{folder}: the job's hf_assets_path holds no tokenizer.json. Correct the path, or "
            "pass --model FLAVOR instead of the job to export without a tokenizer."
        )

    def build() -> Tokenizer:
        return Tokenizer.from_file(str(folder / _TOKENIZER))

    for problem in vocabulary_problems(build, str(folder), vocabulary, flavor):
        raise EzpzError(problem)


def write_description(
    target: Path, form: TransformersClass, origin: Origin, tokenizer: Path | None
) -> None:
    """Write everything except the weights, so that transformers opens the folder.

    Args:
        target: an existing folder.
        form: the class that computes the model.
        origin: for the card.
        tokenizer: a folder with the tokenizer's files; None to write none.

    Raises:
        EzpzError: a file of the tokenizer cannot be read.
    """
    # Without pad_token_id, whose default is None in all four classes.
    ids: dict[str, int | None] = dict.fromkeys(f"{name}_id" for name in _SPECIAL[:2])
    if tokenizer is not None:
        ids |= _copy_tokenizer(tokenizer, target)
    # Written even if they are unknown: the classes' defaults are the ids of another tokenizer.
    _write(target / CONFIG, form.config | {"dtype": _name(origin.dtype)} | ids)
    if not (target / GENERATION).exists():
        known = {key: value for key, value in ids.items() if value is not None}
        # The mark that transformers gives to defaults which it took from a config.
        _write(target / GENERATION, {"_from_model_config": True, **known})
    (target / "README.md").write_text(_card(form, origin), encoding="utf-8")


def _copy_tokenizer(source: Path, target: Path) -> dict[str, int | None]:
    """Copy the tokenizer's files, and return the ids of its special tokens."""
    for name in (*_TOKENIZER_FILES, GENERATION):
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    config = _read(source / _TOKENIZER_CONFIG)
    if "tokenizer_class" not in config:
        # transformers would take one by model_type. Qwen2Tokenizer, that of qwen3_moe, ignores how
        # tokenizer.json cuts the text.
        named = {"tokenizer_class": "PreTrainedTokenizerFast"}
        _write(target / _TOKENIZER_CONFIG, config | named)
    tokens = {key: _content(config.get(key)) for key in _SPECIAL}
    try:
        known = _ids(source, config)
        return {f"{key}_id": known.get(token) for key, token in tokens.items() if token is not None}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise EzpzError(f"{source}: its files are not those of a tokenizer: {error!r}.") from error


def _ids(folder: Path, config: Mapping[str, Any]) -> dict[str, int]:
    """Return token -> id, from every place where a tokenizer may say so."""
    tokenizer = _read(folder / _TOKENIZER)
    vocabulary = tokenizer.get("model", {}).get("vocab", {})
    ids = dict(vocabulary) if isinstance(vocabulary, dict) else {}
    ids |= _read(folder / "vocab.json") | _read(folder / "added_tokens.json")
    ids |= {each["content"]: each["id"] for each in tokenizer.get("added_tokens", ())}
    decoder = config.get("added_tokens_decoder", {})
    return ids | {_content(token): int(number) for number, token in decoder.items()}


def _content(token: Any) -> Any:
    return token.get("content") if isinstance(token, dict) else token


def _read(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise EzpzError(f"{file}: cannot be read: {error}.") from error
    return found if isinstance(found, dict) else {}


def _write(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _card(form: TransformersClass, origin: Origin) -> str:
    flavor = origin.flavor
    base = f" (torchtitan's {flavor.base})" if flavor.base else ""
    step = "unknown" if origin.step is None else f"{origin.step}"
    lines = [
        "---",
        "library_name: transformers",
        "---",
        f"# {flavor.name}",
        "",
        f"- Class: {form.name}, {origin.parameters:,} parameters in {_name(origin.dtype)}",
        f"- Flavor: {flavor.name}{base}",
        f"- Training step: {step}",
        f"- Converted by: ezpz_moe {__version__} with torchtitan {installed_pair()[1]}",
        *([f"- Left out: {origin.left_out}"] if origin.left_out else []),
        *(f"- Note: {note}" for note in form.notes),
    ]
    return "\n".join(lines) + "\n"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
