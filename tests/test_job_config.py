"""A job becomes the trainer's config, unless its settings or the machine exclude it."""

import dataclasses
import operator
from pathlib import Path
from typing import Any

import pytest
import torch

from ezpz_moe.errors import EzpzError
from ezpz_moe.hosts import TITAN_GROUPED_LINEAR, TITAN_MAIN, binding, check_host, generation
from ezpz_moe.job import Job, load_job

check_host()  # before torchtitan is imported: it chooses the device

from torchtitan.components.loss import ChunkedLossWrapper, CrossEntropyLoss  # noqa: E402
from torchtitan.config import ConfigManager  # noqa: E402
from torchtitan.distributed.activation_checkpoint import FullAC, SelectiveAC  # noqa: E402
from torchtitan.models.common.token_dispatcher import DeepEPTokenDispatcher  # noqa: E402
from torchtitan.tools import utils  # noqa: E402
from torchtitan.trainer import Trainer  # noqa: E402

from ezpz_moe.assets import EMBEDDED_TOKENIZER  # noqa: E402
from ezpz_moe.hosts.titan_0_3.conflicts import captures_cuda_graphs  # noqa: E402
from ezpz_moe.hosts.titan_0_3.job import JobConfig, trainer_config  # noqa: E402

dialect = binding("dialect")
IS_MAIN = generation() in (TITAN_MAIN, TITAN_GROUPED_LINEAR)
JOBS = Path(__file__).parents[1] / "flavors" / "jobs"
MODEL = '[model]\nname = "ezpz_moe"\nflavor = "debugmodel_sdpa_for_loop"\n'


