"""Rendering of chat messages."""

from __future__ import annotations

import pytest

from jaxserve.errors import InvalidRequestError
from jaxserve.text import chat
from tests.api_fakes import byte_level_tokenizer

TOKENIZER = byte_level_tokenizer()
HELLO = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hi"}]


def test_ids_are_those_of_the_rendered_text():
    text = "<|im_start|>system\nbe kind<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n"
    text += "<|im_start|>assistant\n"
    assert chat.render(TOKENIZER, HELLO) == TOKENIZER(text)["input_ids"]


def test_template_variables_reach_the_template():
    ids = chat.render(TOKENIZER, HELLO, template_kwargs={"add_generation_prompt": False})
    assert TOKENIZER.decode(ids).endswith("hi<|im_end|>\n")


def test_batches_are_told_from_conversations():
    assert chat.is_batch([HELLO, HELLO]) and not chat.is_batch(HELLO)


@pytest.mark.parametrize("messages", [None, "hi", [], [[]], ["hi"], [{"content": "x"}], [[1]], {}])
def test_wrong_messages_are_named(messages):
    with pytest.raises(InvalidRequestError, match="messages"):
        chat.is_batch(messages)


def test_errors_of_template_and_tokenizer_are_clear():
    with pytest.raises(InvalidRequestError, match="skip_tokenizer_init"):
        chat.render(None, HELLO)
    tokenizer = byte_level_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(InvalidRequestError, match="no chat template"):
        chat.render(tokenizer, HELLO)
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(InvalidRequestError, match="roles must alternate"):
        chat.render(tokenizer, HELLO)
