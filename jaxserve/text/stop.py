"""Stop strings and stop regexes, matched on the text as it is generated. Imports no jax."""

from __future__ import annotations

from collections.abc import Sequence

from jaxserve.text.pattern import Patience, StopRegex
from jaxserve.text.transcript import Tail, Transcript

MAX_REGEX_HOLD = 64
"""Characters that a stream withholds at most because a regex might match them."""
LOOK_AROUND = 64
"""Characters before the longest match that are searched again, for patterns that look ahead."""
TAIL_SLACK = 4096
"""Characters that the tail grows by before it is cut back, so that cutting costs little."""


class StopMatcher:
    """Watches one request's output for its stop strings and regexes.

    After each token the strings are tried in the order given, then the regexes; each in the whole
    text, special tokens included, and then in what the caller is shown, if that is another.
    `append` returns the string or pattern that matched, once. Regexes find matches of at most
    `MAX_REGEX_WINDOW` characters.
    """

    def __init__(
        self, strings: Sequence[str], regexes: Sequence[StopRegex], transcript: Transcript
    ) -> None:
        self.strings = tuple(strings)
        """In the order given; constant."""
        self.regexes = tuple(regexes)
        """Likewise."""
        self._transcript = transcript
        self._patience = Patience()
        # One character more than a match needs, so that `^` and lookbehind see a real neighbour.
        self._reach = 1 + max(
            [len(string) for string in self.strings]
            + [regex.width + LOOK_AROUND for regex in self.regexes],
            default=0,
        )
        self.start: int | None = None
        """Where in the shown text the match begins, in characters; None without a match."""
        self.end: int | None = None

    def append(self, token_id: int) -> str | None:
        """Takes the next token. Returns the matched stop string or pattern text, or None. Raises
        RequestFailedError when a pattern takes too long, or the tokenizer fails."""
        transcript = self._transcript
        transcript.append(token_id)
        tails = [transcript.whole]
        if transcript.shown.end != transcript.whole.end:
            tails.append(transcript.shown)
        tails = [tail for tail in tails if tail.new]
        if not tails:
            return None
        matched = self._match(tails)
        if matched is None and len(transcript.whole.text) > self._reach + TAIL_SLACK:
            transcript.forget(self._reach)
        return matched

    def _match(self, tails: list[Tail]) -> str | None:
        """Looks for a match that ends in the newest characters."""
        for string in self.strings:
            for tail in tails:
                old = len(tail.text) - tail.new
                place = tail.text.find(string, max(0, old - len(string) + 1))
                if place >= 0:
                    return self._found(string, tail, place, place + len(string))
        for regex in self.regexes:
            for tail in tails:
                old = len(tail.text) - tail.new
                first = max(0, old - regex.width - LOOK_AROUND)
                span = self._patience.search(regex, tail.text, first)
                if span:
                    return self._found(regex.text, tail, *span)
        return None

    def _found(self, matched: str, tail: Tail, start: int, end: int) -> str:
        start, end = tail.start + start, tail.start + end
        if tail is self._transcript.whole:
            start, end = self._transcript.shown_at(start), self._transcript.shown_at(end)
        self.start, self.end = start, end
        return matched


def held_back(text: str, strings: Sequence[str], regexes: Sequence[StopRegex] = ()) -> int:
    """How many characters at the end of `text` a stream must withhold.

    They are the longest suffix that could be the beginning of a stop string, or that a match of a
    regex could include (at most MAX_REGEX_HOLD characters: a regex that matches more may cut text
    that a stream has already shown).
    """
    held = 0
    for string in strings:
        for size in range(min(len(string) - 1, len(text)), held, -1):
            if text.endswith(string[:size]):
                held = size
                break
    for regex in regexes:
        held = max(held, min(regex.width - 1, MAX_REGEX_HOLD, len(text)))
    return held
