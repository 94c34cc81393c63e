"""``ezpz-moe convert`` with whole job files, in the forms that people publish them in.

``data/jobs_0_2`` has jobs of torchtitan 0.2's models, of forks with models, converters and data of
their own, and of the releases before 0.2. Each becomes a job that the host accepts, but for what is
marked as open; or is refused with the reason. No key of the old file is lost without a word.
"""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import pytest
import tomli
from hypothesis import given, settings
from hypothesis import strategies as st

from ezpz_moe import cli
from ezpz_moe.config.older_keys import OLDER_KEYS
from ezpz_moe.errors import EzpzError
from ezpz_moe.hosts.detect import check_host, presumed_host
from ezpz_moe.hosts.jobs import load_job
from ezpz_moe.hosts.setting import flat
from ezpz_moe.hosts.titan.v0_3 import Titan03
from ezpz_moe.hosts.titan_0_2.job_keys import KEYS as KEYS_0_2
from ezpz_moe.tools.convert import Conversion, Wish, convert, write

JOBS = Path(__file__).parent / "data" / "jobs_0_2"
REFUSED = {
    "flux_schnell": "flux is dense",
    "llama2_2024": "llama2 is dense",
    "llama3_8b": "llama3 is dense",
    "llama4_17bx16e": "torchtitan 0.3 has no llama4",
    "qwen3_0.6b": 'qwen3\'s "0.6B" is dense',
}
OPEN = {
    "fork_16b_12rank": ["model.flavor"],
    "fork_9.7b": ["model.flavor", "training.dataset"],
    "fork_hf_backend": ["model.flavor"],
    "fork_kimi_k2_npu": ["model.flavor"],
    "fork_own_model": ["model.flavor", "training.dataset"],
    "older_2024": ["model.tokenizer_path"],
}
NAMES = sorted(path.stem for path in JOBS.glob("*.toml"))
WRITTEN = [name for name in NAMES if name not in REFUSED]
PUT_IN = {"fork_16b_12rank": "10B_2B_sdpa", "fork_kimi_k2_npu": "671B"}
"""A flavor that a fork's job can train, as its experts fit the ranks; of the others 16B's do."""
NOTHING = Wish()


@functools.cache
def values_of(name: str) -> dict:
    return dict(flat(tomli.loads((JOBS / f"{name}.toml").read_text())))


def conversion(name: str, new: Path, wish: Wish = NOTHING) -> Conversion:
    return convert(JOBS / f"{name}.toml", new, wish)


def test_there_are_enough_of_them() -> None:
    assert len(NAMES) >= 20
    assert set(REFUSED) | set(OPEN) <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_every_key_is_accounted_for(name: str, tmp_path: Path) -> None:
    """In the report once; and in the new file with its value, or as a comment that has it."""
    found = conversion(name, tmp_path / "new.toml")
    ours = [change for change in found.changes if change.fate not in ("added", "differs")]
    # tomli puts tables of one parent together, so its order may be another.
    assert sorted(change.key for change in ours) == sorted(values_of(name))
    new = dict(flat(tomli.loads(found.text)))
    comments = [line for line in found.text.splitlines() if line.startswith("#")]
    for change in ours:
        assert change.value == values_of(name)[change.key]
        match change.fate:
            case "kept":
                assert new[change.key] == change.value
            case "moved" | "replaced":
                assert new[change.new_key] == change.new
            case "dropped" | "open" if change.new is None:
                assert change.note
                last = change.key.rpartition(".")[2]
                assert any(line.startswith((f"# {last} ", f"# {last}=")) for line in comments)
            case _:
                assert change.note


@pytest.mark.parametrize("name", WRITTEN)
def test_the_new_job_is_accepted_but_for_what_is_open(name: str, tmp_path: Path) -> None:
    new = tmp_path / "new.toml"
    found = conversion(name, new)
    write(found, new)
    assert [change.key for change in found.left_open] == OPEN.get(name, [])
    if "model.flavor" not in OPEN.get(name, []):
        assert load_job(new).flavor == found.flavor
        return
    with pytest.raises(EzpzError) as error:
        load_job(new)
    assert str(error.value) == (
        f"{new}: [model] flavor is missing: name the model to train; `ezpz-moe flavors` lists them."
    )


