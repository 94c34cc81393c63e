"""Embeddings and output matrix as one tensor: only if ``config.json`` says so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from ezpz_moe.hosts.detect import check_host, presumed_host
from ezpz_moe.hosts.titan.v0_3 import Titan03

if type(presumed_host()) is not Titan03:
    pytest.skip("builds models of torchtitan 0.3", allow_module_level=True)
check_host()  # before torchtitan is imported: it chooses the device

import hf_cases  # noqa: E402
from hf_cases import Case, changed, load, with_tensors  # noqa: E402
from hf_models import TOKENS_L, assert_same_logits, drawn, logits, opened  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from transformers import AutoConfig  # noqa: E402

from ezpz_moe.tools.checkpoints.huggingface.tied import EMBEDDINGS, OUTPUT  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is unavailable")

TIED = {"tie_word_embeddings": True}


exports = pytest.fixture(scope="module")(hf_cases.tiny_exports)


@pytest.fixture(scope="module")
def tied(exports, tmp_path_factory) -> Path:
    """A tied qwen3_moe as transformers saves it."""
    _, _, folder = exports.plain("qwen3_moe")
    saved = tmp_path_factory.mktemp("tied") / "saved"
    drawn(folder, **TIED).save_pretrained(saved)
    return saved


def renamed(old: str, new: str):
    return lambda tensors: {new if key == old else key: each for key, each in tensors.items()}


def both(tensors: dict) -> dict:
    """With both of the tied tensors, as formats before safetensors have them."""
    return tensors | {OUTPUT: tensors[EMBEDDINGS].clone()}


def assert_imported(case: Case, folder: Path, target: Path) -> None:
    assert case.remap(folder, target, "--to", "0.3") == 0
    weights = load(target)
    assert torch.equal(weights["lm_head.weight"], weights["tok_embeddings.weight"])
    assert_same_logits(logits(opened(folder)), case.logits(weights, TOKENS_L))


def test_a_tied_model_is_imported(exports, tied, tmp_path, capsys) -> None:
    """And exported again as the two tensors that it then has."""
    (file,) = tied.glob("*.safetensors")
    assert OUTPUT not in load_file(file)
    case = exports.case("qwen3_moe")
    assert_imported(case, tied, tmp_path / "step-0")
    assert f"{OUTPUT} is a copy of {EMBEDDINGS}" in capsys.readouterr().out
    assert case.remap(tmp_path / "step-0", tmp_path / "hf", "--to", "hf") == 0
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["tie_word_embeddings"] is False
    assert_same_logits(logits(opened(tmp_path / "hf")), logits(opened(tied)), 0)


@pytest.mark.parametrize(
    ("change", "note"),
    [
        (renamed(EMBEDDINGS, OUTPUT), f"{EMBEDDINGS} is a copy of {OUTPUT}"),
        (both, ""),
    ],
)
def test_either_tensor_may_be_there_or_both(exports, tied, change, note, tmp_path, capsys) -> None:
    """transformers ties in both directions."""
    other = with_tensors(tied, tmp_path / "other", change)
    assert_imported(exports.case("qwen3_moe"), other, tmp_path / "step-0")
    said = capsys.readouterr().out
    assert note in said
    assert ("is a copy of" in said) == bool(note)


def test_tied_tensors_that_differ_are_refused(exports, tmp_path, capsys) -> None:
    """transformers takes both; readers that believe the config take one."""
    case, (weights, _, folder) = exports.case("qwen3_moe"), exports.plain("qwen3_moe")
    other = changed(folder, tmp_path / "other", TIED)
    with pytest.raises(SystemExit):
        case.remap(other, tmp_path / "step-0", "--to", "0.3")
    said = capsys.readouterr().err
    assert f'{other / "config.json"}: says "tie_word_embeddings": true, but {OUTPUT} (in ' in said
    assert "transformers warns, and computes with both" in said
    assert not (tmp_path / "step-0").exists()
    # What the message says of transformers, and its first remedy.
    assert_same_logits(logits(opened(other)), case.logits(weights, TOKENS_L))
    repaired = changed(other, tmp_path / "repaired", {"tie_word_embeddings": False})
    assert case.remap(repaired, tmp_path / "step-0", "--to", "0.3") == 0


@pytest.mark.parametrize("config", ['{"tie_word_embeddings": false}', "{}", None])
def test_an_output_matrix_that_is_absent_is_not_invented(
    exports, tied, config, tmp_path, capsys
) -> None:
    """The file that has it may not have been copied. An absent key means false."""
    other = with_tensors(tied, tmp_path / "other", dict)
    described = json.loads((other / "config.json").read_text())
    (other / "config.json").unlink()
    if config is not None:
        del described["tie_word_embeddings"]
        (other / "config.json").write_text(json.dumps(described | json.loads(config)))
    with pytest.raises(SystemExit):
        exports.case("qwen3_moe").remap(other, tmp_path / "step-0", "--to", "0.3")
    said = capsys.readouterr().err
    assert f"{other}: has no {OUTPUT}, and no config.json there says" in said
    assert not (tmp_path / "step-0").exists()


@pytest.mark.parametrize(
    "model_type", ["deepseek_v2", "deepseek_v3", "qwen3", "qwen3_moe", "gpt_oss"]
)
def test_no_class_ties_by_default(model_type) -> None:
    assert AutoConfig.for_model(model_type).tie_word_embeddings is False
