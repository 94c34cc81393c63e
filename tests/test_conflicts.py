"""Settings that exclude each other, or the machine, and what is said of them."""

import dataclasses

import pytest
import torch
from config_cases import config, conflict
from text_cases import special_token, tokenizer_with

from ezpz_moe.errors import EzpzError
from ezpz_moe.hosts.detect import check_host, host
from ezpz_moe.hosts.job_files import largest_token_id
from ezpz_moe.hosts.titan.base import titan
from ezpz_moe.hosts.titan.v2026_08 import Titan2026_08

check_host()  # before torchtitan is imported: it chooses the device

from torchtitan.tools import utils  # noqa: E402
from torchtitan.trainer import Trainer  # noqa: E402

from ezpz_moe.hosts.titan.conflicts import captures_cuda_graphs  # noqa: E402

dialect = titan()
SINCE_2026_08 = isinstance(host(), Titan2026_08)


# With another setting -------------------------------------------------------------------------


def test_cuda_graphs_and_a_backend_that_copies_to_the_host():
    message = conflict("debugmodel_sdpa_for_loop", training__disable_cuda_graphs=False)
    assert message.startswith("flavor debugmodel_sdpa_for_loop: training.disable_cuda_graphs")
    assert "'for_loop' copies token counts to the host" in message
    assert config("debugmodel", training__disable_cuda_graphs=False)


def test_a_run_that_is_longer_than_its_schedule():
    message = conflict(training__steps=11, lr_scheduler__total_steps=10)
    assert "lr_scheduler.total_steps = 10 is less than training.steps = 11" in message
    assert config(training__steps=10, lr_scheduler__total_steps=10)


def test_after_the_end_of_its_schedule_the_host_has_no_rate():
    """Why it is refused. The rate after ten steps is that of the eleventh."""
    told = config(training__steps=10, lr_scheduler__warmup_steps=2)
    assert host().learning_rate(told, 10) == 0
    assert host().learning_rate(told, 11) < 0
    told.lr_scheduler.decay_type = "cosine"
    assert host().learning_rate(told, 11) > 0
    told.lr_scheduler.warmup_steps = 10
    with pytest.raises(AssertionError, match="decay_steps must not be zero"):
        host().learning_rate(told, 11)


@pytest.mark.parametrize(
    "values",
    [{"expert_parallel_degree": 2}, {"pipeline_parallel_degree": 2}],
    ids=["expert parallel", "pipeline parallel"],
)
def test_cuda_graphs_and_what_the_host_cannot_capture(values):
    values = {f"parallelism__{key}": value for key, value in values.items()}
    message = conflict("debugmodel", training__disable_cuda_graphs=False, **values)
    (key,) = values
    assert f"cannot be combined with {key.replace('__', '.')} = 2" in message
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


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"training__local_batch_size": 2**40}, "training.local_batch_size = 1099511627776: "),
        ({"compile__backend": "nope"}, "compile.backend = 'nope': torch.compile has no such"),
    ],
)
def test_what_no_machine_can_run(values, said):
    assert said in conflict("debugmodel", **values)


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


@pytest.fixture
def watched(tmp_path, monkeypatch):
    (tmp_path / "watched.toml").write_text('inherits = "debugmodel"\n[telemetry]\nevery = 15\n')
    monkeypatch.setenv("EZPZ_MOE_FLAVORS", str(tmp_path))


@pytest.mark.usefixtures("watched")
def test_a_cadence_of_telemetry_that_the_hosts_logging_cannot_meet():
    message = conflict("watched_sdpa", metrics__log_freq=10)
    assert (
        "'watched_sdpa': [telemetry] every = 15 must be a multiple of metrics.log_freq" in message
    )
    assert "Set metrics.log_freq to 5, or every to a multiple of 10." in message
    assert config("watched_sdpa").metrics.log_freq == 5  # a divisor of the host's own, 10


