"""Asks the guides of a step's rows, between the model and the draw."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import jax
import numpy as np

from jaxserve.errors import RequestFailedError
from jaxserve.parallel.mesh import replicated
from jaxserve.request import Request
from jaxserve.step.chain_programs import mask_words
from jaxserve.step.chained import Said, Undrawn

if TYPE_CHECKING:
    from jaxserve.guides.guide import Guide
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


class Text(NamedTuple):
    """What guides are asked about."""

    sequence: Sequence
    outputs: list[int]
    """All tokens that its request has."""

    @classmethod
    def of(cls, sequence: Sequence) -> Text:
        """As it is now."""
        sequence.drain()
        count = sequence.total_tokens - sequence.prompt_len
        return cls(sequence, sequence.request.output_ids[:count])


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
        texts: dict[int, Text] = {}
        for row, sequence in sequences.items():
            if not sequence.request.finished:
                with self._failing(sequence.request):
                    texts[row] = Text.of(sequence)
        self._prepare(texts)
        for row, (sequence, outputs) in texts.items():
            with self._failing(sequence.request):
                for guide in sequence.request.guides:
                    if guide.masks and not sequence.request.finished:
                        guide.mask(outputs, said.bits[row])
        edited = {row: text for row, text in texts.items() if _edited(text.sequence.request)}
        if edited:
            undrawn = undrawn._replace(logits=self._edit(edited, undrawn.logits, said))
        return undrawn, said

    def _prepare(self, texts: Mapping[int, Text]) -> None:
        """Let guides of one class do for all their rows what they can."""
        of_class: dict[type[Guide], list[tuple[Guide, Text]]] = {}
        for text in texts.values():
            for guide in text.sequence.request.guides:
                if guide.masks:
                    of_class.setdefault(type(guide), []).append((guide, text))
        for kind, asked in of_class.items():
            with self._failing(*(text.sequence.request for _, text in asked)):
                kind.prepare_masks([(guide, text.outputs) for guide, text in asked])

    def _edit(self, rows: dict[int, Text], logits: jax.Array, said: Said) -> jax.Array:
        """logits [B, V] with those of `rows` as their guides leave them."""
        bucket = len(said.edited)
        slots = np.full(bucket, self._rows, np.int32)
        slots[list(rows)] = [text.sequence.slot for text in rows.values()]
        adjusted = self._run(("adjusted", bucket), logits=logits, slots=slots, bits=said.bits)
        for row, (sequence, outputs) in rows.items():
            number = np.int32(row)
            values = np.array(self._run(("peek", bucket), logits=adjusted, row=number))
            with self._failing(sequence.request):
                for guide in sequence.request.guides:
                    values = guide.edit(outputs, values) if guide.edits else values
            if not sequence.request.finished:
                logits = self._run(("poke", bucket), logits=logits, row=number, values=values)
                said.edited[row] = 1
        return logits

    @contextlib.contextmanager
    def _failing(self, *requests: Request) -> Iterator[None]:
        """What the block raises fails the requests, and nobody else."""
        try:
            yield
        except Exception as error:
            for request in requests:
                logger.exception(
                    "a guide of request %s failed, and the request with it", request.rid
                )
                named = isinstance(error, RequestFailedError)
                failure = error if named else RequestFailedError.caused_by(error)
                self.between.fail(request, failure)


def _edited(request: Request) -> bool:
    return not request.finished and any(guide.edits for guide in request.guides)
