"""``ezpz-moe convert``: a job of torchtitan 0.2 becomes one for 0.3; no key is lost silently."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import tomli
from convert_cases import DATA, OLD, QWEN3, changes, fates, toml, written
from hypothesis import given
from hypothesis import strategies as st

from ezpz_moe import cli
from ezpz_moe.config.job import is_one_of
from ezpz_moe.config.toml_edit import statements
from ezpz_moe.errors import EzpzError
from ezpz_moe.hosts.detect import check_host, presumed_host
from ezpz_moe.hosts.jobs import load_job
from ezpz_moe.hosts.titan.job_keys import KEYS
from ezpz_moe.hosts.titan.v0_3 import Titan03
from ezpz_moe.hosts.titan_0_2.job_keys import CHANGED_DEFAULTS, LOST_DEFAULTS, NO_EFFECT
from ezpz_moe.tools.convert import Change, convert, write
from ezpz_moe.tools.convert_keys import OldJob

LIST_0_2 = Path(__file__).parent / "data" / "titan_0_2_2_keys.txt"
DEFAULTS_0_2 = dict(line.split(" = ", maxsplit=1) for line in LIST_0_2.read_text().splitlines())

# The report -----------------------------------------------------------------------------------


def test_every_key_is_reported_once_in_the_order_of_the_file(job_file):
    reported = [change.key for change in convert(job_file(OLD), Path("new.toml")).changes]
    assert reported == [
        "job.description",
        "model.name",
        "model.flavor",
        "model.hf_assets_path",
        "training.dataset",
        "training.seq_len",
        "training.local_batch_size",
        "parallelism.expert_parallel_degree",
        "parallelism.expert_tensor_parallel_degree",
        "activation_checkpoint.mode",
        "activation_checkpoint.selective_ac_option",
        "compile.enable",
        "compile.components",
        "quantize.linear.float8.filter_fqns",
        "validation.enable",
        "validation.local_batch_size",
    ]


def test_what_becomes_of_a_key(job_file):
    found = changes(job_file(OLD + "[optimizer]\nbeta1 = 0.8\n"))
    assert found["training.seq_len"] == Change("training.seq_len", 128, "kept")
    assert found["optimizer.beta1"].note == (
        "now optimizer.param_groups.0.optimizer_kwargs.betas.0"
    )
    assert found["model.name"] == Change(
        "model.name", "qwen3", "replaced", 'by "ezpz_moe"', "ezpz_moe"
    )
    assert found["parallelism.expert_tensor_parallel_degree"].fate == "needless"
    lost = found["activation_checkpoint.selective_ac_option"]
    assert (lost.fate, lost.note) == (
        "dropped",
        KEYS["activation_checkpoint"]["selective_ac_option"].message,
    )
    assert "validation.enable = false" in found["validation.local_batch_size"].note
    assert "model.converters = []" in found["quantize.linear.float8.filter_fqns"].note


def test_quantization_counts_once_a_converter_asks_for_it(job_file):
    text = OLD.replace("# converters", "converters")
    found = fates(job_file(text))
    assert found["model.converters"] == "dropped"
    assert found["quantize.linear.float8.filter_fqns"] == "dropped"


def test_a_value_that_0_3_does_not_take_is_dropped_with_what_it_takes(job_file):
    change = changes(job_file(QWEN3 + '[checkpoint]\nenable = true\nexport_dtype = "float8"\n'))[
        "checkpoint.export_dtype"
    ]
    assert change.fate == "dropped"
    assert change.note == 'it must be one of "float16", "bfloat16", "float32"'


def test_a_key_of_a_config_module_of_the_users_is_dropped(job_file):
    found = changes(job_file(QWEN3 + "[encoder]\nlayers = 2\n[training]\nstep = 3\n"))
    assert found["encoder.layers"].fate == "dropped"
    assert found["training.step"].note.endswith("Did you mean 'steps'?")


@pytest.mark.parametrize("row", NO_EFFECT, ids=lambda row: f"{row[0]} {row[1]}")
def test_a_setting_that_is_switched_off_is_needless(row, job_file):
    prefix, switch, default, off = row
    assert DEFAULTS_0_2[switch] in (repr(default), "field(default_factory=list)")
    may_be_idle = (
        f"{section}.{name}"
        for section, names in KEYS.items()
        for name, key in names.items()
        if key.message or section == "activation_checkpoint"
    )
    key = next(key for key in may_be_idle if key.startswith(prefix) and key != switch)
    for value in off:
        change = changes(job_file(toml({switch: value, key: "no value of it"})))[key]
        assert change.fate == "needless"
        assert change.note.startswith("it has no effect with ")
    on = {other: "no value of it" for start, other, *_ in NO_EFFECT if key.startswith(start)}
    assert fates(job_file(toml(on | {key: "no value of it"})))[key] == "dropped"


def test_a_value_of_another_type_is_not_what_0_3_does(job_file):
    text = QWEN3 + "[activation_checkpoint]\nearly_stop = {}\n"
    assert fates(job_file(text.format("false")))["activation_checkpoint.early_stop"] == "needless"
    assert fates(job_file(text.format("0")))["activation_checkpoint.early_stop"] == "dropped"


def test_a_setting_that_is_switched_on_is_not_needless(job_file):
    text = OLD.replace("enable = false\nlocal", "enable = true\nlocal")
    assert fates(job_file(text))["validation.local_batch_size"] == "dropped"


# The new file ---------------------------------------------------------------------------------


def test_the_new_job_is_valid_and_says_the_same(job_file):
    job = load_job(written(job_file(OLD)))
    assert job.values == {
        "job.description": "a job of torchtitan 0.2",
        "model.name": "ezpz_moe",
        "model.flavor": "qwen3_debugmodel_sdpa",
        "model.hf_assets_path": "./assets/tokenizer",
        "training.dataset": "c4",
        "training.seq_len": 128,
        "training.local_batch_size": 1,
        "parallelism.expert_parallel_degree": 1,
        "activation_checkpoint.mode": "selective",
        "compile.enable": False,
        "compile.components": ["model", "loss"],
        "validation.enable": False,
    }


def test_what_stays_is_as_the_user_wrote_it(job_file):
    text = written(job_file(OLD)).read_text()
    for line in ("# our run", '# converters = ["float8"]', "enable=false", '    "model",  # both'):
        assert f"\n{line}\n" in text
    assert 'description = "a job of torchtitan 0.2"  # keep me\n' in text
    assert 'flavor = "qwen3_debugmodel_sdpa" # was "debugmodel_moe"\n' in text


def test_windows_line_ends_stay(job_file):
    new = written(job_file(OLD.replace("\n", "\r\n")))
    assert b"enable=false\r\ncomponents = [\r\n" in new.read_bytes()


def test_what_is_dropped_is_a_comment_with_its_reason(job_file):
    text = written(job_file(OLD)).read_text()
    reason = KEYS["activation_checkpoint"]["selective_ac_option"].message
    assert f"# dropped: {reason}\n# selective_ac_option = '2'  # every second layer\n" in text


def test_a_section_of_needless_keys_is_left_out(job_file):
    assert "[quantize.linear.float8]" not in written(job_file(OLD)).read_text()


def test_a_section_that_0_3_does_not_know_is_a_comment(job_file):
    new = written(job_file(OLD + "\n[encoder]\nlayers = [\n  1,\n]\n"))
    assert "# [encoder]\n" in new.read_text()
    assert "# layers = [\n#   1,\n# ]\n" in new.read_text()
    load_job(new)


@pytest.mark.parametrize(
    "text",
    [
        OLD.replace("\n", "\r\n"),
        "\ufeff" + OLD,
        OLD.rstrip("\n"),
        'model.name = "qwen3"\nmodel.flavor = "debugmodel_moe"\n[training]\nsteps = 3',
        OLD + "[encoder]\n[[many]]\nx = 1\n",
        OLD + "# a line\u2028separator\n[metrics]\nlog_freq = 3\n",
        OLD + '[metrics]\nsave_tb_folder = """\n[not.a.header]\n# not a comment"""\n',
    ],
    ids=[
        "windows",
        "byte order mark",
        "no last newline",
        "dotted",
        "unknown",
        "u2028",
        "multi-line",
    ],
)
def test_every_way_to_write_toml(text, job_file):
    path = job_file(text)
    new = load_job(written(path)).values
    old = tomli.loads(path.read_text(encoding="utf-8-sig"))
    assert new["model.flavor"] == "qwen3_debugmodel_sdpa"
    for section in ("training", "metrics"):
        for name, value in old.get(section, {}).items():
            assert new[f"{section}.{name}"] == value


