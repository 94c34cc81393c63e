"""Predict steps that others have published, and print both: the table of docs/guides/plan.md.

    python benchmarks/published_steps.py

Nothing is fitted to these rows: the machine's figures are those of its file. The guide has the
links, and says of every source what it does not publish.
"""

from __future__ import annotations

import math
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path

from ezpz_moe.hosts.detect import check_host, host
from ezpz_moe.tools.planning.cuts import Cut
from ezpz_moe.tools.planning.machine import machine
from ezpz_moe.tools.planning.plans import predicted

# Source, machine, and what the products were computed in.
AUTOMODEL = "NeMo AutoModel, DGX H100, bfloat16"
BRIDGE = "Megatron Bridge, DGX H100, bfloat16"
BRIDGE_FP8 = "Megatron Bridge, DGX H100, FP8"
MEGATRON = "Megatron-Core 0.8, H100, bfloat16"
TITAN = "torchtitan #2107, H100, bfloat16"
TITAN_DENSE = "torchtitan's tables, H100 of 500 W, bfloat16"
OLMOE = "OLMoE report, H100, bfloat16"
DEEPSEEK_V2 = "DeepSeek-V2 report, H800, not said"
DEEPSEEK_V3 = "DeepSeek-V3 report, H800, FP8"

FLAVORS = {
    "deepseek_v3": 'base = "deepseek_v3/671B"',
    "deepseek_v2": 'base = "deepseek_v3/236B"',
    "gpt_oss_120b": 'base = "gpt_oss/120b"',
    "qwen3_235B": 'base = "qwen3/235B-A22B"',
    # A job names a dense model by the mixture of experts that costs as much: here one with a
    # single expert.
    "llama3_8B_like": 'dense_baseline_of = "one_expert"',
    "one_expert": """
inherits = "mixtral_8x7B_like"
[change]
vocab_size = 128256
num_experts = 1
router_top_k = 1
""",
}
"""Flavors that the package does not have: name -> file."""


def megatron_mixtral_flops() -> float:
    """Return FLOPs of Mixtral 8x7B for each token of 4096, as Megatron-LM counts them.

    Its training.py takes three times the forward pass, and attention scores without a mask.
    """
    D, F, layers, tokens, vocabulary = 4096, 14336, 32, 4096, 32000
    attention = D * (D + D / 4 + tokens)  # of queries, keys and values, output; both products
    experts = 2 * 3 / 2 * D * F  # two experts, each of three products
    return 12 * (layers * (attention + experts) + D * vocabulary / 2)


@dataclass(frozen=True)
class Published:
    """A run that others have measured.

    Attributes:
        model: the flavor.
        cut: as published; what was not is ours.
        tokens_per_second: of one rank.
        source: where it is published.
        seq_len: tokens of a sequence.
    """

    model: str
    cut: Cut
    tokens_per_second: float
    source: str
    seq_len: int = 4096


ROWS = (
    Published("deepseek_v3", Cut(256, 1, 1, 4, 64, 1, 32, "full"), 865, AUTOMODEL),
    Published("deepseek_v3", Cut(64, 1, 1, 4, 64, 1, 8, "full"), 1002, AUTOMODEL),
    Published("qwen3_30B_A3B", Cut(8, 1, 1, 1, 8, 4, 16, "full"), 12040, AUTOMODEL),
    Published("gpt_oss_20b", Cut(8, 1, 1, 1, 8, 2, 16, "none"), 13058, AUTOMODEL),
    Published("gpt_oss_120b", Cut(64, 1, 1, 1, 64, 2, 4, "none"), 7626, AUTOMODEL),
    Published("gpt_oss_120b", Cut(16, 1, 1, 4, 8, 1, 80, "selective"), 5824, BRIDGE),
    Published("qwen3_30B_A3B", Cut(16, 1, 1, 1, 16, 1, 64, "none"), 8960, BRIDGE_FP8),
    Published("qwen3_235B", Cut(16, 1, 2, 8, 32, 1, 512, "none"), 1712, BRIDGE_FP8),
    Published(
        "mixtral_8x7B_like",
        Cut(16, 1, 1, 4, 8, 1, 16, "none"),
        438e12 / megatron_mixtral_flops(),
        MEGATRON,
    ),
    Published("deepseek_v3", Cut(64, 1, 1, 8, 32, 1, 16, "full"), 346, TITAN),
    Published("olmoe_7B_like", Cut(128, 1, 1, 1, 1, 4, 2, "none"), 23600, OLMOE),
    # A trillion tokens in 172.8 K GPU hours.
    Published(
        "deepseek_v2",
        Cut(64, 1, 1, 16, 8, 1, 144, "selective"),
        1e12 / (172.8e3 * 3600),
        DEEPSEEK_V2,
    ),
    # 14.8 T tokens in 2664 K GPU hours.
    Published(
        "deepseek_v3",
        Cut(128, 1, 1, 16, 64, 1, 120, "selective"),
        14.8e12 / (2664e3 * 3600),
        DEEPSEEK_V3,
    ),
    Published("llama3_8B_like", Cut(8, 1, 1, 1, 1, 2, 1, "selective"), 6667, TITAN_DENSE, 8192),
    Published("llama3_8B_like", Cut(128, 1, 1, 1, 1, 2, 1, "selective"), 6514, TITAN_DENSE, 8192),
)


def write_flavors(folder: Path) -> None:
    """Write every flavor of ``FLAVORS``, and beside it a job that names it."""
    for name, text in FLAVORS.items():
        (folder / f"{name}.toml").write_text(text)
        job = f'[model]\nname = "ezpz_moe"\nflavor = "{name}"\n'
        (folder / f"{name}.job.toml").write_text(job)


def main() -> None:
    check_host()
    on = machine("h100")
    print(
        "| model | ranks | cut | microbatches | reported tokens/s/rank | predicted | ratio | "
        "overlapped | GiB | source |"
    )
    print("|---|---:|---|---:|---:|---:|---:|---:|---:|---|")
    ratios = []
    with tempfile.TemporaryDirectory() as folder:
        write_flavors(Path(folder))
        for row in ROWS:
            job = str(Path(folder, f"{row.model}.job.toml"))
            sheet = (
                host()
                .planning()
                .model_sheet(
                    job if row.model in FLAVORS else row.model,
                    ["--training.seq-len", str(row.seq_len)],
                )
            )
            found = predicted(sheet, row.cut, on, 8)
            ratio = found.tokens_per_second / row.tokens_per_second
            ratios.append(ratio)
            print(
                f"| {row.model} | {row.cut.ranks} | {row.cut} | {row.cut.microbatches} | "
                f"{row.tokens_per_second:.0f} | {found.tokens_per_second:.0f} | {ratio:.2f} | "
                f"{ratio * found.time.predicted / found.time.best:.2f} | "
                f"{found.held.total / 2**30:.0f} | {row.source} |"
            )
    apart = statistics.median(abs(math.log(ratio)) for ratio in ratios)
    print(f"\nmedian |log ratio| of {len(ratios)}: {apart:.2f}, a factor of {math.exp(apart):.2f}")


if __name__ == "__main__":
    main()
