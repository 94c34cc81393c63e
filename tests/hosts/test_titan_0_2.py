"""What is special to torchtitan 0.2: its TOML and command line, its mistakes, its router.

On another host these do not run, except for those of the table of keys, which need no host.
"""

import dataclasses
import logging
import os
import subprocess
from pathlib import Path
from pydoc_data.topics import topics

import fork_server
import pytest
import torch
from quantized_weights import WRAPPERS, wrap_weights
from trainer_runs import TORCHRUN

from ezpz_moe.config.flavors import load_flavor
from ezpz_moe.config.job import allowed
from ezpz_moe.config.keys import Key
from ezpz_moe.errors import EzpzError
from ezpz_moe.hosts.detect import check_host, host
from ezpz_moe.hosts.installed import host_name
from ezpz_moe.hosts.titan_0_2.moe_models import MOE_MODELS
from ezpz_moe.hosts.titan_0_2.since_0_3 import refuse_later_keys
from ezpz_moe.hosts.titan_0_2.v0_2 import Titan02
from ezpz_moe.tools.convert_model import new_model

check_host()  # before torchtitan is imported: it chooses the device

JOBS = Path(__file__).parents[2] / "flavors" / "jobs"
KEYS_0_2 = Titan02().job_keys()
DATA = Path(__file__).parents[1] / "data"
LIST_0_2 = DATA / "titan_0_2_2_keys.txt"
ACCEPTED_0_2 = DATA / "titan_0_2_accepts.txt"  # recorded when the table began to be its own

pytestmark = pytest.mark.smoke

on_0_2 = pytest.mark.skipif(
    type(host()) is not Titan02,
    reason=f"the installed host is {host().name}; make test-hosts runs these",
)


