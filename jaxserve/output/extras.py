"""What a request can have beside its tokens: a value for each of them, from the device to
`meta_info`. No jax.

A step reports such payloads as arrays by name (`step/payloads.py`). An `Extra` is one request's:
the engine thread reads its rows of them, the caller makes them entries of its result. Scheduler,
commit and results loop over a request's extras and know none of them; docs/add_an_output.md adds
one.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar, Generic, NamedTuple, Protocol, TypeVar


class Values(Protocol):
    """The values of consecutive tokens: a list, or several of one length as one object."""

    def __len__(self) -> int: ...

    def extend(self, values: Any, /) -> None:
        """Add those of the tokens that follow, which are of the same type."""

    def clear(self) -> None: ...


V = TypeVar("V", bound=Values)


class News(NamedTuple):
    """What is new of an extra since the last update."""

    output: Any
    """Values of the tokens sampled since."""
    prompt: Any | None
    """Values of the prompt, whole, in the first update that has them; otherwise None."""


@dataclasses.dataclass(slots=True)
class Collected:
    """All that the updates so far have brought of an extra. The caller's."""

    output: Any
    prompt: Any | None = None

    def add(self, news: News) -> None:
        self.output.extend(news.output)
        if news.prompt is not None:
            self.prompt = news.prompt


class View(NamedTuple):
    """What entries of a result may say about tokens."""

    prompt_ids: Sequence[int]
    output_ids: Sequence[int]
    """All so far, and of a request for no tokens the one that it would have gone on with."""
    text: Callable[[int], str | None] | None
    """A token's text; None where no texts are wanted."""


class Reported:
    """The payloads of one step on the host."""

    __slots__ = ("_arrays", "_opened", "_step")

    def __init__(self, arrays: Mapping[str, Any], step: int | None = None) -> None:
        """arrays: by name, [n, B, ...] of n steps by row, of which `step` is read, or (None)
        [T, ...] by packed token; or what is there of them (`output.picked`)."""
        self._arrays = arrays
        self._step = step
        self._opened: dict[str, Any] = {}

    @property
    def step(self) -> int:
        """That is read."""
        return self._step or 0

    def of(self, extra: Extra[Any]) -> Any:
        """The array that `extra` reads, opened once for all rows."""
        opened = self._opened.get(extra.name)
        if opened is None:
            array = self._arrays[extra.name]
            array = array if self._step is None else array[self._step]
            opened = self._opened[extra.name] = extra.open(array)
        return opened


class Extra(abc.ABC, Generic[V]):
    """One payload of one request: what it wants of a step, and what it has been given so far.

    The engine thread's, but for `collect` and `as_meta`, which use only what never changes.
    """

    name: ClassVar[str]
    """Of the payload that it reads."""
    fields: Mapping[str, int] = MappingProxyType({})
    """What the device has to know of the request's row: values for fields of `sampler.fields`."""
    ids: Sequence[int] = ()
    """Token ids that the device looks at in its row. At most one extra of a request has any."""
    wide: bool = False
    """It needs the programs with more columns, see `config.WIDE_TOP`."""
    picked: ClassVar[bool] = False
    """Its payload is of the model's inside: rows are gathered, of prompts too, by no program of its
    own (`step.picking`)."""
    bulky: bool = False
    """Its caller is to be told of its values every few tokens, streaming or not, so that they are
    not all converted when the request has ended."""
    at_end: bool = False
    """It reads one row: that of the token with which the request ends, when it has ended. (Its
    payload stays on the device, and nobody looks at its request's tokens one by one.)"""

    def __init__(self, prompt: range = range(0)) -> None:
        """prompt: its positions whose rows are read. They must run, whatever is cached."""
        self.prompt = prompt
        self.complete = False
        """The prompt's values are there, or there are none."""
        self.place: tuple[int, int] | None = None
        """Of an extra that is read `at_end`: step and row of the newest token."""
        self._output = self.empty()
        self._prompt = self.empty()  # of the chunks read so far
        self._news: V | None = None

    # -- what a payload defines -------------------------------------------------------------------

    @abc.abstractmethod
    def empty(self) -> V:
        """Values of no tokens."""

    @staticmethod
    def open(array: Any) -> Any:
        """What `values` reads of a step's array: done once for all of its rows."""
        return array

    @abc.abstractmethod
    def values(self, opened: Any, start: int, count: int) -> V:
        """Of the `count` rows from `start` on."""

    def whole(self, values: V) -> V:
        """The prompt's values as the caller gets them, from those of the positions in `prompt`."""
        return values

    @abc.abstractmethod
    def as_meta(self, collected: Collected, first: int, view: View) -> dict[str, Any]:
        """The entries of meta_info, with new lists in each call; of the outputs, those from number
        `first` on."""

    # -- what is the same for all -----------------------------------------------------------------

    def wants_prompt(self, start: int, stop: int) -> bool:
        """Whether any of the prompt's positions start..stop-1 is still to be read."""
        prompt = self.prompt
        return not self.complete and start < prompt.stop and stop > prompt.start

    def prompt_positions(self, start: int, stop: int) -> range:
        """Those of start..stop-1 that are still to be read."""
        if not self.wants_prompt(start, stop):
            return range(0)
        return range(max(start, self.prompt.start), min(stop, self.prompt.stop))

    def reads_sample(self, stop: int) -> bool:
        """Whether it reads the row of an extend step that samples behind `stop` tokens."""
        del stop
        return not self.at_end

    def read(self, reported: Reported, row: int) -> None:
        """The value of the token that row `row` of a step has sampled."""
        if self.at_end:
            self.place = reported.step, row
        else:
            self._output.extend(self.values(reported.of(self), row, 1))

    def read_end(self, arrays: Mapping[str, Any]) -> None:
        """The value of the last token, of arrays [n, B, ...] by name in which its row is there."""
        assert self.place is not None
        step, row = self.place
        self._output.extend(self.values(Reported(arrays, step).of(self), row, 1))

    def read_prompt(self, reported: Reported, start: int, stop: int, packed_start: int) -> None:
        """Those of the wanted positions among start..stop-1, packed from row `packed_start`."""
        positions = self.prompt_positions(start, stop)
        if positions:
            first = packed_start + positions.start - start
            self._prompt.extend(self.values(reported.of(self), first, len(positions)))

    def end_prompt(self, leader: Extra[V] | None) -> None:
        """All of the prompt has run, in this request's rows or, of a fork, its leader's."""
        if self.complete:
            return
        if leader is None:
            self._news = self.whole(self._prompt)
            self._prompt = self.empty()
        else:
            self._news = leader._news
        self.complete = True

    def restart(self) -> None:
        """The request leaves the device, and runs again from its first token."""
        if not self.complete:
            self._prompt.clear()

    def take(self) -> News:
        """What is new since the last call."""
        news = News(self._output, self._news)
        self._output, self._news = self.empty(), None
        return news

    def collect(self) -> Collected:
        """For the caller, with nothing in it."""
        return Collected(self.empty())


class ExtraSpec(abc.ABC):
    """What the requests of one prompt ask for, each with an Extra of its own."""

    def check(self, prompt_len: int) -> None:  # noqa: B027 (most have nothing to check)
        """Raises InvalidRequestError for what a prompt of `prompt_len` tokens cannot have."""

    def num_bytes(self, prompt_len: int, new_tokens: int) -> int:
        """Most that a request returns of it, with so many tokens: of what `max_state_bytes`
        bounds."""
        del prompt_len, new_tokens
        return 0

    @abc.abstractmethod
    def extra(self, prompt_len: int) -> Extra[Any]:
        """For one request with a prompt of `prompt_len` tokens."""
