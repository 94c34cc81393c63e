"""``ezpz-moe``: arguments in, calls out. Commands gather plain rows; ``display`` formats them.

Nothing heavy is imported before a command runs, so that help and argument mistakes are quick.
Results go to stdout, progress and errors to stderr. Exit codes: 0; 1 when a check fails or a
training run breaks; 2 for a mistake of the user's; 128 + n when signal n ended it.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from tyro.conf import (
    CascadeSubcommandArgs,
    FlagCreatePairsOff,
    OmitArgPrefixes,
    Positional,
    Suppress,
    arg,
    subcommand,
)

from ezpz_moe import __version__, display
from ezpz_moe.errors import DEBUG_VARIABLE, exit_on_user_error

if TYPE_CHECKING:
    from ezpz_moe.verify import Row

DType = Literal["bfloat16", "float32", "float16", "float64"]
Device = Annotated[str | None, arg(metavar="DEVICE")]
Config = Annotated[Positional[str], arg(metavar="FLAVOR|JOB.toml")]


@dataclass(frozen=True)
class Flavors:
    """List the model flavors, smallest first: parameters, experts, backend."""

    def run(self) -> int:
        from ezpz_moe.flavors import flavor_names, load_flavor

        flavors = [load_flavor(name) for name in flavor_names()]
        with display.progress().status("Building the models on the meta device to count ..."):
            binding = _import_host()
            summarize = binding("parameters").summarize
            counted = [(summarize(flavor), flavor) for flavor in flavors]
            rows = [
                {
                    "flavor": flavor.name,
                    "total": display.count(model.total),
                    "active": display.count(model.active),
                    "experts": model.num_experts,
                    "top-k": model.top_k,
                    "expert dim": model.expert_hidden_dim,
                    "layers": model.n_layers,
                    "dim": model.dim,
                    "attention": flavor.attention or "the host's",
                    "backend": flavor.compute_backend,
                }
                for model, flavor in sorted(counted, key=lambda pair: pair[0].total)
            ]
        display.print_table(rows)
        return 0


@dataclass(frozen=True)
class Show:
    """Show the resolved config of a flavor or job: the model, and what the trainer is told.

    Names of the trainer's settings are also its flags: --training.steps 100.
    """

    config: Config
    """A flavor's name, or the path of a job's TOML."""
    all: bool = False
    """Also show the settings that are torchtitan's own defaults."""

    def run(self) -> int:
        from ezpz_moe.flavors import load_flavor
        from ezpz_moe.job import find_job

        job = find_job(self.config)
        flavor = load_flavor(job.flavor, near=job.folder)
        with display.progress().status("Building the config ..."):
            binding = _import_host()
            settings = binding("settings")
            fields = flavor.model_dump(exclude_none=True)
            fields["counted"] = asdict(binding("parameters").summarize(flavor))
            config = binding("job").trainer_config(job)
            told = [s for s in settings.settings(config) if self.all or s.changed]
        rows = [{"flavor": path, "value": value} for path, value in settings.flat(fields)]
        display.print_table(rows, title=job.source)
        display.print_table(map(asdict, told), title="torchtitan's config")
        return 0


@dataclass(frozen=True)
class Backends:
    """List the expert backends: usable here, or every reason why not."""

    device: Device = None
    """Such as cpu, cuda or xpu. Default: the accelerator that torch finds, else the CPU."""
    dtype: DType = "bfloat16"
    """What the kernels compute in."""

    def run(self) -> int:
        with display.progress().status("Asking torch ..."):
            from ezpz_moe.verify import default_device, properties, reasons_against

            device = self.device or default_device()
            reasons = reasons_against(device, self.dtype)
            rows = [
                {"backend": name, "usable": not against, **properties(name)}
                for name, against in reasons.items()
            ]
        title = f"Expert backends on {device} in {self.dtype}"
        display.print_table(rows, title=title)
        display.print_reasons(reasons)
        return 0