def test_dumps_that_the_hosts_logging_or_a_cuda_graph_cannot_meet(tmp_path, monkeypatch):
    text = 'inherits = "debugmodel"\n[telemetry]\ndump = { every = 15, what = ["ids"] }\n'
    (tmp_path / "dumped.toml").write_text(text)
    monkeypatch.setenv("EZPZ_MOE_FLAVORS", str(tmp_path))
    message = conflict("dumped_sdpa", metrics__log_freq=10)
    assert "'dumped_sdpa': [telemetry] dump.every = 15 must be a multiple of metrics" in message
    assert "Set metrics.log_freq to 5, or dump.every to a multiple of 10." in message
    assert config("dumped_sdpa").metrics.log_freq == 5
    message = conflict("dumped_sdpa", training__disable_cuda_graphs=False)
    assert "[telemetry] dump copies the routing to the host, which a CUDA graph cannot" in message


@pytest.mark.usefixtures("watched")
def test_pictures_for_loggers_that_the_host_does_not_let_us_find(monkeypatch):
    """Not silently none: they are found by an attribute of the host's own."""
    from torchtitan.components.metrics import LoggerContainer

    def renamed(self) -> None:
        self.all_loggers = []

    monkeypatch.setattr(LoggerContainer, "__init__", renamed)
    message = conflict("watched_sdpa", metrics__log_freq=5, metrics__enable_tensorboard=True)
    assert "LoggerContainer, but its __init__ sets no _loggers. Set images = false" in message
    assert config("watched_sdpa", metrics__log_freq=5)


def test_an_override_that_is_named_twice():
    target = "torchtitan.overrides.fused_swiglu.fused_swiglu"
    message = conflict(override__imports=[target, target])
    assert message.endswith(f"override.imports {target}: named 2 times. Name it once.")


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


# With the machine -----------------------------------------------------------------------------


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


@pytest.mark.parametrize(
    ("file", "attention", "said"),
    [
        ("mini_flex.toml", "flex", "Use flavor mini_flex_sdpa."),
        ("mini_sdpa.toml", "flex", "Use flavor mini_sdpa_sdpa."),
        ("mini.toml", "flex", 'Use a flavor with attention = "sdpa".'),
    ],
)
def test_only_a_flavor_that_exists_is_named(
    file, attention, said, monkeypatch, in_training, tmp_path
):
    """The end of a file's name is no suffix; and the variant's name may be a file's."""
    monkeypatch.setattr(utils, "device_type", "cpu")
    monkeypatch.setenv("EZPZ_MOE_FLAVORS", str(tmp_path))
    for name in {file, "mini_sdpa.toml"}:
        (tmp_path / name).write_text(f'inherits = "debugmodel"\nattention = "{attention}"\n')
    assert said in conflict(file.removesuffix(".toml"))


def test_attention_that_text_never_calls(monkeypatch, in_training, tmp_path):
    """A vision encoder's: its flavor with SDPA was told to use itself."""
    monkeypatch.setattr(utils, "device_type", "cpu")
    monkeypatch.setenv("EZPZ_MOE_FLAVORS", str(tmp_path))
    (tmp_path / "kimi.toml").write_text('base = "kimi_k2_7/debugmodel"\n')
    assert "Use flavor kimi_sdpa_for_loop." in conflict("kimi_for_loop")
    assert config("kimi_sdpa_for_loop")


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


@pytest.mark.skipif(SINCE_2026_08, reason="this host counts a batch in tokens")
def test_parts_of_several_sequences_in_a_pipeline_on_the_cpu(monkeypatch, in_training):
    """gloo refuses what torch's pipeline would receive: "input tensor has to be contiguous"."""
    monkeypatch.setattr(utils, "device_type", "cpu")
    monkeypatch.setenv("WORLD_SIZE", "4")
    values = {
        "parallelism__tensor_parallel_degree": 2,
        "parallelism__pipeline_parallel_degree": 2,
        "parallelism__pipeline_parallel_microbatch_size": 2,
        "training__local_batch_size": 4,
    }
    assert config(**values).parallelism.spmd_backend == "partial_dtensor"
    message = conflict(parallelism__spmd_backend="spmd_types", **values)
    assert "pipeline_parallel_microbatch_size = 2 with tensor parallelism on the CPU" in message
    for key, value in (
        ("parallelism__pipeline_parallel_microbatch_size", 1),
        ("parallelism__enable_sequence_parallel", False),
        ("parallelism__tensor_parallel_degree", 1),
    ):
        chosen = config(**values | {key: value, "parallelism__data_parallel_shard_degree": -1})
        assert chosen.parallelism.spmd_backend == "spmd_types"


