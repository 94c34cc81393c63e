"""Any flavor file is a flavor or one message that names it; no key is ignored."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ezpz_moe.config.flavors import load_flavor
from ezpz_moe.errors import EzpzError


def lines_of(name: str) -> list[str]:
    """A flavor with every key in one file, one key a line."""
    flavor = load_flavor(name)
    assert flavor.dimensions is not None
    keys = flavor.dimensions.model_dump(exclude_none=True)  # what TOML does not have
    rope = keys.pop("rope")
    keys |= {"attention": flavor.attention, "compute_backend": flavor.compute_backend}
    top, table = ([f"{k} = {json.dumps(v)}" for k, v in part.items()] for part in (keys, rope))
    return ['inherits = "_mla"', *top, "[rope]", *table]


LINES = lines_of("671B_sdpa_for_loop")
VALUES = (
    *(
        "0",
        "1",
        "-1",
        "3",
        "7.5",
        "1e400",
        "-inf",
        "nan",
        "99999999999999999999",
        "0x" + "f" * 5000,
    ),
    *("true", '"x"', '"' + "x" * 500 + '"', "[]", "{}", "{ a = 1 }", "2024-01-01", "07:32:00"),
    *("", "'''", "[" * 500),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


def message(folder: Path, text: str) -> str:
    """What is wrong with a flavor of this text; empty if nothing is."""
    (folder / "fuzzed.toml").write_bytes(text.encode("utf-8", "surrogatepass"))
    try:
        load_flavor("fuzzed", near=folder)
    except EzpzError as error:
        return str(error)
    return ""


def named_or_accepted(folder: Path, text: str) -> bool:
    said = message(folder, text)
    return not said or "fuzzed.toml" in said


def test_the_flavor_is_valid_before_it_is_changed(folder: Path) -> None:
    assert message(folder, "\n".join(LINES)) == ""


@given(st.integers(0, len(LINES) - 1), st.sampled_from(VALUES))
def test_any_value(folder: Path, line: int, value: str) -> None:
    key = LINES[line].partition(" = ")[0]
    text = "\n".join([*LINES[:line], f"{key} = {value}", *LINES[line + 1 :]])
    assert named_or_accepted(folder, text)


@given(st.integers(0, len(LINES) - 1), st.integers(0, 30), st.sampled_from("abz_9"))
def test_no_key_is_ignored(folder: Path, line: int, position: int, letter: str) -> None:
    changed = LINES[line][:position] + letter + LINES[line][position:]
    key = LINES[line].partition(" = ")[0]
    if changed.partition(" = ")[0] != key:
        text = "\n".join([*LINES[:line], changed, *LINES[line + 1 :]])
        assert "fuzzed.toml" in message(folder, text)


@given(st.integers(0, 900), st.integers(0, 40), st.text(max_size=4))
def test_any_text(folder: Path, start: int, length: int, replacement: str) -> None:
    text = "\n".join(LINES)
    assert named_or_accepted(folder, text[:start] + replacement + text[start + length :])
