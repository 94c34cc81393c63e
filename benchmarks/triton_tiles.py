"""What every tile choice of the Triton kernels takes on GPUs that need not be here.

    python benchmarks/triton_tiles.py > docs/internals/benchmarks/triton_tiles.md    half an hour
    python benchmarks/triton_tiles.py --ffns all                                     hours
    python benchmarks/triton_tiles.py --target sm90 --dtype float32 --launch multiply

Compiles every launch of a routed layer and of the expert FFN with each of the tile sizes that it
may be given, for the arguments with which the backend would launch it. Prints a table in Markdown:
registers of a thread, bytes that spill from them, shared memory of a program, and tensor memory.
With ``--ffns all`` it compiles every activation with biases and without, and prints of a launch
that is not SwiGLU's the choice that takes most. The exit code is 1 if a choice spills or does not
fit. It says nothing about time.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

from ezpz_moe.compute.activations import ACTIVATIONS
from ezpz_moe.compute.arguments import NO_BIASES
from ezpz_moe.compute.backends.triton import kernels, launch, tuning

KERNELS = ("gate_and_up", "multiply", "hidden_gradients", "weight_gradient")
EXPERTS, DIM, HIDDEN, TOP_K, TOKENS = 128, 2048, 768, 8, 8192  # Qwen3-30B-A3B's
PLAIN = (("swiglu", False),)
FFNS = {"swiglu": PLAIN, "all": tuple(product(ACTIVATIONS, (False, True)))}
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class Target:
    """A kind of GPU, and the shared memory, in KiB, that a program may have there."""

    gpu: GPUTarget
    shared: int


TARGETS = {
    "sm80": Target(GPUTarget("cuda", 80, 32), 163),
    "sm90": Target(GPUTarget("cuda", 90, 32), 227),
    "sm100": Target(GPUTarget("cuda", 100, 32), 227),
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), 64),
}


@dataclass(frozen=True)
class Launch:
    """A launch that the backend makes. Of several with one name all compile to the same."""

    name: str
    tuner: Any = field(repr=False)
    positional: tuple[Any, ...] = field(repr=False)
    named: dict[str, Any] = field(repr=False)

    def choices(self, target: Target) -> list[triton.Config]:
        """The tile sizes that it may be given."""
        kernel, dtype = self.tuner.base_fn.__name__, self.positional[0].dtype
        return [*tuning.choices(kernel, dtype, target.gpu), tuning.SMALL]

    def compiled(self, config: triton.Config, target: Target) -> Any:
        """Compile it as a process would that has such a GPU."""
        triton.runtime.driver.set_active(OnlyCompiles(target.gpu))
        return self.tuner.fn.warmup(
            *self.positional, grid=(1,), **self.named, **config.all_kwargs()
        )


class OnlyCompiles:
    """A driver without a device. Triton asks it for what it compiles."""

    def __init__(self, gpu: GPUTarget) -> None:
        self._gpu = gpu

    def get_current_target(self) -> GPUTarget:
        return self._gpu

    def get_current_device(self) -> str:
        return str(self._gpu)  # the key of the kernels that a process has compiled

    def get_current_stream(self, device: str) -> int:
        return 0


@dataclass(frozen=True)
class Needs:
    """What a compiled kernel takes. Bytes, but ``tensor``: columns of tensor memory, of 512."""

    registers: int
    spilled: int
    shared: int
    tensor: int


def launches(dtype: torch.dtype, ffns: Sequence[tuple[str, bool]] = PLAIN) -> list[Launch]:
    """Every launch of a routed layer and of the FFN, forward and backward, by its name once.

    Args:
        ffns: activations, and whether products have biases.
    """
    found: dict[str, Launch] = {}

    def note(tuner: Any, *given: Any, grid: Any, warmup: bool, **named: Any) -> None:
        arguments = dict(zip(tuner.arg_names, given, strict=False)) | named
        name = _name(tuner.base_fn.__name__, arguments)
        found.setdefault(name, Launch(name, tuner, given, named))

    for kernel in KERNELS:
        tuner = getattr(kernels, kernel)
        tuner.run = partial(note, tuner)
    try:
        for activation, biased in ffns:
            _launch_all(dtype, activation, biased)
    finally:
        for kernel in KERNELS:
            del getattr(kernels, kernel).run
    return list(found.values())


def _launch_all(dtype: torch.dtype, activation: str, biased: bool) -> None:
    rows = TOKENS * TOP_K

    def empty(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def up(*shape: int) -> torch.Tensor | None:
        return empty(*shape) if ACTIVATIONS[activation].is_gated else None

    weights = empty(EXPERTS, HIDDEN, DIM), empty(EXPERTS, DIM, HIDDEN), up(EXPERTS, HIDDEN, DIM)
    biases = empty(EXPERTS, HIDDEN), empty(EXPERTS, DIM), up(EXPERTS, HIDDEN)
    parameters = (*weights, *(biases if biased else NO_BIASES))
    scores, x = empty(TOKENS, TOP_K, dtype=torch.float32), empty(TOKENS, DIM)
    ids, counts = empty(TOKENS, TOP_K, dtype=torch.int64), empty(EXPERTS, dtype=torch.int64)
    inputs, last = (*parameters, x, scores), (dtype, activation)
    counted = (counts, None)  # every expert learns
    _, *saved = launch.routed(*inputs, ids, *counted, rows, *last)
    launch.routed_backward(x, *inputs, *counted, *saved, *last)
    launch.routed_backward(x, *inputs, *counted, None, None, saved[2], *last)
    inputs = (*parameters, empty(rows, DIM), *counted)
    _, *saved = launch.ffn(*inputs, activation)
    launch.ffn_backward(inputs[6], *inputs, *saved, activation)
    launch.ffn_backward(inputs[6], *inputs, None, None, activation)


def _name(kernel: str, arguments: dict[str, Any]) -> str:
    activation = arguments.get("ACTIVATION", "swiglu")
    what = {
        "of a routed layer": arguments["TOP_K"] > 0,
        "two products": arguments.get("SECOND", False),
        "nothing kept": not arguments.get("HIDDEN_TOO", True),
        "transposed": arguments.get("g_k") == 1,
        activation: activation != "swiglu",
        "biases": arguments.get("BIASED", False),
    }
    return ", ".join([kernel, *(words for words, true in what.items() if true)])


def needs(compiled: Any) -> Needs:
    """Read from machine code what it takes."""
    if "amdgcn" in compiled.asm:
        text = compiled.asm["amdgcn"]
        registers = _number(r"\.vgpr_count: +(\d+)", text)
        # Nothing of ours is on a stack: what is there has been spilled.
        spilled = _number(r"\.private_segment_fixed_size: +(\d+)", text)
        return Needs(registers, spilled, compiled.metadata.shared, 0)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        text = subprocess.check_output([tool, "--dump-resource-usage", file.name], text=True)
    return Needs(
        registers=_number(r"REG:(\d+)", text),
        spilled=_number(r"STACK:(\d+)", text) + _number(r"LOCAL:(\d+)", text),
        shared=compiled.metadata.shared,
        tensor=compiled.metadata.tmem_size or 0,
    )


def _number(pattern: str, text: str) -> int:
    return int(re.findall(pattern, text)[0])


def wrong(it: Needs, target: Target) -> list[str]:
    """What no choice may be."""
    found = []
    if it.spilled:
        found.append(f"spills {it.spilled} bytes")
    if it.shared > target.shared * 1024:
        found.append(f"does not fit into {target.shared} KiB of shared memory")
    return found


@dataclass(frozen=True)
class Compiled:
    """A launch with one of its choices, what that takes, and what is wrong with it."""

    name: str
    config: triton.Config
    needs: Needs
    remarks: list[str]

    @classmethod
    def of(cls, each: Launch, config: triton.Config, target: Target) -> Compiled:
        it = needs(each.compiled(config, target))
        return cls(each.name, config, it, wrong(it, target))

    def row(self, tensor: bool) -> str:
        it, config = self.needs, self.config
        tile = " x ".join(str(config.kwargs[f"BLOCK_{letter}"]) for letter in "RNK")
        cells = [self.name, tile, config.num_warps, config.num_stages, it.registers, it.spilled]
        cells += [f"{it.shared / 1024:.1f}", *([it.tensor] if tensor else [])]
        return f"| {' | '.join(map(str, [*cells, ', '.join(self.remarks)]))} |"


_HEAD = """
## {target}, {dtype}

