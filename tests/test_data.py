"""The text behind ``dataset`` and ``dataset_path``: what becomes a document, that no rank goes
without, and that every mistake in a file is one message before the run starts."""

import dataclasses
import json
from pathlib import Path
from pydoc_data.topics import topics
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from text_cases import EQUAL, UNEQUAL

from ezpz_moe.config.assets import EMBEDDED_TOKENIZER
from ezpz_moe.config.job import Job
from ezpz_moe.errors import EzpzError
from ezpz_moe.hosts.detect import check_host

check_host()  # the host's device, before anything else imports the host

from torchtitan.components.tokenizer import HuggingFaceTokenizer  # noqa: E402
from torchtitan.components.validate import Validator  # noqa: E402

from ezpz_moe.hosts.titan.data import dataloader_config, read_documents  # noqa: E402
from ezpz_moe.hosts.titan.job import trainer_config  # noqa: E402

TEXTS = ["First document.\nIts second line.", "Zweites, mit Umlauten: äöü, 日本語 🙂.", "Third."]


def write(folder: Path, name: str, content: str | bytes) -> str:
    file = folder / name
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(file)


def write_parquet(folder: Path, columns: dict, name: str = "data.parquet") -> str:
    pq.write_table(pa.table(columns), folder / name)
    return str(folder / name)


def compressed(folder: Path, name: str, content: str) -> str:
    with pa.output_stream(str(folder / name), compression="detect") as stream:
        stream.write(content.encode())
    return str(folder / name)


def lines(texts: list[str], id: str = "1") -> str:
    return "\n".join(f'{{"id": {id}, "text": {json.dumps(text)}}}' for text in texts)


@pytest.fixture(scope="module")
def tokenizer() -> HuggingFaceTokenizer:
    return HuggingFaceTokenizer(tokenizer_path=str(EMBEDDED_TOKENIZER))


def build(config, tokenizer, *, rank: int = 0, ranks: int = 1, seq_len: int = 16):
    return config.build(
        dp_rank=rank, dp_world_size=ranks, tokenizer=tokenizer, seq_len=seq_len, local_batch_size=1
    )


def some_tokens(loader, batches: int) -> list[int]:
    iterator = iter(loader)
    return [token for _ in range(batches) for token in next(iterator)[0]["input"][0].tolist()]


FILES = {
    "txt": lambda f: write(f, "a.txt", "\ufeff\n \n" + "\n \t\n\n".join(TEXTS) + "\n"),
    "txt-crlf": lambda f: write(f, "a.TXT", "\n\n".join(TEXTS).replace("\n", "\r\n")),
    "jsonl": lambda f: write(
        f, "a.jsonl", "\n".join(json.dumps({"id": 1, "text": t}) for t in TEXTS) + "\n\n"
    ),
    "json": lambda f: write(f, "a.json", json.dumps([{"text": t} for t in TEXTS], indent=1)),
    "parquet": lambda f: write_parquet(f, {"text": TEXTS, "id": [1, 2, 3]}),
    "parquet-large": lambda f: write_parquet(f, {"text": pa.array(TEXTS, pa.large_string())}),
    "parquet-dictionary": lambda f: write_parquet(f, {"text": pa.array(TEXTS).dictionary_encode()}),
    "parquet-view": lambda f: write_parquet(f, {"text": pa.array(TEXTS, pa.string_view())}),
    "jsonl-gz": lambda f: compressed(f, "a.jsonl.gz", lines(TEXTS)),
    "jsonl-zst": lambda f: compressed(f, "a.JSONL.zst", lines(TEXTS)),
    "json-bz2": lambda f: compressed(f, "a.json.bz2", json.dumps([{"text": t} for t in TEXTS])),
    "txt-gz": lambda f: compressed(f, "a.txt.gz", "\r\n\r\n".join(TEXTS)),
    # Other keys are not looked at: no number is too large.
    "jsonl-digits": lambda f: write(f, "a.jsonl", lines(TEXTS, id="9" * 6000)),
}


@pytest.mark.parametrize("make", FILES.values(), ids=FILES)
def test_every_kind_of_file_gives_the_same_documents(make, tmp_path):
    documents = [text.rstrip("\n") for text in read_documents(make(tmp_path))["text"]]
    assert documents == TEXTS