@dataclass(frozen=True)
class Verify:
    """Compare every usable backend with float64: output and all four gradients."""

    device: Device = None
    """Such as cpu, cuda or xpu. Default: the accelerator that torch finds, else the CPU."""
    dtype: tuple[DType, ...] = ("bfloat16", "float32")
    """What the kernels compute in; one or more."""
    json: bool = False
    """Print every compared tensor, as JSON."""

    def run(self) -> int:
        with display.progress().status("Asking torch ..."):
            from ezpz_moe.verify import compare, default_device, plan, reasons_against, worst

            device = self.device or default_device()
            checks = plan(device, self.dtype)
        compared = [compare(check) for check in display.tracked(checks, "Verifying")]
        rows = [row for rows in compared for row in rows]
        passed = all(row.ok for row in rows)
        reasons = {dtype: reasons_against(device, dtype) for dtype in self.dtype}
        if self.json:
            report = {"passed": passed, "not_usable": reasons, "rows": list(map(asdict, rows))}
            display.output().print_json(data=report, allow_nan=False)
        else:
            display.print_table(
                (_figures(worst(rows)) for rows in compared),
                title=f"Errors against float64 on {device}: the worst tensor of each case",
            )
            for against in reasons.values():
                display.print_reasons(against)
            display.print_failures([row for row in rows if not row.ok])
        return 0 if passed else 1


@dataclass(frozen=True)
class Doctor:
    """Check what is installed, what the binding relies on in it, and a job if one is given.

    Exit code 1 when something is broken.
    """

    config: Annotated[Positional[str | None], arg(metavar="FLAVOR|JOB.toml")] = None
    """A flavor's name, or the path of a job's TOML."""
    world_size: int | None = None
    """Ranks of the job; without it, what depends on them is left out."""

    def run(self) -> int:
        with display.progress().status("Looking at torch and the host ..."):
            from ezpz_moe import doctor

            facts = doctor.facts()
            findings = doctor.host_findings()
            if self.config is not None and all(finding.holds for finding in findings):
                findings += doctor.job_findings(self.config, self.world_size)
        display.print_table(({"installed": what, "": said} for what, said in facts.items()))
        display.print_findings(findings)
        return 0 if all(finding.holds for finding in findings) else 1


@dataclass(frozen=True)
class Preflight:
    """Build the ranks of a big run on this machine, without accelerators: what each would hold.

    One rank for each pipeline stage: the first, whose shards are the largest. All other flags go
    to the trainer as they are. Exit code 1 when a rank meets an error.
    """

    config: Config
    """A flavor's name, or the path of a job's TOML. It comes first."""
    world_size: int
    """Ranks of the run."""
    host_flags: Suppress[tuple[str, ...]] = ()

    def run(self) -> int:
        from ezpz_moe.job import find_job
        from ezpz_moe.launch import pipeline_degree
        from ezpz_moe.preflight import preflight

        flags = list(self.host_flags)
        stages = pipeline_degree(find_job(self.config), flags)
        built = preflight(self.config, flags, world_size=self.world_size, stages=stages)
        reports = list(display.tracked(built, "Building ranks", total=stages))
        display.print_table(
            (
                {
                    "stage": stage,
                    "rank": report.rank,
                    "parameters": display.count(report.parameters),
                    "model states": display.gibibytes(report.state_bytes),
                    "step": report.step,
                }
                for stage, report in enumerate(reports)
            ),
            title=f"{self.config} on {self.world_size} ranks",
        )
        errors: dict[str, list[int]] = {}
        for report in reports:
            if report.error:
                errors.setdefault(report.error, []).append(report.rank)
        for error, ranks in errors.items():
            display.print_line(f"rank {', '.join(map(str, ranks))}: {error}")
        return 1 if errors else 0


@dataclass(frozen=True)
class Inspect:
    """Tell what a checkpoint holds and which generation of torchtitan wrote it."""

    folder: Annotated[Positional[Path], arg(metavar="DIR")]
    """A checkpoint's folder, such as outputs/checkpoint/step-100."""

    def run(self) -> int:
        with display.progress().status("Reading ..."):
            from ezpz_moe.checkpoints import inspect

            contents = inspect(self.folder)
        shown = {
            **asdict(contents),
            "parameters": display.count(contents.parameters),
            "dtypes": ", ".join(contents.dtypes),
            "bytes": display.gibibytes(contents.bytes),
        }
        display.print_line(str(self.folder))
        display.print_table({"checkpoint": what, "": value} for what, value in shown.items())
        return 0


