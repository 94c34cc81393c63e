"""Shipped TOML files, broken in every way: an EzpzError or success, never anything else.

Success has to be complete: each setting that the broken file still holds is known, and is what
the loaded job or flavor holds. So no key is ignored in silence.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import tomli
from hypothesis import given, settings
from hypothesis import strategies as st

from ezpz_moe.config.flavors import load_flavor
from ezpz_moe.errors import EzpzError
from ezpz_moe.hosts.jobs import load_job
from ezpz_moe.hosts.titan.job_keys import KEYS

FLAVORS = Path(__file__).parents[1] / "flavors"
JOB_FILES = sorted((FLAVORS / "jobs").glob("*.toml"))
FLAVOR_FILES = sorted(FLAVORS.glob("*.toml"))

VALUES = st.sampled_from(
    [
        "true",
        "0",
        "-1",
        "7",
        "1e400",
        "nan",
        "0.5",
        '""',
        '"x"',
        "[]",
        '["model"]',
        "[[1]]",
        "{a = 1}",
        "1979-05-27",
        "1000000000000000000000",
        '"\\u0000"',
        "",
        "=",
        '"ezpz_moe"',
        '"for_loop"',
        '"sdpa"',
        '"16B"',
    ]
)
LINES = st.sampled_from(
    [
        "[training]",
        "[trainning]",
        "[quantize]",
        "[[model]]",
        "[rope]",
        "steps = 3",
        "stepz = 3",
        "training.steps = 3",
        'inherits = "16B"',
        'base = "qwen3/30B-A3B"',
        "n_layerz = 2",
        '"" = 1',
    ]
)


@st.composite
def broken(draw: st.DrawFn, files: list[Path]) -> bytes:
    """The bytes of one of ``files`` after one or two mutations."""
    data = draw(st.sampled_from(files)).read_bytes()
    for _ in range(draw(st.integers(1, 2))):
        data = draw(st.sampled_from(MUTATIONS))(draw, data)
    return data


def _cut(draw: st.DrawFn, data: bytes) -> bytes:
    return data[: draw(st.integers(0, len(data)))]


def _random_bytes(draw: st.DrawFn, data: bytes) -> bytes:
    at = draw(st.integers(0, len(data)))
    return data[:at] + draw(st.binary(min_size=1, max_size=4)) + data[at:]


def _on_a_line(change: Callable[[st.DrawFn, bytes], bytes]) -> Callable[[st.DrawFn, bytes], bytes]:
    """``change`` applied to a line that says something (most say it in a comment)."""

    def mutate(draw: st.DrawFn, data: bytes) -> bytes:
        lines = data.split(b"\n")
        spoken = [i for i, line in enumerate(lines) if line and not line.startswith(b"#")]
        if spoken:
            at = draw(st.sampled_from(spoken))
            lines[at] = change(draw, lines[at])
        return b"\n".join(lines)

    return mutate


def _rename(draw: st.DrawFn, line: bytes) -> bytes:
    at = draw(st.integers(0, len(line.split(b" ")[0])))
    return line[:at] + draw(st.sampled_from([b"_", b"s", b".", b"\xc3\xa9", b""])) + line[at + 1 :]


def _set(draw: st.DrawFn, line: bytes) -> bytes:
    return line.split(b"=")[0] + b"= " + draw(VALUES).encode()


def _another_number(draw: st.DrawFn, line: bytes) -> bytes:
    return re.sub(rb"\d+", lambda _: str(draw(st.integers(0, 64))).encode(), line)


MUTATIONS = [
    _cut,
    _random_bytes,
    _on_a_line(lambda draw, line: b""),
    _on_a_line(lambda draw, line: b"# " + line),
    _on_a_line(lambda draw, line: line + b"\n" + line),
    _on_a_line(lambda draw, line: draw(LINES).encode() + b"\n" + line),
    _on_a_line(_rename),
    _on_a_line(_set),
    _on_a_line(_set),
    _on_a_line(_another_number),
    _on_a_line(_another_number),
]


def leaves(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in table.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def outcome(load: Callable[[], Any]) -> tuple[Any, str]:
    """What was loaded, or the message."""
    try:
        return load(), ""
    except EzpzError as error:
        return None, str(error)


@settings(max_examples=400)
@given(data=broken(JOB_FILES))
def test_a_broken_job(data: bytes, tmp_path_factory: pytest.TempPathFactory):
    path = tmp_path_factory.getbasetemp() / "broken_job.toml"
    path.write_bytes(data)
    job, message = outcome(lambda: load_job(path))
    if job is None:
        assert path.name in message
        return
    for key, value in leaves(tomli.loads(data.decode())):
        section, _, name = key.rpartition(".")
        row = KEYS[section][name]
        assert value in row.unless if row.message else job.values[key] == value


@settings(max_examples=400)
@given(data=broken(FLAVOR_FILES))
def test_a_broken_flavor(data: bytes, tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.getbasetemp() / "broken_flavors"
    folder.mkdir(exist_ok=True)
    (folder / "broken.toml").write_bytes(data)
    flavor, message = outcome(lambda: load_flavor("broken", near=folder))
    if flavor is None:
        assert ".toml" in message
        return
    held = flavor.model_dump() | (flavor.dimensions.model_dump() if flavor.dimensions else {})
    held = dict(leaves(held))
    for key, value in leaves(tomli.loads(data.decode())):
        kept = held.get(key)  # a list of sizes is kept as a tuple
        assert key == "inherits" or (list(kept) if isinstance(kept, tuple) else kept) == value
