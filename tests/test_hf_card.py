"""What stands beside exported weights, when the job's tokenizer is damaged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from text_cases import tokenizer_with

from ezpz_moe.config.assets import EMBEDDED_TOKENIZER
from ezpz_moe.config.flavors import load_flavor
from ezpz_moe.errors import EzpzError
from ezpz_moe.tools.checkpoints.huggingface.card import Origin, check_tokenizer, write_description
from ezpz_moe.tools.checkpoints.huggingface.config import TransformersClass


def write(folder: Path, tokenizer_config: str) -> dict:
    """Write the description of some model with this tokenizer, and return its config."""
    tokenizer, target = folder / "tokenizer", folder / "hf"
    tokenizer.mkdir()
    target.mkdir()
    (tokenizer / "tokenizer.json").write_bytes((EMBEDDED_TOKENIZER / "tokenizer.json").read_bytes())
    (tokenizer / "tokenizer_config.json").write_text(tokenizer_config)
    form = TransformersClass("Some", {}, biases={}, differences=(), notes=())
    origin = Origin(load_flavor("debugmodel"), None, torch.float32, parameters=1, left_out="")
    write_description(target, form, origin, tokenizer)
    config = json.loads((target / "config.json").read_text())
    assert isinstance(config, dict)
    return config


def test_special_tokens_have_their_ids(tmp_path) -> None:
    config = write(tmp_path, '{"eos_token": {"content": "<|end_of_text|>"}}')
    assert (config["bos_token_id"], config["eos_token_id"]) == (None, 1)


@pytest.mark.parametrize(
    "damaged",
    [
        '{"eos_token": ["a"]}',
        '{"eos_token": {"content": {}}}',
        '{"added_tokens_decoder": 5}',
        '{"added_tokens_decoder": {"x": "y"}}',
        "{",
        "[" * 100_000,
    ],
)
def test_a_damaged_tokenizer_is_one_line(tmp_path, damaged) -> None:
    with pytest.raises(EzpzError, match=f"^{tmp_path / 'tokenizer'}") as error:
        write(tmp_path, damaged)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "vocab.json", "merges.txt"])
def test_what_transformers_would_not_read_as_the_host_does_is_no_tokenizer(tmp_path, name) -> None:
    (tmp_path / name).write_text("{}")
    with pytest.raises(EzpzError, match=r"holds no tokenizer\.json"):
        check_tokenizer(tmp_path, 2048, "debugmodel")


def test_a_tokenizer_with_more_ids_than_the_model_is_not_exported(tmp_path) -> None:
    check_tokenizer(tokenizer_with(tmp_path / "fits"), 2048, "debugmodel")
    more = tokenizer_with(tmp_path / "more", "<one more>")
    with pytest.raises(EzpzError, match="can give the token ID 2048"):
        check_tokenizer(more, 2048, "debugmodel")