@pytest.mark.skipif(type(presumed_host()) is not Titan03, reason="of 0.3's binding")
@pytest.mark.parametrize("name", WRITTEN)
def test_the_host_takes_the_new_job(name: str, tmp_path: Path) -> None:
    """What doctor checks of a job on any machine; a fork's with a flavor and a dataset put in."""
    check_host()
    new = tmp_path / "new.toml"
    is_open = "model.flavor" in OPEN.get(name, [])
    write(conversion(name, new, Wish(PUT_IN.get(name, "16B")) if is_open else NOTHING), new)
    if "training.dataset" in OPEN.get(name, []):
        with pytest.raises(EzpzError, match=r"is unknown\. Known: c4, "):
            presumed_host().trainer_config(load_job(new))
        lines = new.read_text().splitlines(keepends=True)
        new.write_text("".join(line for line in lines if not line.startswith("dataset")))
    presumed_host().trainer_config(load_job(new))


@pytest.mark.parametrize("name", REFUSED)
def test_a_job_without_experts_is_refused_with_the_reason(name: str, tmp_path: Path) -> None:
    new = tmp_path / "new.toml"
    with pytest.raises(EzpzError, match=REFUSED[name]) as error:
        write(conversion(name, new), new)
    assert "add --flavor NAME" in str(error.value)
    assert not new.exists()
    # With a flavor, its other settings are not thrown away.
    write(conversion(name, new, Wish("16B")), new)
    assert load_job(new).values["training.steps"] == values_of(name)["training.steps"]


@pytest.mark.parametrize("name", WRITTEN)
def test_the_exit_code_says_whether_anything_is_missing(name: str, tmp_path: Path, capsys) -> None:
    found = conversion(name, tmp_path / "new.toml")
    lost = bool(found.dropped or found.left_open)
    assert cli.main(["convert", str(JOBS / f"{name}.toml"), str(tmp_path / "new.toml")]) == lost
    output = capsys.readouterr().out
    assert ("open: model.flavor: " in output) is ("model.flavor" in OPEN.get(name, []))


VALUES = (
    "true",
    "3",
    "0",
    "-1",
    "0.5",
    "nan",
    "''",
    "'c4'",
    "[]",
    "['float8']",
    "[1, [2]]",
    "8192",
)
ANY_KEY = (*OLDER_KEYS, *(f"{s}.{n}" for s, r in KEYS_0_2.items() for n in r))
MODELS = ("'deepseek_v3'", "'qwen3'", "'gpt_oss'", "'ezpz_moe'", "'our_own'", "[['x']]")
FLAVORS = ("'16B'", "'debugmodel_moe'", "'20b'", "'9.7B'", "3")


@settings(max_examples=60, deadline=None)
@given(
    keys=st.dictionaries(st.sampled_from(ANY_KEY), st.sampled_from(VALUES), max_size=12),
    model=st.sampled_from(MODELS),
    flavor=st.sampled_from(FLAVORS),
)
def test_whatever_a_file_says_the_new_one_is_a_job(keys, model, flavor) -> None:
    """Valid TOML of keys that 0.3 takes, or refused: keys of every release, values of any kind."""
    lines = keys | {"model.name": model, "model.flavor": flavor}
    with tempfile.TemporaryDirectory() as folder:
        old, new = Path(folder, "old.toml"), Path(folder, "new.toml")
        old.write_text("".join(f"{key} = {value}\n" for key, value in lines.items()))
        found = convert(old, new)
        assert len(found.changes) >= len(lines)
        # Of our own model's job too the flavor has to exist.
        if found.refusal or (model == "'ezpz_moe'" and flavor != "'16B'"):
            with pytest.raises(EzpzError):
                write(found, new)
            return
        write(found, new)
        open_ = {change.key for change in found.left_open}
        if "optimizer.name" in open_:
            with pytest.raises(EzpzError, match=r"\[optimizer\] name = "):
                load_job(new)
        elif "model.flavor" in open_:
            with pytest.raises(EzpzError, match=r"new\.toml: \[model\] flavor is missing"):
                load_job(new)
        else:
            load_job(new)
