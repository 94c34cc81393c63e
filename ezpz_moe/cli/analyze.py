"""``ezpz-moe analyze``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import Positional, arg

from ezpz_moe.cli import display
from ezpz_moe.cli.arguments import Device, import_host
from ezpz_moe.cli.attributed import attributed_rows
from ezpz_moe.cli.command import Reporting
from ezpz_moe.errors import EzpzError

if TYPE_CHECKING:
    from ezpz_moe.config.flavors import Flavor
    from ezpz_moe.config.job import Job
    from ezpz_moe.tools.analysis.record import Recording
    from ezpz_moe.tools.analysis.report import LayerReport
    from ezpz_moe.tools.analysis.text import Sequence as TextSequence
    from ezpz_moe.tools.named_model import NamedModel


@dataclass(frozen=True)
class Analyze(Reporting):
    """Run a trained model on a text and report how its routers use the experts.

    Shows how well a token's ID predicts its experts, what a capacity factor would drop and where,
    whether neighbouring tokens share experts, how similar the experts' weights are, and what
    another checkpoint routes differently.
    """

    group = "after a run"

    # The underscore: `run` is the method.
    run_: Annotated[Positional[str], arg(name="run", metavar="CHECKPOINT|RUN|JOB.toml")]
    """A checkpoint's folder, a run's folder (its newest checkpoint), a folder with safetensors, or
    the job of the run."""
    data: Annotated[Path | None, arg(metavar="FILE")] = None
    """Run this text: .txt, .jsonl, .json or .parquet, as for a job's dataset_path."""
    attribute: Annotated[Path | None, arg(metavar="FILE")] = None
    """Run this text instead, and report each expert's share of it, for [train_only]."""
    config: Annotated[str | None, arg(metavar="FLAVOR|JOB.toml")] = None
    """Name the model, which a checkpoint does not. Not needed with JOB.toml."""
    against: Annotated[Path | None, arg(metavar="CHECKPOINT|RUN|FILE")] = None
    """Compare the routing with this checkpoint of the same model; with --attribute, the shares
    with those of this text."""
    sequences: int = 64
    """Run this many sequences of the text."""
    seq_len: Annotated[int | None, arg(metavar="INT")] = None
    """Use this many tokens per sequence. Default: the job's."""
    capacity_factor: float = 1.25
    """Count the drops of experts with this capacity factor."""
    segment: int = 16
    """Use this many tokens per segment, for the local consistency."""
    cache: float = 2.0
    """Size a segment's cache of experts, as a multiple of the experts that a token uses."""
    device: Device = None
    """Run the model on this device. Default: the accelerator if there is one."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute in this dtype; experts compute in bfloat16, as in the host."""
    out: Annotated[Path | None, arg(metavar="FILE")] = None
    """Also write the JSON to this file."""
    plot: Annotated[Path | None, arg(metavar="DIR")] = None
    """Draw the measurements as PNG files in this folder."""

    def run(self) -> int:
        # Before torch is imported: a wrong number is reported at once.
        self._check()
        from ezpz_moe.config.dense_flavors import refuse_dense
        from ezpz_moe.hosts.dcp.paths import find_weights
        from ezpz_moe.tools.named_model import named_model

        named = named_model(self.run_, self.config)
        flavor, checkpoint = named.flavor, find_weights(named.path)
        refuse_dense(flavor, "to analyze")
        if self.attribute:
            return self._attribute(flavor, checkpoint, named)
        assert self.data is not None  # _check
        # Before the text is read: a wrong path must not show only after the first model has run.
        other = find_weights(self.against) if self.against else None
        with display.status("Reading the text"):
            host = import_host()
            tokenizer = named.tokenizer(checkpoint)
            encode = host.analysis().encoder(tokenizer, flavor)
            text = self._text(self.data, named.job, encode)
        recording = self._record(flavor, checkpoint, text)
        compared = self._record(flavor, other, text) if other else None

        import torch

        from ezpz_moe.tools.analysis.report import Settings, report

        settings = Settings(self.capacity_factor, self.segment, self.cache)
        tokens_SL = torch.stack([each.tokens_L for each in text])
        layers = report(recording, tokens_SL, settings, compared)
        facts = {
            "checkpoint": str(checkpoint),
            "config": self.config or self.run_,
            "data": str(self.data),
            "sequences": tokens_SL.shape[0],
            "seq_len": tokens_SL.shape[1],
            "loss": recording.loss,
            "against": str(other) if other else None,
            "against_loss": compared.loss if compared else None,
        }
        document = facts | {"settings": asdict(settings), "layers": [asdict(x) for x in layers]}
        # Printed first: if a file cannot be written, the results of a long run are not lost.
        display.print_json(document)
        _print(facts, layers, settings)
        for note in recording.notes:
            display.print_line(note)
        try:
            self._write(document, layers, settings)
        except OSError as error:
            raise EzpzError(f"--out, --plot: cannot write the results: {error}.") from error
        return 0

    def _attribute(self, flavor: Flavor, checkpoint: Path, named: NamedModel) -> int:
        """Report each expert's shares of a text, and of another one."""
        assert self.attribute is not None
        with display.status("Reading the text"):
            host = import_host()
            encode = host.analysis().encoder(named.tokenizer(checkpoint), flavor)
            text = self._text(self.attribute, named.job, encode)
            other = self._text(self.against, named.job, encode) if self.against else None
        recording = self._record(flavor, checkpoint, text)
        compared = self._record(flavor, checkpoint, other) if other else None

        from ezpz_moe.tools.analysis.attribution import attribution

        experts = [asdict(each) for each in attribution(recording, compared)]
        document = {
            "checkpoint": str(checkpoint),
            "config": self.config or self.run_,
            "attribute": str(self.attribute),
            "sequences": len(text),
            "seq_len": len(text[0].tokens_L),
            "loss": recording.loss,
            "against": str(self.against) if self.against else None,
            "against_loss": compared.loss if compared else None,
            "experts": experts,
        }
        display.print_json(document)
        display.print_table(attributed_rows(experts))
        for note in recording.notes:
            display.print_line(note)
        try:
            self._write(document)
        except OSError as error:
            raise EzpzError(f"--out: cannot write the results: {error}.") from error
        return 0

    def _write(
        self, document: dict[str, Any], layers: Sequence[LayerReport] = (), settings: Any = None
    ) -> None:
        """Write the file and the pictures that the user asked for."""
        if self.out:
            self.out.write_text(display.json_text(document) + "\n")
            display.print_line(f"Written: {self.out}")
        if self.plot:
            from ezpz_moe.tools.analysis.plots import draw

            for file in draw(list(layers), settings, self.plot):
                display.print_line(f"Drawn: {file}")

    def _check(self) -> None:
        if (self.data is None) == (self.attribute is None):
            given = "both are given" if self.data else "the text is missing"
            raise EzpzError(f"--data FILE, or --attribute FILE: {given}. Name one of them.")
        if self.attribute and self.plot:
            raise EzpzError("--plot has no effect with --attribute: remove it, or use --data.")
        texts = {"--data": self.data, "--attribute": self.attribute}
        if self.attribute:
            texts["--against"] = self.against
        for flag, path in texts.items():
            if path is not None and not path.is_file():
                raise EzpzError(f"{flag} {path}: is not a file.")
        counts = {"--sequences": self.sequences, "--segment": self.segment}
        for flag, number in (counts | {"--seq-len": self.seq_len}).items():
            if number is not None and number < 1:
                raise EzpzError(f"{flag} {number}: must be at least 1.")
        factors = {"--capacity-factor": self.capacity_factor, "--cache": self.cache}
        for flag, factor in factors.items():
            # Refuses NaN as well: every comparison with it is false.
            if not 0 < factor < float("inf"):
                raise EzpzError(f"{flag} {factor}: must be a number above 0.")
        if self.out and not self.out.absolute().parent.is_dir():
            raise EzpzError(f"--out {self.out}: there is no folder {self.out.parent}.")
        if self.plot and self.plot.exists() and not self.plot.is_dir():
            raise EzpzError(f"--plot {self.plot}: is a file. Name a folder.")

    def _text(self, data: Path, job: Job, encode: Callable[[str], list[int]]) -> list[TextSequence]:
        from ezpz_moe.tools.analysis.text import read_sequences

        # 2048 is the host's default. --segment is checked here, because the length may be the
        # job's.
        length = self.seq_len or job.values.get("training.seq_len", 2048)
        if length < self.segment:
            raise EzpzError(
                f"--segment {self.segment}: is longer than a sequence of {length} tokens."
            )
        return read_sequences(data, encode, length, self.sequences)

    def _record(self, flavor: Flavor, checkpoint: Path, text: list[TextSequence]) -> Recording:
        import torch

        from ezpz_moe.tools.analysis.record import record
        from ezpz_moe.tools.verify import default_device

        with ExitStack() as loading:
            loading.enter_context(display.status(f"Loading {checkpoint.name}"))

            def tracked(items: Sequence[TextSequence]) -> Iterable[TextSequence]:
                loading.close()  # a terminal shows one thing at a time
                return display.tracked(items, f"Running {checkpoint.name}", len(items))

            return record(
                checkpoint,
                flavor,
                text,
                device=self.device or default_device(),
                dtype=getattr(torch, self.dtype),
                progress=tracked,
            )


