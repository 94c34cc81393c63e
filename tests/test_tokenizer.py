"""The embedded tokenizer: loads as the host loads it, loses nothing, and has 2048 entries."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ezpz_moe.config.assets import EMBEDDED_TOKENIZER
from ezpz_moe.config.flavors import load_flavor
from ezpz_moe.hosts.detect import check_host

check_host()  # the host's device, before anything else imports the host

from torchtitan.components.tokenizer import HuggingFaceTokenizer  # noqa: E402

TOKENIZER = HuggingFaceTokenizer(tokenizer_path=str(EMBEDDED_TOKENIZER))
ENTRIES = 2048


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_survives_and_its_ids_are_in_the_vocabulary(text):
    ids = TOKENIZER.encode(text, add_bos=False, add_eos=False)
    assert all(0 <= token < ENTRIES for token in ids)
    assert TOKENIZER.decode(ids) == text


def test_the_vocabulary_is_what_the_debug_flavor_says():
    assert TOKENIZER.get_vocab_size() == ENTRIES == load_flavor("debugmodel").dimensions.vocab_size
    assert sorted(TOKENIZER.get_vocab().values()) == list(range(ENTRIES))


def test_documents_begin_and_end_with_their_own_tokens():
    ids = TOKENIZER.encode("x", add_bos=True, add_eos=True)
    assert (ids[0], ids[-1]) == (TOKENIZER.bos_id, TOKENIZER.eos_id)
    assert TOKENIZER.id_to_token(ids[0]) == "<|begin_of_text|>"
    assert TOKENIZER.id_to_token(ids[-1]) == "<|end_of_text|>"
    assert TOKENIZER.decode(ids) == "x"


@pytest.mark.parametrize("text", ["<|begin_of_text|>", "<|end_of_text|>"])
def test_special_tokens_are_one_token(text):
    assert len(TOKENIZER.encode(text, add_bos=False, add_eos=False)) == 1


def test_english_is_compressed():
    """A vocabulary of mere bytes would pass everything above."""
    text = "The statement raises an exception if the value of the expression is not a list."
    assert len(TOKENIZER.encode(text, add_bos=False, add_eos=False)) < len(text) / 3
