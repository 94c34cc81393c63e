"""``ezpz-moe bench``."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import arg

from ezpz_moe.cli import display
from ezpz_moe.cli.arguments import Device, DType, print_emulated
from ezpz_moe.cli.command import Command
from ezpz_moe.errors import EzpzError

if TYPE_CHECKING:
    from ezpz_moe.tools.bench.plan import Allocator, Plan
    from ezpz_moe.tools.bench.results import Measured

_SCALE_ON_CPU, _REPEATS_ON_CPU, _REPEATS = 4, 5, 30


@dataclass(frozen=True)
class Bench(Command):
    """Measure the time and memory of one expert layer: all backends, the host's layer, the limit.

    Times the forward pass alone and with the backward pass; contenders take turns.
    docs/benchmark.md explains each column.
    """

    group = "backends"

    shape: Annotated[tuple[str, ...], arg(metavar="MODEL|E,D,F,R ...")] = ("olmoe",)
    """Measure olmoe, qwen3_30b, deepseek_v2_lite, mixtral, 10b_2b, 7b, or these four sizes:
    experts, model dimension, expert dimension and routed rows."""
    scale: Annotated[int | None, arg(metavar="INT")] = None
    """Divide a model's D, F and tokens by this. Default: 4 on the CPU, else 1."""
    tokens: int = 4096
    """Give a model this many tokens, before the scale; each goes to the model's top-k experts."""
    routing: Annotated[tuple[str, ...], arg(metavar="NAME ...")] = ("balanced", "zipf1")
    """Route as balanced, zipf0.5, zipf1 (any exponent), empty25 (25 % of experts idle) or
    one_hot."""
    dtype: tuple[DType, ...] = ("bfloat16",)
    """Compute in these dtypes."""
    backends: Annotated[tuple[str, ...], arg(metavar="SPEC ...")] = ()
    """Time these, such as for_loop 'for_loop(recompute=true)'. Default: all that run here."""
    against: Annotated[tuple[str, ...], arg(metavar="NAME ...")] = ()
    """Compare with stock, stock_products, indexed, dense, transformers_eager,
    transformers_batched_mm, transformers_grouped_mm, scattermoe, megablocks or sonicmoe.
    Default: all that run here."""
    repeats: Annotated[int | None, arg(metavar="INT")] = None
    """Take this many turns. Default: 5 on the CPU, else 30."""
    device: Device = None
    """Run on this device, such as cpu, cuda or xpu. Default: torch's accelerator, else the CPU."""
    allocator: Literal["default", "retain", "both"] = "default"
    """On the CPU, allocate as the environment says, or retain all memory that was ever obtained."""
    json: Annotated[Path | None, arg(metavar="FILE")] = None
    """Write every turn, and all that the figures depend on, to this file."""
    plot: Annotated[Path | None, arg(metavar="FILE.png")] = None
    """Draw bars per shape, and time and memory over skew, to this file."""

    def run(self) -> int:
        self._check()
        with display.progress().status("Asking torch and torchtitan ..."):
            plan = self._plan()
            from ezpz_moe.tools.bench.plan import check, environment, run

            check(plan)
            about = environment(plan.device)
        display.print_table(_facts(about))
        print_emulated(plan.device, plan.dtypes)
        both: tuple[Allocator, ...] = ("default", "retain")
        allocators = both if self.allocator == "both" else (self.allocator,)
        results: list[Measured] = []
        verdicts: list[str] = []
        told: set[str] = set()
        for measured in chain.from_iterable(
            run(replace(plan, allocator=allocator)) for allocator in allocators
        ):
            results.append(measured)
            verdicts += _print(measured, told)
        self._write(results, about, verdicts)
        return int(any(each.failed for each in results))

    def _check(self) -> None:
        for flag, number in (
            ("--scale", self.scale),
            ("--tokens", self.tokens),
            ("--repeats", self.repeats),
        ):
            if number is not None and number < 1:
                raise EzpzError(f"{flag} {number}: must be at least 1.")
        for flag, names in (
            ("--shape", self.shape),
            ("--routing", self.routing),
            ("--dtype", self.dtype),
        ):
            if not names:
                raise EzpzError(f"{flag}: name at least one.")
        for flag, file in (("--json", self.json), ("--plot", self.plot)):
            if file and not file.absolute().parent.is_dir():
                raise EzpzError(f"{flag} {file}: there is no folder {file.parent}.")
            if file and file.is_dir():
                raise EzpzError(f"{flag} {file}: is a folder. Name a file.")
        if self.plot and self.plot.suffix != ".png":
            raise EzpzError(f"--plot {self.plot}: name a file that ends in .png.")

    def _plan(self) -> Plan:
        from ezpz_moe.tools.bench.routings import check_routing
        from ezpz_moe.tools.bench.shapes import parse_shape

        for routing in self.routing:
            check_routing(routing)
        device = self._device()
        on_cpu = device == "cpu"
        scale = self.scale or (_SCALE_ON_CPU if on_cpu else 1)
        shapes = tuple(parse_shape(each, scale=scale, tokens=self.tokens) for each in self.shape)
        if self.allocator != "default" and not on_cpu:
            raise EzpzError(
                f"--allocator {self.allocator}: only applies to the C library's memory on the CPU, "
                f"but --device is {device}. Leave it out."
            )
        from ezpz_moe.tools.bench.plan import Plan

        return Plan(
            shapes=tuple(dict.fromkeys(shapes)),
            routings=tuple(dict.fromkeys(self.routing)),
            dtypes=tuple(dict.fromkeys(self.dtype)),
            device=device,
            backends=tuple(dict.fromkeys(self.backends)),
            against=tuple(dict.fromkeys(self.against)),
            repeats=self.repeats or (_REPEATS_ON_CPU if on_cpu else _REPEATS),
        )

    def _device(self) -> str:
        """Return the device, after checking that it exists here.

        Raises:
            EzpzError: it does not.
        """
        import torch

        from ezpz_moe.compute.contract import missing_device
        from ezpz_moe.tools.verify import default_device

        name = self.device or default_device()
        try:
            device = torch.device(name)
        except RuntimeError as error:
            raise EzpzError(f"--device {name!r}: {str(error).splitlines()[0]}") from error
        if device.type == "meta":
            raise EzpzError("--device meta: the meta device computes nothing. Use cpu.")
        if missing := missing_device(device):
            raise EzpzError(f"--device {name}: {missing}")
        return name

    def _write(
        self, results: list[Measured], about: Mapping[str, Any], verdicts: list[str]
    ) -> None:
        if self.json:
            from ezpz_moe.tools.bench.report import document

            command = shlex.join(["ezpz-moe", *sys.argv[1:]])
            self.json.write_text(document(results, about, command, verdicts))
            display.print_line(f"Written: {self.json}")
        if self.plot:
            from ezpz_moe.tools.bench.plots import draw

            for file in draw(results, self.plot):
                display.print_line(f"Drawn: {file}")


COMMAND = Bench


def _facts(about: Mapping[str, Any]) -> list[dict[str, str]]:
    def in_words(value: Any) -> str:
        if isinstance(value, Mapping):
            return ", ".join(f"{key} {each}" for key, each in value.items()) or "none"
        return str(value)

    return [
        {"measured": key.replace("_", " "), "with": in_words(value)} for key, value in about.items()
    ]


def _print(measured: Measured, told: set[str]) -> list[str]:
    """Print one layer's table, and why contenders are left out unless ``told`` has it already.

    Returns the verdicts on the goals.
    """
    from ezpz_moe.tools.bench.goals import judged
    from ezpz_moe.tools.bench.report import left_out, remarks, rows, title

    display.print_line("")
    display.print_table(rows(measured), title=title(measured))
    new = [line for line in left_out(measured) if line not in told]
    told.update(new)
    for line in (*new, *remarks(measured)):
        display.print_line(line)
    what = f"{measured.shape.name} {measured.routing} {measured.dtype} {measured.allocator}"
    verdicts = [f"{what}: {verdict}" for verdict in judged(measured)]
    for line in verdicts:
        display.print_line(line)
    return verdicts