def test_without_dataset_and_path_the_embedded_text_is_trained(tokenizer):
    config = dataloader_config(None, None, job_folder=None)
    assert (config.dataset, config.dataset_path) == ("pydoc_topics", None)
    tokens = some_tokens(build(config, tokenizer, seq_len=64), 8)
    assert tokens == some_tokens(build(config, tokenizer, seq_len=64), 8), "a fixed order"
    paragraphs = tokenizer.decode(tokens, skip_special_tokens=False).split(tokenizer.bos_token)
    reference = "\n\n".join(topics.values())
    assert len(paragraphs) > 2
    assert all(paragraph in reference for paragraph in paragraphs)
    first, second = (reference.index(paragraph) for paragraph in paragraphs[1:3])
    assert abs(first - second) > 1000, "neighbours in the text are not neighbours in training"


def test_a_path_without_a_dataset_is_the_users_file(tmp_path, tokenizer):
    config = dataloader_config(None, FILES["txt"](tmp_path), job_folder=None)
    assert config.dataset == "text_file"
    assert TEXTS[0][:8] in tokenizer.decode(some_tokens(build(config, tokenizer), 2))


def test_a_relative_path_is_found_here_or_next_to_the_job(tmp_path, monkeypatch):
    here, jobs = tmp_path / "here", tmp_path / "jobs"
    here.mkdir()
    jobs.mkdir()
    monkeypatch.chdir(here)
    beside_the_job = write(jobs, "a.txt", "b")
    config = dataloader_config(None, "a.txt", job_folder=jobs)
    assert config.dataset_path == beside_the_job
    local = write(here, "a.txt", "b")
    assert dataloader_config(None, "a.txt", job_folder=jobs).dataset_path == local


@pytest.mark.parametrize(("dataset", "path"), [("c4", None), ("C4_test", "some/where")])
def test_the_hosts_datasets_are_handed_on(dataset, path):
    config = dataloader_config(dataset, path, job_folder=None, infinite=False)
    assert (config.dataset, config.dataset_path) == (dataset.lower(), path)
    assert config.infinite is False


def test_one_text_file_serves_several_ranks_without_overlap(tmp_path, tokenizer):
    texts = [f"document number {n} " + "word " * 30 for n in range(8)]
    config = dataloader_config(None, write(tmp_path, "a.txt", "\n\n".join(texts)), job_folder=None)
    seen = [
        tokenizer.decode(some_tokens(build(config, tokenizer, rank=rank, ranks=2), 8))
        for rank in (0, 1)
    ]
    numbers = [{n for n in range(8) if f"number {n} " in text} for text in seen]
    assert all(numbers)
    assert not numbers[0] & numbers[1]


@pytest.mark.parametrize("make", [FILES["txt"], lambda folder: None], ids=["file", "embedded"])
def test_fewer_documents_than_ranks_is_an_error_not_an_endless_search(make, tmp_path, tokenizer):
    config = dataloader_config(None, make(tmp_path), job_folder=None)
    with pytest.raises(EzpzError, match=r"has \d+ documents for 100000 data-parallel ranks"):
        build(config, tokenizer, rank=99_999, ranks=100_000)


def test_a_document_for_each_rank_is_enough_and_one_less_is_not(tmp_path, tokenizer):
    path = write(tmp_path, "a.txt", "\n\n".join(TEXTS))
    config = dataloader_config(None, path, job_folder=None)
    build(config, tokenizer, rank=2, ranks=3)
    with pytest.raises(EzpzError, match="has 3 documents for 4 data-parallel ranks"):
        build(config, tokenizer, rank=2, ranks=4)


def test_a_flag_that_makes_chats_of_text_is_told_what_to_set(tokenizer):
    config = dataloader_config(None, None, job_folder=None)
    with pytest.raises(EzpzError, match=r"flag cannot change. Set \[training\] dataset in the job"):
        build(dataclasses.replace(config, dataset="Chat_File"), tokenizer, rank=0, ranks=1)


def test_resuming_gives_the_tokens_that_would_have_come(tmp_path, tokenizer):
    """Two epochs and a bit, so that the host's reshuffling is in it."""
    path = write(tmp_path, "a.txt", "\n\n".join(f"{n} " * 20 for n in range(9)))
    config = dataloader_config(None, path, job_folder=None)
    loader = build(config, tokenizer)
    some_tokens(loader, 40)
    state = loader.state_dict()
    expected = some_tokens(loader, 5)
    resumed = build(config, tokenizer)
    resumed.load_state_dict(state)
    assert some_tokens(resumed, 5) == expected


def test_a_changed_file_is_read_again(tmp_path):
    path = write(tmp_path, "a.txt", "one")
    assert read_documents(path)["text"] == ["one"]
    write(tmp_path, "a.txt", "another")
    assert read_documents(path)["text"] == ["another"]


