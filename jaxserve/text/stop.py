"""Stop strings and stop regexes, matched on the text as it is generated. Imports no jax."""

from __future__ import annotations

import importlib
import re
from collections.abc import Sequence

from jaxserve.errors import InvalidRequestError
from jaxserve.text.detokenize import Detokenizer

MAX_REGEX_WINDOW = 1024
"""Characters before the newest text in which a match of an unbounded regex may begin."""
MAX_REGEX_HOLD = 64
"""Characters that a stream withholds at most because a regex might match them."""
LOOK_AROUND = 64
"""Characters before the longest match that are searched again, for patterns that look ahead."""
TAIL_SLACK = 4096
"""Characters that the tail grows by before it is cut back, so that cutting costs little."""


class StopRegex:
    """A compiled stop pattern and the length of the longest text that it can match."""

    def __init__(self, pattern: str) -> None:
        try:
            self.pattern = re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            raise InvalidRequestError(
                f"stop_regex {pattern!r} is not a valid regular expression: {error}"
            ) from error
        if self.pattern.search(""):
            raise InvalidRequestError(
                f"stop_regex {pattern!r} matches the empty string, which would stop every request "
                "before its first token"
            )
        # The parser behind `re` is the only thing that knows a pattern's width; it has had this
        # name since Python 3.11 and is not documented.
        width = importlib.import_module("re._parser").parse(pattern).getwidth()[1]
        self.width = min(int(width), MAX_REGEX_WINDOW)
        """Longest match in characters, at most MAX_REGEX_WINDOW."""


class StopMatcher:
    """Watches one request's output for its stop strings and regexes.

    After each token the strings are tried in the order given, then the regexes. `append` returns
    the string or pattern that matched, once; `start` and `end` then tell where in the whole output
    text. Regexes find matches of at most `MAX_REGEX_WINDOW` characters.
    """

    def __init__(
        self, strings: Sequence[str], regexes: Sequence[StopRegex], detokenizer: Detokenizer
    ) -> None:
        self.strings = tuple(strings)
        self.regexes = tuple(regexes)
        self._detokenizer = detokenizer
        self._tail = ""
        self._tail_start = 0
        # One character more than a match needs, so that `^` and lookbehind see a real neighbour.
        self._reach = 1 + max(
            [len(string) for string in self.strings]
            + [regex.width + LOOK_AROUND for regex in self.regexes],
            default=0,
        )
        self.start: int | None = None
        """Where in the output text the match begins, in characters; None without a match."""
        self.end: int | None = None

    def append(self, token_id: int) -> str | None:
        """Takes the next token. Returns the matched stop string or pattern text, or None."""
        new = self._detokenizer.append((token_id,))
        if not new:
            return None
        old = len(self._tail)
        self._tail += new
        matched = self._match(old)
        if matched is None and len(self._tail) > self._reach + TAIL_SLACK:
            cut = len(self._tail) - self._reach
            self._tail = self._tail[cut:]
            self._tail_start += cut
        return matched

    def _match(self, old: int) -> str | None:
        """Looks for a match that ends after the first `old` characters of the tail."""
        for string in self.strings:
            place = self._tail.find(string, max(0, old - len(string) + 1))
            if place >= 0:
                return self._found(string, place, place + len(string))
        for regex in self.regexes:
            match = regex.pattern.search(self._tail, max(0, old - regex.width - LOOK_AROUND))
            if match:
                return self._found(regex.pattern.pattern, *match.span())
        return None

    def _found(self, matched: str, start: int, end: int) -> str:
        self.start, self.end = self._tail_start + start, self._tail_start + end
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
