"""What the unmodified trainer computes with the backends, in real runs on this machine.

- the host's own experts and ``compute_backend = "grouped_mm"``: the same bits, for ten steps;
- the other backends: the same within what one more rounding to bfloat16 does to the host itself;
- a checkpoint of one backend goes on under another;
- activation checkpointing, torch.compile and gradient accumulation change nothing else;
- door 2 works on the host's own deepseek_v3, qwen3 and gpt_oss configs.
"""

import json
from pydoc_data.topics import topics

import pytest
import torch
from trainer_runs import compare_gradients, door_1, job_folder, train

from ezpz_moe.assets import EMBEDDED_TOKENIZER

BACKENDS = ("for_loop", "batched_mm_padded")
SHORT = ("--training.local-batch-size", "1", "--training.seq-len", "64")
MODELS = {
    "deepseek_v3": "deepseek_v3_debugmodel",
    "qwen3": "qwen3_moe_debug",
    "gpt_oss": "gpt_oss_debugmodel",
}
SDPA = "ezpz_moe.overrides.sdpa"

pytestmark = pytest.mark.train


def experts(backend: str) -> str:
    return f'ezpz_moe.overrides.experts={{"compute_backend": "{backend}"}}'


def door_2(model: str, text, *overrides: str, steps: int) -> list[str]:
    """Arguments that train one of the host's own configs on the tests' text."""
    return [
        *("--module", model, "--config", MODELS[model], *SHORT, "--training.steps", str(steps)),
        *("--hf-assets-path", str(EMBEDDED_TOKENIZER), "--dataloader.dataset-path", str(text)),
        *("--debug.seed", "7", "--override.imports", SDPA, *overrides),
    ]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Every single-process run of this file, by name."""
    folder = job_folder(tmp_path_factory.mktemp("single"))
    text = folder / "text"
    text.mkdir()
    lines = (json.dumps({"text": topics[name]}) for name in sorted(topics))
    (text / "train.jsonl").write_text("\n".join(lines))
    saved = ("--dump-folder", str(folder / "saved"), "--training.steps", "8")

    def tiny(backend: str, *flags: str, checkpointing: str = "none") -> list[str]:
        return door_1(folder, f"tiny_sdpa_{backend}", *flags, checkpointing=checkpointing)

    scenarios = {
        "host": door_2("deepseek_v3", text, steps=10),
        "host, one more rounding": [*door_2("deepseek_v3", text, steps=10), "--rounding-noise"],
        "flavor": [
            *("--module", "ezpz_moe", "--config", str(folder / "like_stock.toml"), *SHORT),
            *("--training.steps", "10", "--debug.seed", "7"),
        ],
        "saved": tiny("for_loop", *saved, "--checkpoint.enable", "--checkpoint.interval", "5"),
        "accumulated": tiny("for_loop", "--training.global-batch-size", "4"),
        "one batch": tiny("for_loop", "--training.local-batch-size", "4"),
    }
    for backend in ("grouped_mm", *BACKENDS):
        scenarios |= {
            f"deepseek_v3 {backend}": door_2("deepseek_v3", text, experts(backend), steps=10),
            f"resumed {backend}": tiny(
                backend,
                *saved,
                *("--checkpoint.enable", "--checkpoint.load-only"),
                *("--checkpoint.load-step", "5"),
            ),
        }
    for backend in BACKENDS:
        scenarios |= {
            f"tiny {backend}": tiny(backend),
            f"full {backend}": tiny(backend, checkpointing="full"),
            f"selective {backend}": tiny(backend, checkpointing="selective"),
            f"compiled {backend}": tiny(backend, "--compile.enable"),
        }
    for model in ("qwen3", "gpt_oss"):
        scenarios[f"{model} host"] = door_2(model, text, steps=2)
        scenarios[f"{model} host, one more rounding"] = [
            *door_2(model, text, steps=2),
            "--rounding-noise",
        ]
        scenarios |= {
            f"{model} {backend}": door_2(model, text, experts(backend), steps=2)
            for backend in BACKENDS
        }
    records = train(scenarios, folder, ranks=1)
    return {name: ranks[0] for name, ranks in records.items()}
