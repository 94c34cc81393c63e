"""A job file is read, or one message says what is wrong and where."""

import subprocess
import sys
from pathlib import Path

import pytest

from ezpz_moe.config.job import BASES, Job, job_for_flavor
from ezpz_moe.errors import EzpzError
from ezpz_moe.hosts.jobs import load_job
from ezpz_moe.hosts.titan_0_2.moe_models import MOE_MODELS

JOBS = Path(__file__).parents[1] / "flavors" / "jobs"
MODEL = '[model]\nname = "ezpz_moe"\nflavor = "debugmodel_sdpa_for_loop"\n'


def problem(path: Path) -> str:
    with pytest.raises(EzpzError) as error:
        load_job(path)
    return str(error.value)


# The file ---------------------------------------------------------------------------------------


def test_a_job_holds_what_its_file_sets(job_file):
    path = job_file(MODEL + "[training]\nsteps = 7\n[training.dataloader]\nnum_workers = 1\n")
    job = load_job(path)
    assert job.flavor == "debugmodel_sdpa_for_loop"
    assert job.values == {
        "model.name": "ezpz_moe",
        "model.flavor": "debugmodel_sdpa_for_loop",
        "training.steps": 7,
        "training.dataloader.num_workers": 1,
    }


def test_a_byte_order_mark_and_windows_line_ends_are_read(job_file):
    path = job_file(b"\xef\xbb\xbf" + MODEL.replace("\n", "\r\n").encode())
    assert load_job(path).flavor == "debugmodel_sdpa_for_loop"


def test_a_missing_file_suggests_its_neighbour(job_file):
    path = job_file(MODEL)
    missing = path.with_name("jop.toml")
    assert problem(missing) == f"{missing}: there is no such file. Did you mean '{path}'?"


def test_a_file_with_other_letters_is_not_the_nearest(tmp_path):
    (tmp_path / "zensical.toml").touch()
    missing = tmp_path / "nosuch.toml"
    assert problem(missing) == f"{missing}: there is no such file."


def test_a_folder_is_no_job(tmp_path):
    assert "is a folder" in problem(tmp_path)


def test_a_file_that_may_not_be_read(job_file, monkeypatch):
    path = job_file(MODEL)

    def refuse(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    assert "cannot be read" in problem(path)


def test_not_utf8_names_line_and_column(job_file):
    path = job_file(b"# a\n# \xff\n")
    assert "not UTF-8 text (at line 2, column 3)" in problem(path)


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("[training]\nsteps = = 3\n", "line 2, column 9"),
        ("[training]\nsteps = ", "line 2, column 9"),
        ("[training]\nsteps = 1\nsteps = 2\n", "line 3, column"),
    ],
)
def test_not_toml_names_file_line_and_column(job_file, text, place):
    path = job_file(text)
    message = problem(path)
    assert message.startswith(f"{path}: is not valid TOML: ")
    assert place in message


@pytest.mark.parametrize("value", ["1" * 5000, "[" * 1000])
def test_toml_beyond_the_parsers_limits(job_file, value):
    assert "is not valid TOML" in problem(job_file(f"a = {value}"))


# Sections and keys ------------------------------------------------------------------------------


def test_an_unknown_key_names_the_nearest(job_file):
    message = problem(job_file(MODEL + "[training]\nsequence_len = 8\n"))
    assert "[training] sequence_len: unknown key. Did you mean 'seq_len'?" in message


def test_a_key_of_another_section_is_sent_home(job_file):
    message = problem(job_file(MODEL + "[training]\nwarmup_steps = 8\n"))
    assert "[training] warmup_steps: unknown key. It belongs in [lr_scheduler]." in message


def test_a_key_outside_of_any_section_is_sent_home(job_file):
    message = problem(job_file("seq_len = 8\n" + MODEL))
    assert "seq_len (outside of any section): unknown key. It belongs in [training]." in message


def test_a_flavors_file_is_told_from_a_job(job_file):
    message = problem(job_file('inherits = "debugmodel"\n[telemetry]\nevery = 2\n'))
    assert "is a flavor's file, not a job's" in message
    assert "unknown" not in message
    message = problem(job_file('inherits = "debugmodel"\n' + MODEL))
    assert "inherits (outside of any section): unknown key." in message, "a job with a wrong key"


def test_an_unknown_section_names_the_nearest(job_file):
    message = problem(job_file(MODEL + "[trainning]\nsteps = 8\n"))
    assert "[trainning]: unknown section. Did you mean 'training'?" in message


@pytest.mark.parametrize("text", ["[change]\nn_layers = 2", "[balance]\naux_loss = 0.1", "dim = 8"])
def test_what_a_flavor_says_is_sent_to_its_file(job_file, text):
    # Below MODEL's header, a key without a section is one of [model].
    message = problem(job_file(f"{MODEL}{text}\n"))
    assert message.endswith("It belongs in the flavor's file."), message


@pytest.mark.parametrize("text", ["training = 3\n" + MODEL, MODEL + "[[training]]\nsteps = 3\n"])
def test_a_section_that_is_none(job_file, text):
    assert "must be a section, [training]" in problem(job_file(text))