def test_a_section_in_one_line_is_refused(job_file):
    path = job_file('model = {name = "qwen3", flavor = "debugmodel_moe"}\n')
    with pytest.raises(EzpzError, match="is not one key with one value"):
        convert(path, path)


@given(
    st.lists(
        st.sampled_from(
            (
                "[a]\n",
                "[b.c]\n",
                "\n",
                "# x ] = \"'\n",
                'k{} = """\n[x]\n"""\n',
                "k{} = [\n 1,\n]\n",
            )
        )
    )
)
def test_the_statements_are_the_document(parts):
    text = "".join(part.format(number) for number, part in enumerate(parts))
    found = list(statements(text))
    assert "".join(statement.text for statement in found) == text
    assert len(found) == len(parts)


# Defaults -------------------------------------------------------------------------------------


def test_defaults_that_changed_are_written_down(job_file):
    text = (
        '[model]\nname = "qwen3"\nflavor = "debugmodel_moe"\n[profiling]\nenable_profiling = true\n'
    )
    path = job_file(text)
    values = load_job(written(path)).values
    assert values["training.dataset"] == "c4_test"
    assert values["model.hf_assets_path"] == "./tests/assets/tokenizer"
    assert values["profiling.save_traces_folder"] == "profile_traces"
    assert "profiling.save_memory_snapshot_folder" not in values
    assert fates(path)["training.dataset"] == "added"


