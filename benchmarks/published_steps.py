"""Predict steps that others have published, and print both: the table of docs/guides/plan.md.

    python benchmarks/published_steps.py

Nothing is fitted to these rows: the machine's figures are those of its file.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

from ezpz_moe.hosts.detect import check_host, host
from ezpz_moe.tools.planning.cuts import Cut
from ezpz_moe.tools.planning.machine import machine
from ezpz_moe.tools.planning.plans import predicted

# docs/performance-summary.md of its repository, of 2025-10-02; and arXiv 2412.19437, table 1.
AUTOMODEL = "NeMo AutoModel, DGX H100, bfloat16"
REPORT = "DeepSeek-V3 report, H800, FP8"


@dataclass(frozen=True)
class Published:
    """A run that others have measured.

    Attributes:
        model: the flavor.
        cut: as published; what was not is ours.
        tokens_per_second: of one rank.
        source: where it is published.
    """

    model: str
    cut: Cut
    tokens_per_second: float
    source: str


ROWS = (
    Published("671B", Cut(256, 1, 1, 4, 64, 1, 32, "selective"), 865, AUTOMODEL),
    Published("671B", Cut(64, 1, 1, 4, 64, 1, 8, "selective"), 1002, AUTOMODEL),
    Published("qwen3_30B_A3B", Cut(8, 1, 1, 1, 8, 4, 16, "selective"), 12040, AUTOMODEL),
    # These two are published without a degree of expert parallelism, but with its kernels (DeepEP).
    Published("gpt_oss_20b", Cut(8, 1, 1, 1, 8, 2, 16, "selective"), 13058, AUTOMODEL),
    Published("120b.toml", Cut(64, 1, 1, 1, 32, 2, 4, "selective"), 7626, AUTOMODEL),
    # 14.8 T tokens in 2664 K GPU hours.
    Published("671B", Cut(128, 1, 1, 16, 64, 1, 120, "selective"), 1543, REPORT),
)

JOB_120B = """\
[model]
name = "ezpz_moe"
flavor = "gpt_oss_120b"
"""


def main() -> None:
    check_host()
    on = machine("h100")
    print("| model | ranks | cut | reported tokens/s/rank | predicted | ratio | source |")
    print("|---|---:|---|---:|---:|---:|---|")
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "gpt_oss_120b.toml").write_text('base = "gpt_oss/120b"\n')
        (Path(folder) / "120b.toml").write_text(JOB_120B)
        for row in ROWS:
            config = str(Path(folder, row.model)) if row.model.endswith(".toml") else row.model
            flags = ["--training.seq-len", "4096"]
            sheet = host().planning().model_sheet(config, flags)
            found = predicted(sheet, row.cut, on, 8)
            ratio = found.tokens_per_second / row.tokens_per_second
            print(
                f"| {sheet.flavor} | {row.cut.ranks} | {row.cut} | {row.tokens_per_second:.0f} | "
                f"{found.tokens_per_second:.0f} | {ratio:.2f} | {row.source} |"
            )


if __name__ == "__main__":
    main()
