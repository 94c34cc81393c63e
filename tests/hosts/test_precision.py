"""Which precision a job and its experts have: by flag, job, flavor, or the CPU; with every host."""

import dataclasses
import multiprocessing
import os
from pathlib import Path

import dialect
import pytest
import torch

from ezpz_moe.config.flavors import load_flavor
from ezpz_moe.config.job import Job
from ezpz_moe.errors import EzpzError
from ezpz_moe.hosts.detect import host
from ezpz_moe.hosts.precision import agreeing_on_precision

EMULATED, NATIVE = "float32", "float32,bfloat16"


def flavor_file(folder: Path, text: str) -> str:
    lines = ('inherits = "debugmodel"', 'attention = "sdpa"', text)
    (folder / "mine.toml").write_text("\n".join(lines))
    return "mine"


def job(folder: Path, text: str, **values: str) -> Job:
    keys = {name.replace("__", "."): value for name, value in values.items()}
    flavor = flavor_file(folder, text)
    return Job(flavor=flavor, values=keys, path=folder / "job.toml")


def precision_of(job: Job) -> str:
    flavor = load_flavor(job.flavor, near=job.folder)
    words = host().precision_in_words(host().trainer_config(job), flavor)
    return words.partition(":")[0]


def words(param: str, experts: str) -> str:
    return f'training.mixed_precision_param = "{param}", experts in {experts}'


FOR_LOOP = 'compute_backend = "for_loop"'


@pytest.mark.parametrize(
    ("cpu", "text", "values", "expected"),
    [
        (EMULATED, FOR_LOOP, {}, words("float32", "float32")),
        (NATIVE, FOR_LOOP, {}, words("bfloat16", "bfloat16")),
        (
            EMULATED,
            FOR_LOOP,
            {"training__mixed_precision_param": "bfloat16"},
            words("bfloat16", "bfloat16"),
        ),
        (
            NATIVE,
            FOR_LOOP,
            {"training__mixed_precision_param": "float32"},
            words("float32", "bfloat16"),
        ),
        (
            EMULATED,
            f'{FOR_LOOP}\nexpert_precision = "host"',
            {},
            words("float32", "bfloat16"),
        ),
        (
            NATIVE,
            f'{FOR_LOOP}\nexpert_precision = "float32"',
            {},
            words("bfloat16", "float32"),
        ),
    ],
)
def test_the_job_then_the_flavor_then_the_cpu_decide(
    cpu_with, tmp_path, cpu, text, values, expected
):
    cpu_with(cpu)
    assert precision_of(job(tmp_path, text, **values)) == expected


def test_the_hosts_own_path_is_the_hosts(cpu_with, tmp_path):
    cpu_with(EMULATED)
    own = "float32" if dialect.ON_0_2 else "bfloat16"  # 0.2's loop on the CPU casts nothing
    assert precision_of(job(tmp_path, "")) == words("float32", own)


def test_another_precision_than_the_hosts_for_its_path_names_file_and_key(tmp_path):
    refused = r"mine\.toml: expert_precision = 'float32' cannot be combined with"
    with pytest.raises(EzpzError, match=refused):
        precision_of(job(tmp_path, 'expert_precision = "float32"'))


@pytest.mark.skipif(dialect.ON_0_2, reason="0.2 refuses any backend for them")
def test_experts_whose_forward_is_the_hosts_refuse_float32(tmp_path):
    (tmp_path / "mine.toml").write_text(
        'base = "gpt_oss/debugmodel"\ncompute_backend = "for_loop"\nexpert_precision = "float32"'
    )
    with pytest.raises(EzpzError, match=r"expert_precision = 'float32' \(asked for by flavor mine"):
        host().trainer_config(Job(flavor="mine", path=tmp_path / "job.toml"))


