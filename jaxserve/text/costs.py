"""What the operations of a chat template cost, asked before they run.

A template is a program of a model file. Jinja's sandbox keeps it away from Python; this keeps its
operations small enough for a clock that is read between them: each is linear, or nearly so, in
sizes that `limits` bounds.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, ItemsView, Iterable, Iterator, KeysView, Mapping, ValuesView
from typing import Any

from jinja2 import TemplateRuntimeError

from jaxserve.text import limits

NODE = 16
"""Characters that a nested value is counted as, for each level that it is deep: braces, commas and
indentation up to so many columns."""
TICK = 4096
"""Cost between two readings of the clock: bytes looked at, or NODE for a step without any."""
SEQUENCES = (list, tuple, set, frozenset, KeysView, ValuesView, ItemsView)
WIDE = frozenset(
    (
        "center", "ljust", "rjust", "zfill", "expandtabs", "indent", "batch", "slice",
        "wordwrap", "truncate", "round", "to_bytes",
    )
)  # fmt: skip
SEARCHING = frozenset(
    (
        "rfind", "rindex", "rsplit", "rpartition", "strip", "lstrip", "rstrip", "trim",
    )
)  # fmt: skip
SLOW = frozenset(
    (
        "wordwrap", "urlize", "striptags", "unescape", "pprint", "xmlattr", "title",
        "wordcount",
    )
)  # fmt: skip
CUTTING = frozenset(
    (
        "list", "batch", "slice", "map", "select", "reject", "sort", "unique", "groupby",
        "sum", "min", "max", "random", "split", "rsplit", "splitlines",
    )
)  # fmt: skip
SHALLOW = frozenset(
    (
        "length", "count", "first", "last", "list", "map", "select", "reject", "selectattr",
        "rejectattr", "default", "d", "items", "batch", "slice", "attr", "reverse", "random",
        "int", "float", "abs", "get", "copy", "keys", "values",
    )
)  # fmt: skip
"""Operations that do not look into the items of what they are given."""
CODECS = frozenset(
    (
        "utf-8", "utf8", "ascii", "latin-1", "latin1", "iso-8859-1", "utf-16", "utf-32",
    )
)  # fmt: skip
"""Linear ones; punycode and idna are quadratic."""


class TooCostly(TemplateRuntimeError):
    """A template's operation would take more than `limits` allows."""


