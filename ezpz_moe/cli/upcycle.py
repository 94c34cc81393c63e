"""``ezpz-moe upcycle``."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import Positional, arg

from ezpz_moe.cli import display
from ezpz_moe.cli.arguments import import_host
from ezpz_moe.cli.command import Command
from ezpz_moe.errors import EzpzError
from ezpz_moe.hosts.dcp.paths import find_checkpoint, is_safetensors

if TYPE_CHECKING:
    from ezpz_moe.hosts.upcycling_target import Target
    from ezpz_moe.tools.upcycling.dense import Dense


@dataclass(frozen=True)
class Upcycle(Command):
    """Turn a dense model into a mixture of experts, each of which starts as a copy of its FFN.

    Splits a dense FFN that is G times as wide as an expert into G parts. Writes a checkpoint of the
    model alone; --checkpoint.initial_load_path starts a run from it.
    """

    group = "weights"

    source: Annotated[Positional[Path], arg(metavar="DENSE")]
    """The dense model: the folder of a checkpoint, of a run, or of Hugging Face safetensors."""
    model: Annotated[Positional[str], arg(metavar="FLAVOR|JOB.toml")]
    """The mixture of experts to build."""
    target: Annotated[Positional[Path], arg(metavar="OUT")]
    """The folder to write; it must not exist."""
    noise: Annotated[float, arg(metavar="STD")] = 0.0
    """Add Gaussian noise to every copy, in units of the weight's own standard deviation."""
    reinit: Annotated[float, arg(metavar="FRACTION")] = 0.0
    """Redraw this share of each expert's hidden channels (Drop-Upcycling)."""
    router_std: Annotated[float, arg(metavar="STD")] = 0.02
    """Draw the router's weights with this standard deviation."""
    seed: int = 0
    """Seed all random draws."""

    def run(self) -> int:
        # Before torch is imported: a wrong number is reported at once.
        self._check()
        from ezpz_moe.config.flavors import load_flavor
        from ezpz_moe.config.layer_sizes import in_words
        from ezpz_moe.hosts.jobs import find_job

        job = find_job(self.model)
        flavor = load_flavor(job.flavor, near=job.folder)
        if not is_safetensors(self.source):
            find_checkpoint(self.source)
        with display.status("Reading the models"):
            host = import_host()
            from ezpz_moe.tools.upcycling import Perturbation, upcycle

            target = host.upcycling_target(flavor)
            dense = self._dense(target)
        done = upcycle(
            dense,
            target,
            self.target,
            Perturbation(self.noise, self.reinit, self.router_std, self.seed),
            progress=partial(display.tracked, what="Writing and comparing"),
        )
        layers = f"{done.layers} layers with {in_words(done.num_experts)} experts"
        split = "" if done.parts == 1 else f" in {in_words(done.parts)} parts each"
        copies = f"copies of the dense FFN{split}"
        if isinstance(done.num_experts, int) and isinstance(done.parts, int):
            copies = f"{done.num_experts // done.parts} {copies}"
        display.print_line(
            f"{self.target}: made from {done.source}, {layers}, {copies}; "
            f"{done.tensors} tensors written and compared"
        )
        is_same = "computes" if done.is_preserved else "does not compute exactly"
        display.print_line(f"At step 0 the model {is_same} what the dense model does.")
        for note in done.notes:
            display.print_line(note)
        # The host refuses a relative path in its flag.
        display.print_whole(
            "Train it: ezpz-moe train JOB.toml --checkpoint.enable --checkpoint.initial_load_path "
            f"{shlex.quote(str(self.target.absolute()))}"
        )
        return 0

    def _check(self) -> None:
        for flag, value in {"--noise": self.noise, "--router-std": self.router_std}.items():
            if not 0 <= value < float("inf"):
                raise EzpzError(f"{flag} {value}: a standard deviation must be a number >= 0.")
        if not 0 <= self.reinit <= 1:
            raise EzpzError(f"--reinit {self.reinit}: a share must be between 0 and 1.")

    def _dense(self, target: Target) -> Dense:
        from ezpz_moe.tools.upcycling.dense import DenseCheckpoint, DenseSafetensors

        # What the folder holds decides, not what it is called.
        if not is_safetensors(self.source):
            return DenseCheckpoint(self.source, target)
        host, flavor = import_host(), target.flavor
        architecture = host.architecture(flavor)
        assert architecture is not None  # of a host that can build the target
        return DenseSafetensors(self.source, target, host.adapter(flavor), architecture)


COMMAND = Upcycle
