"""Bytes of a rank: against what a real step saves for backward, and preflight's own count."""

import json
import os
import subprocess
from collections import Counter
from pathlib import Path

import fork_server
import pytest
import torch
from torch import nn

from ezpz_moe.errors import EzpzError
from ezpz_moe.hosts.detect import check_host, host
from ezpz_moe.hosts.rank_report import RankReport
from ezpz_moe.hosts.titan.live import LiveStorages
from ezpz_moe.hosts.titan.v0_3 import Titan03
from ezpz_moe.tools import memory, preflight
from ezpz_moe.tools.memory import StageMemory, held, microbatches_in_flight
from ezpz_moe.tools.preflight import in_a_process

check_host()
if type(host()) is not Titan03:
    pytest.skip("about the binding to torchtitan 0.3", allow_module_level=True)

pytestmark = pytest.mark.usefixtures("forked_processes")

HERE = Path(__file__).parent

JOB = """
[model]
name = "ezpz_moe"
flavor = "{flavor}"
[training]
local_batch_size = 2
seq_len = 64
steps = 1
[activation_checkpoint]
mode = "{mode}"
"""

LOSS = ("lm_head", "output head")
SMALL = 'inherits = "debugmodel"\nn_layers = 2\n'


def look(name: str, config: str, ranks: int = 1, *flags: str) -> RankReport:
    return in_a_process(getattr(memory, f"_{name}"), config, list(flags), ranks, 0)


@pytest.mark.parametrize(
    ("flavor", "mode"),
    [
        ("small_sdpa_for_loop", "full"),
        ("gpt_oss_debugmodel_sdpa", "none"),
        pytest.param("small_sdpa_for_loop", "none", marks=pytest.mark.full),
        pytest.param("gpt_oss_debugmodel_sdpa", "full", marks=pytest.mark.full),
        # Under "full" it also keeps what topk chose, in a cache that torch's hooks do not see.
        pytest.param("small_sdpa_batched_mm_capacity", "none", marks=pytest.mark.full),
    ],
)
def test_activations_are_what_a_real_step_saves(tmp_path: Path, flavor: str, mode: str) -> None:
    (tmp_path / "small.toml").write_text(SMALL)
    estimated, real = estimated_and_real(tmp_path, JOB.format(flavor=flavor, mode=mode))
    assert estimated == real


# debugmodel: dim 256, experts of 256, three of them for each of 2 x 64 tokens; bfloat16.
D = F = 256
T, R = 2 * 64, 3 * 2 * 64


@pytest.mark.parametrize(
    ("flavor", "mode", "flags", "kept"),
    [
        # A flag replaces what the job says, and its policy is still ours.
        ("small_sdpa_for_loop", "full", ["activation-checkpoint:selective"], 2 * R * F),
        ("small_sdpa_for_loop", 'selective"\nexperts = "recompute', [], 0),
        pytest.param("small_sdpa", "selective", [], 2 * R * F, marks=pytest.mark.full),
    ],
)
def test_selective_checkpointing_keeps_gate_and_up(
    tmp_path: Path, flavor: str, mode: str, flags: list[str], kept: int
) -> None:
    """And what the layer returned: by row, or of one node by token, with the rows' order."""
    (tmp_path / "small.toml").write_text(SMALL)
    job = tmp_path / "job.toml"
    job.write_text(JOB.format(flavor=flavor, mode=mode))
    report = look("activations", str(job), 1, *flags)
    assert not report.error
    by_component = Counter()
    for (_, component), number in report.bytes_by_place.items():
        by_component[component] += number
    assert by_component["attention projections"] > 0
    outputs = {2 * R * D, 2 * T * D + 8 * R} if kept else {0}
    assert by_component["routed experts"] - 2 * kept in outputs


@pytest.mark.parametrize(
    ("table", "difference"),
    [
        # An ID that the text has not; the mask stays, a byte for each token.
        pytest.param(
            "pad_token_id = 2000\ndispatch_padding = false", 2 * 64, marks=pytest.mark.full
        ),
        # Every label counts; the mask is part of the batch.
        ('padding = "labels"', 0),
        # No router is balanced yet, whose choices are told as if it were: 1 %.
        ("null_experts = 2\ncopy_experts = 1\nconstant_experts = 1", 100_000),
    ],
)
def test_what_is_cut_off_by_values_is_told_without_them(
    tmp_path: Path, table: str, difference: int
) -> None:
    (tmp_path / "cut.toml").write_text(f"{SMALL}[router]\n{table}\n")
    job = JOB.format(flavor="cut_sdpa_for_loop", mode="none")
    estimated, real = estimated_and_real(tmp_path, job)
    assert abs(estimated - real) <= difference


