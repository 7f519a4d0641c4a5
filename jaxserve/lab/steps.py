"""Queues what a laboratory computes, on the engine thread."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.errors import InvalidRequestError
from jaxserve.lab.programs import BRANCH, HEAD, STEP, lab_programs
from jaxserve.packing import pack
from jaxserve.packing.buckets import Ready, padded_length
from jaxserve.packing.layout import ExtendLayout, RowFields
from jaxserve.parallel.mesh import replicated
from jaxserve.step.chain_programs import ChainBuckets
from jaxserve.step.state_programs import beforehand

if TYPE_CHECKING:
    from jaxserve.step.catalogue import Program
    from jaxserve.step.programs import Facts


class Run(NamedTuple):
    """Tokens of one handle that are to run."""

    tokens: np.ndarray
    """[n] int32."""
    start: int
    """How many are before them."""
    pages: tuple[int, ...]
    """Of all tokens."""


class Piece(NamedTuple):
    """Some of what was computed."""

    hidden: Any
    """[N, D] jax.Array."""
    logits: Any
    """[N, V]."""
    count: int
    """How many of N count."""


class LabSteps:
    """Of one runner, on the engine thread where nothing else is said."""

    def __init__(
        self,
        facts: Facts,
        run: Callable[..., Any],
        copy: Callable[[tuple[tuple[int, int], ...]], None],
        ready: Callable[[], Ready],
        compile: Callable[[list[Program]], None],
    ) -> None:
        """run, ready: the runner's. copy: pages to others, (source, destination). compile: programs
        on the calling thread."""
        self._facts, self._run, self._ready, self._compile = facts, run, ready, compile
        self.copy = copy
        """Queues copies of pages."""
        self._slot = facts.config.program.max_rows  # that of padding
        self._extend = "extend" + beforehand(facts)[0].ending
        self._buckets = ChainBuckets.of(facts.config.buckets)

    def build(self) -> None:
        """Compile what the engine's own programs do not do. From any thread."""
        self._compile(lab_programs(self._facts))

    def row(self, name: str, values: Any, count: int) -> list[Any]:
        """`count` integers of a caller, a list or an array of the host or the device, as `step` and
        `branch` take them: one array for each of `sizes`. From any thread. InvalidRequestError."""
        on_device = isinstance(values, jax.Array)
        array = values if on_device else np.asarray(values)
        if array.shape != (count,) or array.dtype.kind not in "iu":
            raise InvalidRequestError(
                f"{name} must be integers [{count}], got {array.dtype}{list(array.shape)}"
            )
        sizes, library = self.sizes(count), jnp if on_device else np
        padded = library.pad(array.astype(np.int32), (0, sum(sizes) - count))
        parts = library.split(padded, np.cumsum(sizes)[:-1])
        return jax.device_put(parts, replicated(self._facts.mesh)) if on_device else parts

    def step(
        self, tokens: Sequence[Any], runs: Sequence[tuple[int, tuple[int, ...]]]
    ) -> list[Piece]:
        """One token for each of `runs`: how many are before it, and pages. tokens: [B] each, as
        `sizes` has them."""
        pieces, start = [], 0
        for bucket, given in zip(self.sizes(len(runs)), tokens, strict=True):
            some = runs[start : start + bucket]
            lengths = np.full(bucket, -1, np.int32)
            tables = np.zeros((bucket, self._facts.config.program.table_width), np.int32)
            for row, (length, pages) in enumerate(some):
                lengths[row] = length
                tables[row, : len(pages)] = pages
            hidden, logits = self._run((STEP, bucket), tokens=given, lengths=lengths, tables=tables)
            pieces.append(Piece(hidden, logits, len(some)))
            start += bucket
        return pieces

    def branch(
        self, tables: Any, parents: Any, tokens: Any, tails: Sequence[int], length: int
    ) -> tuple[Any, Any, Any]:
        """`programs.step_branches`: hidden, logits and tables of a program of as many rows as
        `tables` has."""
        bucket = tables.shape[0]
        own = np.full(bucket, -1, np.int32)
        own[: len(tails)] = tails
        return self._run(
            (BRANCH, bucket),
            tokens=tokens,
            tables=tables,
            parents=parents,
            tails=own,
            length=np.int32(length),
        )

    def begun(self, pages: Sequence[int], count: int) -> np.ndarray:
        """Tables of `count` branches, at most the largest of `sizes`, that begin with `pages`."""
        (bucket,) = self.sizes(count)
        tables = np.zeros((bucket, self._facts.config.program.table_width), np.int32)
        tables[:, : len(pages)] = pages
        return tables

    @property
    def most_rows(self) -> int:
        """Of one program."""
        return self._buckets.decode[-1]

    def sizes(self, count: int) -> list[int]:
        """Of the programs that step `count` handles, in their order. From any thread."""
        whole, rest = divmod(count, self.most_rows)
        return [self.most_rows] * whole + ([self._buckets.rows(rest)] if rest else [])

    def extend(self, runs: Sequence[Run], everything: bool) -> list[Piece]:
        """Run the tokens of each handle, several in a step where they fit, in parts where they do
        not. What was computed of their last tokens, or of `everything`, in their order."""
        found: list[Piece] = []
        for batch in self._batches(runs):
            layout = self._facts.layout(self._bucket([run for run, _ in batch]))
            packed, starts = self._packed(layout, [run for run, _ in batch])
            _, hidden = self._run((self._extend, layout.tokens), packed=packed)
            places: list[int] = []
            for (run, is_last), start in zip(batch, starts, strict=True):
                stop = start + len(run.tokens)
                places += range(start if everything else stop - is_last, stop)
            found += self._read(layout, hidden, places)
        return found

    def _bucket(self, runs: Sequence[Run]) -> int:
        """Tokens of the step that holds `runs`."""
        sizes, buckets = self._ready().buckets, self._facts.config.buckets
        tokens = sum(padded_length(len(run.tokens)) for run in runs)
        fits = (t for t in sizes.extend if t >= tokens and buckets.extend_rows(t) >= len(runs))
        return next(fits)

    def _batches(self, runs: Sequence[Run]) -> list[list[tuple[Run, bool]]]:
        """Steps of tokens, and whether they are the last of their handle."""
        most = self._facts.config.buckets.max_tokens
        rows, used = self._facts.config.buckets.max_extend_rows, most
        batches: list[list[tuple[Run, bool]]] = []
        for run in runs:
            done = 0
            while done < len(run.tokens):
                if used == most or len(batches[-1]) == rows:
                    batches.append([])
                    used = 0
                stop = min(len(run.tokens), done + most - used)
                part = Run(run.tokens[done:stop], run.start + done, run.pages)
                batches[-1].append((part, stop == len(run.tokens)))
                used += padded_length(stop - done)
                done = stop
        return batches

    def _packed(self, layout: ExtendLayout, runs: Sequence[Run]) -> tuple[np.ndarray, list[int]]:
        """The vector of an extend step, and where each row starts in it."""
        packed = pack.pack_nobody(layout, self._slot)
        fields, _, _, tables = layout.rows_of(packed)
        starts, at = [], 0
        for row, run in enumerate(runs):
            count, stop = len(run.tokens), run.start + len(run.tokens)
            fields[row] = tuple(RowFields(self._slot, at, count, run.start, stop))
            tables[row, : len(run.pages)] = run.pages
            for field, view in layout.tokens_of(packed):
                if field.name == "tokens":
                    view[at : at + count] = run.tokens
                elif field.name != "media":  # where text is rotated, and what it sees: its place
                    view[..., at : at + count] = np.arange(run.start, stop)
            starts.append(at)
            at += padded_length(count)
        return packed, starts

    def _read(self, layout: ExtendLayout, hidden: Any, places: Sequence[int]) -> list[Piece]:
        pieces = []
        for start in range(0, len(places), layout.rows):
            some = places[start : start + layout.rows]
            given = np.zeros(layout.rows, np.int32)
            given[: len(some)] = some
            found, logits = self._run((HEAD, layout.tokens), hidden=hidden, places=given)
            pieces.append(Piece(found, logits, len(some)))
        return pieces
