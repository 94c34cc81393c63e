"""Keys of torchtitan before 0.2: what became of each, in a converted job and in a message."""

from __future__ import annotations

from pathlib import Path

import pytest
from convert_cases import QWEN3, changes, fates, written

from ezpz_moe.config.job import accepts, likely
from ezpz_moe.config.keys import Key
from ezpz_moe.config.older_keys import OLDER_KEYS, successor
from ezpz_moe.errors import EzpzError
from ezpz_moe.hosts.jobs import load_job
from ezpz_moe.hosts.titan.job_keys import KEYS
from ezpz_moe.hosts.titan_0_2.job_keys import KEYS as KEYS_0_2

DATA = Path(__file__).parent / "data"
ROWS = {f"{section}.{name}": row for section, rows in KEYS.items() for name, row in rows.items()}
# Those of 0.1.0 and 0.2.0 that 0.2.2 does not have, read off the released packages.
RELEASED = {
    line.partition(" = ")[0] for line in (DATA / "titan_older_keys.txt").read_text().splitlines()
}
IN_0_2_2 = {
    line.partition(" = ")[0] for line in (DATA / "titan_0_2_2_keys.txt").read_text().splitlines()
}
OURS = '[model]\nname = "ezpz_moe"\nflavor = "debugmodel"\n'


def row_0_2(key: str) -> Key:
    section, _, name = key.rpartition(".")
    return KEYS_0_2[section][name]


def test_every_key_that_a_release_dropped_has_its_row() -> None:
    assert set(OLDER_KEYS) >= RELEASED
    # 0.2.2 itself still reads this one, in place of hf_assets_path.
    assert set(OLDER_KEYS) & IN_0_2_2 == {"model.tokenizer_path"}


@pytest.mark.parametrize("key", [key for key, older in OLDER_KEYS.items() if older.now])
def test_a_successor_is_a_key_that_takes_the_value(key: str) -> None:
    """Of all values that the old key can have had, at least one, and none of another type."""
    older = OLDER_KEYS[key]
    assert older.now in IN_0_2_2
    samples = (
        True,
        False,
        2,
        0.5,
        "c4",
        "full",
        "default",
        "1F1B",
        "rowwise",
        "mxfp8",
        "allgather",
        "triton",
        ["output"],
    )
    taken = [s for s in map(older.renewed, samples) if s is not None]
    assert any(accepts(row_0_2(older.now), value) for value in taken), key


def test_a_key_without_a_successor_says_what_to_do() -> None:
    assert all(older.now or older.note.endswith(".") for older in OLDER_KEYS.values())


# In a converted job -------------------------------------------------------------------------------


def job_of(lines: str, job_file) -> dict:
    return dict(load_job(written(job_file(QWEN3 + lines))).values)


@pytest.mark.parametrize(
    ("lines", "key", "value"),
    [
        ("[checkpoint]\nenable_checkpoint = true", "checkpoint.enable", True),
        ("[checkpoint]\nmodel_weights_only = true", "checkpoint.last_save_model_only", True),
        (
            "[checkpoint]\nlast_save_in_safetensors_format = true",
            "checkpoint.last_save_in_hf",
            True,
        ),
        (
            "[training]\nsequence_parallel_degree = 2",
            "parallelism.tensor_parallel_degree",
            2,
        ),
        ("[training]\ncompile = true", "compile.enable", True),
        ("[training]\ncompile = true\n[compile]\ncomponents=['loss']", "compile.enable", True),
        ("training.compile = true", "compile.enable", True),
        ("[training]\nbatch_size = 3", "training.local_batch_size", 3),
        ("[training]\nseed = 7", "debug.seed", 7),
        ("[lr_scheduler]\nlr_min = 0.25", "lr_scheduler.min_lr_factor", 0.25),
        (
            "[experimental]\ncontext_parallel_degree = 2",
            "parallelism.context_parallel_degree",
            2,
        ),
        ("[metrics]\nenable_color_printing = true", "metrics.disable_color_printing", False),
        ("[metrics]\nrank_0_only = false", "metrics.save_for_all_ranks", True),
        ("[optimizer]\nfused = false", "optimizer.implementation", "foreach"),
    ],
)
def test_an_older_key_moves_to_its_successor(lines, key, value, job_file) -> None:
    # Before the first section where the key has none.
    text = QWEN3 + lines if lines.startswith("[") else f"{lines}\n{QWEN3}"
    assert load_job(written(job_file(text))).values[key] == value


def test_what_moves_says_where_it_was(job_file) -> None:
    text = written(
        job_file(QWEN3 + "[training]\ncompile = true\n[metrics]\nrank_0_only = true\n")
    ).read_text()
    assert "\n[compile]\nenable = true # was [training] compile\n" in text
    assert "save_for_all_ranks = false # was rank_0_only = true\n" in text
    assert "\ncompile = true" not in text