def ezpz_moe(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess:
    return python("-m", "ezpz_moe.cli", *arguments, cwd=cwd)


def python(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess:
    return subprocess.run(
        [fork_server.python(), *arguments],
        env={
            **os.environ,
            "PYTHON_EXEC": fork_server.python(),
            "OMP_NUM_THREADS": "1",
            "NO_COLOR": "1",
        },
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


# The keys, for which no host is needed --------------------------------------------------------


def test_every_key_of_0_2_is_legal_there_and_no_other():
    legal = {f"{section}.{name}" for section, keys in KEYS_0_2.items() for name in keys}
    legal -= {
        f"{section}.{name}"
        for section, keys in KEYS_0_2.items()
        for name, key in keys.items()
        if key.message
    }
    assert legal == {line.partition(" = ")[0] for line in LIST_0_2.read_text().splitlines()}


def test_every_legal_key_has_a_type_that_can_be_said():
    for keys in KEYS_0_2.values():
        for key in keys.values():
            assert bool(key.type) != bool(key.message)
            assert key.message or allowed(key)


def accepted(key: Key) -> str:
    if key.message:
        return f"only {list(key.unless)}; else: {key.message}"
    return f"{allowed(key)}{' (a file)' if key.is_file else ''}"


def test_what_0_2_accepts_stays_as_it_is():
    """It shares rows with newer hosts; what one of them takes since then is not 0.2's."""
    lines = {
        f"{section}.{name}: {accepted(key)}"
        for section, keys in KEYS_0_2.items()
        for name, key in keys.items()
    }
    assert lines == set(ACCEPTED_0_2.read_text().splitlines())


# Jobs, as a user starts them ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('base = "qwen3/30B-A3B"\n[change]\nnum_experts = 64\n', "[change]"),
        ('inherits = "16B"\n[init]\nstd = 0.01\n', "[init]"),
        ('inherits = "16B"\nrouter_bias = true\n', "router_bias"),
        ('inherits = "16B"\noverlap_shared_experts = true\n', "overlap_shared_experts"),
        ('dense_baseline_of = "16B"\n', "models without experts"),
        ('inherits = "16B"\nn_dense_layers = 27\n', "models without experts"),
    ],
)
def test_models_of_later_hosts_are_refused_in_one_line(text: str, said: str, tmp_path) -> None:
    (tmp_path / "mine.toml").write_text(text)
    with pytest.raises(EzpzError) as error:
        refuse_later_keys(load_flavor("mine", near=tmp_path))
    assert said in str(error.value)
    assert "need torchtitan 0.3 or later. Remove them, or install" in str(error.value)
    assert "\n" not in str(error.value)
    refuse_later_keys(load_flavor("16B"))


@on_0_2
@pytest.mark.full
def test_the_hosts_own_command_line_without_a_file(tmp_path):
    result = ezpz_moe(
        *("train", "debugmodel_sdpa_batched_mm_padded", "--training.steps", "1"),
        *("--training.seq_len", "64", "--training.local_batch_size", "1"),
        *("--metrics.log_freq", "1"),
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    assert "compute_backend batched_mm_padded" in result.stdout + result.stderr


@on_0_2
def test_a_file_without_a_job_section_trains_and_validates_on_the_users_text(job_file, tmp_path):
    """Also keys of 0.3 that ask for what 0.2 does anyway."""
    job_file("\n\n".join(topics[name] for name in sorted(topics)[:20]), "my.txt")
    path = job_file(
        MODEL + '[training]\ndataset_path = "my.txt"\nsteps = 1\nseq_len = 64\n'
        "local_batch_size = 1\ndisable_cuda_graphs = true\n[loss]\nnum_chunks = 1\n"
        '[validation]\nenable = true\ndataset_path = "my.txt"\nsteps = 1\nfreq = 1\n'
    )
    result = ezpz_moe("train", str(path), "--metrics.disable_color_printing", cwd=tmp_path)
    output = result.stdout + result.stderr
    assert result.returncode == 0, output[-4000:]
    assert output.count(f"Preparing text_file dataset from {path.with_name('my.txt')}") == 2
    assert "validate step:  1  loss:" in output


@on_0_2
@pytest.mark.full
def test_the_hosts_own_path_trains_where_the_model_does_not_ask_for_the_device(tmp_path):
    result = ezpz_moe(
        *("train", "qwen3_debugmodel_sdpa", "--training.steps", "1", "--training.seq_len", "32"),
        *("--training.local_batch_size", "1"),
        cwd=tmp_path,
    )
    assert result.returncode == 0, (result.stdout + result.stderr)[-4000:]
    assert "grouped_mm (the host's own path: its for-loop)" in result.stdout + result.stderr


MODEL = '[model]\nname = "ezpz_moe"\nflavor = "debugmodel_sdpa_for_loop"\n'
MISTAKES = {
    "an unknown key": (MODEL + "[training]\nstepz = 3\n", (), "Did you mean 'steps'?"),
    "an unknown flavor": (
        MODEL.replace("for_loop", "for_lop"),
        (),
        "Did you mean 'debugmodel_sdpa_for_loop'?",
    ),
    "a key of 0.3 alone": (
        MODEL + "[debug]\ndetect_anomaly = true\n",
        (),
        "torchtitan 0.2 has no such setting. Leave it out, or set it to false",
    ),
    "a flag out of range": (MODEL, ("--training.steps", "0"), "training.steps = 0: must be an int"),
    "an unknown flavor as a flag": (MODEL, ("--model.flavor", "16C"), "unknown flavor '16C'"),
    "no such text": (
        MODEL + '[training]\ndataset_path = "nowhere.txt"\n',
        (),
        "dataset_path = 'nowhere.txt' does not exist",
    ),
    "no tokenizer": (MODEL, ("--model.hf_assets_path", "/nowhere"), "has no tokenizer"),
    "attention without a backward": (
        MODEL.replace("_sdpa", ""),
        (),
        "(flex) has no backward on the CPU",
    ),
    "an attention that the model lacks": (
        MODEL.replace("sdpa", "varlen"),
        (),
        "torchtitan 0.2's deepseek_v3 supports only flex and sdpa attention",
    ),
    "quantized experts": (
        MODEL,
        ("--model.converters", "quantize.grouped_mm.float8"),
        "quantizes torch._grouped_mm",
    ),
    "expert parallelism": (
        MODEL + "[parallelism]\nexpert_parallel_degree = 3\n",
        (),
        "expert_parallel_degree = 3 does not divide the 8 experts",
    ),
    "a token dispatcher without expert parallelism": (
        MODEL + '[parallelism]\nexpert_parallel_comm_backend = "deepep"\n',
        (),
        '"deepep" sends tokens between ranks, but parallelism.expert_parallel_degree = 1',
    ),
    "a batch that the ranks cannot share": (
        MODEL + "[training]\nlocal_batch_size = 4\nglobal_batch_size = 6\n",
        (),
        "training.global_batch_size = 6 is not a multiple of 4",
    ),
}


@on_0_2
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(each, marks=() if each == "an unknown key" else pytest.mark.full)
        for each in MISTAKES
    ],
)
def test_a_mistake_is_one_message_and_exit_code_2(job_file, case):
    text, flags, message = MISTAKES[case]
    path = job_file(text)
    result = python(
        *TORCHRUN,
        *("-m", "ezpz_moe.train", "--job.custom_config_module", "ezpz_moe"),
        *("--job.config_file", str(path), *flags),
        cwd=path.parent,
    )
    output = result.stdout + result.stderr
    assert output.count("ezpz-moe: error: ") == 1, output[-4000:]
    assert message in output
    assert "exitcode  : 2" in output


