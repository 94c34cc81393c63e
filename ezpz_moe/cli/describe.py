"""``ezpz-moe describe``."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from tyro.conf import Suppress

from ezpz_moe.cli import display
from ezpz_moe.cli.arguments import Config, import_host, refuse_no_ranks
from ezpz_moe.cli.command import Command

if TYPE_CHECKING:
    from ezpz_moe.tools.describe import Description
    from ezpz_moe.tools.memory import StageMemory


@dataclass(frozen=True)
class Describe(Command):
    """Describe a model by component: parameters, FLOPs of a token, memory of a rank.

    All other flags go to the trainer as they are, such as --training.seq-len.
    """

    group = "models"

    config: Config
    """A flavor's name, or the path of a job's TOML. It comes first."""
    world_size: int | None = None
    """Ranks of the run. For a job, by default the fewest that its degrees allow; of a flavor the
    memory is shown only with this."""
    device: Literal["accelerator", "cpu"] = "accelerator"
    """Whose kernels the activations are of: those for attention and norms save different things."""
    json: bool = False
    """Print JSON, with every figure as it is."""
    host_flags: Suppress[tuple[str, ...]] = ()

    def run(self) -> int:
        if self.world_size is not None:
            refuse_no_ranks(self.world_size)
        with display.progress().status("Building the model without memory to count ..."):
            import_host()
            from ezpz_moe.tools.describe import as_json, describe

            flags = list(self.host_flags)
            described = describe(self.config, flags, self.world_size, self.device)
        if self.json:
            display.print_line(json.dumps(as_json(described), indent=2))
            return 0
        display.print_line(_title(described))
        display.print_table(_rows(described))
        display.print_line(f"Precision: {described.precision}.")
        for line in _remarks(described):
            display.print_line(line)
        if described.ranks is not None:
            fewest = "" if self.world_size else ", the fewest that the job's degrees allow"
            display.print_line(f"\nMemory of a rank, with {described.ranks} in all{fewest}:")
            display.print_table(_memory_rows(described.memory))
        return 0


COMMAND = Describe


def _title(described: Description) -> str:
    model = described.anatomy
    zero = f" and {model.zero_experts} zero-computation experts" if model.zero_experts else ""
    return (
        f"{described.flavor}: {model.n_layers} layers, {model.n_moe_layers} of them with "
        f"{model.num_experts} experts{zero}, of which a token uses {model.top_k}. FLOPs are of a "
        f"token in a sequence of {described.seq_len}."
    )


def _rows(described: Description) -> Iterator[Mapping[str, str]]:
    total = described.anatomy.total
    for name, cost in [*described.costs.items(), ("total", total)]:
        yield {
            "component": name,
            "parameters": display.count(cost.parameters),
            "active": display.count(round(cost.active)),
            "forward FLOPs": display.flops(cost.forward),
            "backward FLOPs": display.flops(cost.backward),
            "FLOPs": display.flops(cost.both),
            "share": f"{cost.both / total.both:.1%}",
        }


def _remarks(described: Description) -> Iterator[str]:
    model, dense = described.anatomy, described.dense
    if model.zero_experts:
        yield (
            f"{model.computing_experts:.2f} of a token's {model.top_k} experts compute on average, "
            f"when all {model.num_experts} + {model.zero_experts} are used alike."
        )
    yield (
        f"Dense model of equal FLOPs: an FFN of hidden size {dense.hidden_dim} for each layer's "
        f"experts, {display.count(dense.cost.parameters)} parameters; this one has "
        f"{model.total.parameters / dense.cost.parameters:.2f} times as many."
    )
    yield (
        f"torchtitan's own count, for its tflops and MFU: {display.flops(model.host_flops)} "
        "(attention over the whole sequence; norms and biases as products)."
    )
    if "vision encoder" in model.costs:
        yield "The vision encoder's FLOPs go by patches, not by tokens: they are not counted."
    if model.uncounted:
        yield f"Not counted: the FLOPs of {', '.join(model.uncounted)}."


def _memory_rows(stages: Sequence[StageMemory]) -> Iterator[Mapping[str, str]]:
    """By component where all ranks are alike, else by the stages of the pipeline."""
    if len(stages) == 1:
        (stage,) = stages
        for name, held in [*stage.held_by_component.items(), ("total", stage.held)]:
            yield {"component": name} | _in_words(held)
        return
    for number, stage in enumerate(stages):
        who = {"stage": str(number), "rank": str(stage.rank)}
        yield who | _in_words(stage.held) | {"microbatches held": str(stage.in_flight)}


def _in_words(held: Mapping[str, int]) -> dict[str, str]:
    return {what: display.memory(number) for what, number in held.items()}
