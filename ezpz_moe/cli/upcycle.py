"""``ezpz-moe upcycle``."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import Positional, arg

from ezpz_moe.cli import display
from ezpz_moe.cli.arguments import import_host
from ezpz_moe.cli.command import Command
from ezpz_moe.errors import EzpzError
from ezpz_moe.hosts.dcp.paths import find_checkpoint, is_safetensors

if TYPE_CHECKING:
    from ezpz_moe.hosts.upcycling_target import Target
    from ezpz_moe.tools.upcycling import Upcycled
    from ezpz_moe.tools.upcycling.dense import Dense


@dataclass(frozen=True)
class Upcycle(Command):
    """Turn a dense model into a mixture of experts, each of which starts as a copy of its FFN.

    Splits a dense FFN that is G times as wide as an expert into G parts. Writes a checkpoint of the
    model alone; --checkpoint.initial_load_path starts a run from it.
    With --merge: takes several dense models, and each of them gives experts.
    """

    group = "weights"

    # The words in their order, because tyro gives a list of any length all that stand together: the
    # first three are DENSE, FLAVOR and OUT only where one model is named.
    first: Annotated[Positional[str], arg(metavar="DENSE...")]
    """The dense model: the folder of a checkpoint, of a run, or of Hugging Face safetensors."""
    second: Annotated[Positional[str], arg(metavar="FLAVOR|JOB.toml")]
    """The mixture of experts to build."""
    third: Annotated[Positional[str], arg(metavar="OUT")]
    """The folder to write; it must not exist."""
    more: Annotated[Positional[tuple[str, ...]], arg(metavar="", help_behavior_hint="")] = ()
    """Several dense models, for --merge, stand before the other two."""
    merge: Annotated[Literal["mean"] | None, arg(metavar="{mean}")] = None
    """Take experts from several dense models in turn, and the mean of all their other weights."""
    noise: Annotated[float, arg(metavar="STD")] = 0.0
    """Add Gaussian noise to every copy, in units of the weight's own standard deviation."""
    reinit: Annotated[float, arg(metavar="FRACTION")] = 0.0
    """Redraw this share of each expert's hidden channels (Drop-Upcycling)."""
    router_std: Annotated[float, arg(metavar="STD")] = 0.02
    """Draw the router's weights with this standard deviation."""
    seed: int = 0
    """Seed all random draws."""

    @property
    def words(self) -> tuple[str, ...]:
        """All words: the dense models, the flavor, and the folder to write."""
        return (self.first, self.second, self.third, *self.more)

    def run(self) -> int:
        # Before torch is imported: a wrong word or number is reported at once.
        self._check()
        from ezpz_moe.config.flavors import load_flavor
        from ezpz_moe.hosts.jobs import find_job

        *sources, model, out = self.words
        job = find_job(model)
        flavor = load_flavor(job.flavor, near=job.folder)
        folders = [Path(each) for each in sources]
        for folder in folders:
            if not is_safetensors(folder):
                find_checkpoint(folder)
        with display.status("Reading the models"):
            host = import_host()
            from ezpz_moe.tools.upcycling import Perturbation, upcycle

            target = host.upcycling_target(flavor)
            models = [_dense(folder, target) for folder in folders]
        done = upcycle(
            models,
            target,
            Path(out),
            Perturbation(self.noise, self.reinit, self.router_std, self.seed),
            progress=partial(display.tracked, what="Writing and comparing"),
        )
        _report(done, Path(out), str(job.path or "JOB.toml"))
        return 0

    def _check(self) -> None:
        self._check_words()
        for flag, value in {"--noise": self.noise, "--router-std": self.router_std}.items():
            if not 0 <= value < float("inf"):
                raise EzpzError(f"{flag} {value}: a standard deviation must be a number >= 0.")
        if not 0 <= self.reinit <= 1:
            raise EzpzError(f"--reinit {self.reinit}: a share must be between 0 and 1.")

    def _check_words(self) -> None:
        *models, flavor, out = self.words
        if models[1:] and self.merge is None:
            raise EzpzError(
                f"upcycle: {', '.join(models)} would be {len(models)} dense models, {flavor} the "
                f"flavor, and {out} be written. To take experts from each model and the mean of "
                f"all else, write ezpz-moe upcycle {shlex.join(self.words)} --merge mean."
            )
        if self.merge and not models[1:]:
            # Not the mean of one: perhaps the flavor was left out, or a pattern met one folder.
            raise EzpzError(
                f"upcycle: --merge {self.merge}: {models[0]} would be the only dense model, "
                f"{flavor} the flavor, and {out} be written. Name several models, or leave out "
                "--merge."
            )


COMMAND = Upcycle


def _dense(folder: Path, target: Target) -> Dense:
    from ezpz_moe.tools.upcycling.dense import DenseCheckpoint, DenseSafetensors

    # What the folder holds decides, not what it is called.
    if not is_safetensors(folder):
        return DenseCheckpoint(folder, target)
    host, flavor = import_host(), target.flavor
    architecture = host.architecture(flavor)
    assert architecture is not None  # of a host that can build the target
    return DenseSafetensors(folder, target, host.adapter(flavor), architecture)


def _report(done: Upcycled, out: Path, job: str) -> None:
    from ezpz_moe.config.layer_sizes import in_words
    from ezpz_moe.tools.upcycling.several import listed

    layers = f"{done.layers} layer{'s' if done.layers > 1 else ''}"
    experts = f"{in_words(done.num_experts)} experts"
    split = "" if done.parts == 1 else f" in {in_words(done.parts)} parts each"
    copies = f"copies of the dense {'FFN' if done.is_one else 'FFNs'}{split}"
    if isinstance(done.num_experts, int) and isinstance(done.parts, int):
        copies = f"{done.num_experts // done.parts} {copies}"
    display.print_line(
        f"{out}: made from {listed(done.sources)}, {layers} with {experts}, {copies}; "
        f"{done.tensors} tensors written and compared"
    )
    if done.is_one:
        is_same = "computes" if done.is_preserved else "does not compute exactly"
        display.print_line(f"At step 0 the model {is_same} what the dense model does.")
    else:
        display.print_line(
            "At step 0 the model computes what none of the dense models does: a router that has "
            "learnt nothing mixes their FFNs, and the rest is their mean. Train it."
        )
    for note in done.notes:
        display.print_line(note)
    # The host refuses a relative path in its flag.
    display.print_whole(
        f"Train it: ezpz-moe train {shlex.quote(job)} --checkpoint.enable "
        f"--checkpoint.initial_load_path {shlex.quote(str(out.absolute()))}"
    )