| launch | tile | warps | stages | registers | spilled | shared memory, KiB | {tensor}remark |
|---|---|---|---|---|---|---|{line}---|"""


def report(targets: Sequence[str], dtypes: Sequence[str], launched: str, ffns: str) -> int:
    """Print the tables; return how many choices are wrong."""
    print(f"# Tile choices of the `triton` backend, compiled by Triton {triton.__version__}")
    print("\nWritten by `benchmarks/triton_tiles.py`. No GPU has run them.")
    number, plain = 0, {each.name for each in launches(torch.bfloat16)}
    for name in targets:
        target = TARGETS[name]
        tensor = name == "sm100"
        for dtype in dtypes:
            column = {"tensor": "tensor memory | " * tensor, "line": "---|" * tensor}
            print(_HEAD.format(target=name, dtype=dtype, **column))
            for each in launches(DTYPES[dtype], FFNS[ffns]):
                if launched not in each.name:
                    continue
                found = [Compiled.of(each, config, target) for config in each.choices(target)]
                number += sum(bool(of.remarks) for of in found)
                for of in found if each.name in plain else _most(found):
                    print(of.row(tensor), flush=True)
    return number


def _most(found: Sequence[Compiled]) -> list[Compiled]:
    """The choices that are wrong, or the one that takes most registers."""
    bad = [each for each in found if each.remarks]
    return bad or [max(found, key=lambda each: each.needs.registers)]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--launch", default="", help="only launches whose name has this in it")
    parser.add_argument("--ffns", choices=FFNS, default="swiglu", help="without biases, or all")
    given = parser.parse_args()
    number = report(given.target, given.dtype, given.launch, given.ffns)
    print(f"\n{number} choices spill or do not fit." if number else "\nNone spills, all fit.")
    return bool(number)


if __name__ == "__main__":
    sys.exit(main())
