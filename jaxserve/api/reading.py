"""The prompts of a call as token ids, with their pictures."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jaxserve import checks
from jaxserve.api.prompts import NamingRow, Prompts, check_prompts
from jaxserve.errors import InvalidRequestError, NotSupportedError
from jaxserve.text import chat
from jaxserve.text.chat import ChatPrompts
from jaxserve.text.codec import Codec
from jaxserve.text.parts import images_of
from jaxserve.token_ids import token_ids

if TYPE_CHECKING:
    from jaxserve.config import Limits
    from jaxserve.media.picture import PromptMedia
    from jaxserve.media.reader import Reader

SHORT_TOKEN = 8
"""Bytes that the longest token of any vocabulary has: shorter texts need no look at it."""

CHAT = "messages"
"""How a call names the prompts that a chat template has written."""

Row = tuple[list[int], "PromptMedia | None"]
"""A prompt's token ids, and its pictures."""


class ChatText(str):
    """A prompt that a chat template has written."""


def _name_of(prompts: Sequence[str]) -> str:
    """How the call names them."""
    return CHAT if prompts and isinstance(prompts[0], ChatText) else "prompt"


class PromptReader:
    """Of one engine. Thread-safe."""

    def __init__(
        self,
        limits: Limits,
        codec: Codec | None,
        chats: ChatPrompts | None,
        reader: Reader | None,
        auto_truncate: bool,
    ) -> None:
        """codec, chats: None with skip_tokenizer_init. reader: of images; None: the engine takes
        none. auto_truncate: what is too long is cut instead of refused."""
        self._limits = limits
        self._codec = codec
        self._chats = chats
        self._reader = reader
        self._auto_truncate = auto_truncate

    def read(self, given: Prompts, image_data: Any) -> list[Row]:
        """Each prompt's. Raises InvalidRequestError (for a batch, naming the row), and
        NotSupportedError for images where the model, or deterministic inference, takes none."""
        if checks.absent(image_data):
            return [(ids, None) for ids in self._prompt_ids(given)]
        if self._reader is None:
            raise NotSupportedError(
                f"image_data needs a model that takes images, got {checks.shown(image_data)}"
            )
        if self._limits.deterministic and self._limits.most_in_a_block:
            # Their prompts would have to be cut elsewhere than the others.
            raise NotSupportedError(
                "enable_deterministic_inference=True takes no image_data for this model, whose "
                "image tokens see each other"
            )
        if given.ids is not None:
            rows = self._reader.read(self._prompt_ids(given), image_data, given.single)
        else:
            texts = list(given.texts or ())
            check_prompts(texts)
            encode = functools.partial(self._encode_prompts, _name_of(texts))
            rows = self._reader.read(texts, image_data, given.single, encode)
        for index, (ids, media) in enumerate(rows):
            with NamingRow(index, not given.single):
                self._check_room(len(ids), media)
        return rows

    def _check_room(self, tokens: int, media: PromptMedia | None) -> None:
        """A prompt with pictures is not cut."""
        if media is None:
            return
        context, most = self._limits.context_length, self._limits.most_in_a_block
        largest = max(picture.tokens for picture in media.pictures)
        if largest > self._limits.most_of_a_picture:
            raise InvalidRequestError(
                f"image_data: an image is {largest} tokens, and this engine takes at most "
                f"{self._limits.most_of_a_picture} (mm_process_config, context_length)"
            )
        if tokens >= context:
            raise InvalidRequestError(
                f"Multimodal prompt is too long after expanding multimodal tokens. It has {tokens} "
                f"tokens, and the model's context length is {context}"
            )
        if media.longest_block > max(most, 1):
            raise InvalidRequestError(
                f"image_data: {media.longest_block} tokens of images follow each other in the "
                f"prompt, and at most {most} can, because all of them see each other"
            )

    def render_chat(
        self, messages: Any, tools: Sequence[Any] | None, template_kwargs: Mapping[str, Any] | None
    ) -> tuple[str | list[str], Any]:
        """The prompt of a conversation, or of each of a list of them, and their `image_data`."""
        conversations = messages if chat.is_batch(messages) else [messages]
        if self._chats is None:
            raise InvalidRequestError(
                "messages need a tokenizer, and skip_tokenizer_init=True is set"
            )
        texts: list[str] = []
        images: list[list[Any]] = []
        for index, conversation in enumerate(conversations):
            with NamingRow(index, conversations is messages):
                text = self._chats.render(
                    conversation, tools=tools, template_kwargs=template_kwargs
                )
                texts.append(ChatText(text))
                images.append(images_of(conversation))
        shown = images if any(images) else None
        if conversations is messages:
            return texts, shown
        return texts[0], None if shown is None else shown[0]

    def _encode_prompts(self, name: str, texts: list[str]) -> list[list[int]]:
        # A chat template writes the special tokens itself, the first one included.
        encoded = self._encode(name, texts, add_special_tokens=name != CHAT)
        size = self._limits.vocab_size
        for text, row in zip(texts, encoded, strict=True):
            # (Those of a tokenizer are integers; arrays of millions would hold others up.)
            if not row or max(row) >= size:
                token_ids(f"the tokens of {name} {checks.shown(text)}", row, size)
        return encoded

    def _prompt_ids(self, given: Prompts) -> list[list[int]]:
        if given.ids is not None:
            name = "input_ids" if given.single else "input_ids[{}]"
            size = self._limits.vocab_size
            return [token_ids(name.format(index), row, size) for index, row in enumerate(given.ids)]
        prompts = list(given.texts or ())
        check_prompts(prompts)
        return self._encode_prompts(_name_of(prompts), prompts) if prompts else []

    def _encode(self, name: str, texts: list[str], *, add_special_tokens: bool) -> list[list[int]]:
        """Token ids of each text. Those that must be too long, by their bytes, are refused first:
        encoding takes a second for each megabyte or two. (What is cut is encoded: where a text is
        cut decides its last tokens.)"""
        codec, context = self._codec, self._limits.context_length
        if codec is None:
            raise InvalidRequestError(
                f"{name} needs a tokenizer, and skip_tokenizer_init=True is set: give input_ids"
            )
        for index, text in enumerate(texts):
            if len(text) < SHORT_TOKEN * context or self._auto_truncate:
                continue
            least = codec.least_tokens(text)
            if least >= context:
                with NamingRow(index, len(texts) > 1):
                    raise InvalidRequestError(
                        f"The {name} ({len(text)} characters, at least {least} tokens) is longer "
                        f"than the model's context length ({context} tokens)"
                    )
        return codec.encode(name, texts, add_special_tokens=add_special_tokens)
