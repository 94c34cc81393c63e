"""A job becomes the trainer's config, on its own and by the host's command line."""

import operator
from pathlib import Path
from typing import Any

import pytest
from config_cases import config, conflict

from ezpz_moe.config.job import Job
from ezpz_moe.config.telemetry_schema import Telemetry
from ezpz_moe.errors import DEBUG_VARIABLE, EzpzError
from ezpz_moe.hosts.detect import check_host, host
from ezpz_moe.hosts.jobs import load_job
from ezpz_moe.hosts.titan.base import titan
from ezpz_moe.hosts.titan.v2026_08 import Titan2026_08

check_host()  # before torchtitan is imported: it chooses the device

from torchtitan.components.loss import ChunkedLossWrapper, CrossEntropyLoss  # noqa: E402
from torchtitan.config import ConfigManager  # noqa: E402
from torchtitan.distributed.activation_checkpoint import FullAC, SelectiveAC  # noqa: E402
from torchtitan.models.common.token_dispatcher import DeepEPTokenDispatcher  # noqa: E402
from torchtitan.tools import utils  # noqa: E402
from torchtitan.trainer import Trainer  # noqa: E402

from ezpz_moe.config.assets import EMBEDDED_TOKENIZER  # noqa: E402
from ezpz_moe.hosts.titan.job import JobConfig, trainer_config  # noqa: E402

dialect = titan()
SINCE_2026_08 = isinstance(host(), Titan2026_08)
JOBS = Path(__file__).parents[1] / "flavors" / "jobs"
MODEL = '[model]\nname = "ezpz_moe"\nflavor = "debugmodel_sdpa_for_loop"\n'


def text(dataloader: Any) -> tuple[str, str | None]:
    """The name and the path of what is trained on."""
    source = dataloader.dataset.dataset.source if SINCE_2026_08 else dataloader
    if not hasattr(source, "dataset"):  # one of the host's own sources
        return source.path, None
    return source.dataset, source.path if SINCE_2026_08 else source.dataset_path


def value_at(config: Any, path: str) -> Any:
    return operator.attrgetter(path)(config)


def is_endless(dataloader: Any) -> bool:
    return dataloader.repeat if SINCE_2026_08 else dataloader.infinite


# Telemetry ----------------------------------------------------------------------------------------


def of_telemetry(job_file, lines: str, flavor: str = "") -> Any:
    """The telemetry of a job with these lines, whose flavor says ``flavor`` of its own."""
    job_file(f'inherits = "debugmodel"\n{flavor}', "mine.toml")
    model = MODEL.replace("debugmodel", "mine")
    return trainer_config(load_job(job_file(f"{model}{lines}"))).metrics.telemetry


def test_a_job_has_its_routers_reported(job_file):
    watched = of_telemetry(job_file, '[telemetry]\ndetail = "per_layer"\n')
    assert (watched.detail, watched.images) == ("per_layer", True)


def test_a_jobs_telemetry_is_over_its_flavors_key_by_key(job_file):
    flavor = '[telemetry]\nevery = 5\nimages = false\ndump = { every = 10, what = ["ids"] }\n'
    watched = of_telemetry(job_file, "[telemetry]\nevery = 10\nalert_cv_rise = 3.0\n", flavor)
    assert (watched.every, watched.images, watched.alert_cv_rise) == (10, False, 3.0)
    assert watched.dump.every == 10


def test_every_key_of_a_flavors_telemetry_but_its_table_is_a_jobs():
    assert host().job_keys()["telemetry"].keys() == Telemetry.model_fields.keys() - {"dump"}


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("[telemetry]\n", "[telemetry]: is empty. Set a key of it"),
        ("[telemetry]\nevery = 0\n", "[telemetry] every = 0: must be an integer >= 1"),
        ('[telemetry]\ndetails = "brief"\n', "Did you mean 'detail'?"),
    ],
)
def test_a_wrong_table_of_telemetry(job_file, lines, message):
    with pytest.raises(EzpzError) as error:
        load_job(job_file(f"{MODEL}{lines}"))
    assert message in str(error.value)


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
    assert config().activation_checkpoint.experts is None  # what fits, once the model is there


@pytest.mark.parametrize(
    ("mode", "key", "value"),
    [
        *(("full", "memory_budget", 0.5), ("none", "preserve_rng_state", True)),
        ("full", "experts", "save"),
    ],
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


@pytest.mark.parametrize("file", [None, "own.txt"])
def test_validation_reads_the_training_text_unless_the_job_names_one(job_file, file):
    """Whether enabled here or by a flag: a job that trains offline asks no hub."""
    job_file("first paragraph\n\nsecond", "own.txt")
    training = f'[training]\ndataset_path = "{file}"\n' if file else ""
    config = trainer_config(load_job(job_file(MODEL + training)))
    assert text(config.validator.dataloader) == text(config.dataloader)
    assert config.training_text == config.validator.dataloader
    assert is_endless(config.validator.dataloader) is False


def test_a_training_on_the_hosts_text_keeps_the_hosts_validation():
    validator = config(validation__enable=True, training__dataset="c4").validator
    assert type(validator.dataloader) is type(Trainer.Config().validator.dataloader)
    assert "c4" in str(text(validator.dataloader))


def test_the_token_dispatcher_is_chosen_by_the_job():
    keys = {"expert_parallel_comm_backend": "deepep", "expert_parallel_degree": 2}
    deepep = config("debugmodel", **{f"parallelism__{key}": value for key, value in keys.items()})
    experts = deepep.model_spec.model.layers[1].moe.routed_experts
    assert isinstance(experts.token_dispatcher, DeepEPTokenDispatcher.Config)


def test_a_flavor_next_to_the_job(job_file):
    job_file('inherits = "debugmodel"\nn_layers = 2\n', "mine.toml")
    path = job_file('[model]\nname = "ezpz_moe"\nflavor = "mine_sdpa"\n')
    assert len(trainer_config(load_job(path)).model_spec.model.layers) == 2


@pytest.mark.parametrize(
    ("backend", "message"),
    [
        ("for_loop(foo=1)", "for_loop has no option 'foo'"),
        ("auto(among='for_lop')", "unknown compute_backend 'for_lop'"),
    ],
)
def test_a_mistake_in_a_backends_options_names_the_flavors_file(job_file, backend, message):
    mine = job_file(f'inherits = "debugmodel"\ncompute_backend = "{backend}"\n', "mine.toml")
    path = job_file('[model]\nname = "ezpz_moe"\nflavor = "mine_sdpa"\n')
    with pytest.raises(EzpzError) as refused:
        trainer_config(load_job(path))
    said = str(refused.value)
    assert said.startswith(f"{mine}: compute_backend ")
    assert backend in said
    assert message in said


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


@pytest.mark.parametrize("is_a_flag", [True, False])
def test_a_conflict_is_one_message_and_exit_code_2(
    job_file, in_training, monkeypatch, capsys, is_a_flag
):
    monkeypatch.setenv(DEBUG_VARIABLE, "0")
    path = job_file(MODEL + "[parallelism]\nexpert_parallel_degree = 3\n" * (not is_a_flag))
    with pytest.raises(SystemExit) as stop:
        command_line(path, *["--parallelism.expert_parallel_degree", "3"] * is_a_flag)
    assert stop.value.code == 2
    message = capsys.readouterr().err
    flags = " and the command line" if is_a_flag else ""
    assert message.startswith(f"ezpz-moe: error: {path}{flags}:")
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
