"""Sampling parameters: the keys, defaults and ranges of SGLang's `sampling_params` dict.

A value outside its range raises InvalidRequestError (a ValueError) that names the parameter and
the value; a key that does not exist raises UnknownOptionError (a TypeError).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from jaxserve import checks
from jaxserve.errors import InvalidRequestError, UnknownOptionError

TOP_K_ALL = 1 << 30
"""What `top_k=-1` (no limit) is stored as, upstream and here."""
GREEDY_TEMPERATURE = 1e-6
"""Temperatures below this one select the most likely token."""
DEFAULT_MAX_NEW_TOKENS = 128
MOST_SAMPLES = 1 << 16
"""Of one prompt: the largest n."""
MOST_IDS = 1 << 18
"""Stop token ids and biased tokens of a request: as many as the largest vocabularies have."""
LONGEST_ID = 20
"""Characters of a token id that is a string."""
FLAGS = ("ignore_eos", "skip_special_tokens", "spaces_between_special_tokens", "no_stop_trim")
GRAMMAR_KEYS = ("json_schema", "regex", "ebnf", "structural_tag")
LONGEST_GRAMMAR = MappingProxyType(
    {"json_schema": 1 << 18, "regex": 1 << 16, "ebnf": 1 << 16, "structural_tag": 1 << 18}
)
"""Characters. What compiling takes grows with their square."""


class Grammar(NamedTuple):
    """What a request's text is to match."""

    kind: str
    """One of GRAMMAR_KEYS."""
    text: str
    """Not empty."""


@dataclasses.dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one request samples. Values are checked and normalized on construction.

    After construction `stop` and `stop_regex` are tuples, `stop_token_ids` a frozenset and
    `logit_bias` a dict (all possibly empty); a temperature under 1e-6 has become temperature 1
    with top_k 1; `top_k=-1` has become `TOP_K_ALL`. `max_new_tokens=None` means "to the end of
    the context". The types below are what a reader finds; `from_dict` takes upstream's spellings.
    """

    max_new_tokens: int | None = DEFAULT_MAX_NEW_TOKENS
    """At least 0 (the prompt only), or None: to the end of the context."""
    min_new_tokens: int = 0
    """0 to `max_new_tokens`; masks the end-of-text and stop token ids until reached, but for those
    that a grammar leaves no choice of."""
    stop: tuple[str, ...] = ()
    """A string or a list of strings, at most 1,024 of at most 65,536 characters. Special tokens are
    text here, whether they are shown or not."""
    stop_token_ids: frozenset[int] = frozenset()
    """At most 262,144 token ids, from any iterable; ids that the model does not have are without
    effect."""
    stop_regex: tuple[str, ...] = ()
    """A Python regular expression or a list, as many as `stop`; one that matches "" is refused, and
    one that is too large."""
    temperature: float = 1.0
    """At least 0; below 1e-6 the most likely token is taken."""
    top_p: float = 1.0
    """(0, 1]: the least set of likeliest tokens that has this share."""
    top_k: int = TOP_K_ALL
    """-1 (all) or at least 1: that many likeliest tokens."""
    min_p: float = 0.0
    """[0, 1]: tokens at least this likely, in shares of the likeliest one."""
    frequency_penalty: float = 0.0
    """[-2, 2], subtracted from a token's logit for each time it was generated."""
    presence_penalty: float = 0.0
    """[-2, 2], subtracted from the logit of each token that was generated."""
    repetition_penalty: float = 1.0
    """(0, 2]: generated tokens' logits are divided by it where positive, else multiplied."""
    n: int = 1
    """1 to 65,536 samples, the same for all prompts of a batch."""
    json_schema: str | None = None
    """A JSON schema that the output is to satisfy, as JSON text or a dict; `"$$ANY$$"`: any JSON.
    Of this and the next three at most one, of at most 262,144 characters (65,536 of `regex` and
    `ebnf`); "" is none."""
    regex: str | None = None
    """A regular expression that all of the output is to match, in Rust's syntax."""
    ebnf: str | None = None
    """A grammar in llama.cpp's GBNF, or in Lark's syntax as llguidance has it."""
    structural_tag: str | None = None
    """JSON text: free output in which `triggers` begin `structures` of begin, schema and end."""
    ignore_eos: bool = False
    """Goes on after the end of text; `stop_token_ids` still stop. Without effect with a grammar,
    which says where the text may end."""
    skip_special_tokens: bool = True
    """Whether the text leaves special tokens out."""
    spaces_between_special_tokens: bool = True
    """In the text, for tokenizers that know it."""
    no_stop_trim: bool = False
    """Keeps the stop string or token in the text."""
    stream_interval: int | None = None
    """At least 1: tokens between chunks of a stream; None is the engine's option."""
    logit_bias: dict[int, float] = dataclasses.field(default_factory=dict)
    """{token id, an integer or its digits: finite number that is added to its logit}."""
    sampling_seed: int | None = None
    """Any integer, taken modulo 2^32, and always honoured; None is drawn from `random_seed`."""
    custom_params: dict[str, Any] | None = None
    """What a `custom_logit_processor` is told."""
    transform: str | None = None
    """The name of a chain of transforms (`Engine.register`) that changes the logits, after
    penalties and biases and before the temperature."""
    transform_params: dict[str, Any] | None = None
    """{name: value} of the chain's parameters; those that are not given keep their defaults."""
    hook: str | None = None
    """The name of functions inside the model (`Engine.register_hook`) that this request has."""
    hook_params: dict[str, Any] | None = None
    """{name: value} of their parameters."""

    @classmethod
    def from_dict(
        cls, values: Mapping[str, Any] | None, preferred: Mapping[str, Any] | None = None
    ) -> SamplingParams:
        """The parameters of one request, over the engine's `preferred` ones where it gives none.

        None stands for a key's default (for `max_new_tokens`: to the end of the context).
        Raises UnknownOptionError, InvalidRequestError, NotSupportedError.
        """
        if isinstance(values, SamplingParams):
            return values
        merged: dict[str, Any] = {}
        for source in (preferred, values):
            if source is None:
                continue
            if not isinstance(source, Mapping):
                raise InvalidRequestError(
                    f"sampling_params must be a dict or None, got {checks.shown(source)}"
                )
            if merged and any(map(source.get, GRAMMAR_KEYS)):  # instead of the preferred one
                merged = {key: x for key, x in merged.items() if key not in GRAMMAR_KEYS}
            for key, value in source.items():
                if key not in FIELD_NAMES:
                    raise UnknownOptionError(
                        f"unknown sampling parameter {checks.quoted(key)}"
                        f"{checks.near_matches(key, FIELD_NAMES)}"
                    )
                if value is not None or key == "max_new_tokens":
                    merged[key] = value
        return cls(**merged)

    @property
    def grammar(self) -> Grammar | None:
        """The one that is given."""
        for kind in GRAMMAR_KEYS:
            if text := getattr(self, kind):
                return Grammar(kind, text)
        return None

    def __post_init__(self) -> None:
        normal = _Normalizer(self)
        for normalize, defaults in GROUPS:
            for name, default in defaults:
                if getattr(self, name) is not default:
                    normalize(normal)
                    break
        for name, value in normal.values.items():
            object.__setattr__(self, name, value)


