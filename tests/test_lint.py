"""``ezpz-moe convert --lint``: flags in scripts, and what the installed host still takes."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ezpz_moe import cli
from ezpz_moe.errors import EzpzError
from ezpz_moe.hosts.detect import HOSTS, presumed_host
from ezpz_moe.hosts.titan.v0_3 import Titan03
from ezpz_moe.hosts.titan.v2026_08 import Titan2026_08
from ezpz_moe.hosts.titan_0_2.v0_2 import Titan02
from ezpz_moe.tools import flag_remedies, lint
from ezpz_moe.tools.lint import words

# Flags of each generation, as its `flags` gives them.
TAKEN = {
    Titan02: {"training.steps", "training.dataset", "training.seq_len", "optimizer.beta1"},
    Titan03: {
        "training.steps",
        "training.local_batch_size",
        "training.enable_cpu_offload",
        "dataloader.dataset",
        "compile.enable_async_tensor_parallel",
        "optimizer.param_groups.0.optimizer_kwargs.betas",
        "dump_folder",
        "module",
        "config",
    },
    Titan2026_08: {"training.steps", "training.num_tokens_per_microbatch_per_dp_rank", "config"},
}


@pytest.fixture
def on(monkeypatch):
    """Makes a generation the installed one, and lints a script for it."""

    def run(script: Path, generation=Titan03) -> dict[str, str]:
        for module in (lint, flag_remedies):
            monkeypatch.setattr(module, "presumed_host", generation)
        findings = lint.lint(script, frozenset(TAKEN[generation]))
        return {f"{each.place.rpartition(':')[2]} {each.flag}": each.remedy for each in findings}

    return run


SCRIPT = """\
#!/bin/bash -l
#PBS -l select=2:ncpus=64
#SBATCH --nodes=4 --comment=training.steps
# don't use --training.batch_size any more
ARGS=(--training.steps 100 --optimizer.beta1=0.9)
ARGS+=(--job.dump_folder "$PWD/out")
EXTRA="--training.local-batch-size 1 \\
   --training.dataset 'my data'"
