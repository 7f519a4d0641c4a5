"""Chat messages to the text of a prompt, through the tokenizer's chat template."""

from __future__ import annotations

import inspect
import json
import types
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jaxserve import checks
from jaxserve.errors import InvalidRequestError
from jaxserve.text.parts import Part, joined, parts_of

if TYPE_CHECKING:
    from jaxserve.text.template import Template

Message = Mapping[str, Any]
NOT_VARIABLES = frozenset(
    (
        "chat_template",
        "conversation",
        "conversations",
        "messages",
        "tools",
        "tokenize",
        "return_tensors",
        "return_dict",
        "return_assistant_tokens_mask",
        "padding",
        "truncation",
        "max_length",
        "tokenizer_kwargs",
        "sanitize_control_tokens",
    )
)
"""Arguments of transformers' `apply_chat_template` that are no variables of a template."""
REASONING = ("reasoning_content", "thinking", "reasoning")
"""Names under which an assistant's reasoning is given; templates read one or the other."""
MARK = "CONTINUE_FINAL_MESSAGE_TAG "
"""Put behind a message that is to be continued, to find its end. Its space tells whether the
template strips messages."""

PROBE_TEXT = "a b"
PROBE = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": PROBE_TEXT}]},
]
"""A message that tells whether a template knows parts of a content."""


def is_batch(messages: Any) -> bool:
    """Whether `messages` is a list of conversations. Raises InvalidRequestError if it is neither
    that nor a conversation."""
    if not isinstance(messages, list | tuple) or not messages:
        raise InvalidRequestError(
            "messages must be a list of messages or a list of such lists, got "
            + checks.shown(messages)
        )
    batch = isinstance(messages[0], list | tuple)
    for conversation in messages if batch else [messages]:
        _check_conversation(conversation)
    return batch


