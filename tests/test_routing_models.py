"""A flavor's tables in real training on every model: compiled, fully sharded, expert parallel."""

from itertools import product
from pathlib import Path

import pytest
from dialect import ON_0_2, SINCE_2026_08, precision
from trainer_runs import EP_2, at_once, door_1, job_folder, telemetry, train

pytestmark = [
    pytest.mark.train,
    pytest.mark.ranks,
    pytest.mark.skipif(
        ON_0_2 or SINCE_2026_08, reason="the sequences are handed to the trainer of torchtitan 0.3"
    ),
]

TABLES = """
[router]
jitter_noise = true
gate_precision = "float32"
temperature = {start = 2.0, end = 1.0, steps = 4}
activation = "softplus"
pad_token_id = 0
dispatch_padding = false
null_experts = 2
copy_experts = 1
constant_experts = 1

[balance]
aux_loss = 0.01
mse_loss = 0.01
z_loss = 0.001
scope = "global"
bias_update = "proportional"

[telemetry]
images = false
"""
KINDS = {
    "topk": TABLES,
    "sinkhorn": """
[router]
routing = "sinkhorn"
jitter_noise = 0.02
[balance]
z_loss = 0.001
[telemetry]
images = false
""",
    "balanced": """
[router]
routing = "balanced"
skip_first_n_experts = 2
[telemetry]
images = false
""",
}
MODELS = {
    "deepseek_v3": ('inherits = "tiny"', 8, 3),
    "qwen3": ('base = "qwen3/debugmodel_moe"', 64, 2),
    "gpt_oss": ('base = "gpt_oss/debugmodel"', 8, 2),
}
"""The flavor, its experts, and its layers as far as two are of experts."""
SHORT = [
    "--same-sequences",
    *("--training.steps", "2", "--training.seq-len", "64", "--training.global-batch-size", "2"),
]
WAYS = {
    "compiled": (1, [*at_once(2), "--compile.enable", "--compile.backend", "aot_eager"]),
    "fully sharded": (2, at_once(1)),
    "expert parallel": (2, [*at_once(1), *EP_2]),
}


CASES = [
    pytest.param(kind, model, way, marks=() if (k + m + w) % 3 == 0 else pytest.mark.full)
    for k, kind in enumerate(KINDS)
    for m, model in enumerate(MODELS)
    for w, way in enumerate(WAYS)
]
"""A Latin square: every two of a kind, a model and a way meet once. The full check has all."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = job_folder(tmp_path_factory.mktemp("models"))
    for (name, (base, *_)), (kind, tables) in product(MODELS.items(), KINDS.items()):
        (folder / f"{kind}_{name}.toml").write_text(base + tables)
    return folder


@pytest.mark.parametrize(("kind", "model", "way"), CASES)
def test_every_table_trains_every_model(folder, kind, model, way):
    ranks, flags = WAYS[way]
    name = f"{kind} {model} {way}"
    flags = [*SHORT, *flags, *precision(model), f"--layers={MODELS[model][2]}"]
    job = door_1(folder, f"{kind}_{model}_sdpa", *flags)
    (record, *_) = train({name: job}, folder, ranks=ranks)[name]
    assert all(7 < loss < 9 for loss in record["losses"])  # of random tokens
    lines = telemetry(folder, name)
    assert len(lines) == 2
    for layer in (layer for line in lines for layer in line["layers"]):
        CHECKS[kind](layer, experts=MODELS[model][1])
    assert all(len(line["layers"]) >= 2 for line in lines)


def of_topk(layer: dict, experts: int) -> None:
    padding = 6  # of the second sequence: its 7 last tokens of 65, one of them a label only
    assert layer["tokens"] == 2 * 64 - padding
    assert (len(layer["counts_E"]), len(layer["zero_counts_Z"])) == (experts, 4)
    chosen = sum(layer["counts_E"]) + sum(layer["zero_counts_Z"])
    assert chosen % layer["tokens"] == 0
    assert 0.99 < layer["losses"]["aux_loss"] < 2
    assert layer["bias_norm"] > 0


def of_sinkhorn(layer: dict, experts: int) -> None:
    assert len(layer["counts_E"]) == experts
    assert sum(layer["counts_E"]) % (2 * 64) == 0


def of_balanced(layer: dict, experts: int) -> None:
    of_sinkhorn(layer, experts)
    counts = layer["counts_E"]
    assert not any(counts[:2])  # the first two experts stay idle
    assert max(counts) - min(counts[2:]) <= 2  # one for each of two microbatches


CHECKS = {"topk": of_topk, "sinkhorn": of_sinkhorn, "balanced": of_balanced}