@pytest.mark.parametrize(
    ("line", "allowed"),
    [
        ('seq_len = "8"', "an integer >= 1"),
        ("seq_len = true", "an integer >= 1"),
        ("seq_len = 8.0", "an integer >= 1"),
        ("seq_len = 0", "an integer >= 1"),
        ("global_batch_size = 0", "-1 or an integer >= 1"),
        ("max_norm = nan", "a number > 0"),
        ("max_norm = inf", "a number > 0"),
        ("max_norm = 0", "a number > 0"),
        ("gc_debug = 1", "true or false"),
        ('dtype = "float16"', 'one of "bfloat16", "float32"'),
        ('dataset = ""', "a non-empty string"),
        ('dataset_path = "a\\u0000b"', "a non-empty string"),
        ("steps = 1979-05-27", "an integer >= 1"),
        ("steps = {a = 1}", "an integer >= 1"),
    ],
)
def test_a_wrong_value_says_what_is_allowed(job_file, line, allowed):
    message = problem(job_file(f"{MODEL}[training]\n{line}\n"))
    key = line.split(" = ")[0]
    assert f"[training] {key} = " in message
    assert f": must be {allowed}." in message


def test_a_list_says_what_its_entries_may_be(job_file):
    message = problem(job_file(MODEL + '[compile]\ncomponents = ["model", "los"]\n'))
    assert 'a list, each entry one of "model", "loss"' in message


def test_all_problems_are_reported_at_once(job_file):
    path = job_file(
        '[model]\nname = "ezpz_moe"\nflavor = "16C"\n'
        '[training]\nstepz = 1\nseq_len = "x"\n'
        "[fault_tolerance]\nenable = true\ngroup_size = 2\n"
    )
    first, *rest = problem(path).splitlines()
    assert first == f"{path}: 4 problems"
    for part in ("stepz", 'seq_len = "x"', "[fault_tolerance] enable, group_size:", '"16C"'):
        assert sum(part in line for line in rest) == 1
    assert len(rest) == 4


def test_a_key_that_is_gone_may_ask_for_what_the_host_does_anyway(job_file):
    path = job_file(
        MODEL
        + "converters = []\n"
        + '[activation_checkpoint]\nselective_ac_option = "op"\n'
        + "[parallelism]\nexpert_tensor_parallel_degree = 1\n"
        + '[experimental]\ncustom_import = "ezpz_moe"\n'
    )
    assert load_job(path).values.keys() == {"model.name", "model.flavor"}


def test_accepted_values_count_with_their_type(job_file):
    # In Python, 1 == True.
    path = job_file(MODEL + "[parallelism]\nexpert_tensor_parallel_degree = true\n")
    assert "Set only expert_parallel_degree" in problem(path)


def test_quantization_is_refused_with_its_remedy(job_file):
    path = job_file(
        MODEL
        + 'converters = ["quantize.grouped_mm.mx"]\n[quantize.grouped_mm.mx]\nfqns = ["experts"]\n'
    )
    message = problem(path)
    assert "[model] converters: torchtitan 0.3 converts a model where its config is made" in message
    assert "[quantize.grouped_mm.mx] fqns: quantization replaces the same expert prod" in message


def test_converters_of_linears_are_not_said_to_exclude_a_backend(job_file):
    text = 'converters = ["quantize.linear.float8"]\n[quantize.linear.float8]\nemulate = true\n'
    message = problem(job_file(MODEL + text))
    linears = "Converters of linears work with every `compute_backend`"
    assert message.count(linears) == 2
    assert "[quantize.linear.float8] emulate: torchtitan 0.3 converts a model where" in message
    assert "quantization replaces" not in message


# [model] ------------------------------------------------------------------------------------------


def test_another_models_name_says_how_to_choose_it(job_file):
    path = job_file('[model]\nname = "deepseek_v3"\nflavor = "16B"\n')
    message = problem(path)
    assert '[model] name = "deepseek_v3": must be "ezpz_moe"' in message
    assert 'base = "deepseek_v3/<its flavor>"' in message


def test_only_a_model_that_can_be_a_base_is_named_as_one(job_file):
    """With any other, doctor would answer that torchtitan has no such model."""
    assert set(BASES) == {name for name, flavors in MOE_MODELS.items() if flavors}
    message = problem(job_file('[model]\nname = "llama4"\nflavor = "debugmodel"\n'))
    assert "`ezpz-moe flavors` lists them" in message
    assert "base" not in message


def test_name_and_flavor_are_required(job_file):
    message = problem(job_file("[training]\nsteps = 1\n"))
    assert "[model] name is missing" in message
    assert "[model] flavor is missing" in message


def test_an_unknown_flavor_is_found_before_the_run(job_file):
    path = job_file(MODEL.replace("debugmodel", "debugmodle"))
    assert '[model] flavor = "debugmodle_sdpa_for_loop"' in problem(path)


def test_a_flavor_without_a_job():
    job = job_for_flavor("debugmodel_sdpa")
    assert (job.path, job.values, job.source) == (None, {}, "flavor debugmodel_sdpa")
    with pytest.raises(EzpzError, match="nonsense"):
        job_for_flavor("nonsense")


def test_reading_a_job_imports_neither_torch_nor_the_host():
    code = (
        "import sys; from ezpz_moe.hosts.jobs import load_job; load_job(sys.argv[1]);"
        "assert not {'torch', 'torchtitan'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code, str(JOBS / "debug_cpu.toml")], check=True)


# Paths ------------------------------------------------------------------------------------------


def test_a_path_is_the_working_directorys_then_the_jobs(tmp_path, monkeypatch):
    here, there = tmp_path / "here", tmp_path / "there"
    for folder in (here / "both", there / "both", there / "only"):
        folder.mkdir(parents=True)
    monkeypatch.chdir(here)
    job = Job(flavor="x", path=there / "job.toml")
    assert job.resolve("both") == str(here / "both")
    assert job.resolve("only") == str(there / "only")
    assert job.resolve("none") == str(here / "none")
    assert job.resolve("/absolute") == "/absolute"
    assert job.resolve("gs://bucket/x") == "gs://bucket/x"