@on_0_2
def test_a_mistake_in_a_backends_options_names_the_flavors_file(tmp_path):
    from ezpz_moe.hosts.titan_0_2.models import model_args

    path = tmp_path / "mine.toml"
    path.write_text('inherits = "debugmodel"\ncompute_backend = "for_loop(foo=1)"\n')
    with pytest.raises(EzpzError) as refused:
        model_args(load_flavor("mine_sdpa", near=tmp_path))
    assert str(refused.value).startswith(f"{path}: compute_backend ")


@on_0_2
def test_the_same_mistake_is_found_before_the_workers_start(job_file):
    path = job_file(MODEL + "[training]\nstepz = 3\n")
    result = ezpz_moe("train", str(path))
    assert result.returncode == 2
    assert result.stderr.count("error") == 1


@on_0_2
@pytest.mark.full
@pytest.mark.parametrize("path", sorted(JOBS.glob("*.toml")), ids=lambda path: path.stem)
def test_a_shipped_job_can_be_shown(path):
    result = ezpz_moe("show", str(path))
    assert result.returncode == 0, result.stderr
    assert "training.dataset" in result.stdout
    lines = [line.split() for line in result.stdout.splitlines()]
    assert ["job.custom_config_module", "ezpz_moe", '""'] in lines


# Models -----------------------------------------------------------------------------------------


@on_0_2
@pytest.mark.parametrize("how", [*WRAPPERS, "other experts"])
def test_what_a_converter_makes_of_the_selected_experts_stops_the_run(how, capsys):
    """The host converts the built model, and anyone may register a converter."""
    from torchtitan.config import JobConfig
    from torchtitan.models.moe.moe import GroupedExperts

    from ezpz_moe.hosts.titan_0_2.models import build_model, model_args

    args = model_args(load_flavor("debugmodel_sdpa_for_loop"))
    args.n_layers = 2
    args.update_from_config(JobConfig())
    model = build_model(args)
    experts = model.layers["1"].moe.experts
    if how == "other experts":
        model.layers["1"].moe.experts = GroupedExperts(256, 256, 8, use_grouped_mm=False)
    else:
        wrap_weights(experts, how)
    with pytest.raises(SystemExit, match="2"):
        model.init_weights(torch.device("cpu"))
    said = capsys.readouterr().err
    assert "a converter computes the experts' products itself" in said
    assert said.count("\n") == 1


@on_0_2
def test_sizes_that_the_host_has_too_have_its_arguments():
    from torchtitan.models.deepseek_v3 import deepseekv3_args

    from ezpz_moe.hosts.titan_0_2.models import model_args

    sizes = [name for name in deepseekv3_args if "_" not in name]
    assert sizes == ["debugmodel", "16B", "236B", "671B"]
    # The vocabulary is our own; the host's debugmodel has another attention.
    differ = {"vocab_size", "attn_type", "attn_mask_type"}
    for name in sizes:
        stock = dataclasses.asdict(deepseekv3_args[name])
        ours = dataclasses.asdict(model_args(load_flavor(name)))
        added = {"host_model", "compute_backend", "chosen_by", "max_positions"}
        added |= {"expert_precision", "computed_in", "routed"}
        assert ours.keys() - stock.keys() == added
        changed = {key for key in stock if stock[key] != ours[key]}
        assert changed <= (differ if name == "debugmodel" else {"vocab_size"}), name


@on_0_2
@pytest.mark.parametrize(
    ("tables", "said"),
    [
        ("", "; routed layer composed: torchtitan 0.2 dispatches in its MoE, before the experts"),
        ('routed = "composed"', "; routed layer composed: asked for"),
        ('compute_backend = "grouped_mm"', ""),
    ],
)
def test_the_log_says_that_routed_layers_stay_composed(tables, said, tmp_path, caplog):
    chosen = "" if "compute_backend" in tables else 'compute_backend = "for_loop"\n'
    (tmp_path / "mine.toml").write_text(f'inherits = "debugmodel"\n{chosen}{tables}\n')
    with caplog.at_level(logging.INFO):
        host().build_on_meta(load_flavor("mine", near=tmp_path))
    (line,) = (each.message for each in caplog.records if "compute_backend" in each.message)
    assert line.endswith(f"MoE layers; flavor mine{said}")


