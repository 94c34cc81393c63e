"""A run says once, before its first step, what ``describe`` says of its model."""

from __future__ import annotations

import contextlib
import logging
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from trainer_runs import EP_2, LOG, door_1, job_folder, train

from ezpz_moe import cli
from ezpz_moe.config.flavors import FOLDER_VARIABLE, load_flavor
from ezpz_moe.errors import EzpzError
from ezpz_moe.hosts.detect import check_host, host
from ezpz_moe.hosts.dry_run import STATES_PER_PARAMETER
from ezpz_moe.hosts.titan.v0_3 import Titan03
from ezpz_moe.telemetry.text import memory, plain_table

check_host()  # before torchtitan is imported: it chooses the device
if type(host()) is not Titan03:
    pytest.skip("runs of torchtitan 0.3", allow_module_level=True)

from ezpz_moe.hosts.titan import announcing  # noqa: E402
from ezpz_moe.hosts.titan.parameters import build_on_meta  # noqa: E402

PP_2 = ["--parallelism.pipeline-parallel-degree", "2"]
FLAVORS = {
    # The trained router has more logits than the host's, of which it is asked.
    "zero": '[router]\nnull_experts = 4\n[balance]\naux_loss = 1e-2\nbias_update = "none"',
    "plain": "",
}
HELD = {
    # The host's first stage, whole; as it says in its log.
    "pipeline": lambda name, number: number * name.startswith(("tok_", "layers.0.", "layers.1.")),
    # FSDP and EP halve every tensor here: all have an even first dimension.
    "experts": lambda name, number: number / 2,
}


def job_with_flavors(folder: Path) -> Path:
    folder = job_folder(folder)
    for name, lines in FLAVORS.items():
        (folder / f"{name}.toml").write_text(f'inherits = "tiny"\n{lines}\n')
    return folder


@pytest.mark.train
@pytest.mark.ranks
@pytest.mark.parametrize(
    ("parallelism", "size", "flags"), [("pipeline", "zero", PP_2), ("experts", "plain", EP_2)]
)
def test_the_log_has_the_table_of_describe_once_and_what_rank_0_holds(
    parallelism: str,
    size: str,
    flags: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, flavor = job_with_flavors(tmp_path), f"{size}_sdpa_for_loop"
    arguments = door_1(folder, flavor, *flags, "--training.steps", "1")
    train({parallelism: arguments}, folder, ranks=2)
    log = (folder / LOG).read_text()

    monkeypatch.setenv(FOLDER_VARIABLE, str(folder))
    assert cli.main(["describe", flavor, "--training.seq-len", "128"]) == 0
    told = capsys.readouterr().out.partition("Precision: ")[0]
    table = "\n".join(line.rstrip() for line in told.splitlines())
    assert "total" in table
    assert log.count(f"INFO - ezpz_moe: {table}\n") == 1
    assert log.count("FLOPs are per token") == 1
    assert log.index("FLOPs are per token") < log.index("step:  1")

    parameters = build_on_meta(load_flavor(flavor, near=folder)).named_parameters()
    held = sum(HELD[parallelism](name, each.numel()) for name, each in parameters)
    states = memory(round(STATES_PER_PARAMETER * torch.float32.itemsize * held))
    assert log.count(f"ezpz_moe: rank 0 of 2 holds {states} of weights") == 1
    assert log.count("holds") == 1


def test_the_trained_model_gives_the_figures_without_a_warning_whatever_its_dtype(
    tmp_path: Path,
) -> None:
    flavor = load_flavor("zero_sdpa_for_loop", near=job_with_flavors(tmp_path))
    training = SimpleNamespace(seq_len=128)
    whole = announcing.consists_of(build_on_meta(flavor), flavor, training)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = build_on_meta(flavor)
    finally:
        torch.set_default_dtype(default)
    assert next(model.parameters()).dtype is torch.bfloat16
    always = torch.is_warn_always_enabled()
    torch.set_warn_always(True)  # of some things it warns once in a process
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert announcing.consists_of(model, flavor, training) == whole
    finally:
        torch.set_warn_always(always)


@pytest.mark.parametrize(
    ("rank", "backend", "said"),
    [(0, "gloo", True), (1, "gloo", False), (0, "fake", False)],
)
def test_a_run_goes_on_when_its_model_cannot_be_counted(
    rank: int,
    backend: str,
    said: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Ranks other than the first, and those of a dry run, do not even try."""
    group = {"rank": rank, "backend": backend, "world_size": 2}
    answers = {f"get_{what}": lambda value=value: value for what, value in group.items()}
    monkeypatch.setattr(announcing, "dist", SimpleNamespace(**answers))
    caplog.set_level(logging.INFO)
    strange = nn.Linear(2, 2)  # no decoder: it has no config
    spec = SimpleNamespace(parallelize_fn=lambda model, **_: model, pipelining_fn=None)
    announcing.announcing(spec, load_flavor("debugmodel"))
    dims = SimpleNamespace(pp_enabled=False)
    training = SimpleNamespace(seq_len=128)
    assert spec.parallelize_fn(strange, parallel_dims=dims, training=training) is strange
    lines = [record.getMessage() for record in caplog.records]
    if not said:
        assert lines == []
        return
    failed, held = lines
    assert failed.startswith(
        "ezpz_moe: the run goes on, but what its model consists of cannot be told: AttributeError: "
    )
    assert "\n" not in failed
    assert held == (
        "ezpz_moe: rank 0 of 2 holds 0.00 MiB of weights, gradients and AdamW's two moments"
    )


def test_a_table_in_a_log_has_no_colours_and_is_not_wrapped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "20")
    rows = [{"component": "x" * 30, "share": "7.0%"}, {"component": "y", "share": "93.0%"}]
    assert plain_table(rows).splitlines() == [
        " component                       share",
        f" {'x' * 30}   7.0%",
        f" {'y':30}  93.0%",
    ]
    assert plain_table([]) == ""


@pytest.mark.parametrize(
    ("ranks", "of_batch", "said"),
    [
        (1, 0, None),
        (2, 0, r"the 2 rank\(s\) on this machine take 0.00 MiB"),
        (1, 4001 * STATES_PER_PARAMETER, r"batches of the 1 rank\(s\) .* Lower \[training\]"),
    ],
)
def test_what_a_machine_without_accelerators_cannot_hold_is_refused(
    ranks: int, of_batch: int, said: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel would end some process instead, with no word of it in the log."""
    part = nn.Linear(10, 10, bias=False, device="meta")
    there = STATES_PER_PARAMETER * 100 * 4
    monkeypatch.setattr(announcing, "device_memory", lambda kind: there)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    with pytest.raises(EzpzError, match=said) if said else contextlib.nullcontext():
        announcing._refuse_more_than_the_machine_has([part], of_batch)


def test_a_batch_holds_every_layers_input() -> None:
    """Ids and labels of eight bytes, and inputs in bfloat16: what full checkpointing keeps."""
    model = SimpleNamespace(config=SimpleNamespace(dim=10, layers=[None] * 3))
    training = SimpleNamespace(seq_len=7, local_batch_size=2, global_batch_size=-1)
    parallelism = SimpleNamespace(pipeline_parallel_degree=1)
    held = announcing._bytes_of_batch(model, training=training, parallelism=parallelism)
    assert held == 14 * (2 * 8 + 3 * 10 * 2)