class _Normalizer:
    """Checks a SamplingParams' values group by group and collects their normal forms."""

    def __init__(self, params: SamplingParams) -> None:
        self.given = params
        self.values: dict[str, Any] = {}

    def lengths(self) -> None:
        given = self.given
        if given.max_new_tokens is not None:
            self.values["max_new_tokens"] = checks.integer(
                "max_new_tokens", given.max_new_tokens, 0
            )
        smallest = checks.integer("min_new_tokens", given.min_new_tokens, 0)
        self.values["min_new_tokens"] = smallest
        largest = self.values.get("max_new_tokens")
        if largest is not None and smallest > largest:
            raise InvalidRequestError(
                f"min_new_tokens must be in [0, max_new_tokens={checks.quoted(largest)}], got "
                + checks.shown(smallest)
            )
        self.values["n"] = checks.integer("n", given.n, 1, MOST_SAMPLES)
        if given.stream_interval is not None:
            self.values["stream_interval"] = checks.integer(
                "stream_interval", given.stream_interval, 1
            )
        if given.sampling_seed is not None:
            self.values["sampling_seed"] = checks.integer("sampling_seed", given.sampling_seed)

    def stops(self) -> None:
        self.values["stop"] = checks.strings("stop", self.given.stop)
        self.values["stop_regex"] = checks.strings("stop_regex", self.given.stop_regex)
        self.values["stop_token_ids"] = frozenset(
            checks.integers("stop_token_ids", self.given.stop_token_ids, 0, MOST_IDS)
        )

    def distribution(self) -> None:
        given = self.given
        temperature = checks.number("temperature", given.temperature, 0.0)
        top_k = checks.integer("top_k", given.top_k)
        if top_k != -1 and top_k < 1:
            raise InvalidRequestError(
                f"top_k must be -1 (all) or at least 1, got {checks.shown(top_k)}"
            )
        if top_k == -1:
            top_k = TOP_K_ALL
        if temperature < GREEDY_TEMPERATURE:
            temperature, top_k = 1.0, 1
        self.values["temperature"] = temperature
        self.values["top_k"] = min(top_k, TOP_K_ALL)
        self.values["top_p"] = checks.number("top_p", given.top_p, 0.0, 1.0, above=True)
        self.values["min_p"] = checks.number("min_p", given.min_p, 0.0, 1.0)
        self.values["logit_bias"] = _logit_bias(given.logit_bias)

    def penalties(self) -> None:
        given = self.given
        for name in ("frequency_penalty", "presence_penalty"):
            self.values[name] = checks.number(name, getattr(given, name), -2.0, 2.0)
        self.values["repetition_penalty"] = checks.number(
            "repetition_penalty", given.repetition_penalty, 0.0, 2.0, above=True
        )

    def flags(self) -> None:
        for name in FLAGS:
            self.values[name] = checks.boolean(name, getattr(self.given, name))

    def grammar(self) -> None:
        given = []
        for name in GRAMMAR_KEYS:
            value = getattr(self.given, name)
            if name == "json_schema" and isinstance(value, Mapping):
                value = _schema_text(value)
            if value is not None:
                checks.text(name, value, LONGEST_GRAMMAR[name])
            if value:
                given.append(name)
            self.values[name] = value or None
        if len(given) > 1:
            raise InvalidRequestError(
                f"Only one of {', '.join(GRAMMAR_KEYS)} can be set, got {' and '.join(given)}"
            )

    def algorithms(self) -> None:
        given = self.given
        for name in ("transform", "hook"):
            value = getattr(given, name)
            if value is not None:
                self.values[name] = checks.text(name, value)
        for name in ("custom_params", "transform_params", "hook_params"):
            value = getattr(given, name)
            if not isinstance(value, Mapping | None):
                raise InvalidRequestError(f"{name} must be a dict, got {checks.shown(value)}")
            self.values[name] = dict(value) if value else None


