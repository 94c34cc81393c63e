"""Which of a folder's safetensors are read: those that the index names, and none by chance."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ezpz_moe.errors import EzpzError
from ezpz_moe.hosts.dcp.metadata import reason
from ezpz_moe.hosts.dcp.paths import INDEX, is_safetensors
from ezpz_moe.tools.checkpoints.huggingface.files import (
    read_tensors,
    weight_map,
)
from ezpz_moe.tools.checkpoints.huggingface.tied import is_tied

ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
MAP = {"a": ONE, "b": ONE, "c": TWO}


@pytest.fixture
def folder(tmp_path) -> Path:
    """A model in two files with an index."""
    write(tmp_path / ONE, a=1, b=2)
    write(tmp_path / TWO, c=3)
    write_index(tmp_path, MAP)
    return tmp_path


def write(file: Path, **values: float) -> None:
    save_file({name: torch.full((2,), float(value)) for name, value in values.items()}, file)


def write_index(folder: Path, names: object) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": names}))


def values(folder: Path) -> dict[str, float]:
    files = weight_map(folder)
    shapes = dict.fromkeys(files, torch.Size([2]))
    return {key: tensor[0].item() for key, tensor in read_tensors(folder, files, shapes)}


def refusal(folder: Path) -> str:
    with pytest.raises(EzpzError) as error:
        weight_map(folder)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_what_the_index_does_not_name_is_not_read(folder) -> None:
    """A stray file of zeros won over the model, because its name comes last."""
    write(folder / "model.safetensors", a=0, b=0, c=0, d=0)
    (folder / "training_args.safetensors").symlink_to(folder / "gone")
    assert values(folder) == {"a": 1, "b": 2, "c": 3}


def test_without_an_index_all_files_are_read(folder) -> None:
    (folder / INDEX).unlink()
    assert weight_map(folder) == MAP


@pytest.mark.parametrize("indexed", [False, True])
def test_a_tensor_in_two_files_is_refused(folder, indexed) -> None:
    if not indexed:
        (folder / INDEX).unlink()
    write(folder / TWO, c=3, a=4)
    said = refusal(folder)
    assert f"'a' is both in {ONE} and in {TWO}" in said


@pytest.mark.parametrize("how", ["absent", "link", "folder"])
def test_a_file_that_the_index_names_and_that_is_not_there_is_named(folder, how) -> None:
    (folder / TWO).unlink()
    if how == "link":
        (folder / TWO).symlink_to(folder / "blob")
    elif how == "folder":
        (folder / TWO).mkdir()
    assert f"{folder / TWO}: is missing, but {INDEX} names it." in refusal(folder)


def test_a_tensor_that_is_not_where_the_index_says_is_named(folder) -> None:
    write_index(folder, MAP | {"d": TWO})
    assert f"{INDEX}: says that 'd' is in {TWO}, where it is not" in refusal(folder)
    write_index(folder, MAP | {"a": TWO})
    assert f"{INDEX}: says that 'a' is in {TWO}, where it is not" in refusal(folder)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "cannot be read"),
        ("[" * 10**5, "cannot be read"),
        ("\xff", "cannot be read"),
        ("[]", "is not a JSON object"),
        ("{}", 'has no "weight_map"'),
        ('{"weight_map": {}}', 'has no "weight_map"'),
        ('{"weight_map": ["a"]}', 'has no "weight_map"'),
        ('{"weight_map": {"a": 3}}', "'a': 3 is not a file in its folder"),
        ('{"weight_map": {"a": "../x"}}', "'a': '../x' is not a file in its folder"),
        ('{"weight_map": {"a": "/x"}}', "'a': '/x' is not a file in its folder"),
        (f'{{"weight_map": {{"a": "{ONE}", "a": "{TWO}"}}}}', "it has two values for 'a'"),
    ],
)
def test_a_damaged_index_is_said(folder, text, said) -> None:
    (folder / INDEX).write_bytes(text.encode("latin-1"))
    refused = refusal(folder)
    assert refused.startswith(f"{folder / INDEX}: ")
    assert said in refused


def test_an_index_that_leads_nowhere_is_said(folder) -> None:
    (folder / INDEX).unlink()
    (folder / INDEX).symlink_to(folder / "gone")
    assert f"{folder / INDEX}: cannot be read" in refusal(folder)


@pytest.mark.parametrize("damage", ["header", "data", "empty", "link", "folder"])
def test_a_damaged_file_is_said(tmp_path, damage) -> None:
    file = tmp_path / "x.safetensors"
    if damage == "folder":
        file.mkdir()
    elif damage == "link":
        file.symlink_to(tmp_path / "gone")
    else:
        write(file, a=1)
        size = file.stat().st_size
        os.truncate(file, {"header": 20, "data": size - 1, "empty": 0}[damage])
    assert refusal(tmp_path).startswith(f"{file}: cannot be read: ")


def test_a_name_that_a_terminal_would_act_on_is_refused(tmp_path) -> None:
    write(tmp_path / "x.safetensors", **{"a\x1b[2J": 1})
    assert refusal(tmp_path).endswith(r"'a\x1b[2J' is not the name of a tensor.")


def test_a_library_that_quotes_a_damaged_file_does_not_reach_the_terminal(tmp_path) -> None:
    header = json.dumps(
        {"a": {"dtype": "F\x1b[2J\n", "shape": [1], "data_offsets": [0, 4]}}
    ).encode()
    file = tmp_path / "x.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    said = refusal(tmp_path)
    assert said.isprintable()
    assert r"`F\x1b[2J\n`" in said
    # torch quotes names of an archive's files.
    assert reason(RuntimeError("file archive\x11.data is not there.\nException raised ...")) == (
        r"file archive\x11.data is not there (RuntimeError)"
    )


@pytest.mark.parametrize(
    ("config", "tied"),
    [
        ('{"tie_word_embeddings": true}', True),
        ('{"tie_word_embeddings": false}', False),
        ("{}", False),
        (None, False),
    ],
)
def test_a_model_is_tied_if_its_config_says_so(tmp_path, config, tied) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    assert is_tied(tmp_path) is tied


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ("{", r"config\.json: cannot be read"),
        (
            '{"tie_word_embeddings": "true"}',
            r"config\.json: .* is 'true'; it must be true or false",
        ),
    ],
)
def test_a_damaged_config_is_said(tmp_path, config, said) -> None:
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(EzpzError, match=said):
        is_tied(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin"])
def test_weights_in_a_pickle_are_said(tmp_path, name) -> None:
    """Beside safetensors, as older downloads have both, they are of no concern."""
    (tmp_path / name).touch()
    with pytest.raises(EzpzError, match=rf"{name}: is a pickle, .* Save the model as safetensors"):
        is_safetensors(tmp_path)
    write(tmp_path / ONE, a=1)
    assert is_safetensors(tmp_path)
