"""``ezpz-moe place``."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import Positional, arg

from ezpz_moe.cli import display
from ezpz_moe.cli.arguments import import_host, many_imports
from ezpz_moe.cli.command import Reporting
from ezpz_moe.errors import EzpzError

if TYPE_CHECKING:
    from ezpz_moe.tools.placement.report import LayerPlacement, Placement
    from ezpz_moe.tools.placement.window import Window


@dataclass(frozen=True)
class Place(Reporting):
    """Find an order of each layer's experts in which ranks of expert parallelism are evenly busy.

    Reads the run's telemetry, and reports what ranks had and would have. With CKPT and OUT it also
    writes the checkpoint in that order, optimizer and all: the model computes what it did, and a
    run resumes from it.
    """

    group = "after a run"

    # The underscore: `run` is the method.
    run_: Annotated[Positional[Path], arg(name="run", metavar="RUN_DIR|JOB.toml")]
    """The run's dump_folder, its telemetry.jsonl, or the job of the run."""
    ep: int
    """Place for so many ranks of expert parallelism."""
    # A tuple: both or none.
    checkpoint: Annotated[
        Positional[tuple[Path, ...]], arg(metavar="[CKPT OUT]", help_behavior_hint="")
    ] = ()
    """A checkpoint of the run, and the folder to write with its experts in the new order."""
    by: Literal["load", "affinity", "both"] = "load"
    """Even the ranks, bring experts that tokens choose together onto one node, or do both."""
    ranks_per_node: Annotated[int | None, arg(metavar="INT")] = None
    """Take so many neighbouring ranks for one node. Needed for affinity and both."""
    last: int = 1000
    """Use the records of so many steps, the last ones."""
    min_gain: float = 0.01
    """Keep a layer's order if it would gain less: in rows of its busiest ranks, as a share of them,
    or in the share of pairs on one node."""
    config: Annotated[str | None, arg(metavar="FLAVOR|JOB.toml")] = None
    """Name the model if the records do not, or the job that they name is not there."""
    plot: Annotated[Path | None, arg(metavar="DIR")] = None
    """Draw the ranks' loads as a PNG file in this folder."""

    def run(self) -> int:
        self._check()
        from ezpz_moe.tools.placement.checkpoint import check_copy, check_model
        from ezpz_moe.tools.placement.described import described_by, expert_groups
        from ezpz_moe.tools.placement.report import Aim, place
        from ezpz_moe.tools.placement.window import read_window
        from ezpz_moe.tools.trainer_settings import folder_of_run

        if self.checkpoint:
            with display.status("Reading the checkpoint"):
                check_copy(*self.checkpoint)
        with display.status("Reading the records"):
            window = read_window(folder_of_run(self.run_), self.last)
        flavor = described_by(self.run_, window, self.config)
        if self.checkpoint:
            with display.status("Reading the model"):
                import_host()
                check_model(self.checkpoint[0], flavor)
        with many_imports():
            groups = expert_groups(flavor, window)
        aim = Aim(self.ep, self.ranks_per_node, self.by, self.min_gain)
        # By load it takes a second or two for all layers together.
        placed = place(window, groups, aim, partial(display.tracked, what="Placing layers"))
        _print(self._headline(window), placed, self)
        if self.plot:
            from ezpz_moe.tools.placement.picture import draw

            display.print_line(f"Drawn: {draw(placed, self._headline(window), self.plot)}")
        if self.checkpoint:
            self._write(placed, max(groups.values()))
        # Last: after a mistake there is none.
        display.print_json(self._document(window, placed))
        return 0

    def _check(self) -> None:
        counts = {"--ep": self.ep, "--ranks-per-node": self.ranks_per_node, "--last": self.last}
        for flag, number in counts.items():
            if number is not None and number < 1:
                raise EzpzError(f"{flag} {number}: must be at least 1.")
        if self.ep == 1:
            raise EzpzError("--ep 1: one rank has all experts, in any order. Give at least 2.")
        if not 0 <= self.min_gain < 1:
            raise EzpzError(f"--min-gain {self.min_gain}: must be a share, at least 0 and below 1.")
        if len(self.checkpoint) not in (0, 2):
            raise EzpzError(
                f"{' '.join(map(str, self.checkpoint))}: name a checkpoint's folder and the folder "
                "to write, or neither."
            )
        if self.plot and self.plot.exists() and not self.plot.is_dir():
            raise EzpzError(f"--plot {self.plot}: is a file. Name a folder.")
        self._check_nodes()

    def _check_nodes(self) -> None:
        if self.ranks_per_node is None:
            if self.by != "load":
                raise EzpzError(
                    f"--by {self.by}: brings experts onto one node. Add --ranks-per-node."
                )
        elif self.ep % self.ranks_per_node:
            raise EzpzError(
                f"--ranks-per-node {self.ranks_per_node}: does not divide the {self.ep} ranks of "
                "--ep, which lie side by side. All on one node have each other near in any order: "
                "then leave it out."
            )
        elif self.by != "load" and self.ep == self.ranks_per_node:
            raise EzpzError(
                f"--by {self.by}: all {self.ep} ranks of --ep are on one node of "
                f"{self.ranks_per_node}, and so are all experts. Use --by load."
            )

    def _headline(self, window: Window) -> str:
        records = len(window.steps_W)
        steps = f"Steps {window.first} to {window.last}"
        if window.first == window.last:
            steps = f"Step {window.last}"
        nodes = "" if self.ranks_per_node is None else f", {self.ranks_per_node} on a node"
        return f"{steps} in {records} record{'s' * (records > 1)}, for {self.ep} ranks{nodes}"

    def _document(self, window: Window, placed: Placement) -> dict[str, Any]:
        return {
            "records": window.source,
            "first_step": window.first,
            "last_step": window.last,
            "ep": self.ep,
            "ranks_per_node": self.ranks_per_node,
            "by": self.by,
            "min_gain": self.min_gain,
            "rows_before": placed.before,
            "rows_after": placed.after,
            "held_out": placed.held_out and asdict(placed.held_out),
            "layers": [asdict(each) for each in placed.layers],
        }

    def _write(self, placed: Placement, groups: int) -> None:
        source, target = self.checkpoint
        if not placed.order:
            raise EzpzError(f"{target}: not written, because no expert would have another rank.")
        from ezpz_moe.tools.checkpoints.reordering import permute_experts

        done = permute_experts(
            source,
            target,
            placed.order,
            groups=groups,
            progress=partial(display.tracked, what="Writing and comparing"),
        )
        display.print_line(
            f"{target}: {source} with {done.experts} experts of {done.layers} "
            f"layer{'s' * (done.layers != 1)} in their new places; "
            f"{done.tensors} tensors changed, all compared"
        )