def _schema_text(schema: Mapping[str, Any]) -> str:
    try:
        return json.dumps(checks.json_value("json_schema", schema), allow_nan=False)
    except ValueError as error:
        if isinstance(error, InvalidRequestError):
            raise
        raise InvalidRequestError(
            f"json_schema must be JSON, got {checks.shown(schema)}: {error}"
        ) from error


def _logit_bias(value: Any) -> dict[int, float]:
    """`{token id as int or decimal string: finite number}` with integer keys."""
    if not isinstance(value, Mapping):
        raise InvalidRequestError(
            f"logit_bias must be a dict of token id to number, got {checks.shown(value)}"
        )
    if len(value) > MOST_IDS:
        raise InvalidRequestError(
            f"logit_bias may have {MOST_IDS} entries, got {len(value)}: {checks.shown(value)}"
        )
    result = {}
    for key, bias in value.items():
        if isinstance(key, str):
            if not key.strip().isdecimal() or len(key) > LONGEST_ID:
                raise InvalidRequestError(
                    f"logit_bias has the key {checks.quoted(key)}, which is no token id"
                )
            key = int(key)
        token = checks.integer("logit_bias token id", key, 0)
        result[token] = checks.number(f"logit_bias[{checks.quoted(token)}]", bias)
    return result


def _group(
    normalize: Callable[[_Normalizer], None], *names: str
) -> tuple[Callable[[_Normalizer], None], tuple[tuple[str, Any], ...]]:
    """A group of parameters, and their defaults, which are normal."""
    fields = SamplingParams.__dataclass_fields__
    return normalize, tuple((name, fields[name].default) for name in names)


FIELD_NAMES = tuple(field.name for field in dataclasses.fields(SamplingParams))
GROUPS = (
    _group(
        _Normalizer.lengths,
        *("max_new_tokens", "min_new_tokens", "n", "stream_interval", "sampling_seed"),
    ),
    _group(_Normalizer.stops, "stop", "stop_regex", "stop_token_ids"),
    _group(_Normalizer.distribution, "temperature", "top_k", "top_p", "min_p", "logit_bias"),
    _group(_Normalizer.penalties, "frequency_penalty", "presence_penalty", "repetition_penalty"),
    _group(_Normalizer.flags, *FLAGS),
    _group(_Normalizer.grammar, *GRAMMAR_KEYS),
    _group(
        _Normalizer.algorithms,
        *("custom_params", "transform", "transform_params", "hook", "hook_params"),
    ),
)
"""A group of which nothing is given needs no look: a call's own checks are on its way to the first
token."""
