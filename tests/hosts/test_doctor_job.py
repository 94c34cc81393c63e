"""What ``ezpz-moe doctor`` says of a job, with every host: ranks, batch, memory, backends."""

from __future__ import annotations

import pytest
from dialect import ON_0_2

from ezpz_moe.hosts.cpu import no_accelerator
from ezpz_moe.tools import doctor

MODEL = '[model]\nname = "ezpz_moe"\nflavor = "{}"\n'
SMALL = "debugmodel_sdpa_for_loop"


@pytest.fixture
def findings(job_file):
    """What is found of a job: its flavor and further lines, and the ranks."""

    def find(flavor: str, lines: str = "", ranks: int | None = None) -> list[doctor.Finding]:
        job = job_file(f"{MODEL.format(flavor)}{lines}\n")
        return doctor.job_findings(doctor.Asked(str(job), ranks))

    return find


def problems(found: list[doctor.Finding]) -> str:
    return "\n".join(each.problem for each in found if not each.holds)


def memory(found: list[doctor.Finding]) -> list[str]:
    return [each.what for each in found if "of model states" in each.what]


# Ranks, heads, batch --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lines", "ranks", "message"),
    [
        ("[parallelism]\npipeline_parallel_degree = 5", 7, "7 ranks do not fit the degrees"),
        ("[parallelism]\ndata_parallel_shard_degree = 2", 4, "4 ranks do not fit the degrees"),
        ("[parallelism]\ntensor_parallel_degree = 3", 3, "not divide the 16 attention heads"),
        ("[parallelism]\nexpert_parallel_degree = 4", 2, "not divide the 2 ranks that share"),
        ("[training]\nlocal_batch_size = 4\nglobal_batch_size = 6", 1, " is not a multiple of "),
        ("[training]\nlocal_batch_size = 4\nglobal_batch_size = 4", 2, " is not a multiple of "),
        ('[parallelism]\npipeline_parallel_schedule = "2F2B"', 1, "Unknown schedule name '2F2B'"),
    ],
)
def test_a_job_that_its_ranks_cannot_share(findings, lines, ranks, message) -> None:
    assert message in problems(findings(SMALL, lines, ranks))


@pytest.mark.parametrize(
    ("lines", "ranks"),
    [
        ("[parallelism]\ntensor_parallel_degree = 2", 6),
        ("[training]\nlocal_batch_size = 4\nglobal_batch_size = 16", 2),
    ],
)
def test_a_job_that_its_ranks_can_share(findings, lines, ranks) -> None:
    assert problems(findings(SMALL, lines, ranks)) == ""


def test_key_heads_count_as_heads(findings) -> None:
    found = findings("qwen3_debugmodel_sdpa_for_loop", "[parallelism]\ntensor_parallel_degree = 16")
    assert "tensor_parallel_degree = 16 does not divide the 8 attention heads" in problems(found)


@pytest.mark.skipif(not ON_0_2, reason="torchtitan 0.3 has no expert_tensor_parallel_degree")
def test_tensor_parallel_experts_need_ranks_too(findings) -> None:
    degrees = "[parallelism]\nexpert_parallel_degree = 4\ntensor_parallel_degree = 2\n"
    assert "that share the experts" not in problems(findings(SMALL, degrees, 4))
    found = findings(SMALL, f"{degrees}expert_tensor_parallel_degree = 2", 4)
    assert "expert_parallel_degree = 4 x expert_tensor_parallel 2 does not divide the 4" in (
        problems(found)
    )


def test_the_ranks_of_a_job_script_are_not_the_jobs(findings, monkeypatch) -> None:
    """A job script runs doctor where the variables of a run exist, of one process."""
    lines = "[parallelism]\ntensor_parallel_degree = 3"
    outside = problems(findings(SMALL, lines, 3))
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert problems(findings(SMALL, lines, 3)) == outside != ""
    assert problems(findings(SMALL, "[parallelism]\ntensor_parallel_degree = 2", 2)) == ""


# Memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lines", "ranks", "gibibytes"),
    [
        ("", 8, 30.4),
        ("[parallelism]\ndata_parallel_replicate_degree = 8", 8, 243.4),
        ("[parallelism]\ndata_parallel_replicate_degree = 2", 8, 60.9),
        ("[parallelism]\ntensor_parallel_degree = 4\ndata_parallel_replicate_degree = 2", 8, 60.9),
        ('[training]\ndtype = "bfloat16"', 8, 15.2),
    ],
)
def test_model_states_of_16B(findings, lines, ranks, gibibytes) -> None:
    """What preflight measures, but for what tensor parallelism leaves whole."""
    (line,) = memory(findings("16B_sdpa_for_loop", lines, ranks))
    assert line.startswith(f"{gibibytes} GiB of model states on each of {ranks} rank(s)")


def test_without_ranks_memory_is_noted_and_judges_nothing(findings) -> None:
    found = findings("671B_sdpa_for_loop")
    (noted,) = memory(found)
    assert "model states on each of 1 rank(s)" in noted
    assert all(each.holds for each in found)


def test_offloaded_states_are_not_counted_against_the_device(findings) -> None:
    offload = "[training]\nenable_cpu_offload = true"
    (states,) = (
        each
        for each in findings("671B_sdpa_for_loop", offload, 1)
        if "of model states" in each.what
    )
    assert states.state == "note"
    assert "host's memory" in states.used_for


# Backends -------------------------------------------------------------------------------------


def test_a_backend_that_the_job_does_not_use_is_information(findings, job_file) -> None:
    job_file('inherits = "debugmodel"\nmoe_hidden_dim = 252\n', "odd.toml")
    found = findings("odd_sdpa_for_loop")
    assert problems(found) == ""
    (grouped,) = (each for each in found if each.what.endswith("F = 252 with grouped_mm"))
    assert grouped.state == "note"
    assert "torch._grouped_mm needs dimensions" in grouped.problem


@pytest.mark.skipif(
    ON_0_2 and no_accelerator(), reason="torchtitan 0.2 computes it with its for-loop on the CPU"
)
def test_the_jobs_own_backend_is_judged(findings, job_file) -> None:
    job_file('inherits = "debugmodel"\nmoe_hidden_dim = 252\n', "odd.toml")
    said = problems(findings("odd_sdpa"))
    assert "compute_backend 'grouped_mm' cannot run on" in said
    assert "torch._grouped_mm needs dimensions" in said