class ChatPrompts:
    """Writes conversations as the model's chat template says. Thread-safe, without a lock.
    Templates are compiled when they are first used."""

    def __init__(
        self,
        templates: str | Mapping[str, str] | None,
        special_tokens: Mapping[str, str],
        marker: str | None = None,
    ) -> None:
        """templates: Jinja text, or several by name; None if the tokenizer has none.
        special_tokens: texts of the tokenizer's special tokens by role (`bos_token`), which
        templates read. marker: what stands for an image in a prompt of the model
        (`Family.marker_text`); None: the model sees none."""
        named = templates if isinstance(templates, Mapping) else {"default": templates}
        self._sources = {name: source for name, source in named.items() if source}
        self._special_tokens = dict(special_tokens)
        self._marker = marker
        self._compiled: dict[str, Template] = {}
        self._taking_parts: dict[str, bool] = {}

    @classmethod
    def of(cls, tokenizer: Any, marker: str | None = None) -> ChatPrompts:
        """What a transformers tokenizer says now; later changes to it do not count."""
        return cls(getattr(tokenizer, "chat_template", None), tokenizer.special_tokens_map, marker)

    def render(
        self,
        conversation: Sequence[Message],
        *,
        tools: Sequence[Any] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt of one conversation, ending where the assistant's answer begins.

        tools: JSON schemas, or functions with types and a docstring. template_kwargs: further
        variables of the template, such as `enable_thinking`; `add_generation_prompt=False` ends
        with the last message, `continue_final_message=True` (or the name of a field) within it.

        Parts of the type "text" are joined; a tool call's arguments may be JSON text. Of a model
        that sees images, a template that knows parts gets them (images without their data:
        `parts.images_of` has that), and one that knows strings only gets the marker in their place.
        Raises InvalidRequestError (without a template, for other messages and variables, and when
        the template refuses them) and NotSupportedError (images and other media that the model
        does not see).
        """
        variables = _variables(template_kwargs)
        template = self._template(tools is not None)
        with_parts = self._takes_parts(template)
        messages = [_message(message, self._marker, with_parts) for message in conversation]
        continued = variables.pop("continue_final_message", False)
        if continued:
            if variables.get("add_generation_prompt"):
                raise InvalidRequestError(
                    "continue_final_message and add_generation_prompt are both set: a message that "
                    "is continued is followed by no other"
                )
            variables["add_generation_prompt"] = False
            field = "content" if continued is True else continued
            final = _mark_final(messages, field)
        text = template.render(
            {
                "add_generation_prompt": True,
                "documents": None,
                **self._special_tokens,
                **variables,
                "messages": messages,
                "tools": None if tools is None else _tools(tools),
            }
        )
        return _cut_at_mark(text, final) if continued else text

    def _template(self, with_tools: bool) -> Template:
        from jaxserve.text.template import Template  # Jinja is for those who chat

        if not self._sources:
            raise InvalidRequestError(
                "the tokenizer has no chat template: give Engine(chat_template=...), or render the "
                "messages yourself and call generate"
            )
        name = "tool_use" if with_tools and "tool_use" in self._sources else "default"
        source = self._sources.get(name)
        if not isinstance(source, str):
            raise InvalidRequestError(
                f"the tokenizer has the chat templates {sorted(self._sources)} and none of them is "
                "the default: give Engine(chat_template=...)"
            )
        if name not in self._compiled:
            self._compiled[name] = Template(source)
        return self._compiled[name]

    def _takes_parts(self, template: Template) -> bool:
        """Whether a template writes the parts of a content, rather than what Python says of a list:
        found by trying, once."""
        marker, source = self._marker, template.source
        if marker is None:
            return False
        if source not in self._taking_parts:
            variables = {**self._special_tokens, "messages": PROBE, "tools": None}
            try:
                text = template.render({**variables, "add_generation_prompt": False})
            except InvalidRequestError:
                text = ""
            self._taking_parts[source] = (
                marker in text and PROBE_TEXT in text and "type" not in text
            )
        return self._taking_parts[source]


def plain(name: str, value: Any) -> Any:
    """A value rebuilt of None, bools, numbers, strings, lists and dicts: what templates may see.
    Raises InvalidRequestError for a value within itself; other objects become `<type>`."""
    try:
        return _plain(value)
    except RecursionError as error:
        raise InvalidRequestError(f"{name} has values within values without end") from error


def _plain(value: Any) -> Any:
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return int.__int__(value)
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if callable(getattr(value, "model_dump", None)):  # pydantic's, as OpenAI's client returns them
        return _plain(value.model_dump())
    if callable(getattr(value, "item", None)) and getattr(value, "ndim", None) == 0:
        return _plain(value.item())  # numbers of NumPy and JAX
    return f"<{type(value).__name__}>"


def _variables(given: Any) -> dict[str, Any]:
    if given is not None and not isinstance(given, Mapping):
        raise InvalidRequestError(f"chat_template_kwargs must be a dict, got {checks.shown(given)}")
    for name in given or {}:
        if not isinstance(name, str):
            raise InvalidRequestError(
                f"chat_template_kwargs: a variable's name must be a string, got "
                f"{checks.shown(name)}"
            )
        if name in NOT_VARIABLES:
            raise InvalidRequestError(
                f"chat_template_kwargs must not have the key {name!r}: only variables of the chat "
                "template are given there (Engine(chat_template=...) replaces the template)"
            )
    return plain("chat_template_kwargs", given or {})


def _tools(given: Any) -> list[Any]:
    if not isinstance(given, list | tuple):
        raise InvalidRequestError(f"tools must be a list, got {checks.shown(given)}")
    schemas = []
    for row, tool in enumerate(given):
        if isinstance(tool, types.FunctionType) or inspect.ismethod(tool):
            from transformers.utils.chat_template_utils import get_json_schema

            try:
                tool = get_json_schema(tool)
            except Exception as error:  # of its own kinds, for docstrings and annotations
                raise InvalidRequestError(
                    f"tools[{row}]={checks.shown(tool)} has no JSON schema: {str(error)[:500]}"
                ) from error
        if not isinstance(tool, Mapping):
            raise InvalidRequestError(
                f"tools[{row}] must be a JSON schema (a dict) or a function, got "
                f"{checks.shown(tool)}"
            )
        schemas.append(plain(f"tools[{row}]", tool))
    return schemas


def _message(given: Message, marker: str | None, with_parts: bool) -> dict[str, Any]:
    """A message as templates expect it: its content a string, or parts; nothing that is None."""
    message = {key: value for key, value in given.items() if value is not None}
    if "content" in message:
        parts = parts_of(message["content"], images=marker is not None)
        message["content"] = parts if with_parts else joined(parts, marker or "")
    if "tool_calls" in message:
        message["tool_calls"] = _tool_calls(message["tool_calls"])
    message = plain("messages", message)
    reasoning = [message[name] for name in REASONING if message.get(name) is not None]
    if reasoning:
        message = {"thinking": reasoning[0], **message, "reasoning_content": reasoning[0]}
    return message


def _tool_calls(calls: Any) -> list[Any]:
    """Tool calls whose arguments are values: clients send them as JSON text, and templates write
    them as JSON."""
    if not isinstance(calls, list | tuple):
        raise InvalidRequestError(f"messages: tool_calls must be a list, got {checks.shown(calls)}")
    decoded = []
    for call in plain("messages: tool_calls", calls):
        if not isinstance(call, dict):
            raise InvalidRequestError(
                f"messages: a tool call must be a dict, got {checks.shown(call)}"
            )
        function = call.get("function", call)
        if isinstance(function, dict) and isinstance(function.get("arguments"), str):
            function["arguments"] = _arguments(function["arguments"])
        decoded.append(call)
    return decoded


def _arguments(text: str) -> Any:
    try:
        return json.loads(text) if text.strip() else {}
    except (ValueError, RecursionError) as error:
        raise InvalidRequestError(
            f"messages: the arguments of a tool call are no JSON: {checks.shown(text)}"
        ) from error


def _mark_final(messages: list[dict[str, Any]], field: Any) -> str:
    """Puts MARK behind the field of the last message; what stood there."""
    final = messages[-1].get(field) if isinstance(field, str) else None
    if isinstance(final, list) and final and "text" in final[-1]:  # parts of a content
        part: Part = final[-1]
        text, part["text"] = part["text"], part["text"] + MARK
        return text
    if not isinstance(final, str):
        raise InvalidRequestError(
            f"continue_final_message={checks.shown(field)}: the last message has no such text, got "
            + checks.shown(messages[-1])
        )
    names = REASONING if field in REASONING else (field,)
    for name in names:
        if messages[-1].get(name) == final:
            messages[-1][name] = final + MARK
    return final


def _cut_at_mark(text: str, final: str) -> str:
    place = text.rfind(MARK.strip())
    if place < 0 or final.strip() not in text:
        raise InvalidRequestError(
            "continue_final_message: the chat template does not write the last message as it is, "
            f"got {checks.shown(final)}"
        )
    kept = text[:place]
    return kept if text.startswith(MARK, place) else kept.rstrip()


def _check_conversation(conversation: Any) -> None:
    if not isinstance(conversation, list | tuple) or not conversation:
        raise InvalidRequestError(
            f"messages: a conversation must be a non-empty list, got {checks.shown(conversation)}"
        )
    for message in conversation:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise InvalidRequestError(
                "messages: each message must be a dict with the keys 'role' and 'content', got "
                + checks.shown(message)
            )
