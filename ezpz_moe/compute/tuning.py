"""Which backend is fastest: measured on a layer's own rows, and remembered on disk.

A :class:`Situation` is what the times depend on. :mod:`.agreement` makes ranks agree on a choice.
"""

import hashlib
import json
import logging
import math
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import torch
from pydantic import TypeAdapter

from ezpz_moe import __version__
from ezpz_moe.compute.cache import CACHE_VARIABLE, cache_root
from ezpz_moe.compute.native import native_halves

logger = logging.getLogger(__name__)

# In docs/internals/benchmarks, 5 turns pick one over 5 % slower in 2.7 % of cases, 15 in 1.1 %.
_TURNS = 15
_SECONDS = 30  # no further turn begins after this

# Prefixes of the variables that decide whether freed memory is kept: on a CPU, page faults can cost
# more than the choice of a backend (docs/guides/benchmark.md).
_OF_ALLOCATORS = ("MALLOC", "GLIBC_TUNABLES", "LD_PRELOAD", "PYTORCH_CUDA_ALLOC", "PYTORCH_ALLOC")


@dataclass(frozen=True)
class Question:
    """What layers computed by the same backend have in common, on whatever rank.

    Attributes:
        product: ``"routed"``, ``"ffn"`` or ``"mm"``.
        candidates: the backends to choose from.
        device: :func:`device_name`.
        dtype: what the kernels compute in.
        sizes: (E, D, F), or (E, K, N) of one product.
        recompute: whether backward computes gate and up again.
        ffn: the activation of experts, and whether they have biases; empty for one product.
        torch, ezpz_moe: their versions.
    """

    product: str
    candidates: tuple[str, ...]
    device: str
    dtype: str
    sizes: tuple[int, int, int]
    recompute: bool
    ffn: str = ""
    torch: str = torch.__version__
    ezpz_moe: str = __version__

    def __str__(self) -> str:
        E, inner, outer = self.sizes
        again = ", recomputed in backward" if self.recompute else ""
        # SwiGLU without biases is what most models have.
        ffn = "" if self.ffn in ("", "swiglu") else f" ({self.ffn})"
        return (
            f"{self.product}{ffn} of {E} experts {inner} x {outer}, "
            f"{self.dtype} on {self.device}{again}"
        )

    @property
    def key(self) -> str:
        """A key that only equal questions share, in every process."""
        return _key(self)


@dataclass(frozen=True)
class Situation:
    """What determines the fastest backend.

    Attributes:
        question: what is to be computed.
        rows: R, rounded up to a power of two.
        skew: class of the load, :func:`skew_class`.
    """

    question: Question
    rows: int
    skew: int

    def __str__(self) -> str:
        return f"{self.question}, up to {self.rows} rows, busiest expert {self.busiest} x the mean"

    @property
    def busiest(self) -> str:
        """Load of the busiest expert over the mean, at the middle of the class."""
        return f"{2 ** (self.skew / 2):.2g}"


@dataclass(frozen=True)
class Measured:
    """Milliseconds of forward and backward by backend, fastest first; None means out of memory."""

    milliseconds: dict[str, float | None]

    @property
    def fastest(self) -> str:
        return next(iter(self.milliseconds))

    def __str__(self) -> str:
        return ", ".join(
            f"{name} {'out of memory' if ms is None else f'{ms:.3g} ms'}"
            for name, ms in self.milliseconds.items()
        )


@cache
def device_name(device: torch.device) -> str:
    """Return what times on a device depend on. On a CPU the memory allocator matters much."""
    if device.type == "cpu":
        capability = torch.backends.cpu.get_cpu_capability()
        name = f"{platform.machine()} ({capability}), {torch.get_num_threads()} threads"
        if names := sorted(str(each).removeprefix("torch.") for each in native_halves()):
            name += f", {' and '.join(names)} native"
        said = (f"{key}={value}" for key, value in sorted(allocator_variables().items()))
        return ", ".join((name, *said))
    return torch.get_device_module(device).get_device_name(device)


def allocator_variables() -> dict[str, str]:
    """Return the memory settings in this process's environment."""
    return {key: value for key, value in os.environ.items() if key.startswith(_OF_ALLOCATORS)}


def skew_class(busiest_over_mean: float) -> int:
    """Return 0 for an even load, and one more per half power of two of the busiest expert's load.

    That fine because a batched product is fastest for an even load, but no longer at 1.3.
    """
    return round(2 * math.log2(max(busiest_over_mean, 1)))


