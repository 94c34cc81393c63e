"""``ezpz-moe doctor``: what holds, what is broken and what that means, with an exit code."""

from __future__ import annotations

import dataclasses
import logging
import re
from importlib import metadata
from pathlib import Path

import pytest
import torch

from ezpz_moe import cli
from ezpz_moe.compute import get_backend
from ezpz_moe.hosts import detect
from ezpz_moe.hosts.detect import check_host
from ezpz_moe.hosts.titan.v0_3 import Titan03
from ezpz_moe.tools import doctor

check_host()  # before torchtitan is imported: it chooses the device

from torchtitan.models.common.moe import GroupedExperts  # noqa: E402

JOB = Path(__file__).parent.parent / "flavors" / "jobs" / "debug_cpu.toml"
MODEL = '[model]\nname = "ezpz_moe"\nflavor = "debugmodel_sdpa_for_loop"\n'


@pytest.fixture(autouse=True)
def _restored(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a command changes for its process is for its process only."""
    monkeypatch.setattr(logging.getLogger(), "level", logging.getLogger().level)


def run(capsys, *arguments: str) -> tuple[int, str]:
    code = cli.main(["doctor", *arguments])
    return code, capsys.readouterr().out


KEY = "layers.1.moe.routed_experts.inner_experts.w1_EFD"


def test_the_tested_host_holds(capsys) -> None:
    code, said = run(capsys)
    assert code == 0
    assert torch.__version__ in said
    assert f"torchtitan {metadata.version('torchtitan')}" in " ".join(said.split())
    assert "torchtitan 0.3 (torchtitan.config.override:derive is there)" in said
    assert "npu, triton: `ezpz-moe backends` says why" in said
    assert KEY not in said
    verdict = said.splitlines()[-1]
    assert re.fullmatch(r"Runs can start here: \d+ hold, 0 broken\.", verdict)
    code, everything = run(capsys, "--all")
    assert code == 0
    assert KEY in everything
    lines = [line for line in everything.splitlines() if line.startswith(" holds ")]
    assert len(lines) == int(verdict.split()[4])
    assert everything.splitlines()[-1] == verdict


def test_a_seam_that_moved_is_said_in_plain_words(capsys, monkeypatch) -> None:
    monkeypatch.delattr(GroupedExperts, "_grouped_mm")
    code, said = run(capsys)
    assert code == 1
    assert (
        "BROKEN torchtitan.models.common.moe:GroupedExperts._grouped_mm: "
        "GroupedExperts has no _grouped_mm"
    ) in said
    assert "the seam moved: backends other than grouped_mm cannot be bound to experts" in said
    assert "training with the stock path still works." in said
    assert "Runs can start here, without what is broken in the host: " in said
    assert " 1 broken" in said


def test_a_broken_line_stops_the_look_at_the_job_only_if_it_is_vital(capsys, monkeypatch) -> None:
    monkeypatch.delattr(GroupedExperts, "_grouped_mm")
    code, said = run(capsys, "debugmodel_sdpa")
    assert code == 1
    assert "its keys and how they combine" in said
    assert "A run is refused." not in said
    assert "debugmodel_sdpa is ready here, without what is broken in the host: " in said
    monkeypatch.delattr(GroupedExperts, "forward")
    code, said = run(capsys, "debugmodel_sdpa")
    assert code == 1
    assert "torchtitan's own configs still can. A run is refused." in said
    assert "This host cannot start a run, and debugmodel_sdpa was not checked: " in said


@pytest.mark.parametrize(
    ("cpu", "grouped_mm", "fused"),
    [
        ("float32,bfloat16", "in bfloat16", "in bfloat16"),
        (
            "float32",
            "in bfloat16, which is emulated and slow",
            "in float32: bfloat16 is emulated",
        ),
    ],
)
def test_every_backend_says_whether_it_is_usable(
    capsys, monkeypatch, cpu_with, cpu, grouped_mm, fused
) -> None:
    cpu_with(cpu)
    why_not = lambda self, device, dtype, **sizes: ["too hot."]  # noqa: E731
    monkeypatch.setattr(type(get_backend("for_loop")), "why_not", why_not)
    facts = doctor.facts(in_full=True)
    lines = [" ".join(f"{what} {said}".split()) for what, said in facts.items()]
    assert "backend for_loop not usable here: too hot." in lines
    assert f"backend grouped_mm usable here, {grouped_mm}" in lines
    assert f"backend grouped_mm_fused usable here, {fused}" in lines
    assert "; not for_loop, npu, triton: " in doctor.facts(in_full=False)["backends"]


def test_a_renamed_checkpoint_key_is_found(capsys, monkeypatch) -> None:
    keys = ("layers.1.moe.experts.w1",)
    monkeypatch.setattr(type(detect.host()), "state_dict_keys", keys)
    code, said = run(capsys)
    assert code == 1
    assert "BROKEN layers.1.moe.experts.w1: the model's state dict has no such key" in said


def test_a_host_that_no_binding_fits_is_compared_with_the_nearest(capsys, monkeypatch) -> None:
    class Strange(Titan03):
        evidence = dataclasses.replace(Titan03.evidence, thing="no_such_host:thing")

    monkeypatch.setattr(detect, "HOSTS", (Strange(),))
    detect.host.cache_clear()
    try:
        code, said = run(capsys)
    finally:
        detect.host.cache_clear()
    assert code == 1
    assert "none: ezpz_moe cannot work with torch" in said
    assert "BROKEN no_such_host:thing: No module named 'no_such_host'" in said


def test_a_job_that_fits(capsys) -> None:
    code, said = run(capsys, str(JOB), "--world-size", "1")
    assert code == 0
    assert "D = 256, F = 256: the experts' products in bfloat16, with " in said
    assert "0.5 GiB of model states on each of 1 rank(s)" in said
    assert f"\n{JOB} is ready here: " in said


@pytest.mark.parametrize(
    ("lines", "arguments", "message"),
    [
        ("[parallelism]\nexpert_parallel_degree = 3", [], "does not divide the 8 experts"),
        ("[parallelism]\ntensor_parallel_degree = 3", [], "does not divide the 16 attention heads"),
        (
            "[parallelism]\ntensor_parallel_degree = 4",
            ["--world-size", "6"],
            "6 ranks do not fit the degrees",
        ),
        (
            "[training]\nglobal_batch_size = 6\nlocal_batch_size = 4",
            ["--world-size", "2"],
            "training.global_batch_size = 6 is not a multiple of 8",
        ),
        ("[checkpoint]\ninitial_load_path = 'gone'", [], "initial_load_path = "),
        ("[training]\ndataset_path = 'gone.txt'", [], "dataset_path = 'gone.txt' does not exist"),
    ],
)
def test_a_job_that_does_not(capsys, tmp_path, lines, arguments, message) -> None:
    job = tmp_path / "job.toml"
    job.write_text(f"{MODEL}{lines}\n")
    code, said = run(capsys, str(job), *arguments)
    assert code == 1
    assert f"BROKEN {job}: " in said
    assert message in said
    assert said.splitlines()[-1].startswith(f"{job} is not ready here: ")


def test_a_mistake_in_the_jobs_text_is_told_before_anything_is_inspected(
    capsys, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(doctor, "facts", None)
    (tmp_path / "job.toml").write_text(f"{MODEL}[training]\nstepz = 1\n")
    with pytest.raises(SystemExit) as end:
        cli.main(["doctor", str(tmp_path / "job.toml")])
    assert end.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "[training] stepz: unknown key. Did you mean 'steps'?" in captured.err


def test_a_model_that_the_device_cannot_hold(capsys) -> None:
    code, said = run(capsys, "671B_sdpa", "--world-size", "8")
    assert code == 1
    assert "1253.3 GiB of model states on each of 8 rank(s)" in said
    assert "more than the device has" in said


def test_a_job_without_ranks_is_not_judged_by_its_memory(capsys) -> None:
    code, said = run(capsys, "671B_sdpa_for_loop")
    assert code == 0, "it is only noted what one rank would hold"
    assert "for more ranks name them: --nproc or --world-size" in said


def test_dimensions_that_another_backend_cannot_take_break_nothing(capsys, tmp_path) -> None:
    (tmp_path / "odd.toml").write_text('inherits = "debugmodel"\nmoe_hidden_dim = 252\n')
    (tmp_path / "job.toml").write_text('[model]\nname = "ezpz_moe"\nflavor = "odd_sdpa_for_loop"\n')
    code, said = run(capsys, str(tmp_path / "job.toml"))
    assert code == 0
    assert "note D = 256, F = 252 with grouped_mm: torch._grouped_mm needs dimensions" in said
    assert " 0 broken" in said


def test_a_conflict_is_found_also_in_a_job_script(capsys, tmp_path, monkeypatch) -> None:
    (tmp_path / "job.toml").write_text(f"{MODEL}[training]\ndisable_cuda_graphs = false\n")
    code, outside = run(capsys, str(tmp_path / "job.toml"))
    assert code == 1
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert run(capsys, str(tmp_path / "job.toml")) == (code, outside)


@pytest.mark.parametrize("number", ["0", "-8"])
def test_no_number_of_ranks(capsys, number) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["doctor", str(JOB), "--world-size", number])
    assert end.value.code == 2
    assert f"--world-size {number}: a run needs at least 1 rank" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--nproc", "2", "--nnodes", "3"], "6 ranks do not fit the degrees"),
        (["--parallelism.tensor-parallel-degree", "5"], "divide the 16 attention heads"),
        (["--checkpoint.enable", "--checkpoint.load_step", "7"], "step-7"),
    ],
)
def test_the_flags_of_train_are_those_of_the_run(capsys, tmp_path, flags, message) -> None:
    (tmp_path / "job.toml").write_text(f"{MODEL}[parallelism]\ntensor_parallel_degree = 4\n")
    job = str(tmp_path / "job.toml")
    assert run(capsys, job)[0] == 0
    code, said = run(capsys, job, *flags, "--dump_folder", str(tmp_path))
    assert code == 1
    assert message in said


def test_a_flag_mends_what_the_file_says(capsys, tmp_path) -> None:
    (tmp_path / "job.toml").write_text(f"{MODEL}[parallelism]\ntensor_parallel_degree = 3\n")
    job = str(tmp_path / "job.toml")
    assert run(capsys, job)[0] == 1
    assert run(capsys, job, "--parallelism.tensor-parallel-degree", "4")[0] == 0


def test_what_one_rank_cannot_hold_is_noted_where_no_ranks_are_named(monkeypatch) -> None:
    for there, noted in ((2**20, True), (2**50, False)):
        monkeypatch.setattr("ezpz_moe.tools.device.memory", lambda there=there: there)
        found = doctor.job_findings(doctor.Asked("debugmodel_sdpa_for_loop"))
        notes = [each for each in found if "name them: --nproc" in each.problem]
        assert len(notes) == noted
        assert all(each.holds for each in notes), "the run may have more ranks"


def test_the_ranks_of_a_cpu_share_its_memory(monkeypatch, cpu_with) -> None:
    cpu_with("float32,bfloat16")
    monkeypatch.setattr("ezpz_moe.tools.device.memory", lambda: 100 * 2**30)

    def fits(**how) -> bool:
        (states,) = (
            each
            for each in doctor.job_findings(doctor.Asked("16B_sdpa_for_loop", **how))
            if "of model states" in each.what
        )
        return states.holds

    assert fits(ranks=4)
    assert fits(ranks=4, nproc=1)
    assert not fits(ranks=4, nproc=4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--training.steps", "3"], "the flags of a run need its job"),
        (["--nproc", "3"], "the flags of a run need its job"),
        ([str(JOB), "16B"], "debug_cpu.toml 16B: name one flavor or job."),
        ([str(JOB), "--nproc", "2", "--world-size", "3"], "on --nnodes 1 are 2 ranks"),
        ([str(JOB), "--nnodes", "0"], "--nnodes 0: must be at least 1"),
        ([str(JOB), "--training.steps", "many"], "--training.steps many: must be an integer"),
    ],
)
def test_flags_that_say_nothing(capsys, arguments, message) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["doctor", *arguments])
    assert end.value.code == 2
    assert message in capsys.readouterr().err
