"""torchtitan 0.2: the same job files train there, with the same backends.

The host stands beside the installed one: EZPZ_MOE_TITAN_0_2 names a folder that holds it.
Every test starts processes in which that host is the installed one.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from pydoc_data.topics import topics

import pytest
from trainer_runs import (
    assert_same_bits,
    assert_within_twice,
    compare_gradients,
    job_folder,
    train,
    with_host,
)

from ezpz_moe.assets import EMBEDDED_TOKENIZER
from ezpz_moe.flavors import load_flavor
from ezpz_moe.hosts import TITAN_0_2, binding, check_host
from ezpz_moe.job import allowed

VARIABLE = "EZPZ_MOE_TITAN_0_2"
JOBS = Path(__file__).parents[1] / "flavors" / "jobs"
SIZES = ("debugmodel", "500M", "2B", "4B", "7B", "10B_2B", "small", "16B", "236B", "671B")
BACKENDS = ("for_loop", "batched_mm_padded")
ALL = ("grouped_mm", *BACKENDS)
KEYS_0_2 = TITAN_0_2.slot("job_keys").KEYS
LIST_0_2 = Path(__file__).parent / "data" / "titan_0_2_2_keys.txt"

needs_host = pytest.mark.skipif(
    VARIABLE not in os.environ,
    reason=f"{VARIABLE} is not set: `pip install --no-deps --target DIR torchtitan==0.2.2`, then "
    f"{VARIABLE}=DIR",
)


@pytest.fixture(scope="module")
def host() -> Path:
    folder = Path(os.environ[VARIABLE]).absolute()
    assert (folder / "torchtitan" / "protocols" / "train_spec.py").is_file(), folder
    return folder


def ezpz_moe(host: Path, *arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess:
    return python(host, "-m", "ezpz_moe.cli", *arguments, cwd=cwd)


def python(host: Path, *arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *arguments],
        env={**with_host(host), "OMP_NUM_THREADS": "1", "NO_COLOR": "1"},
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


# Jobs, as a user starts them ------------------------------------------------------------------


@needs_host
def test_the_debug_job_trains(host, tmp_path):
    flags = ["--training.steps", "8", "--training.local_batch_size", "2"]
    flags += ["--lr_scheduler.warmup_steps", "2", "--metrics.disable_color_printing"]
    result = ezpz_moe(host, "train", str(JOBS / "debug_cpu.toml"), *flags, cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-4000:]
    lines = [line for line in (result.stdout + result.stderr).splitlines() if "step:" in line]
    losses = [float(line.partition("loss:")[2].split()[0]) for line in lines]
    assert len(losses) == 8
    assert losses[0] > 7.5  # log(2048) = 7.6: nothing is learnt yet
    assert losses[-1] < losses[0] - 0.7
    said = [
        line
        for line in (result.stdout + result.stderr).splitlines()
        if "ezpz_moe: compute_backend" in line
    ]
    assert len(said) == 1
    assert "compute_backend for_loop" in said[0]
    assert "on cpu in bfloat16 for 5 MoE layers; asked for by flavor" in said[0]


@needs_host
def test_the_hosts_own_command_line_without_a_file(host, tmp_path):
    result = ezpz_moe(
        host,
        *("train", "debugmodel_sdpa_batched_mm_padded", "--training.steps", "1"),
        *("--training.seq_len", "64", "--training.local_batch_size", "1"),
        *("--metrics.log_freq", "1"),
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    assert "compute_backend batched_mm_padded" in result.stdout + result.stderr


@needs_host
def test_a_file_without_a_job_section_trains_and_validates_on_the_users_text(
    host, job_file, tmp_path
):
    """Also keys of 0.3 that ask for what 0.2 does anyway."""
    job_file("\n\n".join(topics[name] for name in sorted(topics)[:20]), "my.txt")
    path = job_file(
        MODEL + '[training]\ndataset_path = "my.txt"\nsteps = 1\nseq_len = 64\n'
        "local_batch_size = 1\ndisable_cuda_graphs = true\n[loss]\nnum_chunks = 1\n"
        '[validation]\nenable = true\ndataset_path = "my.txt"\nsteps = 1\nfreq = 1\n'
    )
    result = ezpz_moe(host, "train", str(path), "--metrics.disable_color_printing", cwd=tmp_path)
    output = result.stdout + result.stderr
    assert result.returncode == 0, output[-4000:]
    assert output.count(f"Preparing text_file dataset from {path.with_name('my.txt')}") == 2
    assert "validate step:  1  loss:" in output


@needs_host
def test_the_hosts_own_path_trains_where_the_model_does_not_ask_for_the_device(host, tmp_path):
    result = ezpz_moe(
        host,
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
        "torchtitan 0.2 has no such setting. Remove the key, or set it to false",
    ),
    "a flag out of range": (MODEL, ("--training.steps", "0"), "training.steps = 0: must be an int"),
    "an unknown flavor as a flag": (MODEL, ("--model.flavor", "16C"), "unknown flavor '16C'"),
    "no such text": (
        MODEL + '[training]\ndataset_path = "nowhere.txt"\n',
        (),
        "dataset_path = 'nowhere.txt' does not exist",
    ),
    "no tokenizer": (MODEL, ("--model.hf_assets_path", "/nowhere"), "holds no tokenizer"),
    "attention without a backward": (
        MODEL.replace("_sdpa", ""),
        (),
        "(flex) has no backward on the CPU",
    ),
    "an attention that the model lacks": (
        MODEL.replace("sdpa", "varlen"),
        (),
        "torchtitan 0.2's deepseek_v3 has flex and sdpa attention only",
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
}


@needs_host
@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_message_and_exit_code_2(host, job_file, case):
    text, flags, message = MISTAKES[case]
    path = job_file(text)
    result = python(
        host,
        *("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"),
        *("-m", "ezpz_moe.train", "--job.custom_config_module", "ezpz_moe"),
        *("--job.config_file", str(path), *flags),
        cwd=path.parent,
    )
    output = result.stdout + result.stderr
    assert output.count("ezpz-moe: error: ") == 1, output[-4000:]
    assert message in output
    assert "exitcode  : 2" in output


@needs_host
def test_the_same_mistake_is_found_before_the_workers_start(host, job_file):
    path = job_file(MODEL + "[training]\nstepz = 3\n")
    result = ezpz_moe(host, "train", str(path))
    assert result.returncode == 2
    assert result.stderr.count("error") == 1


@needs_host
@pytest.mark.parametrize("path", sorted(JOBS.glob("*.toml")), ids=lambda path: path.stem)
def test_a_shipped_job_can_be_shown(host, path):
    result = ezpz_moe(host, "show", str(path))
    assert result.returncode == 0, result.stderr
    assert "training.dataset" in result.stdout
    lines = [line.split() for line in result.stdout.splitlines()]
    assert ["job.custom_config_module", "ezpz_moe", '""'] in lines


# Models -----------------------------------------------------------------------------------------

SUMMARIES = f"""
import dataclasses, json
from ezpz_moe.hosts import binding, check_host
check_host()
from ezpz_moe.flavors import load_flavor
summarize = binding("parameters").summarize
print(json.dumps({{name: dataclasses.asdict(summarize(load_flavor(name))) for name in {SIZES}}}))
"""
ARGUMENTS = """
import dataclasses, json
from ezpz_moe.hosts import binding, check_host
check_host()
from torchtitan.models.deepseek_v3 import deepseekv3_args
from ezpz_moe.flavors import load_flavor
model_args = binding("models").model_args
both = {
    name: [dataclasses.asdict(host), dataclasses.asdict(model_args(load_flavor(name)))]
    for name, host in deepseekv3_args.items() if "_" not in name
}
print(json.dumps(both))
"""
BUILT = """
import torch
from ezpz_moe.hosts import binding, check_host
check_host()
from torchtitan.models.moe import MoE
from torchtitan.protocols.train_spec import get_train_spec
from ezpz_moe.flavors import load_flavor
models = binding("models")
for flavor in ("236B_sdpa_for_loop", "qwen3_debugmodel_sdpa_batched_mm_padded"):
    args = models.model_args(load_flavor(flavor))
    args.moe_impl = "standard"
    with torch.device("meta"):
        ours = models.build_model(args)
        stock = get_train_spec(args.host_model).model_cls(args)
    moes = [module for module in ours.modules() if isinstance(module, MoE)]
    assert moes and all(moe.experts.compute_backend in flavor for moe in moes)
    assert list(ours.state_dict()) == list(stock.state_dict()), flavor
    for name, tensor in stock.state_dict().items():
        other = ours.state_dict()[name]
        assert (tensor.shape, tensor.dtype) == (other.shape, other.dtype), name
        assert other.device == tensor.device, name