class Budget:
    """Time and memory of one rendering."""

    def __init__(self) -> None:
        self._end = time.thread_time() + limits.TEMPLATE_SECONDS
        self._until_clock = TICK
        self._bytes_left = limits.TEMPLATE_MADE

    def spend(self, cost: int = NODE) -> None:
        """Raises TooCostly when the time is over."""
        self._until_clock -= cost
        if self._until_clock < 0:
            self._until_clock = TICK
            if time.thread_time() > self._end:
                raise TooCostly(f"rendering takes more than {limits.TEMPLATE_SECONDS:g} seconds")

    def made(self, value: Any) -> Any:
        """The value, its memory counted."""
        if isinstance(value, str | bytes):
            size = len(value)
            within("a text's length", size, limits.TEMPLATE_TEXT)
        elif isinstance(value, (*SEQUENCES, dict)):
            size = 64 * len(value)
        else:
            size = 0
        self.spend(NODE + size // 16)
        self._bytes_left -= size
        if self._bytes_left < 0:
            raise TooCostly(f"its values take more than {limits.TEMPLATE_MADE} bytes")
        return value

    def counted(self, items: Iterable[Any]) -> Iterator[Any]:
        """The items, a step each."""
        for item in items:
            self.spend()
            yield item

    def deep(self, *values: Any) -> int:
        """`weight` of the values, which is also what an operation on all of it costs."""
        total = weight(values)
        self.spend(NODE + total // 4)
        return total


def within(what: str, size: float, most: int) -> None:
    """Raises TooCostly if a size is over its limit."""
    if size > most:
        raise TooCostly(f"{what} is more than {most}")


def weight(value: Any) -> int:
    """Characters to write a value with, shared parts as often as they would be written. Raises
    TooCostly above TEMPLATE_WEIGHT, or below TEMPLATE_DEPTH levels."""
    total, stack = 0, [(value, 0)]
    while stack:
        item, depth = stack.pop()
        if isinstance(item, str | bytes):
            total += len(item) + 2
        elif isinstance(item, int):
            total += 8 + item.bit_length() // 3
        elif isinstance(item, Mapping):
            total += NODE * (depth + 1) * 2 * len(item)
            within("the size of a value", total, limits.TEMPLATE_WEIGHT)
            stack += [(part, depth + 1) for pair in item.items() for part in pair]
        elif isinstance(item, SEQUENCES):
            total += NODE * (depth + 1) * len(item)
            within("the size of a value", total, limits.TEMPLATE_WEIGHT)
            stack += [(part, depth + 1) for part in item]
        elif isinstance(item, range):
            total += NODE * len(item)
        else:
            total += 4 * NODE
        within("the size of a value", total, limits.TEMPLATE_WEIGHT)
        within("the depth of a value", depth, limits.TEMPLATE_DEPTH)
    return total


def check_operator(operator: str, left: Any, right: Any) -> None:
    """Before `left operator right`."""
    numbers = isinstance(left, int) and isinstance(right, int)
    if operator == "**":
        if isinstance(left, int) and isinstance(right, int | float):
            bits = left.bit_length() * abs(right)
            within("the size of a number", int(min(bits, 1e9)), limits.TEMPLATE_BITS)
    elif operator == "*":
        if numbers:
            bits = left.bit_length() + right.bit_length()
            within("the size of a number", bits, limits.TEMPLATE_BITS)
        for one, other in ((left, right), (right, left)):
            if isinstance(one, int) and isinstance(other, str | bytes | list | tuple):
                size = max(one, 0) * len(other)
                most = limits.TEMPLATE_TEXT if isinstance(other, str | bytes) else None
                within("the length of a product", size, most or limits.TEMPLATE_ITEMS)
    elif operator == "%" and isinstance(left, str | bytes):
        _check_percent(str(left) if isinstance(left, str) else left.decode("latin-1"), right)


def check_call(name: str, subject: Any, args: tuple[Any, ...], named: Mapping[str, Any]) -> None:
    """Before the filter or method `name` works on `subject`, which may be a text or a collection.
    Lists as arguments are not iterators."""
    given = [*args, *named.values()]
    size = len(subject) if isinstance(subject, str | bytes) else 0
    if name in WIDE:
        for number in given:
            if isinstance(number, int | float):
                within(f"a number given to {name}", abs(number), limits.TEMPLATE_WIDTH)
    if name in SLOW:
        within(f"a value given to {name}", weight(subject), limits.TEMPLATE_SLOW_TEXT)
    if name in CUTTING and size > limits.TEMPLATE_ITEMS:
        separator = given[0] if given and isinstance(given[0], str | bytes) else None
        cut = separator and name in ("split", "rsplit")
        pieces = _count(subject, separator) if cut else size
        within(f"the pieces that {name} makes", pieces, limits.TEMPLATE_ITEMS)
    if name in SEARCHING:
        longest = max((len(text) for text in given if isinstance(text, str | bytes)), default=1)
        within(f"the work of {name}", size * longest, limits.TEMPLATE_PRODUCT)
    special = GROWING.get(name)
    if special is not None:
        special(subject, given, named)


def _check_replace(subject: Any, given: list[Any], named: Mapping[str, Any]) -> None:
    old = named.get("old", given[0] if given else "")
    new = named.get("new", given[-1] if "old" in named else (given[1:2] or [""])[0])
    if isinstance(subject, str | bytes) and isinstance(new, str | bytes):
        grown = len(subject) + _count(subject, old) * len(new)
        within("the length of what replace makes", grown, limits.TEMPLATE_TEXT)


def _count(text: Any, part: Any) -> int:
    """How often a text has a part; a TypeError says what the operation would."""
    return text.count(part)


def _check_join(subject: Any, given: list[Any], named: Mapping[str, Any]) -> None:
    """Of the method (separator.join(items)) and of the filter (items|join(separator))."""
    first = given[0] if given else ""
    method = isinstance(subject, str | bytes) and not isinstance(first, str | bytes)
    items, separator = (first, subject) if method else (subject, first)
    count = len(items) if isinstance(items, (str, *SEQUENCES, dict, range)) else 0
    each = len(separator) if isinstance(separator, str | bytes) else 0
    within("the length of what join makes", count * each + weight(items), limits.TEMPLATE_TEXT)


def _check_translate(subject: Any, given: list[Any], named: Mapping[str, Any]) -> None:
    tables = [table for table in given if isinstance(table, Mapping)]
    longest = max(
        (len(text) for table in tables for text in table.values() if isinstance(text, str)),
        default=1,
    )
    within("the length of what translate makes", len(subject) * longest, limits.TEMPLATE_TEXT)


def _check_lines(subject: Any, given: list[Any], named: Mapping[str, Any]) -> None:
    """`indent` and `expandtabs` write a width once for each line or tab."""
    if isinstance(subject, str | bytes):
        text = subject if isinstance(subject, str) else subject.decode("latin-1")
        widths = [len(x) if isinstance(x, str) else x for x in given if isinstance(x, str | int)]
        lines = len(text.splitlines()) + text.count("\t") + 1
        grown = lines * max(widths, default=8)
        within("the length of what is indented", grown, limits.TEMPLATE_TEXT)


def _check_tojson(subject: Any, given: list[Any], named: Mapping[str, Any]) -> None:
    for option in given:
        width = len(option) if isinstance(option, str) else option
        if isinstance(width, int):
            within("the indentation of JSON", width, NODE)
        elif isinstance(option, list | tuple):
            within("a separator of JSON", sum(map(weight, option)), 4 * NODE)


def _check_codec(subject: Any, given: list[Any], named: Mapping[str, Any]) -> None:
    codec = given[0] if given else "utf-8"
    if not isinstance(codec, str) or codec.lower() not in CODECS:
        raise TooCostly(
            f"the encoding {str(codec)[:40]!r} is not one of {', '.join(sorted(CODECS))}"
        )


def _check_sum(subject: Any, given: list[Any], named: Mapping[str, Any]) -> None:
    """A sum of lists copies each list as often as others come after it."""
    if any(isinstance(start, list | tuple) for start in given):
        within("the items that sum adds up to a list", len(subject), 1024)


def check_percent_filter(subject: Any, given: list[Any], named: Mapping[str, Any]) -> None:
    """The filter `format`, which is the operator %."""
    _check_percent(str(subject), dict(named) or tuple(given))


def check_format(text: str, args: tuple[Any, ...], named: Any) -> None:
    """Before `text.format(*args, **named)`: widths are numbers in the text or, as fields within
    fields, arguments."""
    if re.search(r"\{[^{}]*\{", text.replace("{{", "").replace("}}", "")):
        raise TooCostly("format has a field within a field")
    _check_digits(text)
    grown = len(text) + text.count("{") * weight((args, named))
    within("the length of what format makes", grown, limits.TEMPLATE_TEXT)


def _check_percent(text: str, values: Any) -> None:
    if re.search(r"%[^a-zA-Z%]*\*", text):
        raise TooCostly("% has a width that is an argument")
    _check_digits(text)
    # A tuple's values are written once each, a name's as often as it stands there.
    times = text.count("%(") + 1
    grown = len(text) + times * weight(values)
    within("the length of what % makes", grown, limits.TEMPLATE_TEXT)


def _check_digits(text: str) -> None:
    for digits in re.findall(r"\d+", text):
        if len(digits) > 9 or int(digits) > limits.TEMPLATE_WIDTH:
            raise TooCostly(f"a width in a format is more than {limits.TEMPLATE_WIDTH}")
    within("the sum of widths in a format", text.count("%") + text.count("{"), 1024)


GROWING: dict[str, Callable[[Any, list[Any], Mapping[str, Any]], None]] = {
    "replace": _check_replace,
    "join": _check_join,
    "translate": _check_translate,
    "indent": _check_lines,
    "expandtabs": _check_lines,
    "tojson": _check_tojson,
    "encode": _check_codec,
    "decode": _check_codec,
    "sum": _check_sum,
}
"""Operations that make more than their subject and numbers together."""
