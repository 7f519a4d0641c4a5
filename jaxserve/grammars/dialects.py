"""From what a user writes to a grammar of llguidance. What cannot be one is a ValueError."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from jaxserve.checks import quoted

if TYPE_CHECKING:
    from llguidance import LLTokenizer

    from jaxserve.server_args import ServerArgs

ANY_JSON = "$$ANY$$"
"""SGLang's name for a schema of all JSON values."""
COMPACT = MappingProxyType(
    {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
)
"""JSON as `json.dumps` writes it."""


class Dialect(NamedTuple):
    """What a kind of grammar is read with."""

    tokenizer: LLTokenizer
    """Of the engine."""
    layout: Mapping[str, Any]
    """llguidance's options of JSON schemas, where a schema has none of its own."""


def layout_of(args: ServerArgs) -> Mapping[str, Any]:
    """The whitespace that options allow in JSON."""
    layout = dict(COMPACT) if args.constrained_json_disable_any_whitespace else {}
    if args.constrained_json_whitespace_pattern is not None:
        layout["whitespace_pattern"] = args.constrained_json_whitespace_pattern
    return layout


def _json_schema(text: str, dialect: Dialect) -> str:
    from llguidance import LLMatcher

    schema = True if text == ANY_JSON else _parsed(text)  # whose messages know the place
    if schema is True:
        text = "{}"  # llguidance takes options with objects only
    elif not isinstance(schema, Mapping):
        raise ValueError(
            "Unsatisfiable schema: nothing is valid"
            if schema is False
            else f"a schema must be an object or boolean, got {quoted(schema)}"
        )
    return LLMatcher.grammar_from_json_schema(text, defaults=dict(dialect.layout))  # pyright: ignore


def _regex(text: str, dialect: Dialect) -> str:
    from llguidance import LLMatcher

    return LLMatcher.grammar_from_regex(text)


def _ebnf(text: str, dialect: Dialect) -> str:
    from llguidance import grammar_from

    return grammar_from("ebnf", text)


def _structural_tag(text: str, dialect: Dialect) -> str:
    """Free text in which a trigger begins a structure. (A `<name>` is a special token of the
    grammar where it is one of the tokenizer, and text elsewhere.)"""
    from llguidance import StructTag

    given = _parsed(text)
    if not isinstance(given, Mapping):
        raise ValueError("it must be a JSON object")
    if "format" in given:
        raise ValueError(
            "'format' is not supported yet; give 'structures' (with begin, schema, end) and "
            "'triggers'"
        )
    structures, triggers = given.get("structures"), given.get("triggers")
    for name, value in (("structures", structures), ("triggers", triggers)):
        if not isinstance(value, list) or not value:
            raise ValueError(f"{name!r} must be a list with something in it, got {quoted(value)}")
    tags = [_tag(structure, triggers, dialect) for structure in structures]  # pyright: ignore
    special = any(_is_special(tag.trigger, dialect.tokenizer) for tag in tags)
    return StructTag.to_grammar(tags, assume_special=special)


READERS: Mapping[str, Callable[[str, Dialect], str]] = MappingProxyType(
    {
        "json_schema": _json_schema,
        "regex": _regex,
        "ebnf": _ebnf,
        "structural_tag": _structural_tag,
    }
)
"""By the sampling parameter."""


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"it is not valid JSON: {error}") from error


def _tag(structure: Any, triggers: list[Any], dialect: Dialect) -> Any:
    from llguidance import StructTag

    if not isinstance(structure, Mapping):
        raise ValueError(f"a structure must be an object, got {quoted(structure)}")
    begin, schema, end = (structure.get(name) for name in ("begin", "schema", "end"))
    if not isinstance(begin, str) or not isinstance(end, str) or not isinstance(schema, Mapping):
        raise ValueError(
            "a structure must have 'begin' and 'end', strings, and 'schema', an object; got "
            + quoted(structure)
        )
    matching = [t for t in triggers if isinstance(t, str) and t and begin.startswith(t)]
    if not matching:
        raise ValueError(f"begin={quoted(begin)} starts with none of the triggers")
    own = schema.get("x-guidance", {})
    if dialect.layout and isinstance(own, Mapping):
        schema = {**schema, "x-guidance": {**dialect.layout, **own}}
    return StructTag(trigger=max(matching, key=len), begin=begin, grammar=dict(schema), end=end)


def _is_special(trigger: str, tokenizer: LLTokenizer) -> bool:
    ids = tokenizer.tokenize_str(trigger, parse_special=True)
    return len(ids) == 1 and tokenizer.is_special_token(ids[0])
