"""``ezpz-moe ckpt prune``."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import Positional, arg

from ezpz_moe.cli import display
from ezpz_moe.cli.arguments import Device, import_host
from ezpz_moe.errors import EzpzError

if TYPE_CHECKING:
    from ezpz_moe.config.flavors import Flavor
    from ezpz_moe.config.job import Job
    from ezpz_moe.tools.analysis.record import Recording
    from ezpz_moe.tools.analysis.text import Sequence as TextSequence
    from ezpz_moe.tools.pruning.constants import Constant
    from ezpz_moe.tools.pruning.layers import Layer
    from ezpz_moe.tools.pruning.prune import MakeConstants, Pruned


@dataclass(frozen=True)
class Prune:
    """Take experts away: write a smaller model, which a run can train on.

    Writes a folder with the checkpoint of the model alone, its flavor and a job.
    """

    source: Annotated[Positional[Path], arg(metavar="CKPT")]
    """The folder of a checkpoint, or of a run (its newest checkpoint)."""
    target: Annotated[Positional[Path], arg(metavar="OUT")]
    """The folder to write; it must not exist."""
    model: Annotated[str, arg(metavar="FLAVOR|JOB.toml")]
    """Name the model. A job also names the tokenizer, and what the next run trains with."""
    keep: int
    """Keep so many experts in every layer."""
    by: Literal["frequency", "weight", "cosine"]
    """Keep the experts that most tokens of a text choose; those that routers give most weight; or
    those whose weights are least like another's, which needs no text."""
    text: Annotated[Path | None, arg(metavar="FILE")] = None
    """Run this text: .txt, .jsonl, .json or .parquet, as for a job's dataset_path."""
    merge: bool = False
    """Add the experts that go to those that stay and are most like them, as a weighted mean."""
    as_constant: bool = False
    """Keep the choice of the experts that go, as constant experts that compute next to nothing."""
    sequences: int = 64
    """Run this many sequences of the text."""
    seq_len: Annotated[int | None, arg(metavar="INT")] = None
    """Use this many tokens per sequence. Default: the job's."""
    device: Device = None
    """Run the model on this device. Default: the accelerator if there is one."""

    def run(self) -> int:
        # Before torch is imported: a wrong number is reported at once.
        self._check()
        from ezpz_moe.config.dense_flavors import refuse_dense
        from ezpz_moe.config.flavors import load_flavor
        from ezpz_moe.hosts.dcp.paths import find_checkpoint
        from ezpz_moe.hosts.jobs import find_job

        job = find_job(self.model)
        flavor = load_flavor(job.flavor, near=job.folder)
        refuse_dense(flavor, "to take away")
        source = find_checkpoint(self.source)
        with display.status("Reading the model"):
            import_host()
            from ezpz_moe.tools.pruning.prune import prune
            from ezpz_moe.tools.pruning.whole import check, open_whole

            whole = open_whole(source, flavor)
            check(whole, self.keep, as_constant=self.as_constant)
            text = self._text(self.text, job, flavor, source) if self.text else []
        recording = self._record(source, flavor, text) if text else None
        done = prune(
            whole,
            job,
            self.target,
            keep=self.keep,
            by=self.by,
            merge=self.merge,
            make_constants=self._constants(source, flavor, text) if self.as_constant else None,
            recording=recording,
            progress=partial(display.tracked, what="Writing and comparing"),
        )
        self._print(source, done)
        if recording is not None:
            smaller = load_flavor(done.flavor.source.stem, near=self.target)
            after = self._record(self.target, smaller, text)
            display.print_line(
                f"Loss on {self.text}: {recording.loss:.4f} before, {after.loss:.4f} now."
            )
        job_path = shlex.quote(str(self.target / "job.toml"))
        display.print_whole(f"Train it on: ezpz-moe train {job_path}")
        return 0

    def _check(self) -> None:
        numbers = {"--keep": self.keep, "--sequences": self.sequences, "--seq-len": self.seq_len}
        for flag, number in numbers.items():
            if number is not None and number < 1:
                raise EzpzError(f"{flag} {number}: must be at least 1.")
        # Also refused where it is written; but by then the model has run on the text.
        if os.path.lexists(self.target):
            raise EzpzError(f"{self.target}: already exists. Choose another folder, or remove it.")
        if self.text is not None and not self.text.is_file():
            raise EzpzError(f"--text {self.text}: is not a file.")
        if self.by != "cosine" and self.text is None:
            raise EzpzError(
                f"--by {self.by}: needs a text to count on. Add --text FILE, or use --by cosine."
            )
        if self.as_constant and self.text is None:
            raise EzpzError("--as-constant: needs a text to run the experts on. Add --text FILE.")
        if self.as_constant and self.merge:
            raise EzpzError(
                "--as-constant keeps the choice of the experts that go, and --merge gives their "
                "weights to others. Use one of them."
            )

    def _constants(self, source: Path, flavor: Flavor, text: list[TextSequence]) -> MakeConstants:
        from ezpz_moe.tools.pruning.constants import constants

        def make(removed: Mapping[str, Sequence[int]]) -> Mapping[str, Sequence[Constant]]:
            return constants(
                source, flavor, text, removed, device=self._device(), progress=self._tracked(source)
            )

        return make

    def _text(self, file: Path, job: Job, flavor: Flavor, checkpoint: Path) -> list[TextSequence]:
        from ezpz_moe.hosts.detect import host
        from ezpz_moe.tools.analysis.text import read_sequences
        from ezpz_moe.tools.named_model import NamedModel

        # 2048 is the host's default.
        length = self.seq_len or job.values.get("training.seq_len", 2048)
        encode = (
            host().analysis().encoder(NamedModel(job, checkpoint).tokenizer(checkpoint), flavor)
        )
        return read_sequences(file, encode, length, self.sequences)

    def _record(self, folder: Path, flavor: Flavor, text: list[TextSequence]) -> Recording:
        import torch

        from ezpz_moe.tools.analysis.record import record

        return record(
            folder,
            flavor,
            text,
            device=self._device(),
            dtype=torch.float32,
            progress=self._tracked(folder),
        )

    def _device(self) -> str:
        from ezpz_moe.tools.verify import default_device

        return self.device or default_device()

    def _tracked(self, folder: Path) -> Callable[[Sequence[TextSequence]], Iterable[TextSequence]]:
        return lambda text: display.tracked(text, f"Running {folder.name}", len(text))

    def _print(self, source: Path, done: Pruned) -> None:
        display.print_line(
            f"{self.target}: made from {source}, flavor {done.flavor.source.stem}; {done.tensors} "
            "tensors of the model written and compared; no optimizer, no step, no position in the "
            "data"
        )
        display.print_table(self._row(name, layer) for name, layer in done.layers.items())
        for note in done.notes:
            display.print_line(note)

    def _row(self, name: str, layer: Layer) -> dict[str, str]:
        row = {
            "layer": name.rpartition(".")[2],
            "experts": f"{len(layer.kept)} of {layer.num_experts}",
            "which": ", ".join(map(str, layer.kept)),
        }
        if layer.tokens is not None and layer.weight is not None:
            row |= {
                "gone of tokens": f"{layer.tokens:.1%}",
                "gone of weight": f"{layer.weight:.1%}",
            }
        if self.merge:
            row["merged"] = str(len(layer.merged))
        if self.as_constant:
            part = layer.reproduced
            is_worse = part is not None and part < 0  # by how much says nothing
            row["as constants"] = "none" if is_worse else display.number(part, ".1%")
        return row
