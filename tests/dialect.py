"""The same run, said on the command line of whichever generation of the host is installed."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from pydoc_data.topics import topics

from ezpz_moe.config.assets import EMBEDDED_TOKENIZER
from ezpz_moe.hosts.detect import check_host, host
from ezpz_moe.hosts.titan.v2026_08 import Titan2026_08
from ezpz_moe.hosts.titan.v2026_09 import Titan2026_09
from ezpz_moe.hosts.titan_0_2.v0_2 import Titan02

check_host()  # asks the host for its generation: with its device, before anything else does

ON_0_2 = type(host()) is Titan02
SINCE_2026_09 = type(host()) is Titan2026_09
SINCE_2026_08 = isinstance(host(), Titan2026_08)

EXPERTS = "RoutedExperts" if SINCE_2026_09 else "GroupedExperts"
"""The host's class that gets the selector; ours is named after it."""

DUMP_FOLDER = "--job.dump-folder" if ON_0_2 else "--dump-folder"
LENGTH = 128
"""Tokens of a sequence of the tests' job."""


def job(path: Path, *flags: str) -> list[str]:
    """Train a job file."""
    if ON_0_2:
        door = ["--job.config-file", str(path), "--job.custom-config-module", "ezpz_moe"]
    else:
        door = ["--module", "ezpz_moe", "--config", str(path)]
    return [*door, *flags]


def batch(*, size: int | None = None, seq_len: int | None = None, whole: int | None = None):
    """``size`` sequences of ``seq_len`` tokens at once, ``whole`` sequences a step.

    ``size`` and ``whole`` without ``seq_len`` are of the tests' job.
    """
    if SINCE_2026_08:
        length = seq_len or LENGTH
        sizes = {
            "num-tokens-per-microbatch-per-dp-rank": size and size * length,
            "max-context-length": seq_len,
            "num-tokens-per-train-step": whole and whole * length,
        }
    else:
        sizes = {"local-batch-size": size, "seq-len": seq_len, "global-batch-size": whole}
    flags = [(f"--training.{name}", str(value)) for name, value in sizes.items() if value]
    return [part for flag in flags for part in flag]


SHORT = [*batch(size=1, seq_len=64), "--debug.seed", "7"]
if not ON_0_2:
    SHORT += ["--layers=3"]  # of the host's four to eight, two or three of them of experts

PARSED_AT_ONCE = [] if ON_0_2 else ["--module", "deepseek_v3", "--config", "deepseek_v3_debugmodel"]
"""A command line that the host takes anywhere."""

# The host's own models with a config small enough for this machine, as far as they train on a CPU.
MODELS: Mapping[str, str] = (
    {"deepseek_v3": "debugmodel"}
    if ON_0_2
    else {
        "deepseek_v3": "deepseek_v3_debugmodel",
        "qwen3": "qwen3_moe_debug",
        "gpt_oss": "gpt_oss_debugmodel",
    }
)


def precision(model: str) -> list[str]:
    """In what a model computes around its experts, which are in bfloat16.

    In what every CPU multiplies well; the host's gpt_oss cannot, nor 0.2 without FSDP.
    """
    dtype = "bfloat16" if model == "gpt_oss" or ON_0_2 else "float32"
    return ["--training.mixed-precision-param", dtype]


def write_text(folder: Path) -> None:
    """Put the text that the host's own models train on into ``folder``."""
    lines = "\n".join(json.dumps({"text": topics[name]}) for name in sorted(topics))
    file = folder / "text" / "train.jsonl"
    file.parent.mkdir()
    file.write_text(lines)
    if SINCE_2026_08:  # has no flag for it: its test text is at a fixed place
        asset = folder / "tests" / "assets" / "c4_test" / "data.json"
        asset.parent.mkdir(parents=True)
        shutil.copy(file, asset)


def stock(model: str, folder: Path, *, steps: int) -> list[str]:
    """Train one of the host's own models without the plugin's experts, on :func:`write_text`'s."""
    more = [*SHORT, *precision(model), "--training.steps", str(steps)]
    if ON_0_2:
        # The settings of a job, which the host reads itself; its router cannot count on the CPU.
        own = ["--model.name", model, "--model.flavor", MODELS[model], "--count-on-cpu"]
        assets = ["--model.hf-assets-path", str(EMBEDDED_TOKENIZER)]
        text = ["--training.dataset-path", str(folder / "text")]
        job_file = ["--job.config-file", str(folder / "like_stock.toml")]
        return [*job_file, *own, *assets, *text, *more]
    config = ["--module", model, "--config", MODELS[model]]
    assets = ["--hf-assets-path", str(EMBEDDED_TOKENIZER)]
    text = [] if SINCE_2026_08 else ["--dataloader.dataset-path", str(folder / "text")]
    sdpa = ["--override.imports", "ezpz_moe.overrides.sdpa"]
    return [*config, *assets, *text, *more, *sdpa]


def with_backend(model: str, backend: str, folder: Path, *, steps: int, **keys: str) -> list[str]:
    """:func:`stock` with our experts: by door 2, or where the host has one door, by a flavor.

    ``keys`` are of the override.
    """
    if ON_0_2:
        flavor = ["--model.flavor", f"short_sdpa_{backend}", "--training.steps", str(steps)]
        return job(folder / "like_stock.toml", *SHORT, *precision(model), *flavor)
    experts = json.dumps({"compute_backend": backend, **keys})
    return [*stock(model, folder, steps=steps), f"ezpz_moe.overrides.experts={experts}"]


def by_flavor(folder: Path, *, steps: int) -> list[str]:
    """:func:`stock` of deepseek_v3 by the job with the same settings, and so by door 1."""
    same = ["--model.flavor", "base"] if ON_0_2 else []
    more = [*SHORT, *precision("deepseek_v3"), "--training.steps", str(steps)]
    return job(folder / "like_stock.toml", *more, *same)
