"""Settings of every test run: reproducible examples, no variables from the shell."""

import contextlib
import os
import random
import shutil
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

# Before torch is imported, here and in every process that a test starts: several processes with
# several threads each wait for one another by spinning, a hundred times slower on two cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from hypothesis import settings

pytest.register_assert_rewrite(
    "checkpoint_cases",
    "contract_cases",
    "damage_cases",
    "flavor_files",
    "trainer_runs",
    "upcycle_cases",
)

settings.register_profile("ezpz_moe", derandomize=True, deadline=None, max_examples=100)
settings.load_profile("ezpz_moe")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that train come first, so that no processor waits for the last of them."""
    train = {item.path for item in items if item.get_closest_marker("train")}
    items.sort(key=lambda item: item.path not in train)


@pytest.fixture(autouse=True, scope="module")
def _runs_are_removed(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[None]:
    """What the fixtures of a file have trained goes when its tests have passed."""
    folder, failed = tmp_path_factory.getbasetemp(), request.session.testsfailed
    before = set(folder.iterdir())
    yield
    if request.session.testsfailed == failed:
        for each in set(folder.iterdir()) - before:
            shutil.rmtree(each, ignore_errors=True)


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("EZPZ_MOE_DEBUG", "EZPZ_MOE_FLAVORS", "RANK"):
        monkeypatch.delenv(variable, raising=False)


@pytest.fixture(autouse=True)
def _draws_are_the_same_in_every_run() -> None:
    if "torch" in sys.modules:  # not imported for a test that does without it
        sys.modules["torch"].manual_seed(0)


@pytest.fixture(autouse=True)
def _measurements_are_the_tests_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    monkeypatch.setenv("EZPZ_MOE_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(autouse=True)
def _slow_machines_are_told_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or a command that takes ten seconds there would write a line of progress to stderr."""
    from ezpz_moe.cli import display

    monkeypatch.setattr(display, "PATIENCE", 3600.0)


@pytest.fixture
def in_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process that torchrun started; mistakes are raised, not printed."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("EZPZ_MOE_DEBUG", "1")


@pytest.fixture
def cpu_with(monkeypatch: pytest.MonkeyPatch):
    """``cpu_with("float32")``: as if this CPU multiplied these dtypes natively."""
    from ezpz_moe.compute import native

    def answer(names: str) -> None:
        monkeypatch.setenv(native.VARIABLE, names)
        native.native_halves.cache_clear()

    yield answer
    monkeypatch.undo()
    native.native_halves.cache_clear()


@pytest.fixture
def qwen3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Makes dense models of the flavor "small"'s family, for a host that ``upcycle`` knows."""
    from upcycle_cases import small_qwen3

    return small_qwen3(tmp_path, monkeypatch)


@pytest.fixture(scope="module")
def forked_processes() -> Iterator[None]:
    """What multiprocessing spawns is a fork of a process that has imported torch and the host."""
    import multiprocessing.spawn

    import fork_server

    executable = multiprocessing.spawn.get_executable()
    multiprocessing.set_executable(fork_server.python())
    yield
    multiprocessing.set_executable(executable)


@pytest.fixture
def job_file(tmp_path: Path):
    """Writes a file into the test's folder and returns its path."""

    def write(text: str | bytes, name: str = "job.toml") -> Path:
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


@pytest.fixture
def port() -> int:
    """Where nobody listens, and below those that a system gives to whoever asks for any port."""
    for candidate in random.sample(range(20_000, 32_000), 100):
        with contextlib.suppress(OSError), socket.socket() as free:
            free.bind(("127.0.0.1", candidate))
            return candidate
    raise RuntimeError("100 ports in a row are taken")
