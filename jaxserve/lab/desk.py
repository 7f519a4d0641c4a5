"""What of a laboratory is on the engine thread: its pages, and who may write where."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from jaxserve.errors import HandleLostError, InvalidRequestError
from jaxserve.lab.pages import Growth, LabPages
from jaxserve.lab.steps import LabSteps, Piece, Run

if TYPE_CHECKING:
    from jaxserve.cache.prefix import PrefixCache
    from jaxserve.lab.handle import Handle


class Ran(NamedTuple):
    """What a call has queued."""

    grown: list[Growth]
    """For each handle."""
    pieces: list[Piece]
    """Of all of them, in their order."""
    lives: int
    """See `Handle`."""


class Begun(NamedTuple):
    """What `prefill` has queued."""

    ran: Ran
    cached: list[int]
    """Tokens of each prompt that were found in the prefix cache."""


class Desk:
    """One laboratory's. Every method runs on the engine thread, but for `dropped`."""

    def __init__(
        self,
        pool: PrefixCache,
        steps: LabSteps,
        count: int,
        page_size: int,
        unit: int,
        evicted: Callable[[], None],
    ) -> None:
        """count: pages to reserve. unit: cached prefixes end at multiples of so many tokens.
        evicted: called when pages of the pool have been taken, before they are written."""
        self._pool, self._steps, self.count = pool, steps, count
        self._size, self._unit, self._evicted = page_size, unit, evicted
        self._dropped: deque[tuple[Sequence[int], int]] = deque()
        self._lives = 0
        self._closed = False
        self._pages = self._reserve()

    @property
    def available(self) -> int:
        """Pages that no handle has."""
        self._collect()
        return self._pages.available

    @property
    def counts(self) -> dict[int, int]:
        """Handles that have each page, of those that some handle has."""
        self._collect()
        return self._pages.counts()

    def dropped(self, pages: Sequence[int], lives: int) -> None:
        """A handle is gone, or branches. From any thread, at any moment."""
        self._dropped.append((pages, lives))

    def lost(self) -> None:
        """The device has lost everything, and the pool is empty."""
        self._lives += 1
        self._pages = self._reserve()

    def close(self) -> None:
        """Give all pages back, once."""
        self._closed = True
        self._pool.release(self._pages.all)

    # -- calls ------------------------------------------------------------------------------------

    def prefill(self, prompts: Sequence[np.ndarray], everything: bool) -> Begun:
        """Begin values with `prompts`, behind what of them is cached (of none, if everything is to
        be computed)."""
        self._begin(())
        grown = self._pages.grow([((), 0, len(tokens)) for tokens in prompts])
        with self._kept_if_queued(grown):
            cached = [
                0 if everything else self._from_cache(tokens, growth.pages)
                for tokens, growth in zip(prompts, grown, strict=True)
            ]
            runs = [
                Run(tokens[start:], start, growth.pages)
                for tokens, start, growth in zip(prompts, cached, grown, strict=True)
            ]
            return Begun(Ran(grown, self._steps.extend(runs, everything), self._lives), cached)

    def extend(
        self, handles: Sequence[Handle], tokens: Sequence[np.ndarray], everything: bool
    ) -> Ran:
        """Run `tokens` [n] behind each handle."""
        grown = self._grow(handles, [len(each) for each in tokens])
        runs = [
            Run(each, handle.length, growth.pages)
            for handle, each, growth in zip(handles, tokens, grown, strict=True)
        ]
        with self._kept_if_queued(grown):
            return Ran(grown, self._steps.extend(runs, everything), self._lives)

    def step(self, handles: Sequence[Handle], tokens: Sequence[Any]) -> Ran:
        """Run one token behind each handle. tokens: as `LabSteps.step` takes them."""
        grown = self._grow(handles, [1] * len(handles))
        rows = [
            (handle.length, growth.pages) for handle, growth in zip(handles, grown, strict=True)
        ]
        with self._kept_if_queued(grown):
            return Ran(grown, self._steps.step(tokens, rows), self._lives)

    def cut(self, handle: Handle, length: int) -> tuple[int, ...]:
        """The pages of the first `length` tokens of `handle`, held once more."""
        self._begin([handle])
        return self._pages.cut(handle.pages, length)

    def step_branches(
        self,
        root: Handle,
        held: list[int],
        tails: list[int],
        fresh: bool,
        tables: Any,
        parents: Any,
        tokens: Any,
        length: int,
    ) -> tuple[Any, Any, Any]:
        """One token for each branch of `root`. held: their pages, more of which may be taken.
        tails: the last ones; fresh: to be taken anew. The rest as of `LabSteps.branch`."""
        self._begin([root])
        if fresh:
            tails[:] = self._pages.allocate(len(tails))
            held += tails
        return self._steps.branch(tables, parents, tokens, tails, length)

    def keep_branches(self, root: Handle, tables: Sequence[tuple[int, ...]], length: int) -> None:
        """Hold the pages of each branch of `root`, `tables`, for a handle of its own."""
        self._begin([root])
        for pages in tables:
            self._pages.share(pages)
            self._pages.mark(pages, length)

    # -- pages ------------------------------------------------------------------------------------

    def _reserve(self) -> LabPages:
        pages = LabPages(self._pool.allocate(self.count), self._size)
        self._evicted()
        return pages

    def _grow(self, handles: Sequence[Handle], more: Sequence[int]) -> list[Growth]:
        self._begin(handles)
        grown = self._pages.grow(
            [(each.pages, each.length, n) for each, n in zip(handles, more, strict=True)]
        )
        with self._kept_if_queued(grown):
            self._steps.copy(tuple([copy for growth in grown for copy in growth.copies]))
        return grown

    @contextlib.contextmanager
    def _kept_if_queued(self, grown: Sequence[Growth]) -> Iterator[None]:
        """Pages that nobody gets a handle of are given back."""
        try:
            yield
        except BaseException:
            for growth in grown:
                self._pages.release(growth.pages)
            raise

    def _from_cache(self, tokens: np.ndarray, pages: tuple[int, ...]) -> int:
        """Copy what is cached of a prompt, but for its last token, into `pages`: how many tokens.
        Copies are queued before whatever could write into the cached pages next."""
        reusable = len(tokens) - 1
        lease, shared = self._pool.lease("", tokens[:reusable].astype(np.int32).tobytes())
        found = len(shared) * self._size
        found -= found % self._unit
        self._pool.used(lease)
        self._steps.copy(tuple(zip(shared[: found // self._size], pages, strict=False)))
        self._pool.end(lease, shared)
        return found

    def _begin(self, handles: Sequence[Handle]) -> None:
        """Before a call with `handles`."""
        self._collect()
        if self._closed:
            raise InvalidRequestError("the laboratory is closed")
        for handle in handles:
            if handle.lives != self._lives:
                raise HandleLostError(
                    f"the handle of {handle.length} tokens, and what came of it, was lost in a "
                    "failed step; lab.rebuild computes it again"
                )

    def _collect(self) -> None:
        """Take back the pages of handles that are gone."""
        while self._dropped:
            pages, lives = self._dropped.popleft()
            if lives == self._lives:
                self._pages.release(pages)
