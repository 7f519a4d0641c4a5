"""Token ids to text as they arrive, never showing half a character."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

REPLACEMENT = "\ufffd"
CONTEXT_TOKENS = 6
"""Tokens kept to the left of what is decoded: what a token's text may depend on."""
WINDOW_TOKENS = 24
"""Tokens decoded at a time before the window moves on."""
MAX_INCOMPLETE = 3
"""An incomplete UTF-8 character has at most three bytes: at most three replacement characters."""


class Tokenizer(Protocol):
    """What is needed of a `codec.Codec`."""

    def decode(
        self,
        token_ids: list[int],
        *,
        skip_special_tokens: bool,
        spaces_between_special_tokens: bool,
    ) -> str: ...


class Detokenizer:
    """The text of one request's output, appended to token by token or all at once.

    The text is that of `tokenizer.decode(prompt + output)` after the prompt's part: tokenizers
    that drop a leading space (SentencePiece) keep it, because the last tokens of the prompt are
    decoded with the output. For byte-level tokenizers it equals `tokenizer.decode(output)`.

    Each append decodes a short window of tokens, so the cost of a stream is linear in its length.
    A character whose bytes have not all arrived is withheld until they have, or until `finish`.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_ids: Sequence[int] = (),
        *,
        skip_special_tokens: bool = True,
        spaces_between_special_tokens: bool = True,
    ) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._spaces_between_special_tokens = spaces_between_special_tokens
        self._window = list(prompt_ids[-CONTEXT_TOKENS:])
        self._text = self._decode(self._window)
        # A prompt may end within a character; the output then completes and owns it.
        self._shown = len(self._text) - _incomplete(self._text)

    def append(self, token_ids: Iterable[int]) -> str:
        """The text that the new tokens complete: no text later changes it."""
        window = [*self._window, *token_ids]
        text = self._decode(window)
        if text == self._text and text and not text.endswith(REPLACEMENT):
            # Tokens without text (skipped special ones) need not be decoded again. After half a
            # character they may be its next bytes, which do not change what it looks like.
            return ""
        self._window, self._text = window, text
        end = max(self._shown, len(text) - _incomplete(text))
        new = text[self._shown : end]
        self._shown = end
        if len(window) > WINDOW_TOKENS:
            self._advance()
        return new

    def finish(self) -> str:
        """What was withheld. Nothing may be appended afterwards."""
        rest = self._text[self._shown :]
        self._shown = len(self._text)
        return rest

    def _advance(self) -> None:
        """Drops the oldest tokens of the window, keeping the place in the text."""
        window = self._window[-CONTEXT_TOKENS:]
        text = self._decode(window)
        withheld = self._text[self._shown :]
        # The last shown character must be in the shorter window too: it is the proof that both
        # windows decode alike up to here. Otherwise the window grows and the next append retries.
        shown = len(text) - len(withheld)
        if shown > 0 and self._text.endswith(text[shown - 1 :]):
            self._window, self._text, self._shown = window, text, shown

    def _decode(self, token_ids: list[int]) -> str:
        if not token_ids:
            return ""
        return self._tokenizer.decode(
            token_ids,
            skip_special_tokens=self._skip_special_tokens,
            spaces_between_special_tokens=self._spaces_between_special_tokens,
        )


def _incomplete(text: str) -> int:
    """Characters at the end of `text` that may stand for the first bytes of one character."""
    count = 0
    while count < min(MAX_INCOMPLETE, len(text)) and text[-1 - count] == REPLACEMENT:
        count += 1
    return count