mpiexec -n 4 --ppn 12 --cpu-bind depth --envall \\
  torchrun --nnodes ${#NODES[@]} --nproc_per_node=12 --rdzv_endpoint=$head:29500 \\
  -m torchtitan.train --job.config_file $JOB "${ARGS[@]}" $EXTRA \\
  ${OFFLOAD:+--training.no-enable-cpu-offload} --parallelism.no-enable_async_tensor_parallel
srun --ntasks-per-node=1 python -m torchtitan.train --activation_checkpoint.mode=full # --x.y
cat <<END
it's run with --model.flavor 16B
END
"""


def test_every_flag_of_a_script_with_its_line(job_file, on):
    found = on(job_file(SCRIPT, "job.pbs"))
    assert list(found) == [
        "5 --training.steps",
        "5 --optimizer.beta1",
        "6 --job.dump_folder",
        "7 --training.local-batch-size",
        "8 --training.dataset",
        "11 --job.config_file",
        "12 --training.no-enable-cpu-offload",
        "12 --parallelism.no-enable_async_tensor_parallel",
        "13 --activation_checkpoint.mode",
        "15 --model.flavor",
    ]


def test_what_replaced_a_flag(job_file, on):
    found = on(job_file(SCRIPT, "job.pbs"))
    assert {flag.partition(" ")[2]: remedy for flag, remedy in found.items()} == {
        "--training.steps": "",
        "--optimizer.beta1": (
            "now one of the values of --optimizer.param-groups.0.optimizer-kwargs.betas"
        ),
        "--job.dump_folder": "now --dump-folder",
        "--training.local-batch-size": "",
        "--training.dataset": "now --dataloader.dataset",
        "--job.config_file": (
            "the file is named on the command line: --module ezpz_moe --config PATH. Leave it out."
        ),
        "--training.no-enable-cpu-offload": "",
        "--parallelism.no-enable_async_tensor_parallel": (
            "now --compile.no-enable-async-tensor-parallel"
        ),
        "--activation_checkpoint.mode": (
            "no longer a flag: set [activation_checkpoint] mode in the job's TOML"
        ),
        "--model.flavor": "now --config",
    }


def test_a_flag_that_no_generation_has(job_file, on):
    found = on(job_file("x --training.step 8 --training.zzz --unheard.of --help\n", "a.sh"))
    assert found == {
        "1 --training.step": "torchtitan itself has no such flag. Did you mean 'steps'?",
        "1 --training.zzz": "torchtitan itself has no such flag.",
    }


@pytest.mark.parametrize(
    ("flag", "remedy"),
    [
        ("--training.batch_size", "now --training.local-batch-size"),
        ("--training.tensor_parallel_degree", "now --parallelism.tensor-parallel-degree"),
        ("--metrics.rank_0_only", "now --metrics.no-save-for-all-ranks"),
        ("--metrics.no_rank_0_only", "now --metrics.save-for-all-ranks"),
        ("--optimizer.fused", "now --optimizer.implementation fused"),
        ("--optimizer.no-fused", "now --optimizer.implementation foreach"),
        ("--checkpoint.no_enable_checkpoint", "now --checkpoint.no-enable"),
        ("--checkpoint.enable_step_checkpoint", "torchtitan itself has no such flag."),
    ],
)
def test_a_flag_of_a_release_before_0_2(flag, remedy, job_file, on, monkeypatch):
    more = {"parallelism.tensor_parallel_degree", "metrics.save_for_all_ranks"}
    more |= {"checkpoint.enable", "checkpoint.enable_first_step_checkpoint"}
    more |= {"optimizer.implementation"}
    monkeypatch.setitem(TAKEN, Titan03, TAKEN[Titan03] | more)
    assert on(job_file(f"x {flag}\n", "a.sh")) == {f"1 {flag}": remedy}


def test_a_flag_without_a_section(monkeypatch):
    monkeypatch.setattr(flag_remedies, "presumed_host", Titan02)
    assert flag_remedies.remedy("hf_assets_path", {"hf_assets_path"}) == ""
    taken = {"model.hf_assets_path"}
    assert flag_remedies.remedy("hf_assets_path", taken) == "now --model.hf-assets-path"


def test_a_section_that_is_misspelled(job_file, on):
    found = on(job_file("x --trainnig.steps 3 --job-id.x 3 --other.tools=1\n", "a.sh"))
    assert found == {"1 --trainnig.steps": "unknown section: did you mean training?"}


def test_a_new_flag_on_an_old_host(job_file, on):
    script = job_file(
        "x --dataloader.dataset=c4 --optimizer.param-groups.0.optimizer-kwargs.betas.0 1 "
        "--training.max-context-length 4\n",
        "a.sh",
    )
    found = on(script, Titan02)
    assert found["1 --dataloader.dataset"] == "now --training.dataset"
    assert found["1 --optimizer.param-groups.0.optimizer-kwargs.betas.0"] == (
        "now --optimizer.beta1"
    )
    assert found["1 --training.max-context-length"] == "now --training.seq-len"


def test_sizes_in_tokens_since_2026_08(job_file, on):
    found = on(job_file("x --training.local_batch_size 8\n", "a.sh"), Titan2026_08)
    assert found == {
        "1 --training.local_batch_size": "now --training.num-tokens-per-microbatch-per-dp-rank"
    }


@pytest.mark.parametrize(
    ("generation", "remedy"),
    [(Titan02, ""), (Titan03, "run_train.sh of torchtitan 0.3 takes MODULE and CONFIG")],
)
def test_the_launchers_variable(generation, remedy, job_file, on):
    script = job_file('export CONFIG_FILE="${CONFIG_FILE:-x}"\nNGPU=8 ./run_train.sh\n', "a.sh")
    assert on(script, generation) == {"1 CONFIG_FILE=": remedy}


def test_a_variable_of_the_same_name_without_the_launcher(job_file, on):
    assert on(job_file("CONFIG_FILE=x\npython mine.py $CONFIG_FILE\n", "a.sh")) == {}


def test_every_generation_has_its_variables():
    assert all(each.launcher_variables for each in HOSTS)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("a 'b c' \"d e\"", ["a", "b", "c", "d", "e"]),
        ("(a) | b;c&&d `e`", ["(", "a", ")", "|", "b", ";", "c", "&&", "d", "`", "e", "`"]),
        ("a # b", ["a"]),
        ("${#a[@]} b", ["${#a[@]}", "b"]),
        ("a b\\", ["a", "b"]),
        ("a 'b c", ["a", "b", "c"]),
        ("it's a \"b", ["its", "a", "b"]),
        ('a"', ["a"]),
        ('a "b\u00a0c"', ["a", "b\u00a0c"]),
        ("", []),
    ],
)
def test_the_words_of_a_line(line, expected):
    assert list(words(line)) == expected


@given(st.text("ab-.='\"`\\#$(){} \t\u00a0\u2028"))
def test_any_line_has_words(line):
    list(words(line))


@given(st.lists(st.text("abc-.=_", min_size=1), min_size=1))
def test_plain_words_are_those_of_shlex(plain):
    assert list(words(shlex.join(plain))) == plain


def test_a_file_that_cannot_be_read(tmp_path):
    with pytest.raises(EzpzError, match="No such file"):
        lint.lint(tmp_path / "missing.sh", frozenset())
    with pytest.raises(EzpzError, match="Is a directory"):
        lint.lint(tmp_path, frozenset())


def test_lines_are_those_of_an_editor(job_file, on):
    assert on(job_file("a\u2028b\x0cc\nx --training.steps 1\n", "a.sh")) == {
        "2 --training.steps": ""
    }


def test_bytes_that_are_not_utf8(job_file, on):
    assert on(job_file(b"echo \xff --training.steps 1\n", "a.sh")) == {"1 --training.steps": ""}


# With the installed host -------------------------------------------------------------------------

ALIVE = {
    Titan02: "--job.config_file a.toml --training.dataset=c4 --model.flavor x",
    Titan03: "--dataloader.dataset=c4 --training.no-disable-cuda-graphs --training.seq_len 9",
    Titan2026_08: "--training.max-context-length 9",
}


def test_the_command_with_the_hosts_own_flags(job_file, capsys):
    script = job_file(f"python -m torchtitan.train {ALIVE[type(presumed_host())]}\n", "a.sh")
    assert cli.main(["convert", "--lint", str(script)]) == 0
    assert "flags, 0 dead on torchtitan" in capsys.readouterr().out
    dead = job_file("x --training.steps 1 --metrics.enable_color_printing\n", "b.sh")
    assert cli.main(["convert", "--lint", str(script), str(dead)]) == 1
    output = capsys.readouterr().out
    assert f"{dead}:1" in output
    assert "now --metrics.no-disable-color-printing" in output
    assert "1 dead" in output


@pytest.mark.skipif(type(presumed_host()) is not Titan03, reason="of 0.3's command line")
def test_the_flags_are_those_of_the_command_line():
    taken = lint.taken_flags()
    from torchtitan.config import ConfigManager

    def takes(*arguments: str) -> bool:
        try:
            ConfigManager().parse_args(
                ["--module", "ezpz_moe", "--config", "debugmodel_sdpa", *arguments]
            )
        except SystemExit:
            return False
        return True

    assert "training.steps" in taken
    assert takes("--training.steps", "3")
    assert "activation_checkpoint.debug" not in taken
    assert not takes("--activation-checkpoint.debug")
    assert "job.dump_folder" not in taken
    assert not takes("--job.dump_folder", "x")
