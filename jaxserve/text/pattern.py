"""Stop patterns: Python's regular expressions, compiled and searched in bounded time.

`re` says what is a pattern, and how wide it is. `regex` searches: it stops at a time limit, and
lets other threads run meanwhile.
"""

from __future__ import annotations

import importlib
import re
import time
from typing import Any

from jaxserve.errors import InvalidRequestError, RequestFailedError
from jaxserve.text import limits

MAX_REGEX_WINDOW = 1024
"""Characters before the newest text in which a match of an unbounded regex may begin."""
SAMPLE = " " * MAX_REGEX_WINDOW
SHOWN = 200
"""Characters of a pattern in an error."""
REPEAT = re.compile(r"\{\d*,?\d*\}")


class StopRegex:
    """A compiled stop pattern and the length of the longest text that it can match.

    Raises InvalidRequestError if it is no pattern, matches the empty string, or breaks a bound of
    `limits`.
    """

    def __init__(self, pattern: str) -> None:
        self.text = pattern
        """As the caller gave it."""
        parsed = _parse(pattern)
        size, run = _size(parsed), _longest_run(parsed)
        for what, count, most in (
            ("characters", len(pattern), limits.PATTERN_LENGTH),
            ("places, its repetitions written out,", size, limits.PATTERN_SIZE),
            ("plain characters in a row", run, limits.PATTERN_RUN),
        ):
            if count > most:
                raise _invalid(pattern, f"has {count} {what} and may have {most}")
        # Late: transformers has it loaded anyway, and who gives no pattern waits for nothing.
        import regex

        try:
            # V0 is what `re` means, but for some braces and brackets.
            self._compiled = regex.compile(_for_regex(pattern), flags=regex.V0)
        except (regex.error, RecursionError) as error:
            raise _invalid(pattern, f"is not supported: {error}") from error
        self.width = min(int(parsed.getwidth()[1]), MAX_REGEX_WINDOW)
        """Longest match in characters, at most MAX_REGEX_WINDOW."""
        try:
            empty = self._search("")
            self._search(SAMPLE)  # which makes the tables that searches need
        except TimeoutError as error:
            raise _invalid(pattern, "backtracks without end on plain spaces") from error
        if empty:
            raise _invalid(
                pattern,
                "matches the empty string, which would stop every request before its first token",
            )

    def search(self, text: str, start: int) -> tuple[int, int] | None:
        """Where it first matches from `start` on. Raises RequestFailedError after
        PATTERN_SECONDS."""
        try:
            match = self._search(text, start)
        except TimeoutError as error:
            raise RequestFailedError(
                f"stop_regex {_shown(self.text)} takes more than {limits.PATTERN_SECONDS} seconds "
                "to search the output: it backtracks without end"
            ) from error
        return match.span() if match else None

    def _search(self, text: str, start: int = 0) -> Any:
        return self._compiled.search(text, start, timeout=limits.PATTERN_SECONDS, concurrent=True)


class Patience:
    """What slow searches of one request may take together: each token runs one."""

    def __init__(self) -> None:
        self._left = limits.PATTERN_TOTAL_SECONDS

    def search(self, regex: StopRegex, text: str, start: int) -> tuple[int, int] | None:
        """`regex.search`. Raises RequestFailedError when the request's time is over."""
        began = time.thread_time()  # a busy machine costs a request nothing
        found = regex.search(text, start)
        took = time.thread_time() - began
        if took > limits.PATTERN_PATIENCE:
            self._left -= took
            if self._left < 0:
                raise RequestFailedError(
                    f"searches for stop_regex {_shown(regex.text)} took more than "
                    f"{limits.PATTERN_TOTAL_SECONDS} seconds"
                )
        return found


def _parse(pattern: str) -> Any:
    """The parse tree of `re`, which alone knows a pattern's width; the module has had this name
    since Python 3.11 and is not documented."""
    if len(pattern) > limits.PATTERN_LENGTH:
        raise _invalid(
            pattern, f"has {len(pattern)} characters and may have {limits.PATTERN_LENGTH}"
        )
    try:
        return importlib.import_module("re._parser").parse(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise _invalid(pattern, f"is not a valid regular expression: {error}") from error


def _invalid(pattern: str, why: str) -> InvalidRequestError:
    return InvalidRequestError(f"stop_regex {_shown(pattern)} {why}")


def _shown(pattern: str) -> str:
    return repr(pattern if len(pattern) <= SHOWN else pattern[:SHOWN] + "...")


def _inner(value: Any) -> list[Any]:
    """The patterns within an operation's argument."""
    if hasattr(value, "getwidth"):
        return [value]
    return [p for part in value for p in _inner(part)] if isinstance(value, tuple | list) else []


def _size(parsed: Any) -> int:
    """Places of a parsed pattern with its repetitions written out."""
    total = 0
    for operation, value in parsed:
        inside = sum(map(_size, _inner(value))) or 1
        if str(operation).endswith("REPEAT"):
            least, most = int(value[0]), value[1]
            bounded = int(most) if str(most) != "MAXREPEAT" else max(least, 1)
            inside *= max(bounded, 1)
        total += inside
    return total


def _longest_run(parsed: Any) -> int:
    longest = run = 0
    for operation, value in parsed:
        run = run + 1 if str(operation) == "LITERAL" else 0
        longest = max([longest, run, *map(_longest_run, _inner(value))])
    return longest


def _for_regex(pattern: str) -> str:
    """The pattern as `regex` must read it: there `{e<=1}` is a fuzzy match and `[[:a:]]` a class,
    which are plain characters of `re`."""
    out, place, in_set = [], 0, False
    while place < len(pattern):
        letter = pattern[place]
        end = place + 1
        if letter == "\\":
            end += 1
        elif in_set:
            in_set = letter != "]"
            letter = "\\[" if letter == "[" else letter
        elif letter == "[":
            in_set = True
            while pattern[end : end + 1] == "^" and end == place + 1:
                end += 1
            if pattern[end : end + 1] == "]":  # as the first of a set it is a character
                end += 1
        elif letter == "{" and not REPEAT.match(pattern, place):
            letter = "\\{"
        out.append(letter + pattern[place + 1 : end])
        place = end
    return "".join(out)
