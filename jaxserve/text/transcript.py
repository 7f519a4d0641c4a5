"""One output as two texts: all of it, special tokens included, and what its caller is shown."""

from __future__ import annotations

import bisect
from collections.abc import Sequence

from jaxserve.text.codec import Codec
from jaxserve.text.detokenize import Detokenizer


class Transcript:
    """Grows token by token.

    Positions are in characters from the output's beginning. `forget` drops the beginnings.
    """

    def __init__(
        self,
        codec: Codec,
        prompt_ids: Sequence[int] = (),
        *,
        skip_special_tokens: bool = True,
        spaces_between_special_tokens: bool = True,
    ) -> None:
        both = _Both(codec)

        def tail(skip: bool) -> Tail:
            return Tail(
                Detokenizer(
                    both,
                    prompt_ids,
                    skip_special_tokens=skip,
                    spaces_between_special_tokens=spaces_between_special_tokens,
                )
            )

        self.whole = tail(False)
        """The text that stop strings are looked for in."""
        self.shown = tail(True) if skip_special_tokens else self.whole
        """The caller's; the same object unless special tokens are skipped."""
        # Lengths of both texts after each token: where they differ a special token was skipped.
        self._whole_ends: list[int] = [0]
        self._shown_ends: list[int] = [0]

    def append(self, token_id: int) -> None:
        """Takes the next token."""
        self.whole.append(token_id)
        if self.shown is not self.whole:
            self.shown.append(token_id)
            self._whole_ends.append(self.whole.end)
            self._shown_ends.append(self.shown.end)

    def shown_at(self, place: int) -> int:
        """The place in the shown text of a place in the whole one. Within a skipped token it is
        where that would be."""
        if self.shown is self.whole:
            return place
        before = max(0, bisect.bisect_right(self._whole_ends, place) - 1)
        inside = place - self._whole_ends[before]
        ends = self._shown_ends[before : before + 2]
        return min(ends[0] + inside, ends[-1])

    def forget(self, kept: int) -> None:
        """Drops all but the last `kept` characters of both texts."""
        self.whole.forget(kept)
        if self.shown is not self.whole:
            self.shown.forget(kept)
            first = max(0, bisect.bisect_right(self._whole_ends, self.whole.start) - 1)
            del self._whole_ends[:first], self._shown_ends[:first]


class _Both:
    """Decodes for both texts: once, where no special token makes them differ."""

    def __init__(self, codec: Codec) -> None:
        self._codec = codec
        self._ids: list[int] = []
        self._text = ""

    def decode(
        self,
        token_ids: list[int],
        *,
        skip_special_tokens: bool,
        spaces_between_special_tokens: bool,
    ) -> str:
        known = skip_special_tokens and token_ids == self._ids
        if known and self._codec.special_ids.isdisjoint(token_ids):
            return self._text
        text = self._codec.decode(
            token_ids,
            skip_special_tokens=skip_special_tokens,
            spaces_between_special_tokens=spaces_between_special_tokens,
        )
        if not skip_special_tokens:
            self._ids, self._text = token_ids, text
        return text


class Tail:
    """The end of a growing text. `start`: how many characters are forgotten."""

    def __init__(self, detokenizer: Detokenizer) -> None:
        self._detokenizer = detokenizer
        self.text = ""
        self.start = 0
        self.new = 0
        """Characters that the newest token has completed."""

    @property
    def end(self) -> int:
        return self.start + len(self.text)

    def append(self, token_id: int) -> None:
        new = self._detokenizer.append((token_id,))
        self.text += new
        self.new = len(new)

    def forget(self, kept: int) -> None:
        cut = max(0, len(self.text) - kept)
        self.text = self.text[cut:]
        self.start += cut