COMMAND = Analyze


def _print(facts: dict[str, Any], layers: list[LayerReport], settings: Any) -> None:
    display.print_line(
        f"{facts['checkpoint']} on {facts['sequences']} sequences of {facts['seq_len']} tokens: "
        f"loss {facts['loss']:.4f}"
    )
    if facts["against"]:
        display.print_line(f"{facts['against']}: loss {facts['against_loss']:.4f}")
    dropped = f"dropped at {settings.capacity_factor:g}"
    cache = _cache_in_words(layers, settings)
    display.print_table(
        (_row(each, settings, cache) for each in layers),
        important=["rerouted", "experts", "told by token ID", "explained", dropped, "cosine"],
    )


def _cache_in_words(layers: list[LayerReport], settings: Any) -> str:
    """Return how many experts the cache holds; as a multiple of k where the layers differ."""
    sizes = {each.cache_size for each in layers}
    return f"{settings.cache:g}k" if len(sizes) > 1 else str(*sizes)


def _row(each: LayerReport, settings: Any, cache: str) -> dict[str, str]:
    # None for an expert without tokens, which must not count as one that sees every token.
    explained, narrow = each.explained, [x for x in each.concentration if x is not None]
    told = (
        (explained.by_token, explained.by_frequency, explained.share) if explained else [None] * 3
    )
    row = {
        "layer": each.layer.removeprefix("layers."),
        "experts": f"{each.top_k:g} of {each.num_experts}",
        "told by token ID": display.number(told[0], ".1%"),
        "by frequency": display.number(told[1], ".1%"),
        "explained": display.number(told[2], ".1%"),
        "concentration": display.number(sum(narrow) / len(narrow) if narrow else None, ".3f"),
        f"dropped at {settings.capacity_factor:g}": f"{each.dropped:.1%}",
        "first to last part": (
            f"{each.dropped_by_position[0]:.1%} to {each.dropped_by_position[-1]:.1%}"
        ),
        f"SRP({settings.segment})": f"{each.srp:.3f}",
        f"SCH({settings.segment}, {cache})": f"{each.sch:.3f}",
        "cosine": display.number(each.mean_cosine, ".3f"),
        "max": display.number(each.max_cosine, ".3f"),
    }
    # All layers have it or none, so all rows have the same columns.
    if each.drift:
        row |= {"rerouted": f"{each.drift.changed:.1%}", "Jaccard": f"{each.drift.jaccard:.3f}"}
    return row
