"""``ezpz-moe bench``."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain, product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import arg

from ezpz_moe.cli import display
from ezpz_moe.cli.arguments import Device, DType, print_emulated, refuse_unknown_device
from ezpz_moe.cli.command import Reporting
from ezpz_moe.config.flavor_schema import Activation
from ezpz_moe.errors import EzpzError

if TYPE_CHECKING:
    from ezpz_moe.tools.bench.plan import Allocator, Plan
    from ezpz_moe.tools.bench.results import Figures, Measured

# Full sizes would keep a CPU busy for long; with these a comparison takes minutes.
_SCALE_ON_CPU, _REPEATS_ON_CPU, _REPEATS = 4, 5, 30


@dataclass(frozen=True)
class Bench(Reporting):
    """Measure the time and memory of one expert layer: all backends, the host's layer, the limit.

    With --layer routed it is the whole routed layer, with dispatch and combination of tokens.
    Times the forward pass alone and with the backward pass; contenders take turns.
    docs/guides/benchmark.md explains each column.
    """

    group = "backends"

    layer: Literal["experts", "routed"] = "experts"
    """Measure the experts' FFN over sorted rows, or the routed layer: every backend's own, and its
    FFN composed with torchtitan's dispatch and combination."""
    shape: Annotated[tuple[str, ...], arg(metavar="MODEL|E,D,F,R ...")] = ("olmoe",)
    """Measure olmoe, qwen3_30b, deepseek_v2_lite, mixtral, 10b_2b, 7b, deepseek_v3, or these four
    sizes: experts, model dimension, expert dimension and routed rows; for a routed layer a fifth,
    the experts of a token."""
    scale: Annotated[int | None, arg(metavar="INT")] = None
    """Divide a model's D, F and tokens by this. Default: 4 on the CPU, else 1."""
    tokens: int = 4096
    """Give a model this many tokens, before the scale; each goes to the model's top-k experts."""
    routing: Annotated[tuple[str, ...], arg(metavar="NAME ...")] = ("balanced", "zipf1")
    """Route as balanced, zipf0.5, zipf1 (any exponent), empty25 (25 % of experts idle) or
    one_hot."""
    dtype: tuple[DType, ...] = ("bfloat16",)
    """Compute in these dtypes."""
    activation: tuple[Activation, ...] = ("swiglu",)
    """Put these in the experts' FFN. Other projects' layers, torchtitan's too, are SwiGLU."""
    bias: bool = False
    """Give the experts' products biases."""
    backends: Annotated[tuple[str, ...], arg(metavar="SPEC ...")] = ()
    """Time these, such as for_loop 'for_loop(recompute=true)'. Default: all that run here."""
    against: Annotated[tuple[str, ...], arg(metavar="NAME ...")] = ()
    """Compare with stock, stock_products, indexed, dense, transformers_eager,
    transformers_batched_mm, transformers_grouped_mm, scattermoe, megablocks, sonicmoe or
    single_buffer; a routed layer with stock, stock_copy or transformers'. Default: all that run
    here, except single_buffer."""
    repeats: Annotated[int | None, arg(metavar="INT")] = None
    """Take this many turns. Default: 5 on the CPU, else 30."""
    device: Device = None
    """Run on this device, such as cpu, cuda or xpu. Default: torch's accelerator, else the CPU."""
    allocator: Literal["default", "retain", "both"] = "default"
    """On the CPU, allocate as the environment says, or retain all memory that was ever obtained."""
    out: Annotated[Path | None, arg(metavar="FILE")] = None
    """Also write the JSON to this file: every turn, and all that the figures depend on."""
    plot: Annotated[Path | None, arg(metavar="FILE.png")] = None
    """Draw bars per shape, and time and memory over skew, to this file."""

    def run(self) -> int:
        # Before torch is imported: a mistake in a flag is reported at once.
        self._check()
        with display.status("Asking torch and torchtitan"):
            plan = self._plan()
            from ezpz_moe.tools.bench.plan import check, environment, run

            # Before anything is measured: a contender that is named but cannot run is refused at
            # once.
            check(plan)
            about = environment(plan.device)
        display.print_table(_facts(about))
        print_emulated(plan.device, plan.dtypes)
        both: tuple[Allocator, ...] = ("default", "retain")
        allocators = both if self.allocator == "both" else (self.allocator,)
        results: list[Measured] = []
        # Every layer leaves out the same contenders, mostly: each reason is printed once.
        told: set[str] = set()
        for measured in chain.from_iterable(
            run(replace(plan, allocator=allocator), display.steps) for allocator in allocators
        ):
            results.append(measured)
            _print(measured, told)
        self._write(results, about)
        return int(any(each.failed for each in results))

    def _check(self) -> None:
        from ezpz_moe.compute.names import name_and_options

        for spec in self.backends:
            name_and_options(spec)  # refuses a name that is not known
        for flag, number in (
            ("--scale", self.scale),
            ("--tokens", self.tokens),
            ("--repeats", self.repeats),
        ):
            if number is not None and number < 1:
                raise EzpzError(f"{flag} {number}: must be at least 1.")
        # tyro takes a flag without values, such as a bare --shape, as an empty tuple.
        for flag, names in (
            ("--shape", self.shape),
            ("--routing", self.routing),
            ("--dtype", self.dtype),
            ("--activation", self.activation),
        ):
            if not names:
                raise EzpzError(f"{flag}: name at least one.")
        for flag, file in (("--out", self.out), ("--plot", self.plot)):
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
        shapes = [
            parse_shape(each, scale=scale, tokens=self.tokens).of_ffn(activation, biased=self.bias)
            for each, activation in product(self.shape, self.activation)
        ]
        if self.allocator != "default" and not on_cpu:
            raise EzpzError(
                f"--allocator {self.allocator}: only applies to the C library's memory on the CPU, "
                f"but --device is {device}. Leave it out."
            )
        from ezpz_moe.tools.bench.plan import Plan

        return Plan(
            # What is named twice is measured once, in the order of the first.
            shapes=tuple(dict.fromkeys(shapes)),
            routings=tuple(dict.fromkeys(self.routing)),
            dtypes=tuple(dict.fromkeys(self.dtype)),
            device=device,
            backends=tuple(dict.fromkeys(self.backends)),
            against=tuple(dict.fromkeys(self.against)),
            repeats=self.repeats or (_REPEATS_ON_CPU if on_cpu else _REPEATS),
            layer=self.layer,
        )

    def _device(self) -> str:
        """Return the device, after checking that it exists here.

        Raises:
            EzpzError: it does not.
        """
        refuse_unknown_device(self.device)
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

    def _write(self, results: list[Measured], about: Mapping[str, Any]) -> None:
        # Before the picture: that can be drawn again, and measuring takes minutes.
        # Not argv[0], which is a path of this machine.
        command = shlex.join(["ezpz-moe", *sys.argv[1:]])
        from ezpz_moe.tools.bench.results import document

        made = document(results, about, command)
        display.print_json(made)
        if self.out:
            self.out.write_text(display.json_text(made) + "\n")
            display.print_line(f"Written: {self.out}")
        if self.plot:
            from ezpz_moe.tools.bench.plots import draw

            # With several dtypes or allocators it draws a file for each.
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