def _print(headline: str, placed: Placement, asked: Place) -> None:
    display.print_line(f"{headline}:")
    display.print_table(
        map(_row, placed.layers),
        important=["max / mean", "expected", "moved"],
    )
    if not placed.order:
        less = f" of at least {asked.min_gain:g} (--min-gain)" if asked.min_gain else ""
        display.print_line(f"No order was found with a gain{less}, so all layers keep theirs.")
        return
    display.print_line(
        f"The busiest ranks of a step have {placed.before:,.0f} rows in all layers together, and "
        f"would have {placed.after:,.0f}: {_fewer(placed.before, placed.after)}."
    )
    if held := placed.held_out:
        display.print_line(
            "An order by load from the first half of these steps has in the second half "
            f"{_fewer(held.before, held.after)}; its own has {_fewer(held.before, held.best)}."
        )


def _row(each: LayerPlacement) -> dict[str, str]:
    before, after = each.before, each.after
    row = {
        "layer": str(each.layer),
        "moved": f"{each.moved} of {each.experts}",
        "busiest rank": str(before.busiest),
        "max / mean": display.number(before.max_over_mean, ".3f"),
        "expected": display.number(after.max_over_mean, ".3f"),
        "at best": display.number(each.least, ".3f"),
        "by record": display.number(before.max_over_mean_of_records, ".3f"),
        "expected by record": display.number(after.max_over_mean_of_records, ".3f"),
    }
    # All layers have it or none, so all rows have the same columns.
    if before.pairs_on_node is not None:
        row |= {
            "pairs on a node": display.number(before.pairs_on_node, ".1%"),
            "expected pairs": display.number(after.pairs_on_node, ".1%"),
        }
    return row


def _fewer(before: float, after: float) -> str:
    share = 1 - after / before if before else 0.0
    return f"{abs(share):.1%} {'fewer' if share >= 0 else 'more'}"


COMMAND = Place
