"""Which tokens are padding, and labels that say so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from dialect import ON_0_2, SINCE_2026_08
from hypothesis import example, given
from hypothesis import strategies as st

from ezpz_moe.config.routing_schema import Router
from ezpz_moe.routing.padding import tokens_that_count

END = 1
sequences = st.lists(st.lists(st.sampled_from([0, END, 2]), min_size=6, max_size=6), min_size=1)


def written_out(tokens: list[int], padding: str) -> list[bool]:
    """Whether each token of a sequence counts."""
    if padding == "token":
        return [token != END for token in tokens]
    last_other = max((at for at, token in enumerate(tokens) if token != END), default=-1)
    return [at <= last_other + 1 for at in range(len(tokens))]


@given(sequences)
@example([[END] * 6])
@example([[0, END, END, 2, END, END]])
@pytest.mark.parametrize("padding", ["token", "trailing"])
@pytest.mark.parametrize("folded", [False, True])
def test_a_mask_is_the_one_written_out(folded: bool, padding: str, tokens: list) -> None:
    """A host may fold sequences, whose ends then do not show."""
    settings = Router(pad_token_id=END, padding=padding)
    ids_BL = torch.tensor(tokens)
    ids = ids_BL.flatten() if folded else ids_BL
    mask = tokens_that_count(ids, settings, length=6)
    assert (mask.shape, mask.dtype) == (ids.shape, torch.bool)
    assert mask.view_as(ids_BL).tolist() == [written_out(each, padding) for each in tokens]


class _Tokenizer:
    """What the host's chat data asks of a tokenizer: a token for each letter."""

    eos_id = END

    def encode(self, text: str, **more: object) -> list[int]:
        return [3 + ord(letter) for letter in text]

    def apply_chat_template(self, messages: list, add_generation_prompt: bool = False) -> str:
        return "".join(each["content"] for each in messages)


def messages(sample: dict) -> list[dict[str, str]]:
    return [
        {"role": "user", "content": sample["question"]},
        {"role": "assistant", "content": sample["answer"]},
    ]


@pytest.mark.skipif(ON_0_2 or SINCE_2026_08, reason="the chat data of torchtitan 0.3")
def test_the_hosts_chat_data_says_which_labels_count_and_resumes(tmp_path: Path) -> None:
    """It pads with the end-of-text token, which is no way to tell padding."""
    from torchtitan.components.loss import IGNORE_INDEX
    from torchtitan.hf_datasets.text_datasets import ChatDataLoader

    from ezpz_moe.data import labelled
    from ezpz_moe.hosts.titan.labelled import COUNTED

    samples = [{"question": "2+2?" * n, "answer": "4." * n} for n in (1, 2, 3, 1, 2)]
    (tmp_path / "chat.jsonl").write_text("\n".join(map(json.dumps, samples)))
    config = ChatDataLoader.Config(
        dataset_path="json",
        load_dataset_kwargs={
            "data_files": str(tmp_path / "chat.jsonl"),
            "split": "train",
            "cache_dir": str(tmp_path),
        },
        sample_processor=messages,
    )

    def build():
        return labelled(config).build(
            dp_world_size=1, dp_rank=0, tokenizer=_Tokenizer(), seq_len=24, local_batch_size=2
        )

    loader = build()
    batches = iter(loader)
    inputs, labels = next(batches)
    assert torch.equal(inputs[COUNTED], labels != IGNORE_INDEX)
    assert inputs[COUNTED].any()
    assert not inputs[COUNTED].all()
    place = loader.state_dict()
    expected, _ = next(batches)
    again = build()
    again.load_state_dict(place)
    found, _ = next(iter(again))
    assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.skipif(ON_0_2, reason="[router] needs torchtitan 0.3 or later")
def test_a_batch_that_does_not_say_which_labels_count_is_refused() -> None:
    """As of a loader that an override puts in place of the job's, after the job was checked."""
    from ezpz_moe.hosts.titan.groups import TokenMask
    from ezpz_moe.hosts.titan.labelled import COUNTED
    from ezpz_moe.hosts.titan.routing import _masking

    mask, tokens_BL = TokenMask(), torch.zeros(2, 6, dtype=torch.int64)
    before_forward = _masking(mask, Router(padding="labels"), 6, None)
    with pytest.raises(ValueError, match=r'"labels": a batch does not say .* another data loader'):
        before_forward(torch.nn.Identity(), (tokens_BL,), {})
    counted_BL = tokens_BL.bool()
    _, kwargs = before_forward(torch.nn.Identity(), (tokens_BL,), {COUNTED: counted_BL})
    assert mask.mask_BL is counted_BL
    assert kwargs == {}, "the model has no such parameter"
