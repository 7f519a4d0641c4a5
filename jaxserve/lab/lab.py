"""The laboratory: prefixes as values, computed with beside whatever the engine serves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve import checks
from jaxserve.errors import InvalidRequestError
from jaxserve.lab.branches import Branches
from jaxserve.lab.handle import Handle, History, Output

if TYPE_CHECKING:
    from jaxserve.lab.bench import Bench
    from jaxserve.lab.desk import Desk
    from jaxserve.lab.steps import Piece

T = TypeVar("T")
At = Literal["last", "all"]


class Lab:
    """What `Engine.lab` returns. Calls may come from any thread; each queues its work between two
    steps of the engine and returns arrays that are on the device, without waiting for them. They
    raise InvalidRequestError, OutOfPagesError, HandleLostError, EngineShutdownError and
    EngineDeadError, and change nothing then.
    """

    def __init__(self, bench: Bench, desk: Desk) -> None:
        self._bench, self._desk = bench, desk
        self.dropped = desk.dropped
        """Takes back the pages of a handle that is gone."""

    def __enter__(self) -> Lab:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def available_tokens(self) -> int:
        """That fit into the pages which no handle has."""
        return self._call(lambda: self._desk.available) * self._bench.page_size

    def prefill(self, prompts: Sequence[Sequence[int]], *, at: At = "last") -> Output:
        """New handles of `prompts`, token ids. What the engine's prefix cache has of them is not
        computed again (`Handle.cached_tokens`), but for at="all"."""
        rows = [
            self._tokens(f"prompts[{i}]", x, 0) for i, x in enumerate(_listed("prompts", prompts))
        ]
        begun = self._call(lambda: self._desk.prefill(rows, _everything(at)))
        handles = [
            Handle(self, growth.pages, len(row), cached, History(None, 0, row), begun.ran.lives)
            for growth, row, cached in zip(begun.ran.grown, rows, begun.cached, strict=True)
        ]
        return _output(handles, begun.ran.pieces, at, [len(row) for row in rows])

    def extend(
        self, handles: Sequence[Handle], tokens: Sequence[Sequence[int]], *, at: At = "last"
    ) -> Output:
        """Each handle with its own `tokens` behind it, one or more."""
        handles, given = self._own(handles), _listed("tokens", tokens)
        if len(given) != len(handles):
            raise InvalidRequestError(f"tokens has {len(given)} lists for {len(handles)} handles")
        rows = [
            self._tokens(f"tokens[{i}]", each, handle.length)
            for i, (each, handle) in enumerate(zip(given, handles, strict=True))
        ]
        ran = self._call(lambda: self._desk.extend(handles, rows, _everything(at)))
        longer = [
            handle.longer(growth.pages, row)
            for handle, growth, row in zip(handles, ran.grown, rows, strict=True)
        ]
        return _output(longer, ran.pieces, at, [len(row) for row in rows])

    def step(self, handles: Sequence[Handle], tokens: Any) -> Output:
        """Each handle with one token behind it: a list of ids, or an integer jax.Array [B], whose
        values nobody waits for (ids out of the vocabulary are not noticed there)."""
        handles = self._own(handles)
        for handle in handles:
            self._bench.check_length(handle.length + 1)
        if not isinstance(tokens, jax.Array):
            tokens = self._ids("tokens", tokens)
            if len(tokens) != len(handles):
                raise InvalidRequestError(
                    f"tokens has {len(tokens)} ids for {len(handles)} handles"
                )
        given = self._bench.steps.row("tokens", tokens, len(handles))
        ran = self._call(lambda: self._desk.step(handles, given))
        longer = [
            handle.longer(growth.pages, tokens, row)
            for row, (handle, growth) in enumerate(zip(handles, ran.grown, strict=True))
        ]
        return _output(longer, ran.pieces, "last", [1] * len(longer))

    def fork(self, handle: Handle) -> Handle:
        """Another handle of the same tokens, which is freed apart. (Handles never change: to go on
        from one in several ways needs no fork.)"""
        return self.truncate(handle, handle.length)

    def truncate(self, handle: Handle, length: int) -> Handle:
        """A handle of the first `length` tokens, at least one."""
        (handle,) = self._own([handle])
        length = checks.integer("length", length, 1, handle.length)
        pages = self._call(lambda: self._desk.cut(handle, length))
        cached = min(handle.cached_tokens, length)
        return Handle(self, pages, length, cached, handle.history, handle.lives)

    def branch(self, handle: Handle, width: int) -> Branches:
        """`width` sequences that go on from `handle`, and then from each other, by arrays that the
        host need not read."""
        (handle,) = self._own([handle])
        return Branches(self, self._bench, self._desk, handle, width)

    def free(self, handles: Sequence[Handle] | Handle) -> None:
        """Give the pages of `handles` back, which cannot be used any more."""
        for handle in [handles] if isinstance(handles, Handle) else handles:
            self._own([handle])
            handle.end()

    def rebuild(self, handles: Sequence[Handle]) -> Output:
        """The tokens of `handles`, lost or not, computed anew. Their tokens must have been read by
        the host, or still be on a device that works."""
        return self.prefill([each.tokens for each in self._own(handles)])

    def close(self) -> None:
        """Give the reserved pages back to the engine. No handle can be used any more."""
        self._bench.close(self._desk)

    # -- checks -----------------------------------------------------------------------------------

    def _call(self, function: Callable[[], T]) -> T:
        return self._bench.call(function)

    def _own(self, handles: Any) -> list[Handle]:
        handles = _listed("handles", handles)
        for number, handle in enumerate(handles):
            if not isinstance(handle, Handle) or handle.lab is not self:
                raise InvalidRequestError(
                    f"handles[{number}] must be a handle of this laboratory, got "
                    f"{checks.shown(handle)}"
                )
            if handle.freed:
                raise InvalidRequestError(
                    f"handles[{number}], of {handle.length} tokens, has been freed"
                )
        return handles

    def _tokens(self, name: str, values: Any, length: int) -> np.ndarray:
        """At least one id, to run behind `length` tokens."""
        row = self._ids(name, values)
        self._bench.check_length(length + len(row))
        return row

    def _ids(self, name: str, values: Any) -> np.ndarray:
        return np.array(self._bench.token_ids(name, values), np.int32)


def _listed(name: str, values: Any) -> list[Any]:
    if isinstance(values, str | bytes) or not hasattr(values, "__iter__"):
        raise InvalidRequestError(f"{name} must be a list, got {checks.shown(values)}")
    found = list(values)
    if not found:
        raise InvalidRequestError(f"{name} is empty")
    return found


def _everything(at: Any) -> bool:
    if at not in ("last", "all"):
        raise InvalidRequestError(f'at must be "last" or "all", got {checks.shown(at)}')
    return at == "all"


def _output(
    handles: Sequence[Handle], pieces: Sequence[Piece], at: At, counts: Sequence[int]
) -> Output:
    """counts: tokens that ran of each handle."""
    logits = _joined([(piece.logits, piece.count) for piece in pieces])
    hidden = _joined([(piece.hidden, piece.count) for piece in pieces])
    if at == "all":
        ends = np.cumsum(counts)[:-1].tolist()
        return Output(handles, jnp.split(logits, ends), jnp.split(hidden, ends))
    return Output(handles, logits, hidden)


def _joined(pieces: Sequence[tuple[Any, int]]) -> Any:
    """The first n of each array, one behind the other."""
    cut = [array if len(array) == count else array[:count] for array, count in pieces]
    return cut[0] if len(cut) == 1 else jnp.concatenate(cut)