def test_expert_parallelism_elsewhere_is_as_the_host_has_it(monkeypatch):
    monkeypatch.setattr(utils, "device_type", "cuda")
    default = Trainer.Config().parallelism.spmd_backend
    assert config(parallelism__expert_parallel_degree=2).parallelism.spmd_backend == default


@pytest.mark.parametrize("spmd_backend", ["spmd_types", "full_dtensor"])
def test_sdpa_of_a_sequence_that_ranks_share(spmd_backend):
    """The host refuses it too, when the model is parallelized."""
    values = {"context_parallel_degree": 2, "spmd_backend": spmd_backend}
    keys = {f"parallelism__{key}": value for key, value in values.items()}
    message = conflict(**keys)
    assert "context_parallel_degree = 2 cannot be combined with the SDPA of flavor" in message
    assert f'spmd_backend = {spmd_backend!r}. Set the latter to "partial_dtensor"' in message
    assert config("debugmodel", **keys), "FlexAttention"
    assert config(**keys | {"parallelism__spmd_backend": "partial_dtensor"})


@pytest.mark.skipif(SINCE_2026_08, reason="this host counts a batch in tokens")
def test_microbatches_that_a_pipeline_lacks():
    """torch refuses them too, when the pipeline is built."""
    values = {"parallelism__pipeline_parallel_degree": 2, "training__local_batch_size": 3}
    sized = values | {"parallelism__pipeline_parallel_microbatch_size": 3}
    message = conflict(**sized)
    assert "local_batch_size = 3 and parallelism.pipeline_parallel_microbatch_size = 3" in message
    assert "make 1 microbatches, but schedule 1F1B needs one for each of" in message
    assert config(**sized | {"parallelism__pipeline_parallel_schedule": "GPipe"})
    assert config(**values | {"parallelism__pipeline_parallel_microbatch_size": 1})
    message = conflict(**values | {"parallelism__pipeline_parallel_microbatch_size": 2})
    assert "microbatch_size = 2: the one must be a multiple of the other" in message


def test_balance_that_is_forced_on_distributed_scores():
    """The host fails in its router: plain numbers of experts look up scores that are no tensors."""
    values = {"debug__moe_force_load_balance": True, "parallelism__tensor_parallel_degree": 2}
    message = conflict(parallelism__spmd_backend="partial_dtensor", **values)
    assert "debug.moe_force_load_balance = true cannot be combined with" in message
    assert "spmd_backend = 'partial_dtensor'. Set the latter to \"spmd_types\"" in message
    assert config(parallelism__spmd_backend="spmd_types", **values)
    values["parallelism__tensor_parallel_degree"] = 1
    assert config(parallelism__spmd_backend="partial_dtensor", **values)


def test_a_sequence_shared_by_cpus(monkeypatch, in_training):
    monkeypatch.setattr(utils, "device_type", "cpu")
    monkeypatch.setenv("WORLD_SIZE", "2")
    message = conflict(
        parallelism__context_parallel_degree=2, parallelism__spmd_backend="partial_dtensor"
    )
    assert "context_parallel_degree = 2: on CPUs, torch cannot compute attention" in message


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
    assert config("debugmodel", **dry_run), "what this machine cannot run is not a conflict"
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
    unit = 8 if SINCE_2026_08 else 1
    message = conflict(training__global_batch_size=12, **sizes)
    assert f"{dialect.STEP} = {12 * unit} is not a multiple of {8 * unit}" in message
    assert config(training__global_batch_size=16, **sizes)


def test_a_tokenizer_that_is_not_there(monkeypatch, in_training, tmp_path):
    monkeypatch.setattr(utils, "device_type", "cpu")
    assert "has no tokenizer" in conflict(model__hf_assets_path=str(tmp_path))


