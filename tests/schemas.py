"""Sixty JSON schemas over every keyword that grammars support, and those that they refuse."""

from __future__ import annotations

from typing import Any


def record(required: list[str] | None = None, **properties: Any) -> dict[str, Any]:
    """A closed object; `required`: all properties unless it is given."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties) if required is None else required,
        "additionalProperties": False,
    }


def array(items: Any, most: int = 3, **more: Any) -> dict[str, Any]:
    return {"type": "array", "items": items, "maxItems": most, **more}


def string(most: int = 8, **more: Any) -> dict[str, Any]:
    return {"type": "string", "maxLength": most, **more}


def whole(low: int, high: int) -> dict[str, Any]:
    return {"type": "integer", "minimum": low, "maximum": high}


NULL, FLAG = {"type": "null"}, {"type": "boolean"}
TREE = record(["value"], value=whole(0, 9), left={"$ref": "#"}, right={"$ref": "#"})
LINKED = {
    "$defs": {"node": record(["name"], name=string(3), next={"$ref": "#/$defs/node"})},
    "$ref": "#/$defs/node",
}
PERSON = record(
    name=string(12, minLength=1),
    age=whole(0, 120),
    email={"type": "string", "pattern": r"^[a-z]{1,8}@[a-z]{1,8}\.(de|org)$"},
    tags=array({"enum": ["new", "old", "hot"]}, 4),
    address=record(street=string(10), number=whole(1, 999), zip={"pattern": "^[0-9]{5}$"}),
)

SCHEMAS: dict[str, Any] = {
    # types
    "null": NULL,
    "boolean": FLAG,
    "integer": {"type": "integer"},
    "number": {"type": "number"},
    "string": string(),
    "types": {"type": ["null", "boolean", "integer"]},
    "types with bounds": {"type": ["string", "integer"], "maxLength": 4, "minimum": 5},
    "array of nulls": array(NULL),
    # enum, const
    "enum": {"enum": ["red", "green", 'bl"ue', 7, None, True, [1, {"a": 2}]]},
    "typed enum": {"type": "integer", "enum": [1, "x", 22, None]},
    "const string": {"const": "yes \\ no"},
    "const object": {"const": {"a": [1, 2.5], "b": None}},
    "const in a record": record(kind={"const": "point"}, x=whole(-5, 5)),
    # numbers
    "minimum": {"type": "integer", "minimum": 37},
    "maximum": {"type": "integer", "maximum": -12},
    "between": whole(-105, 1234),
    "exclusive": {"type": "integer", "exclusiveMinimum": 3, "exclusiveMaximum": 6},
    "number between": {"type": "number", "minimum": 0.25, "maximum": 12.5},
    "exclusive number": {"type": "number", "exclusiveMinimum": -1, "exclusiveMaximum": 1},
    "multiples": {"type": "integer", "multipleOf": 7, "minimum": 0, "maximum": 500},
    "halves": {"type": "number", "multipleOf": 0.5, "minimum": 0, "maximum": 100},
    # strings
    "length": string(5, minLength=5),
    "pattern": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3}$"},
    "loose pattern": string(6, pattern="ab+"),
    "choice of patterns": {"type": "string", "pattern": "^(cat|dog|b.rd)$"},
    "pattern and length": string(4, minLength=2, pattern="^[xyz]+$"),
    "date-time": {"type": "string", "format": "date-time"},
    "date": {"type": "string", "format": "date"},
    "time": {"type": "string", "format": "time"},
    "duration": {"type": "string", "format": "duration"},
    "email": {"type": "string", "format": "email"},
    "hostname": {"type": "string", "format": "hostname"},
    "ipv4": {"type": "string", "format": "ipv4"},
    "ipv6": {"type": "string", "format": "ipv6"},
    "uuid": {"type": "string", "format": "uuid"},
    "uri": {"type": "string", "format": "uri"},
    # arrays
    "few items": array(whole(0, 99), 4, minItems=2),
    "tuple": {
        "type": "array", "prefixItems": [FLAG, whole(1, 3)], "items": False, "minItems": 2,
    },
    "tuple and more": {
        "type": "array", "prefixItems": [string(3)], "items": FLAG, "minItems": 1, "maxItems": 3,
    },
    "arrays of arrays": array(array(whole(0, 9), 2), 2, minItems=1),
    # objects
    "record": record(a=whole(0, 9), b=FLAG),
    "optional": record(["b"], a=whole(0, 9), b=FLAG, c=NULL),
    "nothing required": record([], a=FLAG, b=FLAG),
    "nested": record(outer=record(inner=record(value=whole(0, 9)))),
    "additional": {
        "type": "object", "properties": {"a": FLAG}, "required": ["a"], "maxProperties": 2,
        "additionalProperties": whole(0, 9),
    },
    "pattern properties": {
        "type": "object", "patternProperties": {"^n_[a-c]{1,2}$": whole(0, 9)},
        "additionalProperties": False, "maxProperties": 2,
    },
    "number of properties": {
        "type": "object", "additionalProperties": FLAG, "minProperties": 1, "maxProperties": 2,
    },
    "required elsewhere": {
        "type": "object", "properties": {"a": NULL}, "required": ["a", "z"], "maxProperties": 2,
        "additionalProperties": FLAG,
    },
    "odd names": record(**{"": FLAG, 'say "hi"': NULL, "zwölf": whole(0, 9)}),
    # together
    "anyOf": {"anyOf": [whole(0, 9), string(3), NULL]},
    "oneOf": {"oneOf": [record(kind={"const": "a"}, x=FLAG), record(kind={"const": "b"}, y=NULL)]},
    "allOf": {
        "allOf": [{"type": "integer", "minimum": 10}, {"maximum": 99}, {"multipleOf": 5}],
    },
    "allOf of objects": {
        "allOf": [
            {"type": "object", "properties": {"a": FLAG}, "required": ["a"]},
            {"properties": {"b": NULL}, "required": ["b"], "maxProperties": 2},
        ],
    },
    "anyOf beside": {"type": "object", "properties": {"a": {"anyOf": [FLAG, NULL]}},
                     "required": ["a"], "additionalProperties": False},
    "definitions": {
        "definitions": {"p": array(whole(0, 9), 2, minItems=2)},
        **record(start={"$ref": "#/definitions/p"}, stop={"$ref": "#/definitions/p"}),
    },
    "linked list": LINKED,
    "tree": TREE,
    "annotated": {
        "$schema": "https://json-schema.org/draft/2020-12/schema", "$id": "https://example.org/t",
        "title": "T", "description": "d", "$comment": "c", "default": 1, "examples": [2],
        "deprecated": True, "readOnly": True, "writeOnly": False, **record(a=FLAG),
    },
    "person": PERSON,
    "people": array(record(name=string(6), likes=array({"enum": ["tea", "go"]}, 2)), 2),
}  # fmt: skip

REFUSED: dict[str, tuple[Any, str]] = {
    "uniqueItems": (array(FLAG, uniqueItems=True), "uniqueItems"),
    "not": ({"not": NULL}, "not"),
    "if": ({"if": NULL, "then": NULL, "else": FLAG}, "if"),
    "contains": (array(FLAG, contains=NULL), "contains"),
    "minContains": (array(FLAG, minContains=1), "minContains"),
    "propertyNames": ({"type": "object", "propertyNames": {"pattern": "a"}}, "propertyNames"),
    "dependentRequired": ({"dependentRequired": {"a": ["b"]}}, "dependentRequired"),
    "dependentSchemas": ({"dependentSchemas": {"a": NULL}}, "dependentSchemas"),
    "unevaluatedProperties": ({"unevaluatedProperties": False}, "unevaluatedProperties"),
    "unevaluatedItems": ({"unevaluatedItems": False}, "unevaluatedItems"),
    "$dynamicRef": ({"$dynamicRef": "#a"}, "dynamicRef"),
    "unknown format": ({"type": "string", "format": "colour"}, "colour"),
    "remote reference": ({"$ref": "https://example.org/other"}, "example.org"),
    "look-around": ({"type": "string", "pattern": "(?=a)"}, "look-around"),
    "overlapping oneOf": ({"oneOf": [{"type": "number"}, {"type": "integer"}]}, "oneOf"),
    "empty interval": (whole(5, 3), "Unsatisfiable"),
    "no value": ({"allOf": [NULL, FLAG]}, "Unsatisfiable"),
    "false": (False, "Unsatisfiable"),
    "unknown type": ({"type": "text"}, "text"),
    "endless": ({"$ref": "#"}, "never come to an end"),
    "no schema": ("3", "must be an object or boolean"),
    "no JSON": ("{'type': 'null'}", "not valid JSON"),
}
"""The schema (or its text) -> what the message says."""
