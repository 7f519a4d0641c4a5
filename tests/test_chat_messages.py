"""What a conversation may hold, and what its template may be given."""

from __future__ import annotations

import numpy as np
import pytest

from jaxserve.errors import InvalidRequestError, NotSupportedError
from jaxserve.text.chat import ChatPrompts

PLAIN = "{% for m in messages %}[{{ m.role }}:{{ m.content }}]{% endfor %}"
CALLS = (
    "{% for c in messages[-1].tool_calls %}{{ (c.function or c).arguments | tojson }}{% endfor %}"
)


def render(messages, template=PLAIN, **variables):
    return ChatPrompts(template, {}).render(messages, template_kwargs=variables)


def user(content, **more):
    return [{"role": "user", "content": content, **more}]


@pytest.mark.parametrize(
    "content",
    ["hello", [{"type": "text", "text": "hello"}],
     ({"type": "text", "text": "hel"}, {"type": "text", "text": "lo", "cache_control": {}})],
)  # fmt: skip
def test_parts_of_text_are_joined(content):
    assert render(user(content)) == "[user:hello]"


def test_content_that_is_none_is_not_there():
    assert render([{"role": "user", "content": None, "name": None}]) == "[user:]"


@pytest.mark.parametrize("kind", ["image_url", "image", "input_audio", "video"])
def test_media_are_not_supported(kind):
    with pytest.raises(NotSupportedError, match=kind):
        render(user([{"type": "text", "text": "see"}, {"type": kind, kind: {"url": "x"}}]))


@pytest.mark.parametrize(
    "content", [5, {"type": "text"}, ["hello"], [{"text": "x"}], [{"type": "text"}], b"x",
                [{"type": "text", "text": 5}], [[]], True]
)  # fmt: skip
def test_other_content_is_refused_by_name(content):
    with pytest.raises(InvalidRequestError, match=r"messages: .*content|messages: a part"):
        render(user(content))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [('{"city": "日本", "n": 1}', '{"city": "日本", "n": 1}'), ({"a": [1]}, '{"a": [1]}'),
     ("", "{}"),
     ('{"quoted": "\\"x\\""}', '{"quoted": "\\"x\\""}')],
)  # fmt: skip
@pytest.mark.parametrize("nested", [True, False])
def test_a_tool_calls_arguments_are_encoded_once(arguments, expected, nested):
    call = {"name": "f", "arguments": arguments}
    messages = user("x", tool_calls=[{"type": "function", "function": call} if nested else call])
    assert render(messages, CALLS) == expected
    assert call["arguments"] == arguments  # the caller's messages stay as they are


@pytest.mark.parametrize(
    "calls", ["x", [5], [{"function": {"arguments": "{no json"}}], {"a": 1},
              [{"arguments": "[" * 100_000}]]
)  # fmt: skip
def test_other_tool_calls_are_refused(calls):
    with pytest.raises(InvalidRequestError, match="tool"):
        render(user("x", tool_calls=calls), CALLS)


def test_a_final_message_is_continued():
    template = PLAIN + "{% if add_generation_prompt %}[assistant:{% endif %}"
    messages = [*user("hi"), {"role": "assistant", "content": "The answer is"}]
    expected = "[user:hi][assistant:The answer is"
    assert render(messages, template, continue_final_message=True) == expected
    parts = [*user("hi"), {"role": "assistant", "content": [{"type": "text", "text": "Well "}]}]
    assert render(parts, template, continue_final_message=True) == "[user:hi][assistant:Well "
    thinking = [{"role": "assistant", "thinking": "hm", "content": ""}]
    template = "{{ messages[0].reasoning_content }}<end>"
    assert render(thinking, template, continue_final_message="thinking") == "hm"


def test_a_message_that_cannot_be_continued_is_refused():
    both = {"continue_final_message": True, "add_generation_prompt": True}
    for messages, template, variables in (
        (user("hi"), PLAIN, both),
        ([{"role": "assistant"}], PLAIN, {"continue_final_message": True}),
        (user("hi"), PLAIN, {"continue_final_message": 5}),
        (user("hi"), "{{ messages[0].content[:1] }}", {"continue_final_message": True}),
    ):
        with pytest.raises(InvalidRequestError, match="continue_final_message"):
            render(messages, template, **variables)


@pytest.mark.parametrize(
    "name", ["chat_template", "tokenize", "return_tensors", "return_dict", "padding", "truncation",
             "max_length", "tools", "messages", "conversation", "tokenizer_kwargs"]
)  # fmt: skip
def test_what_is_no_variable_of_the_template_is_refused(name):
    """A caller's `chat_template` would be a program of its own."""
    with pytest.raises(InvalidRequestError, match=f"chat_template_kwargs.*'{name}'"):
        ChatPrompts(PLAIN, {}).render(user("hi"), template_kwargs={name: "{{ 'a' * 10**10 }}"})


@pytest.mark.parametrize("given", [5, "x", [("a", 1)], {5: 1}])
def test_variables_are_a_dict_of_names(given):
    with pytest.raises(InvalidRequestError, match="chat_template_kwargs"):
        ChatPrompts(PLAIN, {}).render(user("hi"), template_kwargs=given)


def test_templates_see_plain_values_only():
    class Text(str):
        def run(self):
            return "ran"

    template = "{{ x.run }}|{{ n + 1 }}|{{ o }}|{{ messages[0].content.run }}"
    given = {"x": Text("a"), "n": np.int64(2), "o": object()}
    assert render(user(Text("hi")), template, **given) == "|3|<object>|"
    circle: dict = {}
    circle["self"] = circle
    with pytest.raises(InvalidRequestError, match="without end"):
        render(user("hi"), x=circle)


def test_tools_are_schemas_or_functions():
    def look(where: str) -> str:
        """
        Looks.

        Args:
            where: A place.
        """
        return where

    chats = ChatPrompts("{{ tools[0].function.name }}", {})
    assert chats.render(user("hi"), tools=[look]) == "look"
    assert chats.render(user("hi"), tools=[{"function": {"name": "f"}}]) == "f"
    for tools in ("x", [5], [lambda: 1]):
        with pytest.raises(InvalidRequestError, match="tools"):
            chats.render(user("hi"), tools=tools)