def test_a_folder_of_torchtitans_checkout_is_called_so(job_file):
    """doctor refuses it elsewhere, where nobody knows whose folder it is."""
    text = written(job_file('[model]\nname = "qwen3"\nflavor = "debugmodel_moe"\n')).read_text()
    assert "a folder of torchtitan's own checkout. Elsewhere name your tokenizer's" in text


def test_a_value_that_0_3_refuses_is_needless_where_it_is_switched_off(job_file):
    text = QWEN3 + '[checkpoint]\nenable = {}\nfolder = ""\n'
    assert fates(job_file(text.format("false")))["checkpoint.folder"] == "needless"
    assert fates(job_file(text.format("true")))["checkpoint.folder"] == "dropped"


def test_a_default_is_not_added_to_what_the_file_says(job_file):
    assert "added" not in fates(job_file(OLD)).values()


def test_defaults_that_0_3_cannot_be_given_are_reported(job_file):
    path = job_file(QWEN3 + DATA + "[validation]\nenable = true\nseq_len = 512\n")
    differing = {key: change for key, change in changes(path).items() if change.fate == "differs"}
    assert {key: change.value for key, change in differing.items()} == {
        "activation_checkpoint.selective_ac_option": "2",
        "validation.local_batch_size": 8,
    }
    assert "every second layer" in differing["activation_checkpoint.selective_ac_option"].note
    assert convert(path, path).dropped == ["validation.seq_len"]
    assert "selective_ac_option" not in written(path).read_text()


def test_the_table_of_lost_defaults_is_complete():
    """Of the keys that are gone, those with a default that is no list, nothing, or switched off."""
    gone = {}
    for section, rows in KEYS.items():
        for name, row in rows.items():
            default = DEFAULTS_0_2.get(f"{section}.{name}", "None")
            if row.message and default != "None" and not is_list(default):
                gone[f"{section}.{name}"] = ast.literal_eval(default), row
    on = {"validation.enable": True, "parallelism.pipeline_parallel_degree": 2}
    on |= {"parallelism.expert_parallel_degree": 2, "activation_checkpoint.mode": "selective"}
    assert {key: default for key, (default, _) in LOST_DEFAULTS.items()} == {
        key: default
        for key, (default, row) in gone.items()
        if not is_one_of(row.unless, default) and not OldJob(on).switched_off(key)
    }


def is_list(default: str) -> bool:
    """Whether the list of 0.2's defaults shows only that there is one."""
    return default.startswith("field(")