"""


def printed(host: Path, program: str) -> dict:
    result = python(host, "-c", program)
    assert result.returncode == 0, result.stderr[-4000:]
    return json.loads(result.stdout.splitlines()[-1])


@needs_host
def test_every_size_has_the_parameters_that_it_has_on_the_installed_host(host):
    check_host()
    summarize = binding("parameters").summarize
    expected = {name: vars(summarize(load_flavor(name))) for name in SIZES}
    assert printed(host, SUMMARIES) == expected


@needs_host
def test_sizes_that_the_host_has_too_have_its_arguments(host):
    both = printed(host, ARGUMENTS)
    assert both.keys() == {"debugmodel", "16B", "236B", "671B"}
    ours_alone = {"host_model", "compute_backend", "chosen_by", "max_positions"}
    # The vocabulary is our own; the host's debugmodel has another attention.
    differ = {"vocab_size", "attn_type", "attn_mask_type"}
    for name, (stock, ours) in both.items():
        assert ours.keys() - stock.keys() == ours_alone
        changed = {key for key in stock if stock[key] != ours[key]}
        assert changed <= (differ if name == "debugmodel" else {"vocab_size"}), name


@needs_host
def test_no_backend_changes_a_state_dict(host):
    result = python(host, "-c", BUILT)
    assert result.returncode == 0, result.stderr[-4000:]


EXPERTS = """
import torch
from ezpz_moe.hosts import binding, check_host
check_host()
from ezpz_moe.errors import EzpzError
from ezpz_moe.flavors import load_flavor
Experts = binding("experts").EzpzGroupedExperts
counts, x = torch.tensor([3, 0, 5]), torch.randn(10, 16)  # two tail rows
for name in ("for_loop", "batched_mm_padded"):
    experts = Experts(16, 32, 3, False, name)
    with torch.no_grad():
        experts.init_weights(0.02)
        y = experts(x, counts)
        w1, w2, w3 = (w.bfloat16() for w in (experts.w1, experts.w2, experts.w3))
    first = x[:3].bfloat16()
    expected = (torch.nn.functional.silu(first @ w1[0].T) * (first @ w3[0].T)) @ w2[0].T
    assert y.dtype == torch.float32 and torch.equal(y[:3], expected.float()), name
    assert not y[8:].any(), name
