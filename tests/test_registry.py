"""Backends by name: ours, those of other packages, and everything that can be wrong with one.

A third-party package is made for real: a module and the ``dist-info`` folder that an installer
writes, on the path of a fresh interpreter.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ezpz_moe.compute import backend_names, get_backend
from ezpz_moe.compute.backends.for_loop import ForLoop
from ezpz_moe.compute.names import known_backend_names
from ezpz_moe.errors import EzpzError

TESTS = Path(__file__).parent

GOOD = """
import torch
from ezpz_moe.compute import Backend, for_loop, get_backend


class Twin(Backend):
    name = "twin"
    summary = "for_loop under another name"
    host_syncs = True
    static_shapes = True

    def _grouped_mm(self, A_RK, B_EKN, offs_E):
        return get_backend("for_loop").grouped_mm(A_RK, B_EKN, offs_E)


BACKEND = Twin()
"""


def install(site: Path, package: str, source: str, entry_points: dict[str, str]) -> Path:
    """What an installer leaves behind: the module, and its metadata with entry points."""
    site.mkdir(exist_ok=True)
    (site / f"{package}.py").write_text(source)
    info = site / f"{package}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    lines = [f"{name} = {value}" for name, value in entry_points.items()]
    (info / "entry_points.txt").write_text("\n".join(["[ezpz_moe.backends]", *lines, ""]))
    return site


def python(
    site: Path, *arguments: str, folder: Path = TESTS.parent
) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter that sees the packages of ``site``, and this one's."""
    environment = os.environ | {"PYTHONPATH": str(site), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    return subprocess.run(
        [sys.executable, *arguments],
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
    )


def ask(site: Path, name: str) -> str:
    """``get_backend(name)`` in a fresh interpreter: the backend's name, or the error's text."""
    program = (
        "from ezpz_moe.compute import get_backend\n"
        "from ezpz_moe.errors import EzpzError\n"
        f"try: print('found', get_backend({name!r}).name)\n"
        "except EzpzError as error: print(error)"
    )
    done = python(site, "-c", program)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_our_three_backends_are_there() -> None:
    assert {"grouped_mm", "for_loop", "batched_mm_padded"} <= set(backend_names())
    assert backend_names() == known_backend_names()


@pytest.mark.parametrize(
    ("name", "near"),
    [("for-loop", "for_loop"), ("FOR_LOOP", "for_loop"), ("batched_mm", "batched_mm_padded")],
)
def test_an_unknown_name_gets_the_nearest(name: str, near: str) -> None:
    with pytest.raises(EzpzError, match=rf"{name!r}.*Known: .*grouped_mm.*Did you mean {near!r}\?"):
        get_backend(name)


def test_a_name_near_to_nothing_gets_the_list() -> None:
    with pytest.raises(EzpzError) as caught:
        get_backend("xyz")
    assert "for_loop" in str(caught.value)
    assert "Did you mean" not in str(caught.value)


def test_options_are_written_as_a_call() -> None:
    assert get_backend("for_loop(recompute=true)") == ForLoop(recompute=True)
    assert get_backend("for_loop( recompute = False, )") == get_backend("for_loop()") == ForLoop()
    assert get_backend("for_loop") is not get_backend("for_loop(recompute=true)")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("for-loop(recompute=true)", r"unknown compute_backend 'for-loop'.* mean 'for_loop'\?"),
        ("for_loop(recompte=true)", r"no option 'recompte'\. .*: recompute\. Did you mean 'reco"),
        ("for_loop(recompute=maybe)", r"write options as for_loop\(option=value"),
        ("for_loop(recompute=3)", r"recompute = 3: .*boolean"),
        ("for_loop(true)", r"write options as for_loop\(option=value"),
        ("for_loop(recompute=true", r"write options as for_loop\(option=value"),
        ("for_loop(recompute=true) + 1", r"write options as for_loop\(option=value"),
        ("for_loop(**{})", r"write options as for_loop\(option=value"),
        ("for_loop(recompute=1j)", r"write options as for_loop\(option=value"),
        ("for_loop(recompute=b'1')", r"write options as for_loop\(option=value"),
        ("for_loop(recompute={1})", r"write options as for_loop\(option=value"),
        ("for_loop(recompute=true)(recompute=true)", r"write options as for_loop\(option"),
        ("for_loop(recompute=true, recompute=false)", r"write options.* each once"),
        ("grouped_mm(recompute=true)", r"grouped_mm has no option 'recompute'\..*: none\."),
    ],
)
def test_options_that_do_not_exist_or_fit(wrong: str, message: str) -> None:
    with pytest.raises(EzpzError, match=message):
        get_backend(wrong)


