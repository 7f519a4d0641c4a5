"""Chat messages to the token ids of a prompt, through the tokenizer's chat template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jaxserve.api import checks
from jaxserve.errors import InvalidRequestError

Message = Mapping[str, Any]


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


def render(
    tokenizer: Any,
    conversation: Sequence[Message],
    *,
    tools: Sequence[Any] | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
) -> list[int]:
    """Token ids of one conversation, ending where the assistant's answer begins.

    template_kwargs: further variables of the template, such as `enable_thinking`. Raises
    InvalidRequestError without a tokenizer or template, or when the template refuses the messages.
    """
    import jinja2  # a template engine is not needed by those who never chat

    if tokenizer is None:
        raise InvalidRequestError("messages need a tokenizer, and skip_tokenizer_init=True is set")
    if not getattr(tokenizer, "chat_template", None):
        raise InvalidRequestError(
            "the tokenizer has no chat template: give Engine(chat_template=...), or render the "
            "messages yourself and call generate"
        )
    try:
        text = tokenizer.apply_chat_template(
            [dict(message) for message in conversation],
            tools=list(tools) if tools is not None else None,
            tokenize=False,
            **{"add_generation_prompt": True, **(template_kwargs or {})},
        )
    except (jinja2.TemplateError, TypeError, KeyError) as error:
        raise InvalidRequestError(
            f"the chat template refuses messages={checks.shown(conversation)}: {error}"
        ) from error
    # The template writes the special tokens itself, the first one included.
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


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
