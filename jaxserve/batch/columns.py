"""From a row of the input to what an engine is asked, and to a row of the output."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
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
    image_data: str = "image_data"
    """Images of a prompt or of input_ids: one, a list of them, or its JSON text; null is none."""
    sampling_params: str = "sampling_params"
    """A dict over the job's parameters, or its JSON text."""
    sampling: tuple[str, ...] = FIELD_NAMES
    """Columns that are a sampling parameter each, over the row's dict; null is not given."""

    def __post_init__(self) -> None:
        names = [*self.asked.values(), self.image_data, self.sampling_params]
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
        return name not in (*self.asked.values(), self.image_data)


@dataclasses.dataclass(frozen=True, slots=True)
class Question:
    """What an engine is asked for a row."""

    kind: Kind
    """Which of the columns it was in."""
    value: Any
    """Text, messages or token ids; the engine checks them."""
    params: Mapping[str, Any]
    """Sampling parameters, checked. Rows without any of their own share one dict."""
    images: Sequence[Any] = ()
    """Items of `image_data`; the engine checks them. Those of messages are parts of them."""

    @property
    def may_show(self) -> bool:
        """Whether it may have images."""
        if self.kind != "messages" or not isinstance(self.value, list):
            return bool(self.images)
        contents = (x.get("content") for x in self.value if isinstance(x, Mapping))
        return any(isinstance(content, list) for content in contents)


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
        return Question(kind, value, params, self._images(kind, values))

    def _images(self, kind: Kind, values: Mapping[str, Any]) -> Sequence[Any]:
        name = self.columns.image_data
        given = values.get(name)
        if _nothing(given):
            return ()
        if kind == "messages":
            raise InvalidRequestError(
                f"a row with {self.columns.messages} has its images as parts of their content, "
                f"and none in {name}; got {checks.shown(given)}"
            )
        if isinstance(given, str) and given.lstrip().startswith("["):
            given = _json_of_text(name, given)
        items = given if isinstance(given, list) else [given]
        return [_image(item) for item in items if not _nothing(item)]

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


def _image(item: Any) -> Any:
    """An item of `image_data`. Files of Hugging Face's datasets have {"bytes", "path"}, of which
    either may be missing."""
    if isinstance(item, Mapping) and item.keys() <= {"bytes", "path"}:
        return item["bytes"] if item.get("bytes") is not None else item.get("path")
    return item


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