def _print(measured: Measured, told: set[str]) -> None:
    """Print one layer's table, and why contenders are left out unless ``told`` has it already."""
    display.print_line("")
    display.print_table(
        rows(measured),
        title=title(measured),
        important=["fwd+bwd ms", "forward ms", "saved", f"speed / {measured.stock or 'stock'}"],
    )
    new = [line for line in left_out(measured) if line not in told]
    told.update(new)
    for line in (*new, *remarks(measured)):
        display.print_line(line)


def title(measured: Measured) -> str:
    """Return the table's title."""
    E, D, F, R = measured.shape.sizes
    sizes = f"E={E} D={D} F={F} R={R}"
    if measured.layer == "routed":
        sizes = f"routed layer, E={E} K={measured.shape.K} D={D} F={F} T={measured.shape.T}"
    variables = " ".join(f"{key}={value}" for key, value in measured.allocator_variables.items())
    return (
        f"{measured.shape.name} ({sizes}), {measured.routing}: "
        f"{min(measured.counts)} to {max(measured.counts)} rows per expert, the busiest with "
        f"{measured.skew:.3g}x the mean; {measured.dtype}, allocator {measured.allocator}"
        + (f" ({variables})" if variables else "")
    )


def rows(measured: Measured) -> Iterator[Mapping[str, str]]:
    """Yield one row per contender, the fastest first."""
    from ezpz_moe.tools.bench.results import DENSE

    stock = measured.stock
    saved = _in_one_unit({name: each.saved_bytes for name, each in measured.figures.items()})
    peak = _in_one_unit({name: each.peak_bytes for name, each in measured.figures.items()})
    # The median, because a few turns on a busy machine are much slower than the rest.
    by_time = sorted(measured.figures, key=lambda name: measured.figures[name].median())
    for name in by_time:
        figures = measured.figures[name]
        routed = measured.layer == "routed"
        yield {
            "contender": name,
            "forward ms": f"{figures.median('forward'):.4g}",
            **({"backward ms": f"{figures.median('backward'):.4g}"} if routed else {}),
            "fwd+bwd ms": f"{figures.median():.4g}",
            # From here to the ratios, of forward and backward together.
            "quartiles": "{:.4g}-{:.4g}".format(*figures.quartiles()),
            "TFLOP/s": f"{measured.tflops(name):.3g}",
            # Speed is the inverse of time, so stock's time is on top here, and the contender's
            # below.
            f"speed / {stock or 'stock'}": _ratio(measured.time_ratio(stock, name)),
            # No dense layer has tokens to dispatch.
            **({} if routed else {"time / dense": _ratio(measured.time_ratio(name, DENSE))}),
            "saved": saved[name],
            **({"saved / stock": _ratio(measured.saved_ratio(name))} if routed else {}),
            "peak": peak[name],
            "syncs": _syncs(figures),
        }


def left_out(measured: Measured) -> Iterator[str]:
    """Yield the contenders that were not measured, and why."""
    by_reasons: dict[str, list[str]] = {}
    for name, reasons in measured.left_out.items():
        by_reasons.setdefault("; ".join(reasons), []).append(name)
    for why, names in by_reasons.items():
        yield f"left out: {', '.join(names)}: {why}"


def remarks(measured: Measured) -> Iterator[str]:
    """Yield the contenders that broke, and what the table does not show."""
    for name, reason in measured.failed.items():
        yield f"FAILED: {name}: {reason}"
    for name, figures in measured.figures.items():
        if figures.dropped:
            yield f"{name}: drops {figures.dropped:.1%} of the rows and does not compute them"


def _in_one_unit(column: Mapping[str, int | None]) -> dict[str, str]:
    """Return bytes in the unit of the largest of a column."""
    largest = max((each for each in column.values() if each is not None), default=0)
    return {
        name: "-" if each is None else display.memory_beside(each, largest)
        for name, each in column.items()
    }


def _ratio(value: float | None) -> str:
    return display.number(value, ".2f")


def _syncs(figures: Figures) -> str:
    """Return the counted waits, or else what the contender declares."""
    if figures.syncs is not None:
        return str(figures.syncs)
    if figures.declares_syncs is None:
        return "-"
    return "yes (declared)" if figures.declares_syncs else "no (declared)"