def test_a_third_party_backend_is_found_listed_and_under_the_contract(tmp_path: Path) -> None:
    site = install(tmp_path / "site", "acme_twin", GOOD, {"twin": "acme_twin:BACKEND"})
    assert ask(site, "twin") == "found twin"
    listed = python(site, "-m", "ezpz_moe.cli", "backends", "--device", "cpu")
    assert listed.returncode == 0, listed.stderr
    assert "twin" in listed.stdout
    assert "for_loop under another name" in listed.stdout
    contract = python(
        site, "-m", "pytest", str(TESTS / "test_contract.py"), "-q", "-p", "no:cacheprovider",
        "-k", "twin and float32 and int64",
    )  # fmt: skip
    assert contract.returncode == 0, contract.stdout
    assert " passed" in contract.stdout


def test_a_backend_of_ours_is_one_file(tmp_path: Path) -> None:
    """In a copy of this package: found by name, as a function and as a variant of every flavor."""
    for folder in ("ezpz_moe", "flavors"):
        leave = shutil.ignore_patterns("__pycache__")
        shutil.copytree(TESTS.parent / folder, tmp_path / folder, ignore=leave)
    (tmp_path / "ezpz_moe" / "compute" / "backends" / "twin.py").write_text(GOOD)
    program = (
        "from ezpz_moe.compute import get_backend, twin\n"
        "from ezpz_moe.config.flavors import load_flavor\n"
        "assert get_backend('twin').ffn == twin\n"
        "print(load_flavor('debugmodel_sdpa_twin').compute_backend)"
    )
    done = python(tmp_path, "-c", program, folder=tmp_path)
    assert done.stdout == "twin\n", done.stderr


def test_two_packages_with_one_name(tmp_path: Path) -> None:
    site = install(tmp_path / "site", "acme_one", GOOD, {"twin": "acme_one:BACKEND"})
    install(site, "acme_two", GOOD, {"twin": "acme_two:BACKEND"})
    message = ask(site, "for_loop")
    assert "'twin' is registered twice" in message
    assert "acme_one" in message
    assert "acme_two" in message
    assert "Uninstall one" in message


def test_a_package_that_takes_one_of_our_names(tmp_path: Path) -> None:
    site = install(tmp_path / "site", "acme_thief", GOOD, {"for_loop": "acme_thief:BACKEND"})
    message = ask(site, "for_loop")
    assert "'for_loop' is registered twice" in message
    assert "acme_thief" in message


def test_a_broken_package_breaks_its_own_name_only(tmp_path: Path) -> None:
    site = install(
        tmp_path / "site", "acme_broken", "import no_such_module", {"broken": "acme_broken:BACKEND"}
    )
    message = ask(site, "broken")
    assert "'broken' (acme_broken:BACKEND) cannot be loaded" in message
    assert "No module named 'no_such_module'" in message
    assert ask(site, "for_loop") == "found for_loop"
    listed = python(site, "-m", "ezpz_moe.cli", "backends", "--device", "cpu")
    assert listed.returncode == 0, listed.stderr
    assert "no_such_module" in listed.stdout


@pytest.mark.parametrize(
    ("source", "what"),
    [("BACKEND = print", "<built-in function print>"), (GOOD, "acme_wrong.Twin")],
    ids=("no-backend", "another-name"),
)
def test_an_entry_point_that_names_something_else(source: str, what: str, tmp_path: Path) -> None:
    site = install(tmp_path / "site", "acme_wrong", source, {"wrong": "acme_wrong:BACKEND"})
    message = ask(site, "wrong")
    assert "acme_wrong:BACKEND must be an ezpz_moe.compute.Backend" in message
    assert "'wrong'" in message
    assert what in message