models = binding("models")
try:
    args = models.model_args(load_flavor("gpt_oss_debugmodel_for_loop"))
    with torch.device("meta"):
        models.build_model(args)
except EzpzError as error:
    assert "GptOssGroupedExperts is no SwiGLU" in str(error) or "no model module" in str(error)
else:
    raise AssertionError("gpt_oss was built with for_loop")
"""


@needs_host
def test_experts_compute_in_bfloat16_and_others_than_swiglu_are_refused(host):
    result = python(host, "-c", EXPERTS)
    assert result.returncode == 0, result.stderr[-4000:]


COUNTS = """
import torch
from ezpz_moe.hosts import binding, check_host
check_host()
from torchtitan.models.moe import MoE, MoEArgs
moe = MoE(MoEArgs(num_experts=8, top_k=3), 16, 32)
torch.nn.init.normal_(moe.router.gate.weight)
torch.nn.init.zeros_(moe.router.gate.weight[5:])
moe.router.gate.weight.data[0] = 0
binding("router").count_on_cpu(moe)
x = torch.rand(50, 16) + 1
scores, chosen, counts = moe.router(x)
_, order, again = moe.reorderer(scores, chosen)
expected = [int((chosen == expert).sum()) for expert in range(8)]
for each in (counts, again):
    assert each.dtype == torch.int64 and each.tolist() == expected, (each, expected)