def test_reading_writes_nothing(tmp_path, tokenizer, monkeypatch):
    cache = tmp_path / "cache"
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", cache)
    for make in FILES.values():
        folder = tmp_path / "data"
        folder.mkdir(exist_ok=True)
        config = dataloader_config(None, make(folder), job_folder=None)
        some_tokens(build(config, tokenizer), 20)
    assert not cache.exists()


BROKEN = {
    "missing": (lambda f: str(f / "no.txt"), r"no\.txt' does not exist"),
    "folder": (lambda f: str(f), "is a folder .*name one file"),
    "suffix": (lambda f: write(f, "a.csv", "text\nx\n"), r"'\.csv'; known: \.txt, \.jsonl, \.json"),
    "no-suffix": (lambda f: write(f, "a", "x"), r"unknown kind of file ''"),
    "empty": (lambda f: write(f, "a.txt", ""), "contains no text"),
    "blank": (lambda f: write(f, "a.txt", " \n\t\n"), "contains no text"),
    "bom-only": (lambda f: write(f, "a.txt", "\ufeff"), "contains no text"),
    "binary": (lambda f: write(f, "a.txt", b"abc\xff\xfe"), "not UTF-8 text: byte 3"),
    "jsonl-empty": (lambda f: write(f, "a.jsonl", "\n\n"), "contains no text"),
    "jsonl-blank": (lambda f: write(f, "a.jsonl", '{"text": " "}'), "contains no text"),
    "jsonl-broken": (
        lambda f: write(f, "a.jsonl", '{"text": "x"}\n\n{"text": "y"\n'),
        "broken: line 3, column 13",
    ),
    "jsonl-nested": (
        lambda f: write(f, "a.jsonl", '{"text": "x"}\n{"text": "x", "n": ' + "[" * 90000),
        r"a\.jsonl', line 2: lists or objects nest too deeply",
    ),
    "json-nested": (lambda f: write(f, "a.json", "[" * 90000), r"a\.json': lists or objects nest"),
    "not-compressed": (
        lambda f: write(f, "a.jsonl.gz", '{"text": "x"}'),
        r"a\.jsonl\.gz' cannot be read",
    ),
    "compressed-parquet": (
        lambda f: write(f, "a.parquet.gz", ""),
        r"unknown kind .*'\.parquet\.gz'",
    ),
    "jsonl-column": (
        lambda f: write(f, "a.jsonl", '{"text": "x"}\n{"body": "x", "id": 1}'),
        "line 2 has no column 'text'; found: 'body', 'id'",
    ),
    "jsonl-number": (lambda f: write(f, "a.jsonl", '{"text": 3}'), "line 1: 'text' is a number"),
    "jsonl-null": (lambda f: write(f, "a.jsonl", '{"text": null}'), "line 1: 'text' is null"),
    "jsonl-list": (lambda f: write(f, "a.jsonl", '["x"]'), "line 1: a list, not an object"),
    "jsonl-surrogate": (lambda f: write(f, "a.jsonl", '{"text": "\\ud800"}'), "line 1: surrogates"),
    "json-empty": (lambda f: write(f, "a.json", ""), "contains no text"),
    "json-none": (lambda f: write(f, "a.json", "[]"), "contains no text"),
    "json-object": (lambda f: write(f, "a.json", '{"text": "x"}'), "an object, not a list"),
    "json-string": (lambda f: write(f, "a.json", '["x"]'), "item 1: a string, not an object"),
    "json-broken": (lambda f: write(f, "a.json", '[\n{"text" "x"}]'), "broken: line 2, column 9"),
    "json-column": (lambda f: write(f, "a.json", "[{}]"), "no column 'text'; found: none"),
    "parquet-column": (lambda f: write_parquet(f, {"body": ["x"]}), "'text'; found: 'body'"),
    "parquet-number": (lambda f: write_parquet(f, {"text": [1]}), "it is int64"),
    "parquet-dictionary-null": (
        lambda f: write_parquet(f, {"text": pa.array(["x", None]).dictionary_encode()}),
        "with 1 null",
    ),
    "parquet-dictionary-number": (
        lambda f: write_parquet(f, {"text": pa.array([1, 2]).dictionary_encode()}),
        "it is int64",  # Arrow itself keeps only dictionaries of strings
    ),
    "parquet-null": (lambda f: write_parquet(f, {"text": ["x", None]}), "with 1 null"),
    "parquet-none": (lambda f: write_parquet(f, {"text": pa.array([], pa.string())}), "no text"),
    "parquet-broken": (lambda f: write(f, "a.parquet", b"PAR1 not"), "is broken"),
    "parquet-empty": (lambda f: write(f, "a.parquet", b""), "is broken"),
}