def fastest(
    situation: Situation, runs: Mapping[str, Callable[[], object]], device: torch.device
) -> str:
    """Return the fastest of ``runs``, each a backend's forward and backward; log the choice.

    Raises:
        torch.OutOfMemoryError: none of them fits in memory.
    """
    measured, source = _remembered(situation), "measured by an earlier run"
    if measured is None:
        start = time.perf_counter()
        measured = measure(runs, device)
        source = f"measured now, in {time.perf_counter() - start:.2g} s"
        remember(situation, measured)
    logger.info(f"ezpz_moe: auto: {measured.fastest} for {situation} ({source}: {measured})")
    return measured.fastest


def measure(runs: Mapping[str, Callable[[], object]], device: torch.device) -> Measured:
    """Time each of ``runs``. They take turns: a busy machine then slows all of them alike."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    too_large: dict[str, None] = {}
    start = time.perf_counter()
    for turn in range(1 + _TURNS):
        # One timed turn always completes, however slow it is.
        if turn > 1 and time.perf_counter() - start > _SECONDS:
            break
        # Out of memory excludes a backend for good, but is not an error: others may need less.
        for name, run in runs.items():
            if name in too_large:
                continue
            try:
                elapsed = _milliseconds(run, device)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                too_large[name] = None
                continue
            if turn:  # the first turn warms up
                times[name].append(elapsed)
    # The median, because a turn that another process disturbed says nothing about a backend.
    medians = {
        name: statistics.median(each) for name, each in times.items() if name not in too_large
    }
    if not medians:
        raise torch.OutOfMemoryError(f"none of {', '.join(runs)} fits in the memory of {device}")
    return Measured(dict(sorted(medians.items(), key=lambda item: item[1])) | too_large)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Return whether memory ran out. The CPU's allocator has no exception class for it."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _milliseconds(run: Callable[[], object], device: torch.device) -> float:
    """Time all that ``run`` puts on the device, by the host's clock."""
    # The host's clock and a full wait, not device events: what the host does between launches is
    # part of a backend's time, and a CPU has no events.
    synchronize = getattr(torch.get_device_module(device), "synchronize", lambda: None)
    synchronize()
    start = time.perf_counter()
    run()
    synchronize()
    return (time.perf_counter() - start) * 1e3


# --- what earlier runs measured -------------------------------------------------------------------


def _key(asked: Question | Situation) -> str:
    # Not hash(): Python seeds that anew in every process.
    return hashlib.sha256(json.dumps(asdict(asked)).encode()).hexdigest()[:16]


def cache_folder() -> Path:
    """Return the folder with a file for each situation; it may not exist yet."""
    return cache_root() / "auto"


@contextmanager
def elsewhere() -> Iterator[str]:
    """Forget earlier runs for a while; new measurements go to a folder that is then removed."""
    with (
        tempfile.TemporaryDirectory(prefix="ezpz-moe-tune-") as folder,
        variable(CACHE_VARIABLE, folder),
    ):
        yield folder


@contextmanager
def variable(name: str, value: str) -> Iterator[None]:
    """Set one environment variable for a while."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        del os.environ[name]
        if before is not None:
            os.environ[name] = before


def recorded() -> Iterator[tuple[Situation, Measured]]:
    """Yield all measurements on disk."""
    situations, measurements = TypeAdapter(Situation), TypeAdapter(Measured)
    for path in sorted(cache_folder().glob("*.json")):
        text = path.read_bytes()
        yield situations.validate_json(text), measurements.validate_json(text)


def _path(situation: Situation) -> Path:
    return cache_folder() / f"{_key(situation)}.json"


def _remembered(situation: Situation) -> Measured | None:
    path = _path(situation)
    try:
        measured = TypeAdapter(Measured).validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        logger.warning(f"ezpz_moe: {path}: cannot be read ({error}); measuring again")
        return None
    # A file that names other backends cannot answer, whoever wrote it.
    return measured if set(measured.milliseconds) == set(situation.question.candidates) else None


def remember(situation: Situation, measured: Measured) -> None:
    """Save for later runs, whole or not at all: several ranks may write the same file."""
    path = _path(situation)
    # A name of this process, in the same folder, because renaming is atomic only within a file
    # system. The suffix keeps it out of recorded().
    unfinished = path.with_suffix(f".{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_text(json.dumps(asdict(situation) | asdict(measured), indent=2) + "\n")
        # Renaming is atomic: readers see the old file or the whole new one.
        unfinished.replace(path)
    except OSError as error:
        logger.warning(
            f"ezpz_moe: {path}: cannot be written ({error}), so the next run measures again; "
            f"set {CACHE_VARIABLE} to another folder"
        )
