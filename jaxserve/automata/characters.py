"""Sets of characters, and the bytes of UTF-8 that spell them."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterable

Ranges = tuple[tuple[int, int], ...]
"""Code points from one to another, both included: ascending, with gaps between them."""

LAST = 0x10FFFF
SURROGATES = (0xD800, 0xDFFF)
"""No characters: UTF-8 has no bytes for them."""
LETTERS_LIKE = ((0x24B6, 0x24E9), (0x1F130, 0x1F149), (0x1F150, 0x1F169), (0x1F170, 0x1F189))
"""Letters in circles and squares, which are Alphabetic although their category is Symbol."""
WORDS = frozenset(("Lu", "Ll", "Lt", "Lm", "Lo", "Nl", "Mn", "Mc", "Me", "Nd", "Pc"))
"""Categories of \\w, by Annex C of Unicode's Technical Standard 18."""


def ranges(given: Iterable[tuple[int, int]]) -> Ranges:
    """The union of `given`, which may overlap, without surrogates."""
    merged: list[tuple[int, int]] = []
    for low, high in sorted(given):
        if merged and low <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(high, merged[-1][1]))
        else:
            merged.append((low, high))
    found = []
    for low, high in merged:
        parts = ((low, min(high, SURROGATES[0] - 1)), (max(low, SURROGATES[1] + 1), high))
        found += [(a, b) for a, b in parts if a <= b]
    return tuple(found)


def others(of: Ranges) -> Ranges:
    """All characters that are not in `of`."""
    starts = [0, *(high + 1 for _, high in of)]
    stops = [*(low - 1 for low, _ in of), LAST]
    return ranges((low, high) for low, high in zip(starts, stops, strict=True) if low <= high)


def digits() -> Ranges:
    """\\d: decimal digits of any script."""
    return _where(str.isdecimal)


def spaces() -> Ranges:
    """\\s: Unicode's White_Space, which has no separators of files, groups and records."""
    return _where(lambda letter: letter.isspace() and not "\x1c" <= letter <= "\x1f")


def words() -> Ranges:
    """\\w: letters, marks, digits, what connects words, and joiners."""
    found = _where(lambda letter: unicodedata.category(letter) in WORDS)
    return ranges([*found, *LETTERS_LIKE, (0x200C, 0x200D)])


def _where(wanted: Callable[[str], bool]) -> Ranges:
    return ranges((code, code) for code in range(LAST + 1) if wanted(chr(code)))


Spelling = tuple[tuple[int, int, "Spelling | None"], ...]
"""How characters go on: from which byte to which one, both included, and how after it; None: they
end there. Ascending, without overlaps. Equal parts are one object."""

_LAST_OF_LENGTH = (0x7F, 0x7FF, 0xFFFF, LAST)


def spelling(of: Ranges) -> Spelling:
    """The bytes of all characters of `of`."""
    sequences: list[list[tuple[int, int]]] = []
    for low, high in of:
        _split(low, high, sequences)
    return _shared(sequences, {})


def _split(low: int, high: int, into: list[list[tuple[int, int]]]) -> None:
    """Sequences of byte ranges whose products are low to high."""
    for last in _LAST_OF_LENGTH:
        if low <= last < high:
            _split(low, last, into)
            _split(last + 1, high, into)
            return
    for bits in (6, 12, 18):  # where continuation bytes do not take all values, by the bytes behind
        mask = (1 << bits) - 1
        if (low & ~mask) != (high & ~mask) and high > 0x7F:
            if low & mask:
                _split(low, low | mask, into)
                _split((low | mask) + 1, high, into)
                return
            if high & mask != mask:
                _split(low, (high & ~mask) - 1, into)
                _split(high & ~mask, high, into)
                return
    first, last = chr(low).encode(), chr(high).encode()
    into.append(list(zip(first, last, strict=True)))


def _shared(sequences: list[list[tuple[int, int]]], known: dict[Spelling, Spelling]) -> Spelling:
    """Of sequences in order, whose first ranges are equal or apart."""
    grouped: dict[tuple[int, int], list[list[tuple[int, int]]]] = {}
    for first, *rest in sequences:
        grouped.setdefault(first, []).append(rest)
    made = tuple(
        (*first, _shared(rests, known) if rests[0] else None) for first, rests in grouped.items()
    )
    return known.setdefault(made, made)
