"""``dataset = "chat_file"``: a file of chats becomes the host's own chat data, or one line."""

from __future__ import annotations

import dataclasses
import gzip
import json
import logging
import shutil
from pathlib import Path

import pytest

from ezpz_moe.config.assets import EMBEDDED_TOKENIZER
from ezpz_moe.errors import EzpzError
from ezpz_moe.hosts.chats import messages_of, read_chats
from ezpz_moe.hosts.detect import check_host, presumed_host
from ezpz_moe.hosts.titan.v0_3 import Titan03

on_0_3 = pytest.mark.skipif(
    type(presumed_host()) is not Titan03, reason="only torchtitan 0.3 has such chat data"
)
END = 1


def chat(question: str, answer: str, **more: object) -> dict:
    pair = (("user", question), ("assistant", answer))
    return {"messages": [{"role": role, "content": text} for role, text in pair], **more}


def written(folder: Path, *lines: object, name: str = "chats.jsonl") -> str:
    file = folder / name
    texts = (line if isinstance(line, str) else json.dumps(line) for line in lines)
    file.write_bytes("\n".join(texts).encode())
    return str(file)


def test_each_line_is_a_chat(tmp_path) -> None:
    """Whatever else a line has, and with Unicode's own line breaks inside a text."""
    file = written(tmp_path, chat("a\u2028b", "ü", id=7, score=[1]), "", chat("c", "d"))
    first, second = map(messages_of, read_chats(file))
    assert first == chat("a\u2028b", "ü")["messages"]
    assert second == chat("c", "d")["messages"]


def test_a_compressed_file_is_read_once_until_it_changes(tmp_path) -> None:
    file = tmp_path / "chats.jsonl.GZ"
    file.write_bytes(gzip.compress(json.dumps(chat("a", "b")).encode()))
    first = read_chats(str(file))
    assert list(map(messages_of, first)) == [chat("a", "b")["messages"]]
    assert read_chats(str(file)) is first
    file.write_bytes(gzip.compress(json.dumps(chat("a", "bcd")).encode()))
    assert list(map(messages_of, read_chats(str(file)))) == [chat("a", "bcd")["messages"]]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: Invalid JSON: EOF while parsing"),
        ("[" * 5000, "line 2: Invalid JSON: recursion limit exceeded"),
        ("[]", "line 2: Input should be an object"),
        ('{"text": "a"}', "line 2: messages: Field required"),
        ({"messages": [{"role": "user"}]}, "line 2: messages.0.content: Field required"),
        (chat("a", None), "line 2: messages.1.content: Input should be a valid string"),
        ({"messages": []}, "line 2: has messages of nobody"),
        (
            {"messages": [{"role": "system", "content": "s"}, *chat("a", "b")["messages"]]},
            "line 2: has messages of system, user, assistant. torchtitan trains on one message",
        ),
        ('{"messages": [{"role": "\\ud800", "content": ""}]}', "line 2: Invalid JSON"),
    ],
)
def test_a_mistake_is_one_line_with_its_place(tmp_path, line: object, message: str) -> None:
    file = written(tmp_path, chat("a", "b"), line)
    with pytest.raises(EzpzError) as error:
        read_chats(file)
    assert f"dataset_path = '{file}', {message}" in str(error.value)
    assert "\n" not in str(error.value)


def test_files_that_are_none(tmp_path) -> None:
    with pytest.raises(EzpzError, match=r"a chat_file is a \.jsonl file"):
        read_chats(written(tmp_path, name="chats.txt"))
    with pytest.raises(EzpzError, match="contains no chats"):
        read_chats(written(tmp_path, "", ""))
    with pytest.raises(EzpzError, match="is not a file"):
        read_chats(str(tmp_path / "none.jsonl"))
    (tmp_path / "broken.jsonl.gz").write_bytes(b"no gzip")
    with pytest.raises(EzpzError, match="cannot be read"):
        read_chats(str(tmp_path / "broken.jsonl.gz"))
    (tmp_path / "latin.jsonl").write_bytes(b"\xff")
    with pytest.raises(EzpzError, match="is not UTF-8 text: byte 0"):
        read_chats(str(tmp_path / "latin.jsonl"))


