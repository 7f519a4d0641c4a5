"""Rendering of chat messages."""

from __future__ import annotations

import pytest

from jaxserve.errors import InvalidRequestError
from jaxserve.text import chat
from jaxserve.text.chat import ChatPrompts
from tests.api_fakes import byte_level_tokenizer

TOKENIZER = byte_level_tokenizer()
CHATS = ChatPrompts.of(TOKENIZER)
HELLO = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hi"}]
TEXT = "<|im_start|>system\nbe kind<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n"


def test_the_prompt_ends_where_the_answer_begins():
    assert CHATS.render(HELLO) == f"{TEXT}<|im_start|>assistant\n"


def test_template_variables_reach_the_template():
    assert CHATS.render(HELLO, template_kwargs={"add_generation_prompt": False}) == TEXT


def test_batches_are_told_from_conversations():
    assert chat.is_batch([HELLO, HELLO]) and not chat.is_batch(HELLO)


@pytest.mark.parametrize("messages", [None, "hi", [], [[]], ["hi"], [{"content": "x"}], [[1]], {}])
def test_wrong_messages_are_named(messages):
    with pytest.raises(InvalidRequestError, match="messages"):
        chat.is_batch(messages)


def test_errors_of_templates_are_clear():
    with pytest.raises(InvalidRequestError, match="no chat template"):
        ChatPrompts(None, {}).render(HELLO)
    with pytest.raises(InvalidRequestError, match="roles must alternate"):
        ChatPrompts("{{ raise_exception('roles must alternate') }}", {}).render(HELLO)
    with pytest.raises(InvalidRequestError, match=r"\['other'\] and none of them is the default"):
        ChatPrompts({"other": "x"}, {}).render(HELLO)