@dataclass(frozen=True)
class Remap:
    """Write a checkpoint under the names of another generation of torchtitan, bit for bit."""

    source: Annotated[Positional[Path], arg(metavar="SRC")]
    """A checkpoint's folder."""
    target: Annotated[Positional[Path], arg(metavar="DST")]
    """The folder to write; it must not exist."""
    to: Literal["0.2", "0.3"]
    """The generation whose names it gets; 0.3 stands for all from 0.3 on."""

    def run(self) -> int:
        from ezpz_moe.checkpoints import remap

        copied = partial(display.tracked, what="Copying")
        changed = remap(self.source, self.target, self.to, progress=copied)
        display.print_line(f"{self.target}: {changed} names changed, every data file compared")
        return 0


@dataclass(frozen=True)
class Checkpoint:
    """Look at a checkpoint, or carry it to another generation of torchtitan."""

    action: Annotated[Inspect, subcommand("inspect")] | Annotated[Remap, subcommand("remap")]

    def run(self) -> int:
        return self.action.run()


@dataclass(frozen=True)
class Train:
    """Train a flavor or job with torchtitan. All other flags go to the trainer as they are."""

    config: Config
    """A flavor's name, or the path of a job's TOML. It comes first."""
    nproc: int = 1
    """Processes on this machine, one per accelerator."""
    host_flags: Suppress[tuple[str, ...]] = ()

    def run(self) -> int:
        from ezpz_moe.launch import train

        return train(self.config, list(self.host_flags), nproc=self.nproc)


@dataclass(frozen=True)
class Arguments:
    """Selectable expert backends for Mixture-of-Experts training with torchtitan.

    ezpz-moe --version prints the version.
    """

    command: (
        Annotated[Flavors, subcommand("flavors")]
        | Annotated[Show, subcommand("show")]
        | Annotated[Backends, subcommand("backends")]
        | Annotated[Verify, subcommand("verify")]
        | Annotated[Doctor, subcommand("doctor")]
        | Annotated[Preflight, subcommand("preflight")]
        | Annotated[Checkpoint, subcommand("ckpt")]
        | Annotated[Train, subcommand("train")]
    )
    debug: bool = False
    """Show tracebacks."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; argument mistakes exit with 2 at once."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if list(arguments) == ["--version"]:
        print(f"ezpz-moe {__version__}")
        return 0
    parsed = _parse(arguments)
    if parsed.debug:
        os.environ[DEBUG_VARIABLE] = "1"
    try:
        with exit_on_user_error():
            return parsed.command.run()
    except KeyboardInterrupt:
        print("ezpz-moe: stopped by SIGINT", file=sys.stderr, flush=True)
        return 128 + signal.SIGINT


def _parse(arguments: Sequence[str]) -> Arguments:
    """``train`` and ``preflight`` hand the trainer what they do not know; elsewhere it is wrong."""
    words = [argument for argument in arguments if not argument.startswith("-")]
    has_host_flags = words[:1] in (["train"], ["preflight"])
    parse = partial(
        tyro.cli,
        Arguments,
        prog="ezpz-moe",
        args=arguments,
        config=(CascadeSubcommandArgs, FlagCreatePairsOff, OmitArgPrefixes),
    )
    if not has_host_flags:
        return parse()
    parsed, host_flags = parse(return_unknown_args=True)
    return replace(parsed, command=replace(parsed.command, host_flags=tuple(host_flags)))


def _figures(row: Row) -> dict[str, str]:
    """A row of the table of ``verify``."""
    figures = {"max abs": row.max_abs_error, "relative": row.relative_error, "bound": row.bound}
    return {
        "dtype": row.dtype,
        "backend": row.backend,
        "routing": row.routing,
        "tensor": row.tensor,
        **{name: display.number(value, ".3g") for name, value in figures.items()},
        "cosine": display.number(row.cosine, ".6f"),
        "verdict": row.verdict,
    }


def _import_host() -> Callable[[str], ModuleType]:
    """The host's binding, to look at configs. What the host remarks on them is for training."""
    from ezpz_moe.hosts import binding, check_host

    check_host()
    logging.getLogger().setLevel(logging.ERROR)  # the host logs on the root logger
    return binding


if __name__ == "__main__":
    sys.exit(main())
