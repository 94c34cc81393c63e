"""What forward leaves for backward: estimated by `plan`, and measured by `describe`.

    python benchmarks/planned_activations.py

The table of docs/guides/plan.md, whose rows take three seconds each. `ezpz-moe describe` prints the
measured figures too, with --world-size 4 and the job that is written here.
"""

from __future__ import annotations

import logging
import multiprocessing
import tempfile
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from pathlib import Path

from ezpz_moe.hosts.detect import check_host, host
from ezpz_moe.tools.planning.cuts import CHECKPOINTING, job_cut
from ezpz_moe.tools.planning.memory import left_bytes

MODELS = (
    "debugmodel_for_loop",
    "gpt_oss_debugmodel",
    "gpt_oss_debugmodel_sdpa",
    "qwen3_debugmodel",
)
TENSOR_PARALLEL = (1, 2)
RANKS = 4
JOB = """\
[model]
name = "ezpz_moe"
flavor = "{flavor}"
[activation_checkpoint]
mode = "{mode}"
[parallelism]
tensor_parallel_degree = {tp}
"""


def main() -> None:
    check_host()
    logging.disable(logging.WARNING)
    print("| flavor | tp | checkpointing | estimated | measured | ratio |")
    print("|---|---:|---|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as folder:
        for flavor, tp, mode in product(MODELS, TENSOR_PARALLEL, CHECKPOINTING):
            job = Path(folder, "job.toml")
            job.write_text(JOB.format(flavor=flavor, mode=mode, tp=tp))
            # A rank is built once in a process; one that has imported everything is forked.
            with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as one:
                measured = one.submit(left_by_forward, str(job)).result()
            sheet = host().planning().model_sheet(str(job), [])
            estimated = left_bytes(sheet, job_cut(sheet, RANKS), 0)
            print(
                f"| {sheet.flavor} | {tp} | {mode} | {estimated / 2**20:.0f} MiB | "
                f"{measured / 2**20:.0f} MiB | {estimated / measured:.2f} |",
                flush=True,
            )


def left_by_forward(job: str) -> int:
    """Return the bytes that the first rank's forward leaves."""
    return sum(host().memory().activations(job, [], RANKS, 0).bytes_by_place.values())


if __name__ == "__main__":
    main()
