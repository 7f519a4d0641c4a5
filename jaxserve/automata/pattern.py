"""Reads a regular expression: the part of the syntax in which Python's `re` and Rust's `regex`
agree, and mean the same."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple, NoReturn

from jaxserve.automata import characters
from jaxserve.automata.characters import LAST, Ranges
from jaxserve.errors import InvalidRequestError
from jaxserve.shown import quoted

DEEPEST = 64
"""Groups inside each other."""


class Characters(NamedTuple):
    """One character of a set."""

    ranges: Ranges


class Sequence(NamedTuple):
    """One part after the other."""

    parts: tuple[Node, ...]


class Choice(NamedTuple):
    """One of the parts."""

    parts: tuple[Node, ...]


class Repeat(NamedTuple):
    """A part, again and again."""

    part: Node
    least: int
    most: int | None
    """None: as often as you like."""


Node = Characters | Sequence | Choice | Repeat

CONTROLS = {"n": 10, "t": 9, "r": 13, "f": 12, "v": 11, "a": 7}
HEXADECIMAL = {"x": 2, "u": 4, "U": 8}
"""Digits behind such a letter."""
SETS: dict[str, Callable[[], Ranges]] = {
    "d": characters.digits,
    "s": characters.spaces,
    "w": characters.words,
}


def parse(regex: str) -> Node:
    """What `regex` matches from its first character to its last. InvalidRequestError: it is none,
    or has what is not supported, such as look-around, references back, anchors and flags."""
    reader = _Reader(regex)
    found = reader.choice()
    if reader.left:
        reader.refuse("there is no '(' for this ')'")
    return found


class _Reader:
    def __init__(self, text: str) -> None:
        self._text, self._at, self._depth = text, 0, 0
        self._set = functools.cache(lambda letter: SETS[letter]())

    @property
    def left(self) -> str:
        return self._text[self._at :]

    def refuse(self, reason: str, back: int = 0) -> NoReturn:
        """At the place that was read last, or `back` characters before it."""
        raise InvalidRequestError(
            f"regex={quoted(self._text)}, character {self._at - back}: {reason}"
        )

    def _next(self) -> str:
        return self._text[self._at : self._at + 1]

    def _take(self, wanted: str) -> bool:
        """Whether `wanted` comes next; read then."""
        found = self._text.startswith(wanted, self._at)
        self._at += len(wanted) * found
        return found

    # -- parts ------------------------------------------------------------------------------------

    def choice(self) -> Node:
        parts = [self._sequence()]
        while self._take("|"):
            parts.append(self._sequence())
        return parts[0] if len(parts) == 1 else Choice(tuple(parts))

    def _sequence(self) -> Node:
        parts: list[Node] = []
        while self._next() not in ("", "|", ")"):
            parts.append(self._repeated(self._atom()))
        return parts[0] if len(parts) == 1 else Sequence(tuple(parts))

    def _repeated(self, part: Node) -> Node:
        counts = self._counts()
        if counts is None:
            return part
        self._take("?")  # the shortest match first: the same texts match
        if self._next() == "+":
            self.refuse("possessive repetition is not supported")
        if self._next() in ("*", "?", "{"):
            self.refuse("what is repeated already must be in a group: (?:...)")
        return Repeat(part, *counts)

    def _counts(self) -> tuple[int, int | None] | None:
        for sign, counts in (("*", (0, None)), ("+", (1, None)), ("?", (0, 1))):
            if self._take(sign):
                return counts
        if not self._take("{"):
            return None
        inside, closed, _ = self.left.partition("}")
        first, comma, second = inside.partition(",")
        given = [each for each in (first, second) if each]
        if not closed or not given or not all(x.isascii() and x.isdigit() for x in given):
            self.refuse(r"expected {m}, {m,}, {,n} or {m,n}; for the character write \{", back=1)
        least = int(first or 0)
        most = least if not comma else int(second) if second else None
        if most is not None and most < least:
            self.refuse(f"{{{inside}}} repeats at most {most} times and at least {least}", back=1)
        self._at += len(inside) + 1
        return least, most

    def _atom(self) -> Node:
        letter = self._next()
        if letter in "*+?{":
            self.refuse(f"{letter!r} repeats nothing; for the character write \\{letter}")
        if letter in "^$":
            self.refuse(f"all of the output matches: leave {letter!r} out, or write \\{letter}")
        self._at += 1
        match letter:
            case "(":
                return self._group()
            case "[":
                return Characters(self._class())
            case ".":
                return Characters(characters.others(((10, 10),)))
            case "\\":
                return Characters(self._escape())
        return Characters(characters.ranges([(ord(letter), ord(letter))]))

    def _group(self) -> Node:
        if self.left[:2] in ("?=", "?!") or self.left[:3] in ("?<=", "?<!"):
            self.refuse("look-around is not supported")
        if self._take("?P<") or self._take("?<"):
            name, _, _ = self.left.partition(">")
            if not name.isidentifier():
                self.refuse(f"{quoted(name)} is no name of a group")
            self._at += len(name) + 1
        elif self._next() == "?" and not self._take("?:"):
            self.refuse("flags and conditions are not supported")
        self._depth += 1
        if self._depth > DEEPEST:
            self.refuse(f"more than {DEEPEST} groups inside each other")
        found = self.choice()
        self._depth -= 1
        if not self._take(")"):
            self.refuse("a group is not closed")
        return found

    # -- characters -------------------------------------------------------------------------------

    def _class(self) -> Ranges:
        """Behind the [."""
        negated = self._take("^")
        found: list[tuple[int, int]] = []
        first = True
        while first or self._next() != "]":
            first = False
            if not self.left:
                self.refuse("a class is not closed")
            low = self._member()
            if self._next() == "-" and self.left[1:2] not in ("]", ""):
                self._at += 1
                high = self._member()
                (start,), (stop,) = self._single(low), self._single(high)
                if stop < start:
                    self.refuse(f"a range that ends before it begins: {chr(start)}-{chr(stop)}")
                found.append((start, stop))
            else:
                found += low
        self._at += 1
        united = characters.ranges(found)
        return characters.others(united) if negated else united

    def _member(self) -> Ranges:
        letter = self._next()
        if letter == "[":
            self.refuse(r"classes inside classes are not supported; for the character write \[")
        if letter in "&~-" and self.left[1:2] == letter:
            self.refuse(f"operations such as {letter * 2} are not supported in classes")
        self._at += 1
        if letter == "\\":
            return self._escape()
        return ((ord(letter), ord(letter)),)

    def _single(self, member: Ranges) -> tuple[int]:
        if len(member) != 1 or member[0][0] != member[0][1]:
            self.refuse("a range goes from one character to another")
        return (member[0][0],)

    def _escape(self) -> Ranges:
        """Behind the \\."""
        letter = self._next()
        self._at += 1
        if letter.lower() in SETS:
            found = self._set(letter.lower())
            return characters.others(found) if letter.isupper() else found
        if letter in CONTROLS:
            code = CONTROLS[letter]
        elif letter in HEXADECIMAL:
            written = self.left[: HEXADECIMAL[letter]]
            try:
                code = int(written, 16)
            except ValueError:
                code = -1
            if len(written) < HEXADECIMAL[letter] or not 0 <= code <= LAST:
                self.refuse(f"\\{letter} needs {HEXADECIMAL[letter]} hexadecimal digits")
            self._at += len(written)
        elif (
            letter.isascii()
            and letter.isprintable()
            and not letter.isalnum()
            and letter not in "<>"
        ):
            code = ord(letter)
        else:
            self.refuse(f"\\{letter} is not supported", back=1)
        return ((code, code),)
