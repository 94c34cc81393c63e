"""``ezpz-moe ckpt``."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import Positional, arg, subcommand

from ezpz_moe.cli import display
from ezpz_moe.cli.arguments import import_host
from ezpz_moe.cli.command import Command, Reporting
from ezpz_moe.cli.pruned import Prune
from ezpz_moe.errors import EzpzError
from ezpz_moe.hosts.dcp.paths import is_safetensors, refuse_other_folders

if TYPE_CHECKING:
    from ezpz_moe.config.job import Job
    from ezpz_moe.tools.checkpoints.huggingface.model import Model


@dataclass(frozen=True)
class Inspect(Reporting):
    """Show what a checkpoint holds and which generation of torchtitan wrote it."""

    folder: Annotated[Positional[Path], arg(metavar="DIR")]
    """A checkpoint's folder, such as outputs/checkpoint/step-100."""

    def run(self) -> int:
        with display.status("Reading"):
            from ezpz_moe.tools.checkpoints.contents import inspect
            from ezpz_moe.tools.checkpoints.expert_order import FILE

            contents = inspect(self.folder)
        display.print_json({"folder": self.folder, **asdict(contents)})
        shown = {
            **asdict(contents),
            "parameters": display.count(contents.parameters),
            "dtypes": ", ".join(contents.dtypes),
            "reordered": f"the experts of {len(contents.reordered)} layer"
            f"{'s' * (len(contents.reordered) != 1)} ({FILE})",
            "bytes": display.gibibytes(contents.bytes),
        }
        if not contents.reordered:
            del shown["reordered"]
        display.print_line(str(self.folder))
        display.print_table({"checkpoint": what, "": value} for what, value in shown.items())
        return 0


@dataclass(frozen=True)
class Remap:
    """Copy a checkpoint to the names of another generation of torchtitan, bit for bit.

    With --to hf, write the model alone as a folder that transformers opens. From such a folder,
    write a checkpoint of the installed torchtitan.
    """

    source: Annotated[Positional[Path], arg(metavar="SRC")]
    """The checkpoint's folder, or a folder with safetensors."""
    target: Annotated[Positional[Path], arg(metavar="DST")]
    """The folder to write; it must not exist."""
    to: Literal["0.2", "0.3", "2026_09", "main", "hf"]
    """Write these names: 0.3 until August 2026, 2026_09 (once called main) since then, hf for
    safetensors."""
    model: Annotated[str | None, arg(metavar="FLAVOR|JOB.toml")] = None
    """Name the model; needed to convert to or from safetensors. A job also names the tokenizer."""
    drop_bias: bool = False
    """With --to hf, leave out selection biases that the class of transformers has no place for.
    Runs the model on sample text first, and says how many choices of experts change."""

    def run(self) -> int:
        if self.to == "hf" or is_safetensors(self.source):
            return self._through_the_host()
        if self.drop_bias:
            raise EzpzError("--drop-bias: only --to hf leaves out biases. Remove it.")
        refuse_other_folders(self.source)
        from ezpz_moe.tools.checkpoints.remapping import remap

        copied = partial(display.tracked, what="Writing and comparing")
        done = remap(self.source, self.target, self.to, progress=copied)
        display.print_line(
            f"{self.target}: {done.changed} names changed, all {done.entries} entries compared"
        )
        for note in done.notes:
            display.print_line(note)
        return 0

    def _through_the_host(self) -> int:
        if not is_safetensors(self.source):
            refuse_other_folders(self.source)
        model = _model(self.model)
        from ezpz_moe.tools.checkpoints.huggingface import convert

        if self.drop_bias and model.form is None:
            raise EzpzError("--drop-bias: needs torchtitan 0.3 or later, which runs the model.")
        if self.drop_bias and (self.to != "hf" or not model.loses_biases):
            raise EzpzError(
                "--drop-bias: this conversion leaves out no selection bias, because both sides "
                "have a place for it or the source has none. Remove it."
            )
        measure = partial(self._measure, model) if self.drop_bias else None
        with display.status("Writing and comparing"):
            done = convert(self.source, self.target, self.to, model, measure)
        display.print_line(
            f"{self.target}: {done.tensors} tensors of the model written and compared; no "
            "optimizer, no step, no position in the data"
        )
        if done.left_out:
            names = ", ".join(done.left_out)
            display.print_line(f"Left out, because the other format has no place for it: {names}")
        for note in done.notes:
            display.print_line(note)
        return 0

    def _measure(self, model: Model) -> str:
        from ezpz_moe.config.assets import EMBEDDED_TOKENIZER
        from ezpz_moe.tools.analysis.dropped_bias import changed_choices

        found = changed_choices(self.source, model.flavor, model.tokenizer or EMBEDDED_TOKENIZER)
        return (
            "the experts' selection biases. On sample text"
            f"{'' if model.tokenizer else ' in the tokens of the embedded tokenizer'}, this "
            f"changes {found.changed:,} of {found.choices:,} choices "
            f"({found.changed / found.choices:.1%}), and the loss from {found.loss:.4f} to "
            f"{found.loss_without:.4f}"
        )


def _model(config: str | None) -> Model:
    """Ask the installed host about the model of a flavor or job."""
    if config is None:
        raise EzpzError("Safetensors need the model: add --model FLAVOR|JOB.toml.")
    from ezpz_moe.config.flavors import load_flavor
    from ezpz_moe.hosts.jobs import find_job

    job = find_job(config)
    flavor = load_flavor(job.flavor, near=job.folder)
    # Only now, for it imports torch.
    from ezpz_moe.tools.checkpoints.huggingface.model import model_of

    return model_of(import_host(), flavor, _tokenizer(job))


def _tokenizer(job: Job) -> Path | None:
    """Return the folder of the job's tokenizer; None for a flavor, which does not name any."""
    from ezpz_moe.config.assets import EMBEDDED_TOKENIZER

    if job.path is None:
        return None
    assets = job.values.get("model.hf_assets_path")
    return Path(job.resolve(assets)) if assets else EMBEDDED_TOKENIZER


@dataclass(frozen=True)
class Ckpt(Command):
    """Inspect a checkpoint, convert it for another torchtitan, or take experts away."""

    group = "weights"

    action: (
        Annotated[Inspect, subcommand("inspect")]
        | Annotated[Remap, subcommand("remap")]
        | Annotated[Prune, subcommand("prune")]
    )

    @property
    def prints_json(self) -> bool:
        return isinstance(self.action, Reporting) and self.action.json

    def run(self) -> int:
        return self.action.run()


COMMAND = Ckpt
