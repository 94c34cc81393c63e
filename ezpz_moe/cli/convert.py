"""``ezpz-moe convert``: a job, another project's config, or with ``--lint`` check scripts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import Positional, arg

from ezpz_moe.cli import display
from ezpz_moe.cli.command import Reporting
from ezpz_moe.errors import EzpzError

if TYPE_CHECKING:
    from ezpz_moe.tools.convert import Change, Conversion

    _Write = Callable[[Conversion, Path], list[Path]]


@dataclass(frozen=True)
class Convert(Reporting):
    """Convert a torchtitan 0.2 job to one that torchtitan 0.3 trains, and report every key.

    The model of a fork stays open in the new job, unless --flavor or --sizes say what it is.
    With --from: make a flavor of another project's config, its balance losses in our units.
    With --lint: find trainer flags in shell, PBS and Slurm scripts that the installed host rejects.

    Exit code 1 when a setting that had an effect is lost or left open, the model differs, or a flag
    is dead; 2 when NEW.toml cannot be written.
    """

    group = "weights"

    files: Annotated[
        Positional[tuple[Path, ...]],
        arg(metavar="OLD [NEW.toml] | SCRIPT...", help_behavior_hint=""),
    ]
    """The job or config to read, and the file to write, which must not exist; without it, only
    report. With --lint: the scripts to read."""
    from_: Annotated[
        Literal["hf", "megatron"] | None, arg(name="from", metavar="{hf,megatron}")
    ] = None
    """Read a config.json of Hugging Face, or a YAML file of Megatron-Core's arguments."""
    lint: bool = False
    """Treat the files as scripts, and report the trainer flags in them."""
    flavor: Annotated[str | None, arg(metavar="NAME")] = None
    """Train this flavor, whatever the old job's model was."""
    sizes: Annotated[str | None, arg(metavar="SIZES")] = None
    """Draft the flavor of a fork's model: "dim=2048, n_layers=27, ...", or the fork's own
    DeepSeekV3ModelArgs(...). What is not given has torchtitan 0.2's default."""

    def run(self) -> int:
        wished = [each for each in (self.flavor, self.sizes) if each is not None]
        if len(wished) > 1:
            raise EzpzError("convert: --flavor names a model, and --sizes make one. Choose one.")
        if wished and (self.lint or self.from_ is not None):
            raise EzpzError("convert: --flavor and --sizes are of a job's model. Leave them out.")
        if self.lint and self.from_ is not None:
            raise EzpzError("convert: --lint reads scripts, and --from a config. Choose one.")
        if self.lint and self.files:
            return _lint(self.files)
        if self.lint:
            raise EzpzError("convert --lint: name the scripts to check.")
        # tyro can ask for a fixed number of words or for any, but not for one or two.
        if len(self.files) not in (1, 2):
            raise EzpzError(
                f"convert: takes a job, or a job and the file to write, not {len(self.files)} "
                "files. To check scripts, add --lint."
            )
        return self._convert(*self.files)

    def _convert(self, old: Path, new: Path | None = None) -> int:
        """Print what becomes of every key, and write the new file if it has a name."""
        conversion, write = self._conversion(old, new)
        _report(conversion.changes)
        for difference in conversion.differences:
            display.print_line(f"differs: {difference}")
        for note in conversion.notes:
            display.print_line(f"note: {note}")
        # A flavor is short, and a job for the most part what the old file is.
        unwritten = conversion.refusal or (conversion.text if self.from_ else "")
        if new is None and unwritten:
            display.print_whole(unwritten)
        written = [] if new is None else write(conversion, new)
        for path in written:
            display.print_line(f"{path} written")
        for change in conversion.left_open:
            display.print_line(f"open: {change.key}: {change.note}")
        open_ = {change.key: change.note for change in conversion.left_open}
        more = {"notes": conversion.notes} if self.from_ else {"open": open_}
        display.print_json(_document(conversion, written) | more)
        return 0 if conversion.is_whole else 1

    def _conversion(self, old: Path, new: Path | None) -> tuple[Conversion, _Write]:
        """Return what becomes of the old file, and what writes the new one."""
        if self.from_ is None:
            from ezpz_moe.tools.convert import Wish, convert, write

            # Without a new file, the old name only serves to name the flavor's file in the report.
            return convert(old, new or old, Wish(self.flavor, self.sizes)), write
        with display.status("Comparing with the host's model"):
            from ezpz_moe.tools.convert_foreign import write as write_flavor
            from ezpz_moe.tools.convert_hf import from_hf
            from ezpz_moe.tools.convert_megatron import from_megatron

            return (from_hf if self.from_ == "hf" else from_megatron)(old), write_flavor


COMMAND = Convert


def _document(conversion: Conversion, written: Sequence[Path]) -> dict[str, Any]:
    """Return what became of every key, and the new file's text, written or not."""
    return {
        "changes": list(map(asdict, conversion.changes)),
        "refusal": conversion.refusal or None,
        "text": conversion.text,
        "written": list(written),
        "differences": conversion.differences,
    }


def _report(changes: Sequence[Change]) -> None:
    from ezpz_moe.config.job import shown

    display.print_table(
        {
            "key": change.key,
            "value": shown(change.new if change.fate == "added" else change.value),
            "becomes": f"{change.fate}: {change.note}" if change.note else change.fate,
        }
        for change in changes
    )
    if lost := [change.key for change in changes if change.fate == "dropped"]:
        display.print_line(f"{len(lost)} dropped that had an effect: {', '.join(lost)}")


def _lint(scripts: tuple[Path, ...]) -> int:
    with display.status("Asking the host for its flags"):
        from ezpz_moe.hosts.detect import presumed_host
        from ezpz_moe.tools.lint import lint, taken_flags

        taken = taken_flags()
        findings = [finding for path in scripts for finding in lint(path, taken)]
    display.print_table(
        {
            "where": finding.place,
            "flag": finding.flag,
            "": "dead" if finding.remedy else "alive",
            "what to do": finding.remedy or None,
        }
        for finding in findings
    )
    display.print_json({"flags": list(map(asdict, findings)), "host": presumed_host().name})
    dead = sum(bool(finding.remedy) for finding in findings)
    host = presumed_host().name
    display.print_line(f"{len(findings)} trainer flags, {dead} dead on {host}")
    return 1 if dead else 0
