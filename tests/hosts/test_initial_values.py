"""What a fresh run begins with does not depend on its ranks: real trainers, real ranks over gloo.

Nothing is trained. ``tests/test_values_of_one_rank.py`` has what one process can show.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections import defaultdict
from pathlib import Path

import fork_server
import pytest
from dialect import DUMP_FOLDER, ON_0_2, SINCE_2026_08, batch, job, with_backend, write_text
from trainer_runs import OneRank, Runs

HERE = Path(__file__).parent.parent

# Small in every dimension: what is drawn in a moment, and is built quickly.
SMALL = """
inherits = "debugmodel"
attention = "sdpa"
compute_backend = "for_loop"
n_layers = 3
dim = 64
n_heads = 2
kv_lora_rank = 32
qk_nope_head_dim = 16
qk_rope_head_dim = 16
v_head_dim = 16
moe_hidden_dim = 64
dense_hidden_dim = 128
"""
FLAVORS = {
    "small": SMALL,
    "constants": f"{SMALL}[router]\nnull_experts = 2\nconstant_experts = 2\n",
}
JOB = """
[model]
name = "ezpz_moe"
flavor = "small"
[training]
local_batch_size = 2
seq_len = 64
[debug]
seed = 7
"""

TP_2 = ["--parallelism.tensor-parallel-degree", "2"]
PP_2 = ["--parallelism.pipeline-parallel-degree", "2"]
HSDP = ["--parallelism.data-parallel-replicate-degree", "2"]
# Two stages on each rank, of which the first is the embedding alone.
IN_TURNS = [
    *("--parallelism.pipeline-parallel-schedule", "Interleaved1F1B"),
    *("--parallelism.pipeline-parallel-layers-per-stage", "1"),
    *("--parallelism.pipeline-parallel-first-stage-less-layers", "1"),
    *("--parallelism.pipeline-parallel-last-stage-less-layers", "0"),
]
if SINCE_2026_08:  # the degree as a flag leaves the job's batch whole
    PP_2 += ["--parallelism.num-pp-microbatches", "4", *batch(size=1)]

SHARED_OUT = {
    "fully sharded": (2, []),
    "pipeline in turns": (2, [*PP_2, *IN_TURNS]),
    "tensor parallel, fully sharded": (4, TP_2),
    "hybrid sharded": (4, HSDP),
    "pipeline, fully sharded": (4, PP_2),
}
if not ON_0_2:  # which has no expert parallelism on the CPU, and no routers of ours
    EP_2 = [
        *("--parallelism.expert-parallel-degree", "2"),
        *("--parallelism.spmd-backend", "partial_dtensor"),
    ]
    SHARED_OUT |= {
        "expert parallel, fully sharded": (4, EP_2),
        "constant experts": (2, EP_2),
    }
FLAVOR_OF = {"constant experts": "constants"}
"""Of scenarios that do not build "small"."""


def flavors_alone() -> dict[str, tuple[int, list[str]]]:
    """A scenario of one rank for each flavor that is shared out."""
    return {FLAVOR_OF.get(name, "small"): (1, []) for name in SHARED_OUT}


@pytest.fixture(scope="module")
def begun(tmp_path_factory) -> dict[str, list[dict]]:
    """Scenario -> what each of its ranks begins with."""
    folder = tmp_path_factory.mktemp("begun")
    for flavor, text in FLAVORS.items():
        (folder / f"{flavor}.toml").write_text(text)
        (folder / f"job of {flavor}.toml").write_text(JOB.replace('"small"', f'"{flavor}"'))
    scenarios = {
        name: (ranks, _arguments(folder, FLAVOR_OF.get(name, name), flags))
        for name, (ranks, flags) in flavors_alone().items()
    } | {
        name: (ranks, _arguments(folder, FLAVOR_OF.get(name, "small"), flags))
        for name, (ranks, flags) in SHARED_OUT.items()
    }
    (folder / "scenarios.json").write_text(json.dumps(scenarios))
    result = subprocess.run(
        [
            *(fork_server.python(), str(HERE / "run_initial_values.py")),
            *(str(folder / "scenarios.json"), str(folder / "record")),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert result.returncode == 0, (result.stdout + result.stderr)[-8000:]
    return {
        name: [
            json.loads((folder / f"record.{name}.{rank}.json").read_text()) for rank in range(ranks)
        ]
        for name, (ranks, _) in scenarios.items()
    }


def _arguments(folder: Path, flavor: str, flags: list[str]) -> list[str]:
    return job(folder / f"job of {flavor}.toml", DUMP_FOLDER, str(folder / "out"), *flags)


@pytest.mark.train
@pytest.mark.ranks
@pytest.mark.parametrize("scenario", SHARED_OUT)
def test_every_parameter_begins_as_on_one_rank(begun, scenario) -> None:
    seen = defaultdict(set)
    for rank in begun[scenario]:
        for name, digest in rank["parameters"].items():
            seen[name].add(digest)
    (alone,) = begun[FLAVOR_OF.get(scenario, "small")]
    assert seen == {name: {digest} for name, digest in alone["parameters"].items()}


@pytest.mark.train
@pytest.mark.ranks
@pytest.mark.parametrize("scenario", SHARED_OUT)
def test_no_two_experts_begin_alike(begun, scenario) -> None:
    experts = {}
    for rank in begun[scenario]:
        experts |= rank["experts"]
    of_a_kind = {name: each for name, each in experts.items() if len(each) == 8}
    assert len(of_a_kind) == 2 * 3  # two layers with three weights each
    for name, digests in of_a_kind.items():
        assert len(set(digests)) == 8, name


@pytest.mark.train
@pytest.mark.ranks
def test_stages_of_a_pipeline_go_on_with_generators_of_their_own(begun) -> None:
    """As the host has it; ranks of one stage go on alike."""
    first, second, third, fourth = (rank["generator"] for rank in begun["pipeline, fully sharded"])
    assert first == second
    assert third == fourth
    assert first != third


@pytest.fixture
def config(monkeypatch, tmp_path):
    """A config of the host's own, as an override sees it on one of several ranks."""
    if ON_0_2:
        pytest.skip("torchtitan 0.2 has no overrides")
    from torchtitan.config import ConfigManager

    from ezpz_moe.hosts.titan import initial_values

    monkeypatch.setattr(initial_values, "has_several_ranks", lambda: True)
    monkeypatch.setattr(initial_values.utils, "device_type", "cpu")
    config = ConfigManager().parse_args(
        ["--module", "deepseek_v3", "--config", "deepseek_v3_debugmodel"]
    )
    config.dump_folder = str(tmp_path)
    config.checkpoint.enable = False
    config.checkpoint.initial_load_path = None
    return config