@pytest.mark.parametrize(("make", "message"), BROKEN.values(), ids=BROKEN)
def test_a_mistake_in_a_file_is_one_message_at_config_time(make, message, tmp_path):
    path = make(tmp_path)
    with pytest.raises(EzpzError, match=message) as error:
        dataloader_config(None, path, job_folder=None)
    assert f"dataset_path = '{path}'" in str(error.value)


@pytest.mark.parametrize("cut", [0.3, 0.9])
def test_a_truncated_parquet_file_is_an_error(cut, tmp_path):
    whole = Path(write_parquet(tmp_path, {"text": [str(n) for n in range(1000)]})).read_bytes()
    path = write(tmp_path, "cut.parquet", whole[: int(len(whole) * cut)])
    with pytest.raises(EzpzError, match=r"cut\.parquet'"):
        dataloader_config(None, path, job_folder=None)


def test_an_unknown_dataset_gets_the_nearest_name():
    with pytest.raises(EzpzError, match=r"'pydoc_topic' is unknown. Did you mean 'pydoc_topics'"):
        dataloader_config("pydoc_topic", None, job_folder=None)


def test_the_embedded_text_takes_no_path():
    with pytest.raises(EzpzError, match="takes no dataset_path"):
        dataloader_config("pydoc_topics", "a.txt", job_folder=None)


def test_a_text_file_needs_a_path():
    with pytest.raises(EzpzError, match="needs dataset_path"):
        dataloader_config("text_file", None, job_folder=None)


def test_a_path_given_on_the_hosts_command_line_is_checked_too(tmp_path, tokenizer):
    config = dataloader_config(None, None, job_folder=None)
    config.dataset, config.dataset_path = "text_file", str(tmp_path / "no.txt")
    with pytest.raises(EzpzError, match="is not a file"):
        build(config, tokenizer)


# Validation of the whole text --------------------------------------------------------------------


def validator(file: Path, tokenizer, *, ranks: int, steps: int = -1, **parallel):
    validation = {"enable": True, "dataset_path": str(file), "steps": steps}
    values = {f"validation.{key}": value for key, value in validation.items()}
    section = trainer_config(Job(flavor="debugmodel_sdpa", values=values)).validator
    return section.build(
        parallelism=SimpleNamespace(pipeline_parallel_microbatch_size=1),
        dp_world_size=ranks,
        dp_rank=ranks - 1,
        tokenizer=tokenizer,
        parallel_dims=SimpleNamespace(pp_enabled=bool(parallel)),
        loss_fn=None,
        validation_context=None,
        metrics_processor=None,
        seq_len=32,
        local_batch_size=parallel.get("microbatches", 1),
    )


def batches(file: Path, tokenizer) -> list[int]:
    """Batches of 32 tokens that two ranks have of a text, the fewest first."""
    data = dataloader_config(None, str(file), job_folder=None, infinite=False)
    return sorted(
        sum(1 for _ in build(data, tokenizer, rank=rank, ranks=2, seq_len=32)) for rank in (0, 1)
    )


def test_unequal_shares_of_a_validation_text_are_refused_with_the_number_that_works(
    tmp_path, tokenizer
):
    """The host would stop on one rank, and the other would wait in a collective."""
    file = tmp_path / "valid.txt"
    file.write_text(UNEQUAL)
    fewest, most = batches(file, tokenizer)
    assert fewest < most
    with pytest.raises(EzpzError, match="the 2 data-parallel ranks have text for") as refused:
        validator(file, tokenizer, ranks=2)
    assert f"for {fewest} to {most} steps" in str(refused.value)
    assert f"Set validation.steps to {fewest}." in str(refused.value)
    assert validator(file, tokenizer, ranks=2, steps=fewest)
    assert validator(file, tokenizer, ranks=1)
    file.write_text(EQUAL)
    assert validator(file, tokenizer, ranks=2)


def test_what_a_pipeline_cannot_fill_is_not_a_step(tmp_path, tokenizer):
    """Both ranks leave the loop at the same step, although one has a batch more."""
    file = tmp_path / "valid.txt"
    file.write_text(UNEQUAL)
    _, most = batches(file, tokenizer)
    with pytest.raises(EzpzError, match=r"for 0 to 1 steps.*Use more text"):
        validator(file, tokenizer, ranks=2, microbatches=most)
    assert validator(file, tokenizer, ranks=2, microbatches=most + 1)


def test_a_validation_text_of_the_hosts_is_the_hosts_affair():
    values = {"validation.enable": True, "validation.dataset": "c4_validation"}
    section = trainer_config(Job(flavor="debugmodel_sdpa", values=values)).validator
    assert type(section) is Validator.Config