class Letters:
    """A tokenizer with a token for each letter."""

    eos_id = END

    def encode(self, text: str, **_: object) -> list[int]:
        return [3 + ord(letter) for letter in text]

    def apply_chat_template(self, messages: list, add_generation_prompt: bool = False) -> str:
        return "".join(f"{each['content']}\n" for each in messages)


def batches(file: str, *, seq_len: int, ranks: int = 1) -> list:
    from ezpz_moe.hosts.titan.base import titan

    config = titan().dataloader_config("chat_file", file, job_folder=None, infinite=False)
    loader = config.build(
        dp_world_size=ranks, dp_rank=0, tokenizer=Letters(), seq_len=seq_len, local_batch_size=1
    )
    return list(loader)


@on_0_3
def test_the_answer_is_learnt_and_the_question_is_not(tmp_path) -> None:
    check_host()
    from torchtitan.components.loss import IGNORE_INDEX

    ((inputs, labels),) = batches(written(tmp_path, chat("ab", "cde")), seq_len=8)
    a_letter = [3 + ord(letter) for letter in "ab\ncde"]
    assert inputs["input"][0].tolist() == [*a_letter, END, END]
    ignored = [IGNORE_INDEX] * 2
    assert labels[0].tolist() == [*ignored, *a_letter[3:], END, *ignored]


@on_0_3
def test_what_is_longer_than_a_sequence_is_left_out_and_counted(tmp_path, caplog) -> None:
    """Without what fits the host would search forever."""
    check_host()
    # 4 + 4 letters with a line break and the end, of which the first is no label: 9.
    file = written(tmp_path, chat("aaaa", "bbbb"), chat("a", "b"))
    with caplog.at_level(logging.WARNING):
        assert len(batches(file, seq_len=9)) == 2
        assert not [each for each in caplog.messages if "left out" in each]
        assert len(batches(file, seq_len=8)) == 1
    assert f"ezpz_moe: 1 of 2 chats in {file} are longer than 8 tokens" in caplog.text
    for seq_len, ranks in ((2, 1), (8, 2)):
        with pytest.raises(EzpzError, match=f"have at most {seq_len} tokens, and each of {ranks}"):
            batches(file, seq_len=seq_len, ranks=ranks)


JOB = """
[model]
name = "ezpz_moe"
flavor = "debugmodel_sdpa_for_loop"
{assets}
[training]
{data}
"""
CHATS = 'dataset = "chat_file"\ndataset_path = "chats.jsonl"'
NO_TEMPLATE = (
    "hf_assets_path is not set, and the embedded tokenizer has no chat template, which dataset = "
    '"chat_file" needs. Set [model] hf_assets_path to the folder of the model\'s own tokenizer.'
)


@on_0_3
@pytest.mark.parametrize(
    ("assets", "data", "message"),
    [
        ("", f"{CHATS}", NO_TEMPLATE),
        (
            'hf_assets_path = "own"',
            f"{CHATS}",
            "own': the tokenizer has no chat template. Put its chat_template.jinja beside",
        ),
        # Of training and of validation alike, if there is a validation.
        ("", f'dataset = "pydoc_topics"\n[validation]\nenable = true\n{CHATS}', NO_TEMPLATE),
        ("", 'dataset = "chat_file"', "dataset = 'chat_file' needs dataset_path"),
        (
            "",
            'dataset = "chat_file"\ndataset_path = "no.jsonl"',
            "dataset_path = 'no.jsonl' does not exist",
        ),
    ],
)
def test_a_job_without_what_chats_need_is_refused(
    tmp_path, in_training, assets: str, data: str, message: str
) -> None:
    check_host()
    from ezpz_moe.hosts.detect import host
    from ezpz_moe.hosts.jobs import load_job

    written(tmp_path, chat("a", "b"))
    shutil.copytree(EMBEDDED_TOKENIZER, tmp_path / "own")
    job = tmp_path / "job.toml"
    job.write_text(JOB.format(assets=assets, data=data))
    with pytest.raises(EzpzError) as error:
        # A copy, as the host makes of it, is checked for this machine.
        dataclasses.replace(host().trainer_config(load_job(job)))
    assert message in str(error.value)


@on_0_3
def test_a_text_file_of_chats_names_the_dataset(tmp_path) -> None:
    check_host()
    from ezpz_moe.hosts.documents import read_documents

    with pytest.raises(EzpzError, match='For chats, set dataset = "chat_file"'):
        read_documents(written(tmp_path, chat("a", "b")))
