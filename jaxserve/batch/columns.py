"""From a row of the input to what an engine is asked, and to a row of the output."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, Literal

from jaxserve import checks
from jaxserve.errors import InvalidRequestError, UnknownOptionError
from jaxserve.sampling_params import FIELD_NAMES, SamplingParams

SEEDS = 1 << 32
"""Seeds of rows lie in [0, SEEDS)."""
SEED_STRIDE = 0x9E3779B1
"""Odd, so that the rows of one random_seed differ, and those of neighbouring ones too."""
TEXT_PARAMETERS = ("stop", "stop_regex", "json_schema", "regex", "ebnf", "structural_tag")
"""Sampling parameters whose column in a CSV file is text; the others' cells are JSON."""

Kind = Literal["prompt", "messages", "input_ids"]
KINDS: tuple[Kind, ...] = ("prompt", "messages", "input_ids")


@dataclasses.dataclass(frozen=True, slots=True)
class Columns:
    """Which columns of the input say what."""

    prompt: str = "prompt"
    """Text to continue. A row has exactly one of prompt, messages and input_ids; null is none."""
    messages: str = "messages"
    """A conversation, a list of {"role", "content"}, or its JSON text."""
    input_ids: str = "input_ids"
    """Token ids, a list of integers, or its JSON text."""
    sampling_params: str = "sampling_params"
    """A dict over the job's parameters, or its JSON text."""
    sampling: tuple[str, ...] = FIELD_NAMES
    """Columns that are a sampling parameter each, over the row's dict; null is not given."""

    def __post_init__(self) -> None:
        names = [self.prompt, self.messages, self.input_ids, self.sampling_params]
        for name in (*names, *self.sampling):
            checks.text("a column's name", name)
        for name in names:
            if names.count(name) > 1:
                raise InvalidRequestError(f"the column {name!r} is named for two things")
        for name in self.sampling:
            if name not in FIELD_NAMES:
                raise UnknownOptionError(
                    f"sampling_columns has {checks.quoted(name)}, which is no sampling parameter"
                    f"{checks.near_matches(name, FIELD_NAMES)}"
                )

    @property
    def asked(self) -> Mapping[Kind, str]:
        """The columns of which a row has one."""
        return {"prompt": self.prompt, "messages": self.messages, "input_ids": self.input_ids}

    def carries(self, name: str) -> bool:
        """Whether a column of the input is one of the output too: all but what is asked."""
        return name not in (self.prompt, self.messages, self.input_ids)


@dataclasses.dataclass(frozen=True, slots=True)
class Question:
    """What an engine is asked for a row."""

    kind: Kind
    """Which of the columns it was in."""
    value: Any
    """Text, messages or token ids; the engine checks them."""
    params: Mapping[str, Any]
    """Sampling parameters, checked. Rows without any of their own share one dict."""


@dataclasses.dataclass(frozen=True, slots=True)
class Asking:
    """How rows become questions."""

    columns: Columns
    """Where a row has what."""
    defaults: Mapping[str, Any]
    """Sampling parameters of all rows, under each row's own; checked."""
    seed: int | None = None
    """With one, the seed of a row follows from it and the row's number, so that it does not matter
    which engine answers the row, nor when."""

    def question(self, index: int, values: Mapping[str, Any]) -> Question:
        """Of row `index`. Raises InvalidRequestError, NotSupportedError, UnknownOptionError."""
        columns = self.columns.asked
        given: list[Kind] = [k for k in KINDS if not _nothing(values.get(columns[k]))]
        if len(given) != 1:
            names = ", ".join(columns.values())
            have = " and ".join(columns[kind] for kind in given) or "none"
            raise InvalidRequestError(f"a row has exactly one of {names}; this one has {have}")
        kind = given[0]
        value = values[columns[kind]]
        if kind != "prompt":
            value = _json_of_text(columns[kind], value)
        params = self._params(values)
        if self.seed is not None and params.get("sampling_seed") is None:
            seed = (self.seed * SEED_STRIDE + index) % SEEDS
            params = {**params, "sampling_seed": seed}
        return Question(kind, value, params)

    def _params(self, values: Mapping[str, Any]) -> Mapping[str, Any]:
        own: dict[str, Any] = {}
        given = values.get(self.columns.sampling_params)
        if not _nothing(given):
            own = _json_of_text(self.columns.sampling_params, given)
            if isinstance(own, list):  # a map of Parquet
                own = dict(own)
            if not isinstance(own, Mapping):
                raise InvalidRequestError(
                    f"{self.columns.sampling_params} must be a dict, got {checks.shown(given)}"
                )
        for name in self.columns.sampling:
            value = values.get(name)
            if value is not None:
                own = {**own, name: value}
        if not own:
            return self.defaults
        params = {**self.defaults, **own}
        SamplingParams.from_dict(params)
        check_samples(params)
        return params


def check_samples(params: Mapping[str, Any]) -> None:
    """Raises InvalidRequestError for more than one sample of a row: it has one row of output."""
    if params.get("n") not in (None, 1):
        raise InvalidRequestError(
            f"n must be 1 in a batch job, got {checks.shown(params['n'])}: a row of the input is a "
            "row of the output. Give the row as often as it is to be answered"
        )


def cells_of_text(values: Mapping[str, str], columns: Columns) -> dict[str, Any]:
    """A row of CSV: empty cells are null, those of sampling parameters numbers, flags or JSON."""
    row: dict[str, Any] = {name: cell or None for name, cell in values.items()}
    for name in columns.sampling:
        cell = row.get(name)
        if cell is not None and name not in TEXT_PARAMETERS:
            row[name] = _json_of_text(name, cell.strip().lower())
    return row


def _nothing(value: Any) -> bool:
    """NaN is what pandas has where nothing was given."""
    return value is None or value != value


def _json_of_text(name: str, value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise InvalidRequestError(
            f"{name} is no JSON: {error}; got {checks.shown(value)}"
        ) from error
