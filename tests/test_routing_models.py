"""A flavor's tables in real training on every model: compiled, fully sharded, expert parallel."""

from itertools import product

import pytest
from dialect import ON_0_2, ON_MAIN
from trainer_runs import EP_2, at_once, door_1, job_folder, telemetry, train

pytestmark = [
    pytest.mark.train,
    pytest.mark.ranks,
    pytest.mark.skipif(
        ON_0_2 or ON_MAIN, reason="the sequences are handed to the trainer of torchtitan 0.3"
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
    "deepseek_v3": ('inherits = "tiny"', 8),
    "qwen3": ('base = "qwen3/debugmodel_moe"', 64),
    "gpt_oss": ('base = "gpt_oss/debugmodel"', 8),
}
SHORT = [
    "--same-sequences",
    *("--training.steps", "2", "--training.seq-len", "64", "--training.global-batch-size", "2"),
]
WAYS = {
    "compiled": (1, [*at_once(2), "--compile.enable", "--compile.backend", "aot_eager"]),
    "fully sharded": (2, at_once(1)),
    "expert parallel": (2, [*at_once(1), *EP_2]),
}


@pytest.fixture(scope="module")
def every_model(tmp_path_factory):
    """(model, way) -> the folder of its run, and its records."""
    folder = job_folder(tmp_path_factory.mktemp("models"))
    for (name, (base, _)), (kind, tables) in product(MODELS.items(), KINDS.items()):
        (folder / f"{kind}_{name}.toml").write_text(base + tables)
    results = {}
    for ranks in (1, 2):
        scenarios = {
            f"{kind} {model} {way}": door_1(folder, f"{kind}_{model}_sdpa", *SHORT, *flags)
            for kind, model, (way, (of_ranks, flags)) in product(KINDS, MODELS, WAYS.items())
            if of_ranks == ranks
        }
        results |= train(scenarios, folder, ranks=ranks)
    return folder, results


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("model", MODELS)
def test_every_table_trains_every_model(every_model, model, way):
    folder, results = every_model
    losses = results[f"topk {model} {way}"][0]["losses"]  # of random tokens
    assert all(7 < loss < 9 for loss in losses)
    padding = 6  # of the second sequence: its 7 last tokens of 65, one of them a label only
    for line in telemetry(folder, f"topk {model} {way}"):
        assert len(line["layers"]) >= 2
        for layer in line["layers"]:
            experts = MODELS[model][1]
            assert layer["tokens"] == 2 * 64 - padding
            assert (len(layer["counts_E"]), len(layer["zero_counts_Z"])) == (experts, 4)
            chosen = sum(layer["counts_E"]) + sum(layer["zero_counts_Z"])
            assert chosen % layer["tokens"] == 0
            assert 0.99 < layer["losses"]["aux_loss"] < 2
            assert layer["bias_norm"] > 0


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("routing", ["sinkhorn", "balanced"])
def test_other_routings_train_every_model(every_model, routing, model, way):
    folder, results = every_model
    losses = results[f"{routing} {model} {way}"][0]["losses"]
    assert all(7 < loss < 9 for loss in losses)
    for line in telemetry(folder, f"{routing} {model} {way}"):
        for layer in line["layers"]:
            counts = layer["counts_E"]
            assert sum(counts) % (2 * 64) == 0
            if routing == "balanced":  # the first two experts stay idle
                assert not any(counts[:2])
                assert max(counts) - min(counts[2:]) <= 2  # one for each of two microbatches
