"""Asks the guides of a step's rows, between the model and the draw."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import jax
import numpy as np

from jaxserve.errors import RequestFailedError
from jaxserve.parallel.mesh import replicated
from jaxserve.request import Request
from jaxserve.step.chain_programs import mask_words
from jaxserve.step.chained import Said, Undrawn

if TYPE_CHECKING:
    from jaxserve.packing.batch import Batch
    from jaxserve.packing.sequence import Sequence
    from jaxserve.step.catalogue import ProgramKey
    from jaxserve.step.programs import Facts


logger = logging.getLogger(__name__)


class Run(Protocol):
    """`Runner._run`: queues a program."""

    def __call__(self, key: ProgramKey, **given: Any) -> Any: ...


class Between(NamedTuple):
    """What the engine loop does while a step's model runs."""

    catch_up: Callable[[], None]
    """Read and commit all steps before this one."""
    fail: Callable[[Request, BaseException], None]
    """End a request whose guide has failed."""


class Guides:
    """Of one runner."""

    def __init__(self, facts: Facts, run: Run) -> None:
        self._rows = facts.config.program.max_rows
        self._words = mask_words(facts)
        self._sharding = replicated(facts.mesh)
        self._run = run
        self._silent: dict[int, Said] = {}
        self.between = Between(lambda: None, lambda request, error: None)
        """Written by the engine loop before it runs anything."""

    def silent(self, bucket: int) -> Said:
        """Nobody says anything about `bucket` rows."""
        if bucket not in self._silent:
            self._silent[bucket] = jax.device_put(self._nothing(bucket), self._sharding)
        return self._silent[bucket]

    def _nothing(self, bucket: int) -> Said:
        """On the host, to be written to."""
        return Said(np.full((bucket, self._words), -1, np.int32), np.zeros(bucket, np.int32))

    def ask(self, batch: Batch, undrawn: Undrawn, bucket: int) -> tuple[Undrawn, Said]:
        """What the rows of `batch` are drawn from, once the steps before have been read."""
        self.between.catch_up()
        said = self._nothing(bucket)
        sequences = {row: batch.sequences[row] for row in batch.guided}
        rows = {row: each for row, each in sequences.items() if not each.request.finished}
        for row, sequence in rows.items():
            with self._alone(sequence) as outputs:
                for guide in sequence.request.guides:
                    if guide.masks:
                        guide.mask(outputs, said.bits[row])
        edited = {row: each for row, each in rows.items() if _edited(each.request)}
        if edited:
            undrawn = undrawn._replace(logits=self._edit(edited, undrawn.logits, said))
        return undrawn, said

    def _edit(self, rows: dict[int, Sequence], logits: jax.Array, said: Said) -> jax.Array:
        """logits [B, V] with those of `rows` as their guides leave them."""
        bucket = len(said.edited)
        slots = np.full(bucket, self._rows, np.int32)
        slots[list(rows)] = [sequence.slot for sequence in rows.values()]
        adjusted = self._run(("adjusted", bucket), logits=logits, slots=slots, bits=said.bits)
        for row, sequence in rows.items():
            number = np.int32(row)
            values = np.array(self._run(("peek", bucket), logits=adjusted, row=number))
            with self._alone(sequence) as outputs:
                for guide in sequence.request.guides:
                    values = guide.edit(outputs, values) if guide.edits else values
            if not sequence.request.finished:
                logits = self._run(("poke", bucket), logits=logits, row=number, values=values)
                said.edited[row] = 1
        return logits

    @contextlib.contextmanager
    def _alone(self, sequence: Sequence) -> Iterator[list[int]]:
        """The request's tokens so far, for the block; what that raises fails the request alone."""
        request = sequence.request
        try:
            sequence.drain()
            yield request.output_ids[: sequence.total_tokens - sequence.prompt_len]
        except Exception as error:
            logger.exception("a guide of request %s failed, and the request with it", request.rid)
            named = isinstance(error, RequestFailedError)
            self.between.fail(request, error if named else RequestFailedError.caused_by(error))


def _edited(request: Request) -> bool:
    return not request.finished and any(guide.edits for guide in request.guides)