def test_routing_by_relu_is_told_as_if_every_expert_were_used(tmp_path: Path) -> None:
    """Which is the most: half of the logits are above 0 at first."""
    table = '[router]\nrouting = "relu"\nactivation = "relu_rmsnorm"\nlearned_scale = true\n'
    told = []
    for name, keys in (("relu", table), ("all", "router_top_k = 8\n[telemetry]\nimages = false\n")):
        (tmp_path / f"{name}.toml").write_text(f"{SMALL}{keys}")
        job = JOB.format(flavor=f"{name}_sdpa_for_loop", mode="none")
        told.append(estimated_and_real(tmp_path, job))
    (of_relu, real_of_relu), (of_all, real_of_all) = told
    assert real_of_relu < of_relu
    assert real_of_relu < real_of_all <= of_all < 1.05 * of_relu


def estimated_and_real(tmp_path: Path, text: str) -> tuple[int, int]:
    """Bytes of a job's activations: as they are told, and as a step saves them."""
    job = tmp_path / "job.toml"
    job.write_text(text)
    command = [fork_server.python(), str(HERE / "saved_for_backward.py"), str(job)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr[-4000:]
    real = json.loads(result.stdout.splitlines()[-1])
    report = look("activations_on_cpu", str(job))
    assert not report.error
    estimated = dict(report.bytes_by_place)
    # The loss comes after the model's forward: 16 of the tokens at once, in float32.
    assert estimated.pop(LOSS) == 2 * 64 // 8 * 2048 * 4
    return sum(estimated.values()), real["saved"] + real["output"]


def test_a_fused_kernel_saves_its_output_and_its_log_sum_exp_but_no_scores() -> None:
    flags = ("--training.seq-len=512", "activation-checkpoint:none")
    report = look("activations", "debugmodel_sdpa_for_loop", 1, *flags)
    assert not report.error
    places = report.bytes_by_place.items()
    made = sum(number for (_, component), number in places if component == "attention scores")
    # 8 x 512 tokens, 16 heads: 128 values in bfloat16, a float32; and two int64 of its dropout
    assert made == 6 * (8 * 512 * 16 * (128 * 2 + 4) + 16)


def test_weights_are_preflights_and_of_every_component() -> None:
    config, flags = "debugmodel_sdpa", ("--parallelism.expert-parallel-degree=2",)
    weights = look("weights", config, 4, *flags)
    built = in_a_process(preflight._run_rank, config, list(flags), 4, 0)
    assert (weights.error, built.error) == ("", "")
    assert 4 * sum(weights.bytes_by_place.values()) == built.state_bytes
    assert {component for _, component in weights.bytes_by_place} == {
        *("embeddings", "attention projections", "router", "routed experts", "shared experts"),
        *("dense FFN", "norms", "output head"),
    }


def test_attention_that_the_cpu_cannot_differentiate_is_an_error() -> None:
    report = look("activations_on_cpu", "debugmodel")
    assert "--device cpu: the attention of flavor 'debugmodel' has no backward" in report.error


@pytest.mark.parametrize(
    ("schedule", "held_by_stage"), [("1F1B", [4, 3, 2, 1]), ("GPipe", [6, 6, 6, 6])]
)
def test_microbatches_in_flight(schedule: str, held_by_stage: list[int]) -> None:
    assert [microbatches_in_flight(schedule, stage, 4, 6) for stage in range(4)] == held_by_stage


def test_microbatches_of_few_of_no_pipeline_and_of_an_unknown_schedule() -> None:
    assert microbatches_in_flight("1F1B", 0, 8, 2) == 2
    assert microbatches_in_flight("Interleaved1F1B", 0, 1, 8) == 1
    with pytest.raises(EzpzError, match=r"'Interleaved1F1B': only for 1F1B and GPipe"):
        microbatches_in_flight("Interleaved1F1B", 0, 2, 8)


def test_what_is_held_sums_up() -> None:
    stage = StageMemory(0, {"norms": 10, "router": 1}, {"norms": 3, "residual stream": 5}, 1)
    expected = {"weights": 11, "gradients": 11, "optimizer": 22, "activations": 8, "total": 52}
    assert stage.held == held(11, 8) == expected
    by_component = stage.held_by_component
    assert list(by_component) == ["router", "norms", "residual stream"]
    assert sum(each["total"] for each in by_component.values()) == stage.held["total"]


class Squares(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        (x * 1.0).sum()  # made and forgotten
        return (x * 2.0) ** 2


def test_live_storages_are_those_that_backward_needs_and_no_others() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 8), Squares())
    storages = LiveStorages({model: ("", "all"), model[2]: ("2", "squares")})
    tokens = torch.zeros(2, 2, 2)  # flattened it is a view: not made here
    with storages.watching():
        output = model(tokens)
    # Of Squares x * 2 and the output live; of Linear nothing: its output is needed by none.
    assert storages.live_bytes(model) == {("2", "squares"): 2 * output.nbytes}
