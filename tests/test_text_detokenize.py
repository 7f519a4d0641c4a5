"""The incremental detokenizer against decoding everything at once."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.text.codec import Codec
from jaxserve.text.detokenize import CONTEXT_TOKENS, WINDOW_TOKENS, Detokenizer
from tests.api_fakes import EOS, byte_level_tokenizer, chunks, metaspace_tokenizer

BYTES = byte_level_tokenizer()
WORDS = metaspace_tokenizer()

texts = st.text(
    st.one_of(st.characters(exclude_categories=("Cs",)), st.sampled_from("aé日🙂 \n\ufffd")),
    max_size=80,
)
byte_ids = st.lists(st.integers(0, len(BYTES) - 1), max_size=120)
seeds = st.integers(0, 1 << 30)


def pieces(tokenizer, ids, seed, prompt=(), **options) -> list[str]:
    """The text as it appears, its last part from `finish`."""
    detokenizer = Detokenizer(Codec(tokenizer), prompt, **options)
    rng = np.random.default_rng(seed)
    shown = [detokenizer.append(part) for part in chunks(ids, rng)]
    return [*shown, detokenizer.finish()]


@settings(max_examples=150, deadline=None)
@given(texts, seeds)
def test_text_comes_back_whole_whatever_the_pieces(text, seed):
    ids = BYTES(text)["input_ids"]
    shown = pieces(BYTES, ids, seed)
    assert "".join(shown) == BYTES.decode(ids) == text
    # Half characters are never shown: what is shown is always a beginning of the text.
    assert text.startswith("".join(shown[:-1]))


@settings(max_examples=150, deadline=None)
@given(byte_ids, seeds, st.booleans())
def test_any_bytes_decode_as_all_at_once(ids, seed, skip):
    options = {"skip_special_tokens": skip}
    expected = BYTES.decode(ids, clean_up_tokenization_spaces=False, **options)
    assert "".join(pieces(BYTES, ids, seed, **options)) == expected


@settings(max_examples=100, deadline=None)
@given(texts, byte_ids, seeds)
def test_the_prompts_context_adds_nothing_of_its_own(prompt, ids, seed):
    # The prompt ends between characters, so the output decodes as if it were alone.
    prompt_ids = BYTES(prompt)["input_ids"]
    if prompt.endswith("\ufffd"):
        return
    expected = BYTES.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert "".join(pieces(BYTES, ids, seed, prompt_ids)) == expected


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from(sorted(WORDS.get_vocab())), min_size=1, max_size=80), seeds)
def test_word_tokenizers_keep_their_spaces_after_a_prompt(tokens, seed):
    # Byte tokens that are no UTF-8 make this decoder revise characters before them: ASCII only.
    ids = [
        WORDS.convert_tokens_to_ids(token)
        for token in tokens
        if not token.startswith("<0x") or token < "<0x80>"
    ]
    prompt = WORDS.convert_tokens_to_ids(["▁The", "▁capital"])
    whole = WORDS.decode(prompt + ids, skip_special_tokens=True)
    assert "The capital" + "".join(pieces(WORDS, ids, seed, prompt)) == whole


def test_the_first_word_of_an_answer_keeps_its_space():
    paris = WORDS.convert_tokens_to_ids("▁Paris")
    prompt = WORDS.convert_tokens_to_ids(["▁France", "▁is"])
    assert Detokenizer(Codec(WORDS), prompt).append([paris]) == " Paris"
    assert Detokenizer(Codec(WORDS), []).append([paris]) == "Paris"


def test_a_window_of_special_tokens_loses_no_space():
    paris, end = WORDS.convert_tokens_to_ids(["▁Paris", "</s>"])
    detokenizer = Detokenizer(Codec(WORDS))
    detokenizer.append([*[paris] * WINDOW_TOKENS, *[end] * (CONTEXT_TOKENS + 1)])
    assert detokenizer.append([paris]) == " Paris"


@pytest.mark.parametrize("tokenizer", [BYTES, WORDS], ids=["byte-level", "byte-fallback"])
def test_a_character_is_withheld_until_its_last_byte(tokenizer):
    if tokenizer is BYTES:
        ids = BYTES("x𓂀")["input_ids"]
    else:
        ids = WORDS.convert_tokens_to_ids(["a", *(f"<0x{b:02X}>" for b in "𓂀".encode())])
    assert len(ids) == 5
    detokenizer = Detokenizer(Codec(tokenizer))
    assert [detokenizer.append([token]) for token in ids][1:] == ["", "", "", "𓂀"]
    half = Detokenizer(Codec(tokenizer))
    assert half.append(ids[:3]) in ("x", "a")
    assert set(half.finish()) == {"\ufffd"}


def test_an_output_completes_the_character_that_the_prompt_began():
    crab = BYTES("𓂀")["input_ids"]
    assert len(crab) == 4
    detokenizer = Detokenizer(Codec(BYTES), crab[:2])
    assert "".join(detokenizer.append([token]) for token in crab[2:]) == "𓂀"


class Counting:
    """A tokenizer that counts the tokens it decodes."""

    def __init__(self, tokenizer):
        self.tokenizer, self.decoded = tokenizer, 0

    def decode(self, ids, **options):
        self.decoded += len(ids)
        return self.tokenizer.decode(ids, **options)


@pytest.mark.parametrize("kind", ["text", "special tokens", "special tokens first", "garbage"])
def test_the_cost_per_token_is_bounded(kind):
    eos, size = BYTES.convert_tokens_to_ids(EOS), 2000
    garbage = BYTES("𓂀")["input_ids"][1]
    ids = {
        "text": BYTES("ha ha 日本 " * size)["input_ids"][:size],
        "special tokens": [*BYTES("ha")["input_ids"], *[eos] * size],
        "special tokens first": [*[eos] * 20, *BYTES("ha ha 日本 " * size)["input_ids"][:size]],
        "garbage": [garbage] * size,
    }[kind]
    counting = Counting(Codec(BYTES))
    detokenizer = Detokenizer(counting)
    shown = "".join(detokenizer.append([token]) for token in ids) + detokenizer.finish()
    assert shown == BYTES.decode(ids, skip_special_tokens=True)
    assert counting.decoded <= len(ids) * (WINDOW_TOKENS + CONTEXT_TOKENS + 2)