@pytest.mark.skipif(type(presumed_host()) is not Titan03, reason="of 0.3's binding")
def test_the_table_of_changed_defaults_is_complete(cpu_with):
    cpu_with("float32,bfloat16")  # of a CPU that emulates bfloat16 is the rule, not the host
    check_host()
    from ezpz_moe.config.job import job_for_flavor
    from ezpz_moe.hosts.titan.job import trainer_config
    from ezpz_moe.hosts.titan.settings import settings

    now = {each.path: each.value for each in settings(trainer_config(job_for_flavor("debugmodel")))}
    rows = {f"{s}.{name}": row for s, names in KEYS.items() for name, row in names.items()}
    changed = {
        key
        for key, row in rows.items()
        if row.path in now and key in DEFAULTS_0_2 and not is_list(DEFAULTS_0_2[key])
        if DEFAULTS_0_2[key] != repr(now[row.path])
    }
    read_here = {"model.flavor", "training.dataset", "validation.dataset"}
    assert changed | read_here == set(CHANGED_DEFAULTS)
    for key, (value, _) in CHANGED_DEFAULTS.items():
        assert DEFAULTS_0_2[key] == repr(value)


# Files and exit codes -------------------------------------------------------------------------


def test_exit_code_0_when_nothing_with_an_effect_is_lost(job_file, tmp_path, capsys):
    path = job_file(OLD.replace("'2'", "'op'"))
    assert cli.main(["convert", str(path), str(tmp_path / "new.toml")]) == 0
    output = capsys.readouterr().out
    assert f"{tmp_path / 'new.toml'} written" in output
    assert "dropped" not in output


def test_exit_code_1_when_something_is_lost_and_what(job_file, tmp_path, capsys):
    assert cli.main(["convert", str(job_file(OLD)), str(tmp_path / "new.toml")]) == 1
    output = capsys.readouterr().out
    assert "1 dropped that had an effect: activation_checkpoint.selective_ac_option\n" in output
    assert (tmp_path / "new.toml").exists()


@pytest.mark.parametrize("text", ["", "[model]\n"])
def test_a_job_without_keys_is_the_old_hosts_default(text, job_file, capsys):
    assert cli.main(["convert", str(job_file(text))]) == 1
    assert "llama3 is dense: it has no routed experts" in capsys.readouterr().out


def test_a_new_job_that_no_command_would_take_for_one(job_file, tmp_path):
    new = tmp_path / "new.tml"
    with pytest.raises(EzpzError, match=r"new\.tml: a job's name must end in \.toml"):
        write(convert(job_file(OLD), new), new)
    assert not new.exists()


def test_a_number_of_files_that_means_nothing(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["convert", "a.toml", "b.toml", "c.toml"])
    assert stopped.value.code == 2
    assert "not 3 files. To check scripts, add --lint." in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["convert", "--lint"])  # as jobs/*.pbs where there are none
    assert "name the scripts" in capsys.readouterr().err


@pytest.mark.parametrize("there", ["new.toml", "new_model.toml"])
def test_no_file_is_overwritten(there, job_file, tmp_path):
    path = job_file('[model]\nname = "deepseek_v3"\nflavor = "16B"\n')
    (tmp_path / there).write_text("# mine\n")
    new = tmp_path / "new.toml"
    with pytest.raises(EzpzError, match=f"{there} already exists"):
        write(convert(path, new), new)
    assert (tmp_path / there).read_text() == "# mine\n"
    assert {file.name for file in tmp_path.iterdir()} == {"job.toml", there}


def test_a_folder_that_is_not_there_is_made(job_file, tmp_path):
    new = tmp_path / "not" / "yet" / "new.toml"
    assert write(convert(job_file(OLD), new), new) == [new]


def test_a_folder_that_is_a_file(job_file, tmp_path):
    new = tmp_path / "job.toml" / "new.toml"
    with pytest.raises(EzpzError, match="cannot be written"):
        write(convert(job_file(OLD), new), new)


def test_a_write_that_fails_leaves_nothing(job_file, tmp_path, monkeypatch):
    def fail(source, target):
        raise OSError(28, "No space left on device")

    path, new = job_file(OLD), tmp_path / "new.toml"
    conversion = convert(path, new)
    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(EzpzError, match="No space left"):
        write(conversion, new)
    assert [file.name for file in tmp_path.iterdir()] == ["job.toml"]
