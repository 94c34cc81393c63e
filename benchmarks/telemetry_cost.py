"""What counting costs: the routers with telemetry against the host's, as a share of a step.

    python benchmarks/telemetry_cost.py
    python benchmarks/telemetry_cost.py --flavor 500M --sequences 2 --length 512 --repeats 30

Forward and backward of one layer's router, the host's own and the one that counts, taking turns;
the difference of their medians times the number of MoE layers is set against forward and backward
of the whole model in the same run. So is one that besides counts pairs of experts and the tokens
for each of two ranks, which of the pairs a run does only in the steps that end a record. Writing a
record and drawing it for the loggers are timed apart: they happen when the host logs.
All on the CPU, with torch's default number of threads.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
import tyro

from ezpz_moe.cli import display
from ezpz_moe.config.flavors import load_flavor
from ezpz_moe.hosts.detect import check_host
from ezpz_moe.routing.choices import count_this_step, stride_of
from ezpz_moe.telemetry.charts import load_pixels
from ezpz_moe.telemetry.json_lines import append
from ezpz_moe.telemetry.record import LayerRecord, StepRecord


@dataclass(frozen=True)
class Arguments:
    """What counting costs, as a share of a training step."""

    flavor: str = "debugmodel"
    sequences: int = 8
    length: int = 128
    repeats: int = 40


def build(flavor: str, folder: Path, shape: tuple[int, int] | None = None) -> torch.nn.Module:
    """Return the model; one with the ``shape`` of a batch counts pairs and rows of it."""
    from ezpz_moe.hosts.titan.models import model_spec

    spec = model_spec(load_flavor(f"{flavor}_sdpa_for_loop", near=folder))
    model = spec.model.build()
    for block in model.layers.values() if shape else ():
        if block.moe_enabled:
            block.moe.router.stride = stride_of(prod(shape), shape[1])
            block.moe.router.ranks = 2
    model.init_weights(buffer_device=torch.device("cpu"))
    return model.train()


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def router_pass(model: torch.nn.Module, x_BLD: torch.Tensor) -> Callable[[], object]:
    router = next(block.moe.router for block in model.layers.values() if block.moe_enabled)

    def work() -> None:
        weights_BLK, _, _ = router(x_BLD)
        weights_BLK.sum().backward()

    return work


def record_of(layers: int, experts: int) -> StepRecord:
    layer = LayerRecord(
        layer=1,
        tokens=10_000,
        counts_E=tuple(range(1, experts + 1)),
        zero_counts_Z=(),
        top1_probability=0.5,
        margin=0.1,
        bias_norm=0.1,
        losses={"aux_loss": 1.0, "mse_loss": 0.0, "z_loss": 4.0},
        scaled_losses={"aux_loss": 0.01, "mse_loss": 0.0, "z_loss": 0.0},
        padding_waste=None,
        drop_rate=0.0,
    )
    return StepRecord(10, 10, 2.0, 1.0, "for_loop", (layer,) * layers)


def main(arguments: Arguments) -> None:
    check_host()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "counting.toml").write_text(f'inherits = "{arguments.flavor}"\n[telemetry]\n')
        shape = (arguments.sequences, arguments.length)
        host, counting = (build(name, folder) for name in (arguments.flavor, "counting"))
        sampling = build("counting", folder, shape)
        count_this_step(True)
        moes = [block.moe for block in host.layers.values() if block.moe_enabled]
        dim, experts = moes[0].router.gate.in_features, moes[0].router.num_experts
        x_BLD = torch.randn(*shape, dim, requires_grad=True)
        tokens_BL = torch.randint(1, 2000, shape)
        works = {
            "host": router_pass(host, x_BLD),
            "counting": router_pass(counting, x_BLD),
            "sampling": router_pass(sampling, x_BLD),
            "model": lambda: host(tokens_BL).float().sum().backward(),
        }
        times: dict[str, list[float]] = {name: [] for name in works}
        for turn in range(arguments.repeats):
            for name in sorted(works, reverse=bool(turn % 2)):
                works[name]()  # in its place after another work, the first one finds cold caches
                times[name].append(seconds(works[name]))
        median = {name: statistics.median(each) for name, each in times.items()}
        record = record_of(len(moes), experts)
        written = seconds(lambda: append(folder / "telemetry.jsonl", record))
        load_pixels(record)  # imports what it draws with
        drawn = seconds(lambda: load_pixels(record))
    extra = (median["counting"] - median["host"]) * len(moes)
    sampled = (median["sampling"] - median["counting"]) * len(moes)
    rows = {
        "one router, the host's": f"{1e3 * median['host']:.2f} ms",
        "one router that counts": f"{1e3 * median['counting']:.2f} ms",
        f"counting in {len(moes)} layers": f"{1e3 * extra:.2f} ms",
        "the whole model": f"{1e3 * median['model']:.1f} ms",
        "share of a step": f"{100 * extra / median['model']:.2f} %",
        "one router that counts pairs and rows too": f"{1e3 * median['sampling']:.2f} ms",
        "pairs and rows in all layers": f"{1e3 * sampled:.2f} ms",
        "their share of a step": f"{100 * sampled / median['model']:.2f} %",
        "writing a record": f"{1e3 * written:.2f} ms",
        "its picture for the loggers": f"{1e3 * drawn:.2f} ms",
    }
    title = f"{arguments.flavor}, {shape[0]} x {shape[1]} tokens, {torch.get_num_threads()} threads"
    display.print_table(
        [{"forward and backward": k, "median": v} for k, v in rows.items()], title=title
    )


if __name__ == "__main__":
    main(tyro.cli(Arguments))