def refuse(config) -> None:
    from ezpz_moe.hosts.titan.initial_values import refuse_twins

    refuse_twins(config, "door 2")


def test_an_override_refuses_a_fresh_start_on_several_cpu_ranks(config) -> None:
    from ezpz_moe.errors import EzpzError

    with pytest.raises(EzpzError, match=r"door 2: .*checkpoint\.create-seed-checkpoint"):
        refuse(config)
    config.checkpoint.enable = True  # there is nothing to load
    with pytest.raises(EzpzError, match="every expert would have a twin"):
        refuse(config)
    config.checkpoint.initial_load_path = "/seed"
    config.checkpoint.enable = False  # and so it is not loaded
    with pytest.raises(EzpzError, match="every expert would have a twin"):
        refuse(config)


def test_an_override_refuses_none_that_loads_a_checkpoint(config, tmp_path) -> None:
    from ezpz_moe.errors import EzpzError

    config.checkpoint.enable = True
    config.checkpoint.initial_load_path = "/seed"
    refuse(config)
    config.checkpoint.initial_load_path = None
    step = tmp_path / config.checkpoint.folder / "step-0"
    step.mkdir(parents=True)
    with pytest.raises(EzpzError, match="every expert would have a twin"):
        refuse(config)  # of a run that was interrupted while it saved
    (step / ".metadata").touch()
    refuse(config)


def test_an_override_refuses_none_of_another_kind(config, monkeypatch) -> None:
    from ezpz_moe.hosts.titan import initial_values

    with monkeypatch.context() as patch:
        patch.setattr(initial_values, "has_several_ranks", lambda: False)
        refuse(config)
    with monkeypatch.context() as patch:
        patch.setattr(initial_values.utils, "device_type", "cuda")
        refuse(config)
    ours = initial_values.starting_as_one_rank(config.model_spec.model)
    monkeypatch.setattr(config.model_spec, "model", ours)
    refuse(config)


def test_weights_that_are_offloaded_to_the_cpu_count_as_made_there(config, monkeypatch) -> None:
    from ezpz_moe.errors import EzpzError
    from ezpz_moe.hosts.titan import initial_values

    monkeypatch.setattr(initial_values.utils, "device_type", "cuda")
    config.training.enable_cpu_offload = True
    with pytest.raises(EzpzError, match="weights are made on the CPU"):
        refuse(config)


@pytest.mark.train
@pytest.mark.ranks
@pytest.mark.skipif(ON_0_2, reason="torchtitan 0.2 has no overrides")
def test_from_the_seed_checkpoint_that_it_names_an_override_trains_as_on_one_rank(tmp_path) -> None:
    write_text(tmp_path)
    run = with_backend("deepseek_v3", "for_loop", tmp_path, steps=1)
    dumped = [DUMP_FOLDER, str(tmp_path / "seeded"), "--checkpoint.enable"]
    alone, together = OneRank(tmp_path), Runs(tmp_path)
    alone.add("one rank", run)
    alone.add("seed", [*dumped, "--checkpoint.create-seed-checkpoint", *run])
    together.add("two ranks", [*dumped, *TP_2, *run], ranks=2)
    # FSDP scales gradients in a way that gloo does not have. The seed by its path, because the run
    # before has saved a step of its own.
    sharded = [DUMP_FOLDER, str(tmp_path / "sharded"), "--checkpoint.enable"]
    sharded += ["--checkpoint.initial-load-path", str(tmp_path / "seeded/checkpoint/step-0")]
    together.add("FSDP", [*sharded, *run], ranks=2)
    assert alone["seed"] == {}  # nothing is trained
    for record in together["two ranks"]:
        assert record["losses"] == pytest.approx(alone["one rank"]["losses"], abs=1e-4)
    assert {len(record["losses"]) for record in together["FSDP"]} == {1}