@on_0_2
@pytest.mark.parametrize("seq_len", [4096, 8192])
@pytest.mark.parametrize(
    ("name", "size"), [(name, size) for name, sizes in MOE_MODELS.items() for size in sizes]
)
def test_a_converted_job_has_the_model_that_it_had(name, size, seq_len, tmp_path):
    from torchtitan.models import _supported_models
    from torchtitan.protocols.train_spec import get_train_spec

    from ezpz_moe.hosts.titan_0_2.models import model_args

    if name not in _supported_models:
        pytest.skip(f"torchtitan {host_name()} has no {name}")
    made = new_model(name, size, seq_len=seq_len, name="new")
    (tmp_path / "new.toml").write_text(made.file)
    new = model_args(load_flavor(made.flavor, near=tmp_path))
    old = get_train_spec(name).model_args[size]
    apart = {"max_seq_len", "original_seq_len", "rope_factor"}  # compared as what they do
    for field in dataclasses.fields(old):
        if field.name not in apart and field.name != "moe_args":
            assert getattr(old, field.name) == getattr(new, field.name), field.name
    assert old.moe_args.num_experts == new.moe_args.num_experts
    if name == "deepseek_v3":  # the host sets max_seq_len to the job's
        scaled = new.max_seq_len > new.original_seq_len
        assert scaled == (seq_len > old.original_seq_len)


@on_0_2
@pytest.mark.parametrize("name", ["236B_sdpa_for_loop", "qwen3_debugmodel_sdpa_batched_mm_padded"])
def test_no_backend_changes_a_state_dict(name):
    from torchtitan.protocols.train_spec import get_train_spec

    from ezpz_moe.hosts.titan_0_2.models import model_args

    flavor = load_flavor(name)
    args = model_args(flavor)
    args.moe_impl = "standard"  # what the host sets from the job
    with torch.device("meta"):
        stock = get_train_spec(args.host_model).model_cls(args).state_dict()
    ours = host().build_on_meta(flavor).state_dict()
    assert list(ours) == list(stock)
    for key, tensor in stock.items():
        assert (ours[key].shape, ours[key].dtype) == (tensor.shape, tensor.dtype), key
        assert ours[key].device == tensor.device, key


@on_0_2
@pytest.mark.parametrize("name", ["for_loop", "batched_mm_padded"])
def test_experts_compute_in_bfloat16_and_leave_tail_rows_zero(name):
    experts = host().experts_class()(16, 32, 3, False, name)
    counts, x = torch.tensor([3, 0, 5]), torch.randn(10, 16)  # two tail rows
    with torch.no_grad():
        experts.init_weights(0.02)
        y = experts(x, counts)
        w1, w2, w3 = (w.bfloat16() for w in (experts.w1, experts.w2, experts.w3))
    first = x[:3].bfloat16()
    expected = (torch.nn.functional.silu(first @ w1[0].T) * (first @ w3[0].T)) @ w2[0].T
    assert y.dtype == torch.float32
    assert torch.equal(y[:3], expected.float())
    assert not y[8:].any()


@on_0_2
def test_experts_that_are_no_swiglu_are_refused():
    with pytest.raises(EzpzError, match=r"GptOssGroupedExperts is not a SwiGLU|no model module"):
        host().build_on_meta(load_flavor("gpt_oss_debugmodel_for_loop"))


@on_0_2
@pytest.mark.parametrize("table", ["router", "balance", "telemetry"])
def test_what_this_hosts_routers_do_not_get_is_refused(table, tmp_path):
    """Not left out in silence."""
    from ezpz_moe.hosts.titan_0_2.models import model_args

    key = {"router": "freeze = true", "balance": "z_loss = 0.1", "telemetry": "every = 10"}
    path = tmp_path / "mine.toml"
    path.write_text(f'inherits = "debugmodel"\n[{table}]\n{key[table]}\n')
    with pytest.raises(EzpzError, match=r"mine\.toml: \[router\].* need torchtitan 0\.3 or later"):
        model_args(load_flavor("mine", near=tmp_path))


@on_0_2
def test_tokens_are_counted_on_the_cpu():
    """Every expert's tokens, experts without any included, in the host's dtype; compiled too."""
    from torchtitan.models.moe import MoE, MoEArgs

    from ezpz_moe.hosts.titan_0_2.router import count_on_cpu

    moe = MoE(MoEArgs(num_experts=8, top_k=3), 16, 32)
    torch.nn.init.normal_(moe.router.gate.weight)
    torch.nn.init.zeros_(moe.router.gate.weight[5:])
    moe.router.gate.weight.data[0] = 0
    moe.router.gate.weight.data[7] = -1  # below the three zeros, so that no token chooses it
    count_on_cpu(moe)
    x = torch.rand(50, 16) + 1
    scores, chosen, counts = moe.router(x)
    _, order, again = moe.reorderer(scores, chosen)
    expected = [int((chosen == expert).sum()) for expert in range(8)]
    assert expected[7] == 0
    for each in (counts, again):
        assert each.dtype == torch.int64
        assert each.tolist() == expected
    assert torch.equal(chosen.view(-1)[order], chosen.view(-1).sort().values)
    compiled = torch.compile(moe.router, fullgraph=True)(x)
    assert all(map(torch.equal, compiled, (scores, chosen, counts)))