def test_a_tokenizer_with_more_ids_than_the_model(monkeypatch, in_training, tmp_path):
    """Added tokens and special ones count: the host's loader adds those of the config's file."""
    monkeypatch.setattr(utils, "device_type", "cpu")
    folder = tokenizer_with(tmp_path / "more", *(f"<extra {i}>" for i in range(955)))
    said = conflict(model__hf_assets_path=str(folder))
    assert f"hf_assets_path = {str(folder)!r}: its tokenizer can give the token ID 3002" in said
    assert "'debugmodel_sdpa' has a vocabulary of 2048, so its last ID is 2047" in said
    assert "vocab_size is at least 3003" in said
    monkeypatch.setenv("NGPU", "4")
    dry_run = {"comm__mode": "fake_backend", "model__hf_assets_path": str(folder)}
    assert "can give the token ID 3002" in conflict(**dry_run)
    special_token(same := tokenizer_with(tmp_path / "same"), "<pad>")
    assert "can give the token ID 2048" in conflict(model__hf_assets_path=str(same))
    assert config(model__hf_assets_path=str(tokenizer_with(tmp_path / "fits")))


def test_a_tokenizer_that_cannot_be_read(monkeypatch, in_training, tmp_path):
    monkeypatch.setattr(utils, "device_type", "cpu")
    (tmp_path / "tokenizer.json").write_text('{"version": ')
    assert "its tokenizer cannot be read: " in conflict(model__hf_assets_path=str(tmp_path))


def test_an_id_beyond_a_gap_is_the_largest():
    class Sparse:
        def get_vocab(self):
            return {"a": 0, "b": 7}

        def get_vocab_size(self):
            return 2

    class OnlyItsSize:
        get_vocab_size = Sparse.get_vocab_size

    assert largest_token_id(Sparse()) == 7
    assert largest_token_id(OnlyItsSize()) == 1


def test_a_checkpoint_that_is_not_there(monkeypatch, in_training, tmp_path):
    monkeypatch.setattr(utils, "device_type", "cpu")
    missing = str(tmp_path / "step-9")
    assert f"{missing!r} does not exist" in conflict(checkpoint__initial_load_path=missing)


@pytest.mark.parametrize(
    ("cpu", "dtype"), [("float32,bfloat16", torch.bfloat16), ("float32", torch.float32)]
)
def test_a_backend_that_the_machine_cannot_run_gives_all_reasons(
    monkeypatch, in_training, cpu_with, cpu, dtype
):
    from ezpz_moe.compute import get_backend

    monkeypatch.setattr(utils, "device_type", "cpu")
    asked = []

    def why_not(self, device, dtype, *, dims=()):
        asked.append((str(device), dtype, tuple(dims)))
        return ["too hot", "too cold"]

    monkeypatch.setattr(type(get_backend("for_loop")), "why_not", why_not)
    cpu_with(cpu)
    message = conflict("debugmodel_sdpa_for_loop")
    assert "compute_backend 'for_loop' cannot run on cpu: too hot." in message
    assert "too cold." in message
    assert asked == [("cpu", dtype, (256,))]


def test_the_stock_trainer_without_an_accelerator(monkeypatch, in_training):
    monkeypatch.setattr(torch._utils, "_get_available_device_type", lambda: None)
    monkeypatch.setattr(utils, "device_type", "cuda")
    assert "this machine has no accelerator" in conflict("debugmodel_sdpa")


@pytest.mark.skipif(SINCE_2026_08, reason="shown for torchtitan 0.3")
def test_a_gradient_that_the_host_adds_up_twice_is_said():
    """See findings/torchtitan_gpt_oss_doubles_a_bias_gradient.sh."""
    split = {"parallelism__tensor_parallel_degree": 2, "parallelism__spmd_backend": "spmd_types"}

    def said(flavor: str, **values) -> list[str]:
        return [each for each in host().remarks(config(flavor, **values)) if "mlp2_bias_ED" in each]

    (remark,) = said("gpt_oss_debugmodel_sdpa", **split)
    assert 'spmd_backend = "partial_dtensor"' in remark
    right = split | {"parallelism__spmd_backend": "partial_dtensor"}
    assert not said("gpt_oss_debugmodel_sdpa", **right)
    assert not said("gpt_oss_debugmodel_sdpa")
    assert not said("debugmodel_sdpa", **split)
