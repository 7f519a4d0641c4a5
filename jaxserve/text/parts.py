"""The content of a chat message: a string, or parts of text and of images."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jaxserve import checks
from jaxserve.errors import InvalidRequestError, NotSupportedError

IMAGE_KINDS = ("image", "image_url")
IMAGE_KEYS = ("image", "url", "path", "base64")
"""Under which a part of the type "image" has one."""
Part = dict[str, Any]
"""{"type": "text", "text": ...} or {"type": "image"}: what templates look at."""


def parts_of(content: Any, images: bool) -> list[Part]:
    """The parts of a message's content. images: whether it may have any. Raises InvalidRequestError
    and, for other kinds of parts, NotSupportedError."""
    parts: list[Part] = []
    for kind, part in _given(content):
        if kind == "text":
            if not isinstance(part.get("text"), str):
                raise InvalidRequestError(
                    "messages: a part of the type 'text' must have a string 'text', got "
                    + checks.shown(part)
                )
            parts.append({"type": "text", "text": part["text"]})
        elif images and kind in IMAGE_KINDS:
            parts.append({"type": "image"})
        else:
            taken = "'text' and 'image' are" if images else "only 'text' is"
            raise NotSupportedError(
                f"messages: content of the type {kind!r} is not supported, {taken}"
            )
    return parts


def images_of(conversation: Sequence[Mapping[str, Any]]) -> list[Any]:
    """The images of a conversation in their order, as its parts give them: each is an item of
    `image_data`. Raises InvalidRequestError for a part without one."""
    return [
        _image(kind, part)
        for message in conversation
        if message.get("content") is not None
        for kind, part in _given(message["content"])
        if kind in IMAGE_KINDS
    ]


def joined(parts: Sequence[Part], marker: str) -> str:
    """The text of parts, with `marker` where an image is."""
    return "".join(part.get("text", marker) for part in parts)


def _image(kind: str, part: Mapping[str, Any]) -> Any:
    keys = IMAGE_KEYS if kind == "image" else ("image_url",)
    given = [part[key] for key in keys if part.get(key) is not None]
    if len(given) != 1:
        raise InvalidRequestError(
            f"messages: a part of the type {kind!r} must have one of the keys "
            f"{', '.join(map(repr, keys))}, got {checks.shown(part)}"
        )
    return given[0]


def _given(content: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Kinds and parts, as they are."""
    if isinstance(content, str):
        yield "text", {"type": "text", "text": content}
        return
    if not isinstance(content, list | tuple):
        raise InvalidRequestError(
            "messages: content must be a string or a list of parts, got " + checks.shown(content)
        )
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if not isinstance(kind, str):
            raise InvalidRequestError(
                "messages: a part of content must be a dict with the key 'type', got "
                + checks.shown(part)
            )
        yield kind, part