assert 0 in expected and torch.equal(chosen.view(-1)[order], chosen.view(-1).sort().values)
compiled = torch.compile(moe.router, fullgraph=True)(x)
assert all(map(torch.equal, compiled, (scores, chosen, counts)))
"""


@needs_host
def test_tokens_are_counted_on_the_cpu(host):
    """Every expert's tokens, experts without any included, in the host's dtype; compiled too."""
    result = python(host, "-c", COUNTS)
    assert result.returncode == 0, result.stderr[-4000:]


# Runs -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(host, tmp_path_factory):
    """Every single-process run of this file, by name."""
    folder = job_folder(tmp_path_factory.mktemp("titan_0_2"))
    (folder / "base.toml").write_text('base = "deepseek_v3/debugmodel"\nattention = "sdpa"\n')
    # As the host has it at this length: it turns YaRN off for short sequences.
    (folder / "short.toml").write_text('inherits = "debugmodel"\n[rope]\nscaling = "none"\n')
    text = folder / "text"
    text.mkdir()
    lines = (json.dumps({"text": topics[name]}) for name in sorted(topics))
    (text / "train.jsonl").write_text("\n".join(lines))
    short = ("--training.local-batch-size", "1", "--training.seq-len", "64", "--debug.seed", "7")
    stock = [
        *("--job.config-file", str(folder / "like_stock.toml"), *short),
        *("--training.dataset-path", str(text), "--training.steps", "5"),
    ]
    alone = [
        *("--model.name", "deepseek_v3", "--model.flavor", "debugmodel", "--count-on-cpu"),
        *("--model.hf-assets-path", str(EMBEDDED_TOKENIZER)),
    ]
    plugin = ("--job.custom-config-module", "ezpz_moe")

    def tiny(backend: str, *flags: str) -> list[str]:
        job = ("--job.config-file", str(folder / "job.toml"))
        return [*job, *plugin, "--model.flavor", f"tiny_sdpa_{backend}", *flags]

    two_steps = ("--training.steps", "2")
    saved = ("--job.dump-folder", str(folder / "saved"), "--training.steps", "6")
    saved = (*saved, "--checkpoint.enable")
    scenarios = {
        "host": [*stock, *alone],
        "noisy host": [*stock, *alone, "--rounding-noise"],
        "base grouped_mm": [*stock, *plugin, "--model.flavor", "base"],
        "saved": tiny("for_loop", *saved, "--checkpoint.interval", "4"),
    }
    for backend in ALL:
        scenarios |= {
            backend: [*stock, *plugin, "--model.flavor", f"short_sdpa_{backend}"],
            f"resumed {backend}": tiny(
                backend, *saved, "--checkpoint.load-only", "--checkpoint.load-step", "4"
            ),
            f"plain {backend}": tiny(backend, *two_steps),
            f"compiled {backend}": tiny(backend, *two_steps, "--compile.enable"),
        }
    for backend in BACKENDS:
        scenarios[f"full {backend}"] = tiny(
            backend, *two_steps, "--activation-checkpoint.mode", "full"
        )
    records = train(scenarios, folder, ranks=1, titan_0_2=host)
    return {name: ranks[0] for name, ranks in records.items()}


@needs_host
@pytest.mark.train
@pytest.mark.parametrize("run", ["grouped_mm", "base grouped_mm"])
def test_grouped_mm_trains_with_the_hosts_bits(runs, run):
    assert set(runs["host"]["experts"]) == {"GroupedExperts"}
    assert set(runs[run]["experts"]) == {"EzpzGroupedExperts"}
    assert len(runs[run]["losses"]) == 5
    assert_same_bits(runs[run], runs["host"])


@needs_host
@pytest.mark.train
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_first_step_agrees_with_the_host(runs, backend):
    """The loss has the host's bits; gradients differ by less than one more rounding makes."""
    host, noisy, ours = (runs[name] for name in ("host", "noisy host", backend))
    assert ours["backends"] == [backend] * len(host["experts"])
    assert ours["losses"][0] == host["losses"][0]
    assert_within_twice(ours["gradients"], noisy["gradients"], of=host["gradients"])


@needs_host
@pytest.mark.train
@pytest.mark.parametrize("backend", ALL)
def test_a_checkpoint_goes_on_under_another_backend(runs, backend):
    """Four steps with for_loop, then the fifth with each backend."""
    resumed, whole = runs[f"resumed {backend}"], runs["saved"]
    assert len(resumed["losses"]) == 2
    assert resumed["losses"][0] == whole["losses"][4]
    if backend == "for_loop":
        assert resumed["losses"] == whole["losses"][4:]
        assert resumed["parameters"] == whole["parameters"]


@needs_host
@pytest.mark.train
@pytest.mark.parametrize("backend", BACKENDS)
def test_activation_checkpointing_changes_no_bit(runs, backend):
    assert_same_bits(runs[f"full {backend}"], runs[f"plain {backend}"])


@needs_host
@pytest.mark.train
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_compiled_run_deviates_like_the_hosts(runs, backend):
    """Fused kernels round elsewhere: ours at most twice as much as the host's."""
    ours, host = (
        compare_gradients(runs[f"compiled {b}"]["gradients"], runs[f"plain {b}"]["gradients"])
        for b in (backend, "grouped_mm")
    )
    for parameter, difference in ours.items():
        assert difference <= 2 * host[parameter] + 1e-6, parameter


@needs_host
@pytest.mark.train
@pytest.mark.ranks
def test_two_ranks_train_over_gloo(host, tmp_path):
    folder = job_folder(tmp_path)
    job = ["--job.config-file", str(folder / "job.toml"), "--training.steps", "2"]
    job += ["--job.custom-config-module", "ezpz_moe", "--model.flavor", "tiny_sdpa_for_loop"]
    first, second = train({"two": job}, folder, ranks=2, titan_0_2=host)["two"]
    assert len(first["losses"]) == 2
    assert_same_bits(first, second)
