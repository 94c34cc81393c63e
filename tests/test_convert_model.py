"""``ezpz-moe convert``: the model of a job of torchtitan 0.2 as a flavor, and training it."""

from __future__ import annotations

import dataclasses
import json

import pytest
from convert_cases import DATA, OLD, fates, written
from trainer_runs import train

from ezpz_moe import cli
from ezpz_moe.config.flavors import load_flavor
from ezpz_moe.config.job import DENSE_MODELS
from ezpz_moe.errors import EzpzError
from ezpz_moe.hosts.detect import check_host, presumed_host
from ezpz_moe.hosts.jobs import load_job
from ezpz_moe.hosts.titan.v0_3 import Titan03
from ezpz_moe.hosts.titan_0_2.moe_models import LONGEST, MOE_MODELS
from ezpz_moe.tools.convert import convert, flavor_path, write
from ezpz_moe.tools.convert_model import new_model


@pytest.mark.parametrize(
    ("model", "flavor"), [(m, flavor) for m, flavors in MOE_MODELS.items() for flavor in flavors]
)
def test_every_mixture_of_experts_of_0_2_has_a_flavor(model, flavor, job_file):
    text = f'[model]\nname = "{model}"\nflavor = "{flavor}"\n[training]\nseq_len = 2048\n'
    job = load_job(written(job_file(text)))
    found = load_flavor(job.flavor, near=job.folder)
    assert found.attention == MOE_MODELS[model][flavor]["attention"]
    assert found.compute_backend == "grouped_mm"


def test_a_shipped_flavor_is_taken_where_it_is_the_same(job_file):
    path = job_file(OLD)
    assert load_job(written(path)).flavor == "qwen3_debugmodel_sdpa"
    assert not flavor_path(path.with_name("new.toml")).exists()


@pytest.mark.parametrize(
    ("seq_len", "scaling", "longest"),
    [(4096, "none", 16384), (4097, "yarn", 16384), (16385, "yarn", 16385)],
)
def test_deepseek_v3_has_yarn_beyond_4096_tokens(seq_len, scaling, longest, tmp_path):
    model = new_model("deepseek_v3", "16B", seq_len=seq_len, name="new")
    (tmp_path / "new.toml").write_text(model.file)
    flavor = load_flavor("new", near=tmp_path)
    assert flavor.dimensions.vocab_size == 102400
    assert (flavor.dimensions.rope.scaling, flavor.dimensions.rope.max_seq_len) == (
        scaling,
        longest,
    )


@pytest.mark.skipif(type(presumed_host()) is not Titan03, reason="of 0.3's binding")
@pytest.mark.parametrize("size", ["debugmodel_flex_attn", "16B", "236B", "671B"])
def test_deepseek_v3_beyond_4096_tokens_is_0_3s_own(size, tmp_path):
    check_host()
    from torchtitan.models import deepseek_v3

    from ezpz_moe.hosts.titan.models import host_spec

    model = new_model("deepseek_v3", size, seq_len=8192, name="new")
    (tmp_path / "new.toml").write_text(model.file)
    spec = host_spec(load_flavor(model.flavor, near=tmp_path))
    own = deepseek_v3.model_registry(size.removesuffix("_flex_attn"))
    assert repr(spec.model) == repr(own.model)


@pytest.mark.parametrize(
    ("model", "flavor", "seq_len"),
    [
        ("qwen3", "debugmodel_moe", 4096),
        ("qwen3", "debugmodel_moe", 4097),
        ("qwen3", "30B-A3B", 40960),
        ("qwen3", "235B-A22B", 65536),
        ("gpt_oss", "20b", 131072),
        ("gpt_oss", "20b", 262144),
    ],
)
def test_a_rope_is_at_least_as_long_as_the_sequence(model, flavor, seq_len, job_file):
    """0.2 made its tables as long as the sequence; 0.3 refuses a longer one than its RoPE."""
    text = f'[model]\nname = "{model}"\nflavor = "{flavor}"\n[training]\nseq_len = {seq_len}\n'
    job = load_job(written(job_file(text)))
    found = load_flavor(job.flavor, near=job.folder)
    assert found.base == MOE_MODELS[model][flavor]["base"]
    reach = found.rope.max_seq_len if found.rope else LONGEST[found.base]
    assert (reach, found.rope is None) == (
        max(seq_len, LONGEST[found.base]),
        seq_len <= LONGEST[found.base],
    )


