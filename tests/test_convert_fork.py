"""``ezpz-moe convert``: the model of a fork, left open, named by the user or drafted from sizes."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from ezpz_moe import cli
from ezpz_moe.config.flavors import load_flavor
from ezpz_moe.errors import EzpzError
from ezpz_moe.hosts.jobs import load_job
from ezpz_moe.hosts.releases import facts
from ezpz_moe.tools.convert import Wish, convert, write
from ezpz_moe.tools.convert_model import new_model

FORK = '[model]\nname = "{}"\nflavor = "9.7B"\nhf_assets_path = "tok"\n[training]\nseq_len = {}\n'
PASTED = """\
    "9.7B": DeepSeekV3ModelArgs(
        vocab_size=102400,
        dim=1024,
        inter_dim=2816,
        moe_inter_dim=704,
        max_seq_len=4096 * 8,
        n_layers=12,
        n_heads=8,
        moe_args=MoEArgs(
            num_experts=48,
            num_shared_experts=2,
            top_k=6,
            score_func="softmax",
            load_balance_coeff=1e-4,
            score_before_experts=False,
        ),
        q_lora_rank=0,
        mscale=0.70,
        use_flex_attn=True,
        attn_mask_type="block_causal",
    ),
"""


@pytest.mark.parametrize(
    ("model", "takes_sizes"),
    [("deepseek_v3", True), ("qwen3", False), ("gpt_oss", False), ("our_moe", True)],
)
def test_a_forks_flavor_is_left_open_and_everything_else_is_kept(
    model, takes_sizes, job_file, tmp_path, capsys
):
    path, new = job_file(FORK.format(model, 2048)), tmp_path / "new.toml"
    assert cli.main(["convert", str(path), str(new)]) == 1
    output = capsys.readouterr().out
    assert "open: model.flavor: " in output
    assert ("--sizes" in output) is takes_sizes
    assert '# flavor = "9.7B"\n' in new.read_text()
    with pytest.raises(EzpzError, match="flavor is missing: name the model to train"):
        load_job(new)
    new.write_text(new.read_text().replace('# flavor = "9.7B"', 'flavor = "16B"'))
    assert load_job(new).values["training.seq_len"] == 2048


@pytest.mark.parametrize("name", ["3", "['deepseek_v3']", "[['a']]", "''", "2001-01-01"])
def test_a_model_that_is_no_name_is_open_too(name, job_file, tmp_path):
    new = tmp_path / "new.toml"
    write(convert(job_file(f"[model]\nname = {name}\n"), new), new)
    assert "# flavor =\n" in new.read_text()
    with pytest.raises(EzpzError, match="flavor is missing"):
        load_job(new)


def test_a_forks_table_in_one_line_is_one_dropped_key(job_file, tmp_path):
    path = job_file(
        FORK.format("qwen3", 2048) + '[metrics]\nwandb = {project = "x", tags = {a = 1, b = 2}}\n'
    )
    new = tmp_path / "new.toml"
    found = convert(path, new)
    change = next(each for each in found.changes if each.key == "metrics.wandb")
    assert (change.fate, change.value["project"]) == ("dropped", "x")
    assert "# wandb = {project" in found.text


def test_a_forks_optimizer_is_left_open_with_its_lr(job_file, tmp_path):
    """AdamW in its place would train with the learning rate of another."""
    lines = '[optimizer]\nname = "Muon"\nlr = 0.02\n'
    new = tmp_path / "new.toml"
    conversion = convert(job_file(FORK.format("deepseek_v3", 2048) + lines), new, Wish("16B"))
    write(conversion, new)
    assert [change.key for change in conversion.left_open] == ["optimizer.name"]
    with pytest.raises(EzpzError, match='name = "Muon": must be one of'):
        load_job(new)
    new.write_text(new.read_text().replace('"Muon"\nlr = 0.02', '"AdamW"\nlr = 3e-4'))
    assert load_job(new).values["optimizer.lr"] == 3e-4


def test_a_flavor_that_the_user_names(job_file, tmp_path, capsys):
    path, new = job_file(FORK.format("deepseek_v3", 4096)), tmp_path / "new.toml"
    assert cli.main(["convert", str(path), str(new), "--flavor", "16B_for_loop"]) == 0
    assert load_job(new).flavor == "16B_for_loop"
    assert "open: " not in capsys.readouterr().out


@pytest.mark.parametrize("flavor", ["16B_for_loop", "qwen3_debugmodel_sdpa"])
def test_a_flavor_that_the_user_names_reaches_as_far_as_the_sequence(flavor, job_file, tmp_path):
    new = tmp_path / "new.toml"
    found = convert(job_file(FORK.format("deepseek_v3", 50000)), new, Wish(flavor))
    write(found, new)
    made, named = load_flavor("new_model", near=tmp_path), load_flavor(flavor)
    rope = made.rope or made.dimensions.rope
    assert rope.max_seq_len == 50000
    assert (made.attention, made.compute_backend) == (named.attention, named.compute_backend)


@pytest.mark.parametrize(
    ("flavor", "degree", "fits"),
    [
        ("16B", 8, True),
        ("16B", 12, False),
        # Of torchtitan's own models, the host's facts tell it.
        ("qwen3_debugmodel_sdpa", 64, True),
        ("qwen3_debugmodel_sdpa", 12, facts() is None),
    ],
)
def test_the_ranks_that_share_experts_fit_a_flavor_that_the_user_names(
    flavor, degree, fits, job_file, tmp_path, capsys
):
    lines = f"[parallelism]\nexpert_parallel_degree = {degree}\n"
    path, new = job_file(FORK.format("deepseek_v3", 4096) + lines), tmp_path / "new.toml"
    assert cli.main(["convert", str(path), str(new), "--flavor", flavor]) == (not fits)
    said = "open: parallelism.expert_parallel_degree: 12 does not divide the 64 experts"
    assert (said in capsys.readouterr().out) is not fits
    assert load_job(new).values["parallelism.expert_parallel_degree"] == degree
    assert ("# open: 12 does not divide" in new.read_text()) is not fits


def test_the_ranks_that_share_experts_fit_a_draft(job_file, tmp_path, capsys):
    lines = "[parallelism]\nexpert_parallel_degree = 5\n"
    path, new = job_file(FORK.format("deepseek_v3", 4096) + lines), tmp_path / "new.toml"
    assert cli.main(["convert", str(path), str(new), "--sizes", PASTED]) == 1
    assert "one of 1, 2, 3, 4, 6, 8, 12, 16, 24, 48\n" in capsys.readouterr().out


def test_a_flavor_is_drafted_from_a_forks_own_source(job_file, tmp_path, capsys):
    path, new = job_file(FORK.format("deepseek_v3", 8192)), tmp_path / "new.toml"
    assert cli.main(["convert", str(path), str(new), "--sizes", PASTED]) == 0
    made = load_flavor("new_model", near=tmp_path)
    size = made.dimensions
    assert (size.dim, size.dense_hidden_dim, size.moe_hidden_dim) == (1024, 2816, 704)
    assert (size.num_experts, size.router_top_k, size.router_score_func) == (48, 6, "softmax")
    assert (size.rope.scaling, size.rope.max_seq_len) == ("yarn", 32768)
    assert (made.attention, made.compute_backend) == ("flex", "grouped_mm")
    assert made.balance.bias_update == "sign"
    # Not among the sizes: what 0.2's class has, and marked.
    assert (size.kv_lora_rank, size.n_dense_layers) == (512, 1)
    text = (tmp_path / "new_model.toml").read_text()
    assert "kv_lora_rank = 512 # torchtitan 0.2's default\n" in text
    assert "dim = 1024\n" in text
    assert "12 sizes are torchtitan 0.2's defaults" in capsys.readouterr().out


def test_the_sizes_of_a_shipped_model_are_its_flavor():
    """Every default of the table is that of 0.2's class: its 16B leaves most of them out."""
    given = (
        "num_experts=64, num_shared_experts=2, top_k=6, score_func='softmax', mscale=0.7,"
        "score_before_experts=False, attn_type='flex'"
    )
    drafted = new_model("ourlab", "x", seq_len=8192, name="new", wish=Wish(sizes=given))
    theirs = new_model("deepseek_v3", "16B", seq_len=8192, name="new")
    made, known = (flavor_of(each.file) for each in (drafted, theirs))
    assert made.dimensions == known.dimensions
    assert not drafted.differences