@pytest.fixture
def in_training(monkeypatch: pytest.MonkeyPatch):
    """As in a process that torchrun started; mistakes are raised, not printed."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("EZPZ_MOE_DEBUG", "1")


@pytest.fixture(autouse=True)
def _outside_of_training(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("RANK", raising=False)


def conflict(flavor: str = "debugmodel_sdpa", **values: Any) -> str:
    with pytest.raises(EzpzError) as error:
        config(flavor, **values)
    return str(error.value)


def config(flavor: str = "debugmodel_sdpa", **values: Any) -> JobConfig:
    """The host's copy of a job's config; ``training__steps=3`` is ``[training] steps = 3``."""
    keys = {name.replace("__", "."): value for name, value in values.items()}
    return dataclasses.replace(trainer_config(Job(flavor=flavor, values=keys)))


def text(dataloader: Any) -> tuple[str, str | None]:
    """The name and the path of what is trained on."""
    source = dataloader.dataset.dataset.source if IS_MAIN else dataloader
    if not hasattr(source, "dataset"):  # one of the host's own sources
        return source.path, None
    return source.dataset, source.path if IS_MAIN else source.dataset_path


def is_endless(dataloader: Any) -> bool:
    return dataloader.repeat if IS_MAIN else dataloader.infinite


# The config ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(JOBS.glob("*.toml")), ids=lambda path: path.stem)
def test_a_shipped_job_is_valid(path):
    config = trainer_config(load_job(path))
    assert isinstance(config, Trainer.Config)
    assert config.model_spec.flavor in path.read_text()


def test_there_are_shipped_jobs():
    assert {path.stem for path in JOBS.glob("*.toml")} >= {"debug_cpu", "10B_2B_xpu", "16B_h100"}


def test_the_main_job_is_long_enough_to_learn():
    job = load_job(JOBS / "debug_cpu.toml")
    assert job.values["training.steps"] >= 40
    assert job.values["metrics.log_freq"] == 1


def test_the_config_builds_the_stock_trainer():
    assert JobConfig._owner is Trainer


def test_the_defaults_of_our_own():
    ours = config()
    assert ours.training.disable_cuda_graphs is True
    assert ours.hf_assets_path == str(EMBEDDED_TOKENIZER)
    assert isinstance(ours.loss, ChunkedLossWrapper.Config)
    assert isinstance(ours.loss.loss_fn, CrossEntropyLoss.Config)
    assert ours.loss.loss_fn.global_vocab_size == ours.model_spec.model.vocab_size


def test_the_flavors_backend_and_who_chose_it(job_file):
    path = job_file(MODEL)
    experts = trainer_config(load_job(path)).model_spec.model.layers[1].moe.routed_experts
    assert experts.inner_experts.compute_backend == "for_loop"
    assert experts.inner_experts.chosen_by == (
        f"asked for by flavor debugmodel_sdpa_for_loop in {path}"
    )


def test_activation_checkpointing_by_mode():
    assert config(activation_checkpoint__mode="none").activation_checkpoint is None
    full = config(activation_checkpoint__mode="full", activation_checkpoint__debug=True)
    assert full.activation_checkpoint == FullAC.Config(debug=True)
    assert isinstance(config().activation_checkpoint, SelectiveAC.Config)


@pytest.mark.parametrize(
    ("mode", "key", "value"),
    [("full", "memory_budget", 0.5), ("none", "preserve_rng_state", True)],
)
def test_an_option_of_another_checkpointing_mode(mode, key, value):
    values = {"activation_checkpoint__mode": mode, f"activation_checkpoint__{key}": value}
    assert f"[activation_checkpoint] {key} has no effect" in conflict(**values)


def test_the_validation_text_is_its_own(job_file):
    job_file("first paragraph\n\nsecond", "valid.txt")
    path = job_file(
        MODEL + '[validation]\nenable = true\ndataset_path = "valid.txt"\nsteps = 2\nfreq = 5\n'
    )
    config = trainer_config(load_job(path))
    assert text(config.validator.dataloader) == ("text_file", str(path.with_name("valid.txt")))
    assert is_endless(config.validator.dataloader) is False
    assert (config.validator.enable, config.validator.steps, config.validator.freq) == (True, 2, 5)
    assert text(config.dataloader) == ("pydoc_topics", None)
    assert is_endless(config.dataloader)


def test_validation_has_the_hosts_default_text():
    validator = config(validation__enable=True).validator
    assert type(validator.dataloader) is type(Trainer.Config().validator.dataloader)
    assert "c4" in str(text(validator.dataloader))


def test_the_token_dispatcher_is_chosen_by_the_job():
    deepep = config("debugmodel", parallelism__expert_parallel_comm_backend="deepep")
    experts = deepep.model_spec.model.layers[1].moe.routed_experts
    assert isinstance(experts.token_dispatcher, DeepEPTokenDispatcher.Config)


def test_a_flavor_next_to_the_job(job_file):
    job_file('inherits = "debugmodel"\nn_layers = 2\n', "mine.toml")
    path = job_file('[model]\nname = "ezpz_moe"\nflavor = "mine_sdpa"\n')
    assert len(trainer_config(load_job(path)).model_spec.model.layers) == 2


def test_a_file_that_is_read_is_resolved_and_a_folder_that_is_written_is_not(tmp_path):
    (tmp_path / "assets").mkdir()
    (tmp_path / "step-1").mkdir()
    values = {
        "model.hf_assets_path": "assets",
        "job.dump_folder": "out",
        "checkpoint.initial_load_path": "step-1",
    }
    job = Job(flavor="debugmodel", path=tmp_path / "job.toml", values=values)
    config = trainer_config(job)
    assert config.hf_assets_path == str(tmp_path / "assets")
    assert config.checkpoint.initial_load_path == str(tmp_path / "step-1")
    assert config.dump_folder == "out"


# Conflicts ------------------------------------------------------------------------------------


def test_cuda_graphs_and_a_backend_that_copies_to_the_host():
    message = conflict("debugmodel_sdpa_for_loop", training__disable_cuda_graphs=False)
    assert message.startswith("flavor debugmodel_sdpa_for_loop: training.disable_cuda_graphs")
    assert "'for_loop' copies token counts to the host" in message
    assert config("debugmodel", training__disable_cuda_graphs=False)


@pytest.mark.parametrize(
    "values",
    [{"expert_parallel_degree": 2}, {"pipeline_parallel_degree": 2}],
    ids=["expert parallel", "pipeline parallel"],
)
def test_cuda_graphs_and_what_the_host_cannot_capture(values):
    values = {f"parallelism__{key}": value for key, value in values.items()}
    message = conflict("debugmodel", training__disable_cuda_graphs=False, **values)
    (key,) = values
    assert f"does not go with {key.replace('__', '.')} = 2" in message
    assert message.count("training.disable_cuda_graphs = false") == 1


def test_the_host_captures_on_nvidia_alone(monkeypatch):
    graphs = config("debugmodel", training__disable_cuda_graphs=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "hip", None)
    for device, captured in (("cuda", True), ("xpu", False), ("cpu", False)):
        monkeypatch.setattr(utils, "device_type", device)
        assert captures_cuda_graphs(graphs) is captured
    monkeypatch.setattr(utils, "device_type", "cuda")
    assert not captures_cuda_graphs(config("debugmodel"))
    monkeypatch.setattr(torch.version, "hip", "6.0")
    assert not captures_cuda_graphs(graphs)


@pytest.mark.parametrize(("degree", "nearest"), [(3, "2 and 4"), (16, "8")])
def test_experts_that_expert_parallelism_cannot_divide(degree, nearest):
    message = conflict(parallelism__expert_parallel_degree=degree)
    assert f"expert_parallel_degree = {degree} does not divide the 8 experts" in message
    assert f"'debugmodel_sdpa'. The nearest that do: {nearest}." in message


@pytest.mark.parametrize(
    "target",
    ["ezpz_moe.overrides.experts", "torchtitan.overrides.fused_swiglu.fused_grouped_experts"],
)
def test_overrides_of_experts_that_have_a_backend(target):
    assert f"override.imports {target}: " in conflict(override__imports=[target])
    with_arguments = config()
    with_arguments.override.imports.append((target, {"compute_backend": "for_loop"}))
    with_arguments.handed_over = False
    with pytest.raises(EzpzError, match="Remove the override"):
        dataclasses.replace(with_arguments)


def test_other_overrides_are_the_hosts_affair():
    target = "torchtitan.overrides.fused_swiglu.fused_swiglu"
    assert config(override__imports=[target]).override.imports == [target]


def test_a_sequence_beyond_the_models_positions():
    assert f"its RoPE ends at {dialect.LONGEST} = 16384" in conflict(training__seq_len=16384 + 8)


@pytest.mark.parametrize(
    ("values", "multiple"),
    [
        ({"training__seq_len": 100}, 8),
        ({"training__seq_len": 104, "parallelism__context_parallel_degree": 2}, 16),
        ({"training__seq_len": 100, "loss__num_chunks": 3}, 3),
    ],
)
def test_a_sequence_that_the_loss_cannot_cut(values, multiple):
    message = conflict(training__local_batch_size=1, **values)
    assert f"Choose a multiple of {multiple}." in message


def test_an_unknown_pipeline_schedule():
    message = conflict(parallelism__pipeline_parallel_schedule="2F2B")
    assert "parallelism.pipeline_parallel_schedule: Unknown schedule name '2F2B'" in message


def test_a_setting_that_the_host_refuses():
    message = conflict(checkpoint__keep_latest_k=1)
    assert message.startswith("flavor debugmodel_sdpa: checkpoint: torchtitan refuses a setting: ")
    message = conflict(activation_checkpoint__mode="memory_budget")
    assert "Memory budget activation checkpointing requires the model to be compiled" in message


# Conflicts with the machine -------------------------------------------------------------------


def test_a_job_for_another_machine_can_be_looked_at(monkeypatch):
    monkeypatch.setattr(utils, "device_type", "cpu")
    assert config("16B", model__hf_assets_path="/nowhere")


def test_attention_without_a_backward_on_the_cpu(monkeypatch, in_training):
    monkeypatch.setattr(utils, "device_type", "cpu")
    assert "Use flavor debugmodel_sdpa." in conflict("debugmodel")
    assert "Use flavor debugmodel_sdpa_for_loop." in conflict("debugmodel_for_loop")
    assert "Use flavor debugmodel_sdpa." in conflict("debugmodel_flex")
    assert "Use flavor debugmodel_sdpa_for_loop." in conflict("debugmodel_flex_for_loop")
    assert config("debugmodel_sdpa")


def test_expert_parallelism_on_the_cpu(monkeypatch, in_training, caplog):
    caplog.set_level("INFO")
    monkeypatch.setattr(utils, "device_type", "cpu")
    monkeypatch.setenv("WORLD_SIZE", "2")
    chosen = config(parallelism__expert_parallel_degree=2)
    assert chosen.parallelism.spmd_backend == "partial_dtensor"
    assert 'parallelism.spmd_backend = "partial_dtensor"' in caplog.text
    caplog.clear()
    assert config().parallelism.spmd_backend == Trainer.Config().parallelism.spmd_backend
    values = {"parallelism__expert_parallel_degree": 2}
    chosen = config(parallelism__spmd_backend="partial_dtensor", **values)
    assert chosen.parallelism.spmd_backend == "partial_dtensor"
    assert "partial_dtensor" not in caplog.text
    message = conflict(parallelism__spmd_backend="spmd_types", **values)
    assert 'Set parallelism.spmd_backend to "partial_dtensor".' in message


def test_expert_parallelism_elsewhere_is_as_the_host_has_it(monkeypatch):
    monkeypatch.setattr(utils, "device_type", "cuda")
    default = Trainer.Config().parallelism.spmd_backend
    assert config(parallelism__expert_parallel_degree=2).parallelism.spmd_backend == default


def test_a_memory_snapshot_on_the_cpu(monkeypatch, in_training):
    monkeypatch.setattr(utils, "device_type", "cpu")
    assert "enable_memory_snapshot" in conflict(profiling__enable_memory_snapshot=True)


@pytest.mark.parametrize(
    ("ranks", "values"),
    [
        (1, {"tensor_parallel_degree": 2}),
        (4, {"data_parallel_shard_degree": 2}),
        (6, {"tensor_parallel_degree": 4}),
    ],
)
def test_ranks_that_do_not_fit_the_degrees(monkeypatch, in_training, ranks, values):
    monkeypatch.setattr(utils, "device_type", "cpu")
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    message = conflict(**{f"parallelism__{key}": value for key, value in values.items()})
    assert f"{ranks} ranks do not fit the degrees" in message


def test_a_dry_run_stands_for_as_many_ranks_as_the_host_is_told(monkeypatch, in_training):
    monkeypatch.setattr(utils, "device_type", "cpu")
    dry_run = {"comm__mode": "fake_backend", "parallelism__tensor_parallel_degree": 2}
    monkeypatch.setenv("NGPU", "4")
    assert config("debugmodel", **dry_run), "what this machine cannot run is no conflict"
    monkeypatch.setenv("NGPU", "3")
    assert "3 ranks do not fit the degrees" in conflict("debugmodel", **dry_run)


def test_ranks_that_expert_parallelism_cannot_divide(monkeypatch, in_training):
    monkeypatch.setattr(utils, "device_type", "cpu")
    monkeypatch.setenv("WORLD_SIZE", "4")
    two = {"parallelism__pipeline_parallel_degree": 2}
    assert "the 2 ranks" in conflict(parallelism__expert_parallel_degree=4, **two)
    assert config(parallelism__expert_parallel_degree=2, **two)


def test_a_global_batch_that_the_ranks_cannot_share(monkeypatch, in_training):
    monkeypatch.setattr(utils, "device_type", "cpu")
    monkeypatch.setenv("WORLD_SIZE", "2")
    sizes = {"training__local_batch_size": 4, "training__seq_len": 8}
    unit = 8 if IS_MAIN else 1
    message = conflict(training__global_batch_size=12, **sizes)
    assert f"{dialect.STEP} = {12 * unit} is no multiple of {8 * unit}" in message
    assert config(training__global_batch_size=16, **sizes)


def test_a_tokenizer_that_is_not_there(monkeypatch, in_training, tmp_path):
    monkeypatch.setattr(utils, "device_type", "cpu")
    assert "holds no tokenizer" in conflict(model__hf_assets_path=str(tmp_path))


def test_a_checkpoint_that_is_not_there(monkeypatch, in_training, tmp_path):
    monkeypatch.setattr(utils, "device_type", "cpu")
    missing = str(tmp_path / "step-9")
    assert f"{missing!r} does not exist" in conflict(checkpoint__initial_load_path=missing)


def test_a_backend_that_the_machine_cannot_run_gives_all_reasons(monkeypatch, in_training):
    from ezpz_moe.compute import get_backend

    monkeypatch.setattr(utils, "device_type", "cpu")
    asked = []

    def why_not(self, device, dtype, *, dims=()):
        asked.append((str(device), dtype, tuple(dims)))
        return ["too hot", "too cold"]

    monkeypatch.setattr(type(get_backend("for_loop")), "why_not", why_not)
    message = conflict("debugmodel_sdpa_for_loop")
    assert "compute_backend 'for_loop' cannot run on cpu: too hot." in message
    assert "too cold." in message
    assert asked == [("cpu", torch.bfloat16, (256,))]


def test_the_stock_trainer_without_an_accelerator(monkeypatch, in_training):
    monkeypatch.setattr(torch._utils, "_get_available_device_type", lambda: None)
    monkeypatch.setattr(utils, "device_type", "cuda")
    assert "this machine has no accelerator" in conflict("debugmodel_sdpa")


def value_at(config: Any, path: str) -> Any:
    return operator.attrgetter(path)(config)


# The host's command line ----------------------------------------------------------------------


def command_line(path: Path, *flags: str) -> Trainer.Config:
    return ConfigManager().parse_args(["--module", "ezpz_moe", "--config", str(path), *flags])


def test_flags_override_the_job(job_file):
    path = job_file(MODEL + "[training]\nsteps = 7\nseq_len = 64\n")
    config = command_line(path, "--training.steps", "3", "--optimizer.implementation", "for-loop")
    assert (config.training.steps, value_at(config, dialect.LENGTH)) == (3, 64)
    assert config.optimizer.implementation == "for-loop"
    assert isinstance(config, JobConfig)
    assert config.model_spec.flavor == "debugmodel_sdpa_for_loop"


def test_a_flag_mends_a_conflict_of_the_job(job_file, in_training, monkeypatch):
    monkeypatch.setattr(utils, "device_type", "cpu")
    path = job_file(MODEL + "[parallelism]\nexpert_parallel_degree = 3\n")
    mended = command_line(path, "--parallelism.expert_parallel_degree", "1")
    assert mended.parallelism.expert_parallel_degree == 1
    with pytest.raises(EzpzError, match="does not divide the 8 experts"):
        command_line(path)


def test_a_conflict_made_by_a_flag_is_one_message_and_exit_code_2(job_file, capsys):
    path = job_file(MODEL)
    with pytest.raises(SystemExit) as stop:
        command_line(path, "--parallelism.expert_parallel_degree", "3")
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith(f"ezpz-moe: error: {path} and the command line: ")
    assert "does not divide" in message
    assert message.count("ezpz-moe: error") == 1


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("--training.steps", "0", "training.steps = 0: must be an integer >= 1."),
        ("--checkpoint.load_step", "-2", "checkpoint.load_step = -2: must be an integer >= -1."),
        ("--parallelism.expert_parallel_degree", "0", "expert_parallel_degree = 0: must be"),
        ("--lr_scheduler.decay_ratio", "1.5", "lr_scheduler.decay_ratio = 1.5: must be a number"),
    ],
)
def test_a_flag_out_of_range_is_one_message_and_exit_code_2(job_file, capsys, flag, value, message):
    with pytest.raises(SystemExit) as stop:
        command_line(job_file(MODEL), flag, value)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_a_job_with_a_mistake_is_one_message_and_exit_code_2(job_file, capsys):
    with pytest.raises(SystemExit) as stop:
        command_line(job_file(MODEL + "[training]\nstepz = 3\n"))
    assert stop.value.code == 2
    assert "Did you mean 'steps'?" in capsys.readouterr().err


def test_the_host_refuses_after_its_command_line_too(job_file, capsys):
    flags = ["--parallelism.pipeline_parallel_degree", "2", "--debug.spmd_typechecking"]
    with pytest.raises(SystemExit) as stop:
        command_line(job_file(MODEL), *flags)
    assert stop.value.code == 2
    assert "torchtitan refuses a setting" in capsys.readouterr().err