@pytest.mark.skipif(type(presumed_host()) is not Titan03, reason="of 0.3's binding")
@pytest.mark.parametrize("base", LONGEST)
def test_the_hosts_ropes_are_as_long_as_the_table_says(base, tmp_path):
    """And one that is made longer rotates each position that the host's has as before."""
    check_host()
    from ezpz_moe.hosts.titan.models import host_spec

    (tmp_path / "own.toml").write_text(f'base = "{base}"\nattention = "flex"\n')
    (tmp_path / "long.toml").write_text('inherits = "own"\n[rope]\nmax_seq_len = 300000\n')
    own, long = (host_spec(load_flavor(each, near=tmp_path)).model for each in ("own", "long"))
    assert (own.max_seq_len, long.max_seq_len) == (LONGEST[base], 300000)
    ropes = [[layer.attention.rope for layer in model.layers] for model in (own, long)]
    assert {rope.max_seq_len for rope in ropes[1]} == {300000}
    assert [dataclasses.replace(r, max_seq_len=LONGEST[base]) for r in ropes[1]] == ropes[0]


@pytest.mark.skipif(type(presumed_host()) is not Titan03, reason="of 0.3's binding")
def test_what_is_called_dense_has_no_experts(tmp_path):
    check_host()
    from ezpz_moe.hosts.titan.models import host_spec

    (tmp_path / "mine.toml").write_text('base = "llama3/8B"\n')
    with pytest.raises(EzpzError, match="this model is dense"):
        host_spec(load_flavor("mine", near=tmp_path))
    assert "llama3" in DENSE_MODELS
    assert not set(DENSE_MODELS) & {base.partition("/")[0] for base in LONGEST}


def test_a_rope_beside_base_says_its_length_alone(tmp_path):
    (tmp_path / "mine.toml").write_text('base = "qwen3/30B-A3B"\n[rope]\ntheta = 2.0\n')
    with pytest.raises(
        EzpzError, match=r"except \[rope\] max_seq_len, so these keys would be ignor"
    ):
        load_flavor("mine", near=tmp_path)
    (tmp_path / "mine.toml").write_text('base = "qwen3/30B-A3B"\n[rope]\nmax_seq_len = 0\n')
    with pytest.raises(EzpzError, match=r"mine\.toml: rope\.max_seq_len = 0: should be greater"):
        load_flavor("mine", near=tmp_path)


def test_a_model_of_an_experiment_is_torchtitans(job_file):
    path = job_file('[model]\nname = "simple_fsdp.deepseek_v3"\nflavor = "16B"\n')
    job = load_job(written(path))
    assert load_flavor(job.flavor, near=job.folder).dimensions.num_experts == 64