@pytest.mark.skipif(dialect.ON_0_2, reason="0.2 reads its command line elsewhere")
@pytest.mark.parametrize("flag", ["bfloat16", "float32"])
def test_the_flag_wins_over_the_rule(cpu_with, tmp_path, monkeypatch, flag):
    from torchtitan.config import ConfigManager

    cpu_with(EMULATED)
    flavor = load_flavor(flavor_file(tmp_path, FOR_LOOP), near=tmp_path)
    monkeypatch.setenv("EZPZ_MOE_FLAVORS", str(tmp_path))
    door = ["--module", "ezpz_moe", "--config", "mine"]
    config = ConfigManager().parse_args([*door, "--training.mixed-precision-param", flag])
    assert host().precision_in_words(config, flavor).partition(":")[0] == words(flag, flag)


@pytest.mark.parametrize(("cpu", "lines"), [(EMULATED, 1), (NATIVE, 0)])
def test_the_run_says_once_why_it_trains_in_float32(
    cpu_with, tmp_path, monkeypatch, in_training, cpu, lines
):
    from torchtitan.tools.logging import logger

    cpu_with(cpu)
    said = []
    monkeypatch.setattr(logger, "info", said.append)
    if not dialect.ON_0_2:
        from ezpz_moe.hosts.titan.precision import _log

        _log.cache_clear()
    config = host().trainer_config(job(tmp_path, FOR_LOOP))
    if not dialect.ON_0_2:
        dataclasses.replace(config)  # as the host copies it with the flags of its command line
    said = [line for line in said if "mixed_precision_param" in line]
    assert len(said) == lines
    assert all('mixed_precision_param = "bfloat16"' in line for line in said)


@pytest.mark.skipif(not dialect.ON_0_2, reason="0.3 has no autocast: FSDP casts on one rank too")
@pytest.mark.parametrize("param", [torch.bfloat16, torch.float32])
@pytest.mark.filterwarnings("ignore:In CPU autocast")
def test_under_0_2s_autocast_experts_compute_in_their_own_dtype(param):
    from ezpz_moe.hosts.titan_0_2.experts import EzpzGroupedExperts

    def output() -> torch.Tensor:
        torch.manual_seed(0)
        experts = EzpzGroupedExperts(32, 48, 4, False, "for_loop", "float32")
        with torch.no_grad():
            experts.init_weights(0.02)
        return experts(torch.randn(8, 32), torch.tensor([2, 2, 2, 2]))

    with torch.autocast("cpu", dtype=param):
        under = output()
    assert torch.equal(under, output())
    assert under.dtype is torch.float32


# --- ranks of different machines ------------------------------------------------------------------


def _rank(rank: int, store: Path, precisions: list[str], outcomes) -> None:
    os.environ |= {"LOCAL_RANK": str(rank), "EZPZ_MOE_DEBUG": "1"}
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=len(precisions)
    )
    parallelize = agreeing_on_precision(lambda: "parallelized", lambda: precisions[rank])
    try:
        outcomes.put(parallelize() + parallelize())  # as often as a rank has parts of the model
    except EzpzError as error:
        outcomes.put(str(error))


@pytest.mark.ranks
@pytest.mark.usefixtures("forked_processes")
@pytest.mark.parametrize("other", ["bfloat16", "float32"])
def test_ranks_that_differ_are_all_refused_and_others_go_on(tmp_path, other):
    spawn = multiprocessing.get_context("spawn")  # a fork of this process would lack its threads
    outcomes = spawn.Queue()
    precisions = ["float32", other, "float32"]
    ranks = [
        spawn.Process(target=_rank, args=(rank, tmp_path / "store", precisions, outcomes))
        for rank in range(3)
    ]
    for rank in ranks:
        rank.start()
    said = sorted(outcomes.get(timeout=120) for _ in ranks)
    for rank in ranks:
        rank.join()
    if other == "float32":
        assert said == ["parallelizedparallelized"] * 3
    else:
        assert said[0].startswith("1 of the 3 ranks, including this one, would train with bf")
        assert said[1].startswith("2 of the 3 ranks, including this one, would train with float32")
        assert "[training] mixed_precision_param" in said[1]
