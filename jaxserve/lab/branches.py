"""Sequences that go on from each other, as the device decides."""

from __future__ import annotations

import functools
import weakref
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxserve import checks
from jaxserve.errors import InvalidRequestError
from jaxserve.lab.handle import Handle, History, Output

if TYPE_CHECKING:
    from jaxserve.lab.bench import Bench
    from jaxserve.lab.desk import Desk
    from jaxserve.lab.lab import Lab


class Branches:
    """`Lab.branch`: sequences of one length. In each step every one of them goes on from one of
    those before, which one is an array: the host need not know it to queue the next step, as beams
    and particles want it. Pages of branches that nobody goes on from are free again when all are
    freed or dropped. Not for several threads at once.
    """

    def __init__(self, lab: Lab, bench: Bench, desk: Desk, handle: Handle, width: int) -> None:
        """width: branches."""
        width = checks.integer("width", width, 1, bench.steps.most_rows)
        self._lab, self._bench, self._desk, self._root = lab, bench, desk, handle
        self._held = list(bench.call(lambda: desk.cut(handle, handle.length)))
        self._end = weakref.finalize(self, desk.dropped, self._held, handle.lives)
        self._end.atexit = False
        self._tails = [0] * width
        self._tables: Any = bench.steps.begun(handle.pages, width)
        self._steps: list[tuple[Any, Any]] = []

    @property
    def width(self) -> int:
        """B, branches."""
        return len(self._tails)

    @property
    def length(self) -> int:
        """Tokens of each."""
        return self._root.length + len(self._steps)

    def step(self, tokens: Any, parents: Any = None) -> Output:
        """Branch i is what branch `parents[i]` was (None: branch i itself), and `tokens[i]` behind
        it. Both are integers [B], lists or jax.Arrays, whose values nobody waits for and nobody
        checks. The output has no handles. Raises as `Lab.step`."""
        if not self._end.alive:
            raise InvalidRequestError("the branches have been freed")
        self._bench.check_length(self.length + 1)
        row = self._bench.steps.row
        (given,) = row("tokens", tokens, self.width)
        own = np.arange(self.width) if parents is None else parents
        (chosen,) = row("parents", own, self.width)
        fresh = not self._steps or self.length % self._bench.page_size == 0
        run = functools.partial(
            self._desk.step_branches,
            self._root,
            self._held,
            self._tails,
            fresh,
            self._tables,
            chosen,
            given,
            self.length,
        )
        hidden, logits, self._tables = self._bench.call(run)
        self._steps.append((chosen, given))
        if len(logits) != self.width:
            hidden, logits = hidden[: self.width], logits[: self.width]
        return Output((), logits, hidden)

    def handles(self) -> list[Handle]:
        """Each branch as a handle. Waits for what the device has decided."""
        tables = np.asarray(self._tables)[: self.width, : -(-self.length // self._bench.page_size)]
        pages = [tuple(row) for row in tables.tolist()]
        root = self._root
        added = [self._tokens(row) for row in range(self.width)]
        self._bench.call(lambda: self._desk.keep_branches(root, pages, self.length))
        rows = [History(root.history, root.length, each) for each in added]
        return [
            Handle(self._lab, own, self.length, root.cached_tokens, history, root.lives)
            for own, history in zip(pages, rows, strict=True)
        ]

    def free(self) -> None:
        """Give the pages back but for those of `handles`. No step is possible any more."""
        self._end()

    def _tokens(self, row: int) -> np.ndarray:
        """What branch `row` has behind the root."""
        found = []
        for parents, tokens in reversed(self._steps):
            found.append(int(np.asarray(tokens)[row]))
            row = int(np.asarray(parents)[row])
        return np.array(found[::-1], np.int32)
