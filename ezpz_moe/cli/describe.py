"""``ezpz-moe describe``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from ezpz_moe.cli import display
from ezpz_moe.cli.arguments import Config, import_host
from ezpz_moe.cli.inspected import Inspected
from ezpz_moe.hosts import anatomy_text

if TYPE_CHECKING:
    from ezpz_moe.tools.describe import Description
    from ezpz_moe.tools.memory import StageMemory


@dataclass(frozen=True, kw_only=True)
class Describe(Inspected):
    """Describe a model by component: parameters, FLOPs per token, memory per rank.

    All other flags go to the trainer unchanged, such as --training.seq-len.
    """

    group = "models"

    config: Config
    """The name of a flavor, or the path to a job's TOML. It comes first."""
    world_size: int | None = None
    """Assume this many ranks. Default: --nproc times --nnodes, if one of them is given; else, for
    a job, the fewest that its degrees allow. For a flavor, memory is shown only with ranks."""
    device: Literal["accelerator", "cpu"] = "accelerator"
    """Count the activations that this device's kernels save: attention and norms differ."""

    def run(self) -> int:
        ranks = self.ranks()
        from ezpz_moe.hosts.jobs import find_job
        from ezpz_moe.tools.early_refusals import refuse_sizes

        # Before torch is imported: a mistake in the job is reported at once.
        refuse_sizes(find_job(self.config), self.host_flags)
        with display.status("Building the model without memory, to count"):
            import_host()
            from ezpz_moe.tools.describe import as_json, describe

            flags = list(self.host_flags)
            described = describe(self.config, flags, ranks, self.device)
        display.print_json(as_json(described))
        model = described.anatomy
        display.print_line(anatomy_text.title(described.flavor, model, described.seq_len))
        important = ["parameters", "active", "FLOPs", "share"]
        display.print_table(anatomy_text.rows(model), important=important)
        display.print_line(f"Precision: {described.precision}.")
        for line in _remarks(described):
            display.print_line(line)
        if described.ranks is not None:
            # Whoever named a number of ranks knows where it comes from.
            fewest = "" if ranks else ", the fewest that the job's degrees allow"
            display.print_line(f"\nMemory per rank, with {described.ranks} ranks{fewest}:")
            important = ["total", "activations", "weights"]
            display.print_table(_memory_rows(described.memory), important=important)
        return 0


COMMAND = Describe


def _remarks(described: Description) -> Iterator[str]:
    model, dense, baseline = described.anatomy, described.dense, described.baseline_of
    yield from anatomy_text.caveats(model)
    if (width := described.row_width) != model.dim:
        yield (
            f"A row that ranks exchange under expert parallelism has {width} numbers, {2 * width} "
            f"bytes in bfloat16, in place of {2 * model.dim}."
        )
    if baseline is not None:
        equal = "FLOPs" if baseline.equal == "flops" else "parameters"
        yield (
            f"Dense baseline of {baseline.flavor} with equal {equal}, to a whole hidden unit: "
            f"{baseline.more_flops:+.3%} FLOPs, {baseline.more_parameters:+.3%} parameters."
        )
    if dense is not None:
        yield (
            f"Dense model with equal FLOPs: an FFN of hidden size {dense.hidden_dim} replaces each "
            f"layer's experts, {display.count(dense.cost.parameters)} parameters; this model has "
            f"{model.total.parameters / dense.cost.parameters:.2f} times as many."
        )
    yield (
        f"torchtitan's own count, for its tflops and MFU: {display.flops(model.host_flops)} "
        "(counts attention over the whole sequence, and norms and biases as products)."
    )


def _memory_rows(stages: Sequence[StageMemory]) -> Iterator[Mapping[str, str]]:
    """Yield rows by component if all ranks are alike, else by pipeline stage; all in one unit."""
    largest = max(each for stage in stages for each in stage.held.values())
    if len(stages) == 1:
        (stage,) = stages
        # One stage leaves room for the components; several are compared with each other instead.
        for name, held in [*stage.held_by_component.items(), ("total", stage.held)]:
            yield {"component": name} | _in_words(held, largest)
        return
    for number, stage in enumerate(stages):
        who = {"stage": str(number), "rank": str(stage.rank)}
        yield who | _in_words(stage.held, largest) | {"microbatches held": str(stage.in_flight)}


def _in_words(held: Mapping[str, int], largest: int) -> dict[str, str]:
    return {what: display.memory_beside(number, largest) for what, number in held.items()}