@pytest.mark.parametrize(
    ("seq_len", "ranks", "chunks"), [(1000, 1, None), (1004, 1, 4), (1000, 2, 4), (1001, 1, 1)]
)
def test_a_length_that_the_loss_cannot_cut_into_8(seq_len, ranks, chunks, job_file):
    model = '[model]\nname = "deepseek_v3"\nflavor = "debugmodel"\n'
    length = f"[training]\nseq_len = {seq_len}\n"
    path = job_file(f"{model}{length}[parallelism]\ncontext_parallel_degree = {ranks}\n")
    values = load_job(written(path)).values
    assert values.get("loss.num_chunks") == chunks
    assert (values.get("parallelism.spmd_backend") == "partial_dtensor") is (ranks > 1)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ('name = "llama3"\nflavor = "8B"', "llama3 is dense: it has no routed experts"),
        ('name = "qwen3"\nflavor = "0.6B"', 'qwen3\'s "0.6B" is dense'),
        ('name = "qwen3"', 'qwen3\'s "debugmodel" is dense'),  # 0.2's default
        ('name = "llama4"\nflavor = "17bx16e"', "torchtitan 0.3 has no llama4"),
        ('hf_assets_path = "x"', "llama3 is dense"),
    ],
)
def test_a_model_that_no_flavor_is(model, said, job_file, tmp_path, capsys):
    path, new = job_file(f"[model]\n{model}\n{DATA}"), tmp_path / "new.toml"
    assert cli.main(["convert", str(path)]) == 1
    assert said in capsys.readouterr().out
    with pytest.raises(SystemExit) as stopped:
        cli.main(["convert", str(path), str(new)])
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["job.toml"]


def test_a_job_of_ours_keeps_its_flavor(job_file):
    path = job_file('[model]\nname = "ezpz_moe"\nflavor = "10B_2B_for_loop"\n')
    assert load_job(written(path)).values["model.flavor"] == "10B_2B_for_loop"
    assert fates(path) == {
        "model.name": "kept",
        "model.flavor": "kept",
        "activation_checkpoint.selective_ac_option": "differs",
    }


@pytest.mark.parametrize("flavor", ["", "flavor = 3\n"])
def test_a_job_of_ours_without_a_flavor_is_refused(flavor, job_file):
    with pytest.raises(EzpzError, match="unknown flavor ''"):
        written(job_file(f'[model]\nname = "ezpz_moe"\n{flavor}'))


def test_a_flavor_that_the_new_job_would_not_find_is_refused(job_file, tmp_path):
    job_file('inherits = "16B"\n', "wide.toml")
    path = job_file('[model]\nname = "ezpz_moe"\nflavor = "wide"\n')
    (tmp_path / "new").mkdir()
    new = tmp_path / "new" / "job.toml"
    with pytest.raises(EzpzError, match="unknown flavor 'wide'"):
        write(convert(path, new), new)
    assert not list(new.parent.iterdir())


DEBUG_JOB = """
[model]
name = "{model}"
flavor = "{flavor}"
hf_assets_path = "{tokenizer}"

[training]
dataset = "c4_test"
dataset_path = "text"
seq_len = 128
local_batch_size = 1
steps = 2

[activation_checkpoint]
mode = "none"
selective_ac_option = "2"

[metrics]
log_freq = 1

[quantize.grouped_mm.float8]
fqns = ["experts"]
"""


@pytest.mark.train
def test_the_debug_jobs_of_every_family_train(tmp_path):
    import dialect

    from ezpz_moe.config.assets import EMBEDDED_TOKENIZER

    (tmp_path / "text").mkdir()
    text = json.dumps({"text": "Attention is all you need, and a mixture of experts. " * 40})
    (tmp_path / "text" / "data.json").write_text(f"{text}\n" * 20)
    scenarios = {}
    families = [
        ("deepseek_v3", "debugmodel"),
        ("qwen3", "debugmodel_moe"),
        ("gpt_oss", "debugmodel"),
    ]
    for model, flavor in families:
        old, new = tmp_path / f"{model}_old.toml", tmp_path / f"{model}.toml"
        old.write_text(DEBUG_JOB.format(model=model, flavor=flavor, tokenizer=EMBEDDED_TOKENIZER))
        write(convert(old, new), new)
        # FlexAttention, which gpt_oss has in 0.2, has no backward on the CPU.
        new.write_text(
            new.read_text().replace("gpt_oss_debugmodel_flex", "gpt_oss_debugmodel_sdpa")
        )
        scenarios[model] = dialect.job(new, *dialect.precision(model), "--layers=2")
    for model, (record,) in train(scenarios, tmp_path, ranks=1).items():
        assert len(record["losses"]) == 2, model
        assert record["losses"][1] < record["losses"][0], model