def flavor_of(text):
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "new.toml").write_text(text)
        return load_flavor("new", near=Path(folder))


@pytest.mark.parametrize(
    ("seq_len", "scaling", "longest"),
    [(4096, "none", 16384), (4097, "yarn", 16384), (20000, "yarn", 20000)],
)
def test_a_drafted_rope_is_what_0_2_makes_of_the_length(seq_len, scaling, longest):
    made = flavor_of(
        new_model("deepseek_v3", "x", seq_len=seq_len, name="new", wish=Wish(sizes="dim=64")).file
    )
    assert made.dimensions.rope.scaling == scaling
    assert made.dimensions.rope.max_seq_len == longest


def test_what_a_drafted_flavor_does_not_compute_is_said(job_file, tmp_path, capsys):
    path, new = job_file(FORK.format("deepseek_v3", 2048)), tmp_path / "new.toml"
    sizes = "dim=256, gate_bias=True"
    assert cli.main(["convert", str(path), str(new), "--sizes", sizes]) == 1
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("differs: ")]
    assert ["gate_bias" in each for each in said] == [True]
    assert f"# {said[0]}\n" in (tmp_path / "new_model.toml").read_text()


@pytest.mark.parametrize(
    ("sizes", "scores"),
    [
        ("dim=256", 'router_scores = "before" # torchtitan 0.2\'s default\n'),
        ("dim=256, score_before_experts=True", 'router_scores = "before"\n'),
        ("dim=256, score_before_experts=False", None),
    ],
)
def test_scores_stay_where_0_2_applies_them(sizes, scores):
    made = new_model("deepseek_v3", "x", seq_len=2048, name="new", wish=Wish(sizes=sizes))
    assert not made.differences
    assert (scores or "") in made.file
    assert flavor_of(made.file).router_scores == ("before" if scores else "after")


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ("", "has no key=value: write --sizes"),
        ("dim", "has no key=value"),
        ("dim=", "has no key=value"),
        ("[" * 5000, "has no key=value"),
        ("dim=x\0", "has no key=value"),
        ("dim=DIM", "dim = 'DIM': write the number itself."),
        ("dim=2.0**9", "write the number itself."),
        ("dim=1e999", "write the number itself."),
        ("dim=" + "9" * 4000, "write the number itself."),
        ("dim=__import__('os').getcwd()", "has no key=value"),
        ("dim=open", "write the number itself."),
        ("dimm=3", "has no such size. Did you mean 'dim'?"),
        ("dim='2048'", "--sizes: dim = '2048': should be a valid integer."),
        ("dim=-1", "--sizes: dim = -1: should be greater than or equal to 1."),
        ("n_layers=1", "--sizes: a dense model has no experts, so moe_hidden_dim"),
        ("original_seq_len='x'", "rope.original_seq_len = 'x'"),
        ("attn_type='fast'", "attention = 'fast': should be 'flex'"),
    ],
)
def test_sizes_that_are_none(sizes, said, job_file, tmp_path, capsys):
    path, new = job_file(FORK.format("deepseek_v3", 2048)), tmp_path / "new.toml"
    with pytest.raises(SystemExit) as stopped:
        cli.main(["convert", str(path), str(new), "--sizes", sizes])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert [file.name for file in tmp_path.iterdir()] == ["job.toml"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--flavor", "16C"], "unknown flavor '16C'"),
        (["--flavor", "16B", "--sizes", "dim=3"], "Choose one."),
        (["--flavor", "16B", "--lint"], "are of a job's model. Leave them out."),
        (["--sizes", "dim=3"], "of qwen3 there are torchtitan's own alone"),
    ],
)
def test_a_wish_that_cannot_be_met(arguments, said, job_file, tmp_path, capsys):
    path, new = job_file(FORK.format("qwen3", 2048)), tmp_path / "new.toml"
    with pytest.raises(SystemExit) as stopped:
        cli.main(["convert", str(path), str(new), *arguments])
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err
    assert not new.exists()