@pytest.mark.parametrize(
    ("folder", "now"),
    [("assets/tok", "assets/tok"), ("assets/tok/tokenizer.json", "assets/tok")],
)
def test_a_tokenizer_is_its_folder(folder, now, job_file) -> None:
    path = job_file(f'[model]\nname = "qwen3"\nflavor = "30B-A3B"\ntokenizer_path = "{folder}"\n')
    assert load_job(written(path)).values["model.hf_assets_path"] == now


def test_tiktokens_file_is_open_and_no_other_tokenizer_is_put_in_its_place(job_file) -> None:
    model = '[model]\nname = "qwen3"\nflavor = "30B-A3B"\n'
    path = job_file(f'{model}tokenizer_path = "./original/tokenizer.model"\n')
    found = changes(path)
    assert found["model.tokenizer_path"].fate == "open"
    assert "model.hf_assets_path" not in found
    new = written(path)
    # The host refuses it until the folder has one: the embedded tokenizer would be another.
    assert load_job(new).values["model.hf_assets_path"] == "original"
    assert "open: since torchtitan 0.2 it is [model] hf_assets_path" in new.read_text()


@pytest.mark.parametrize(
    ("lines", "fate", "note"),
    [
        ("[training]\ncompile = true\n[compile]\nenable = true", "needless", "says the same"),
        ("[training]\ncompile = true\n[compile]\nenable = false", "needless", "in its place"),
        ("[compile]\nenable = true\n[training]\ncompile = true", "needless", "says the same"),
    ],
)
def test_the_newer_of_two_keys_stays(lines, fate, note, job_file) -> None:
    change = changes(job_file(QWEN3 + lines))["training.compile"]
    assert (change.fate, note in change.note) == (fate, True)
    load_job(written(job_file(QWEN3 + lines)))


def test_of_two_older_keys_for_one_the_first_moves(job_file) -> None:
    lines = "[training]\ntensor_parallel_degree = 2\n[experimental]\ntensor_parallel_degree = 4\n"
    assert job_of(lines, job_file)["parallelism.tensor_parallel_degree"] == 2
    found = changes(job_file(QWEN3 + lines))["experimental.tensor_parallel_degree"]
    assert found.fate == "dropped"
    assert found.note == "training.tensor_parallel_degree = 2 says otherwise"


@pytest.mark.parametrize(
    ("converters", "fate"),
    [
        ("[]", "needless"),
        ('["npu_rope"]', "needless"),
        ('["quantize.grouped_mm.mx"]', "needless"),
        ('["float8"]', "dropped"),
        ('["npu_rope", "quantize.linear.float8"]', "dropped"),
    ],
)
def test_a_quantization_counts_only_with_its_own_converter(converters, fate, job_file) -> None:
    lines = f'converters = {converters}\n[float8]\nfilter_fqns = ["output"]\n'
    assert fates(job_file(QWEN3 + lines))["float8.filter_fqns"] == fate


@pytest.mark.parametrize(
    ("lines", "key", "fate"),
    [
        ("[float8]\nenable_float8_linear = true", "float8.filter_fqns", "dropped"),
        ("[float8]\nenable_float8_linear = false", "float8.filter_fqns", "needless"),
        ("[training]\nenable_fp8_linear = true\n[float8]", "float8.filter_fqns", "dropped"),
        ('[training]\nfp8_linear = ""\n[float8]', "training.fp8_linear", "needless"),
        ('[training]\nfp8_linear = "dynamic"\n[float8]', "training.fp8_linear", "dropped"),
    ],
)
def test_a_switch_of_2024_is_a_converter(lines, key, fate, job_file) -> None:
    """The options of what it turned on had an effect, although the job names no converter."""
    assert fates(job_file(f'{QWEN3}{lines}\nfilter_fqns = ["output"]\n'))[key] == fate


@pytest.mark.parametrize(("converter", "fate"), [("dense", "dropped"), ("moe", "needless")])
def test_the_quantizations_of_september_2025(converter, fate, job_file) -> None:
    lines = f'converters = ["quantize.{converter}.float8"]\n[quantize.dense.float8]\n'
    found = changes(job_file(f'{QWEN3}{lines}filter_fqns = ["output"]\n'))
    assert found["quantize.dense.float8.filter_fqns"].fate == fate
    assert "fork" not in found["model.converters"].note


def test_a_forks_converter_is_not_called_a_quantization(job_file) -> None:
    change = changes(job_file(QWEN3 + 'converters = ["npu_rope", "float8"]\n'))["model.converters"]
    assert change.fate == "dropped"
    assert change.note.startswith(
        '"npu_rope": no converter of torchtitan\'s, so a fork\'s; "float8"'
    )
    alone = changes(job_file(QWEN3 + 'converters = ["npu_rope"]\n'))["model.converters"]
    assert "quanti" not in alone.note


def test_an_older_file_kept_the_whole_last_checkpoint(job_file) -> None:
    """0.1 saved the optimizer too: 0.2's default is not what such a job did."""
    key = "checkpoint.last_save_model_only"
    assert key not in fates(job_file(QWEN3 + "[checkpoint]\nenable_checkpoint = true\n"))
    assert fates(job_file(QWEN3 + "[checkpoint]\nenable = true\n"))[key] == "added"


# In a message -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (
            "[checkpoint]\nenable_checkpoint = true",
            "enable_checkpoint: unknown key. Since torchtitan 0.2 it is [checkpoint] enable.",
        ),
        (
            "[checkpoint]\nmodel_weights_only = true",
            "Since torchtitan 0.2 it is [checkpoint] last_save_model_only.",
        ),
        ("[training]\ncompile = true", "Since torchtitan 0.2 it is [compile] enable."),
        (
            "[experimental]\ncontext_parallel_degree = 2",
            "[experimental] context_parallel_degree: unknown key. It belongs in [parallelism].",
        ),
        (
            "[metrics]\nrank_0_only = true",
            "it is [metrics] save_for_all_ranks: write save_for_all_ranks = false.",
        ),
        (
            "[metrics]\nrank_0_only = 1",  # a value that has no opposite
            "it is [metrics] save_for_all_ranks, with the opposite value.",
        ),
        (
            "[optimizer]\nfused = true",
            'it is [optimizer] implementation: write implementation = "fused".',
        ),
        # Not [quantize.linear.float8] filter_fqns, which 0.3 would then refuse.
        ('[float8]\nfilter_fqns = ["output"]', "It is a key of an older torchtitan: torchtitan"),
        ("[float8]\nnothing = 3", "[float8] nothing: unknown key."),
        ("[parallelism]\nenable_compiled_autograd = true", "have no compiled autograd. Leave it"),
        # Slips, and what is none.
        ("[training]\nstep = 3", "[training] step: unknown key. Did you mean 'steps'?"),
        ("[training]\nseqlen = 3", "Did you mean 'seq_len'?"),
        ("[metrics]\nlog_frequency = 3", "Did you mean 'log_freq'?"),
        ("[checkpoint]\nenable_step_checkpoint = true", "enable_step_checkpoint: unknown key."),
        ("[training]\nstep = true", "[training] step: unknown key."),
        ("enable = true", "[model] enable: unknown key."),
    ],
)
def test_what_a_message_says_of_an_older_key(lines, said, job_file) -> None:
    with pytest.raises(EzpzError) as error:
        load_job(job_file(OURS + lines))
    assert said in str(error.value)
    if said.endswith("unknown key."):  # and no hint
        assert str(error.value).endswith(said)


@pytest.mark.parametrize(
    ("name", "said", "unsaid"),
    [
        ("llama3", "torchtitan's llama3 is dense: it has no routed experts", "base ="),
        ("qwen3", 'base = "qwen3/<its flavor>"', "dense"),
    ],
)
def test_another_models_name_leads_to_no_second_error(name, said, unsaid, job_file) -> None:
    with pytest.raises(EzpzError) as error:
        load_job(job_file(f'[model]\nname = "{name}"\nflavor = "debugmodel"\n'))
    message = str(error.value)
    assert said in message
    assert unsaid not in message


def test_no_key_is_taken_for_a_slip_of_another() -> None:
    """Two keys of one section do different things, however alike their names are."""
    samples = (True, 1, 0.5, "c4", "full", ["output"])
    taken = {}
    for key, row in ROWS.items():
        section, _, name = key.rpartition(".")
        others = {other: each for other, each in KEYS[section].items() if other != name}
        values = [s for s in samples if row.message or accepts(row, s)]
        if found := {near for value in values for near in likely(name, value, others)}:
            taken[key] = found
    assert taken == {}


def test_no_older_key_is_taken_for_a_slip_of_one_that_does_something_else() -> None:
    for key, older in OLDER_KEYS.items():
        section, _, name = key.rpartition(".")
        near = {
            n for value in (True, 1, 0.5, "c4") for n in likely(name, value, KEYS.get(section, {}))
        }
        assert near <= {older.now.rpartition(".")[2]}, key


def test_a_key_of_no_release_has_no_successor() -> None:
    assert successor("training.never_there", 1, KEYS) == ""
