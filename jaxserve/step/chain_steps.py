"""Runs the batches in which requests have chains."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxserve.chains.entries import Entries
from jaxserve.config.states import NO_STATES, STATE_NAMES
from jaxserve.errors import InvalidRequestError
from jaxserve.packing.batch import Batch, DecodeBatch, ExtendBatch
from jaxserve.step.catalogue import Catalogue, Program
from jaxserve.step.chain import Chain, Shapes, trace
from jaxserve.step.chain_programs import (
    NOTED,
    REPLAYED,
    ChainBuckets,
    chain_arrays,
    chain_programs,
    editing_programs,
    shared_programs,
    token_pages,
)
from jaxserve.step.chain_rows import ChainState
from jaxserve.step.chained import Undrawn
from jaxserve.step.compile import Programs
from jaxserve.step.fused_programs import fused_kind, fused_programs
from jaxserve.step.guided import Guides, Run
from jaxserve.step.hook_steps import HookSteps
from jaxserve.step.payloads import Variant
from jaxserve.step.programs import Facts
from jaxserve.step.step import StepOutput

BUILDING_THREADS = 4
"""Compile what a chain needs: requests run meanwhile."""


class DrawnParts(NamedTuple):
    """What the programs of one step returned."""

    parts: list[tuple[np.ndarray | None, StepOutput]]
    """Rows (None: all) and what was drawn for them."""
    inside: Mapping[str, jax.Array]
    """Of all rows, what requests want of the model's inside, [n, B, ...] by name."""

    @classmethod
    def of_all(cls, output: StepOutput) -> DrawnParts:
        """Of a program that is a whole step."""
        return cls([(None, output)], output.payloads)

    def and_then(self, later: DrawnParts) -> DrawnParts:
        """And what was drawn apart, which knows the inside of all rows."""
        return DrawnParts([*self.parts, *later.parts], later.inside)


class ChainSteps:
    """The chains of one runner."""

    def __init__(
        self,
        facts: Facts,
        catalogue: Catalogue,
        programs: Programs,
        run: Run,
        arrays: dict[str, Any],
    ) -> None:
        """run: of the runner. arrays: that the device keeps, by name; those of chains are added."""
        self._facts = facts
        self._catalogue = catalogue
        self._programs = programs
        self._run = run
        self._arrays = arrays
        self._buckets = ChainBuckets.of(facts.config.buckets)
        self._adopted: dict[str, Chain] = {}
        self._reading: set[str] = set()
        self.guides = Guides(facts, run)
        self.hooks = HookSteps(facts, self.compile, run, arrays)
        self._built: set[Callable[[Facts], list[Program]]] = set()
        self._slots: tuple[Any, int, Mapping[str, jax.Array]] | None = None

    # -- registering ------------------------------------------------------------------------------

    def build(
        self,
        name: str,
        transform: Any,
        params: Mapping[str, Any] | None,
        tables: Any,
        fuse: bool,
    ) -> Chain:
        """Trace a chain and compile what its requests can need, on the calling thread, while
        others run. (An engine that does not precompile does that when a program is first used.)
        InvalidRequestError: it cannot be."""
        facts = self._facts
        if fuse and facts.config.program.deterministic:
            raise InvalidRequestError(
                f"fuse=True of the transform {name!r}: with enable_deterministic_inference=True a "
                "request's neighbours may not decide which of two programs draws its tokens"
            )
        model = facts.model
        layers = facts.config.states.layers
        sizes = (model.vocab_size, model.hidden_size, facts.dtype, model.num_layers)
        shapes = Shapes(*sizes, layers)
        chain = trace(name, transform, params, tables, shapes)
        window = model.window
        if window is not None and chain.history > window:
            raise InvalidRequestError(
                f"transform {name!r} asks history({chain.history}) of a model that keeps "
                f"{window} tokens (its sliding window)"
            )
        self.build_shared()
        fused = fused_programs(facts, chain) if fuse else []
        self.compile([*chain_programs(facts, chain), *fused])
        return chain

    def build_shared(self, edits: bool = False) -> None:
        """Compile what all rows that are drawn apart need, as `build` does. edits: and what guides
        that edit logits need."""
        kinds = [shared_programs, editing_programs] if edits else [shared_programs]
        for programs in kinds:
            if programs not in self._built:
                self.compile(programs(self._facts))
                self._built.add(programs)

    def compile(self, entries: list[Program]) -> None:
        """Programs beside those of the engine, on the calling thread, while others run."""
        for entry in entries:
            self._catalogue.add(entry)
        if self._facts.config.precompile:  # otherwise each is compiled when it is first used
            keys = [(entry.kind, bucket) for entry in entries for bucket in entry.buckets]
            order = self._catalogue.mosaic_first(keys)
            self._programs.build(order, BUILDING_THREADS, at_rest=False)

    def adopt(self, chain: Chain) -> None:
        """Make what the device keeps for it. On the engine thread, between two steps."""
        if chain.kind not in self._adopted:
            self._adopted[chain.kind] = chain
            self._reading.update([chain.kind] * chain.layers)
            self._make(chain)

    def reset(self) -> None:
        """Make all of that anew, when the device has lost it."""
        self._slots = None
        self._arrays.pop("token_pages", None)
        for chain in self._adopted.values():
            self._make(chain)
        self.hooks.reset()

    def _make(self, chain: Chain) -> None:
        rows, names = self._facts.config.program.max_rows + 1, chain_arrays(chain)
        tokens = token_pages(self._facts)
        made = {names.state: ChainState.empty(chain, rows), names.tables: chain.tables}
        if chain.history and "token_pages" not in self._arrays:
            made["token_pages"] = np.zeros(tokens.shape, tokens.dtype)
        self._arrays.update(jax.device_put(made, tokens.sharding))

    # -- steps ------------------------------------------------------------------------------------

    def resized(self, batch: DecodeBatch) -> DecodeBatch:
        """`batch` in a bucket that programs of chains have."""
        return dataclasses.replace(batch, row_bucket=self._buckets.rows(batch.row_bucket))

    def reporting(self, batch: ExtendBatch, variant: Variant) -> Variant:
        """`variant`, or where a chain of the batch reads inner layers, one that has them."""
        if self._reading and any(part.kind in self._reading for part in batch.parts):
            return variant._replace(states=self._facts.config.states)
        return variant

    def entries(self, batch: ExtendBatch) -> Entries | None:
        """What the device has to know of the rows of `batch`; None: nothing."""
        return Entries.of(batch, self._facts.config.program.page_size)

    def begin(self, entries: Entries) -> None:
        """Queue what makes the rows of a batch ready to be drawn."""
        for use, slot, tokens, logprobs in entries.admissions:
            for start in range(0, max(len(tokens), 1), REPLAYED):
                part = slice(start, start + REPLAYED)
                self._run(
                    (f"admit_{use.chain.kind}", REPLAYED),
                    slot=np.int32(slot),
                    floats=use.floats,
                    ints=use.ints,
                    fresh=np.int32(start == 0),
                    tokens=_padded(tokens[part], REPLAYED),
                    logprobs=_padded(logprobs[part], REPLAYED),
                    count=np.int32(len(tokens[part])),
                )
        for use, slot in entries.hooks:
            self.hooks.admit(use, slot)
        nowhere = self._facts.memory.num_pages
        for start in range(0, len(entries.pages), NOTED):
            part = slice(start, start + NOTED)
            pages = _padded(entries.pages[part], NOTED, nowhere)
            tokens = _padded(entries.tokens[part], NOTED)
            self._run(("note_tokens", NOTED), pages=pages, tokens=tokens)

    def decode(
        self,
        batch: DecodeBatch,
        upload: jax.Array,
        variant: Variant,
        named: Mapping[str, Any],
    ) -> DrawnParts:
        """Queue one or several decode steps. upload: as `pack.pack_decode` makes it. named: see
        `Runner._named`."""
        bucket, fused = batch.row_bucket, batch.rows.fused
        if self._slots is None or self._slots[:2] != (batch.rows, bucket):
            slots = {
                kind: jax.device_put(each, token_pages(self._facts).sharding)
                for kind, each in self._slots_by_kind(batch, bucket)
            }
            self._slots = (batch.rows, bucket, slots)
        slots = self._slots[2]
        if fused:
            kind = fused_kind(batch.kind, fused) + variant.ending
            output = self._run((kind, bucket), rows=upload, chained=slots[fused], **named)
            return DrawnParts.of_all(output)
        hooked = self.hooks.of(batch, bucket)
        key = ("forward" + hooked.ending, bucket)
        undrawn, layers = self._run(key, rows=upload, **hooked.given)
        return self._draw(batch, undrawn, layers, slots, variant, named)

    def extend(
        self,
        batch: ExtendBatch,
        hidden: jax.Array,
        layers: jax.Array | None,
        variant: Variant,
        named: Mapping[str, Any],
    ) -> DrawnParts:
        """Queue the draws that an extend step has left. hidden [T, D], layers [T, C, D]: of that.
        named: as of `decode`."""
        bucket = self._facts.layout(batch.tokens).rows
        places, tokens = self._places(batch, bucket)
        rows, last = self._run(("pick", batch.tokens), hidden=hidden, tokens=tokens, places=places)
        undrawn = Undrawn(rows, self._run(("head", bucket), hidden=rows), last)
        if layers is not None:
            layers = self._run(("pick_layers", batch.tokens), layers=layers, places=places)
        slots = dict(self._slots_by_kind(batch, bucket))
        return self._draw(batch, undrawn, layers, slots, variant, named)

    def _draw(
        self,
        batch: Batch,
        undrawn: Undrawn,
        layers: jax.Array | None,
        slots: Mapping[str, Any],
        variant: Variant,
        named: Mapping[str, Any],
    ) -> DrawnParts:
        bucket, inside = undrawn.tokens.shape[0], {}
        if batch.wanted.names & STATE_NAMES:
            inside = self._run(("inside", bucket), undrawn=undrawn, layers=layers)
        said = self.guides.silent(bucket)
        if batch.guided:
            undrawn, said = self.guides.ask(batch, undrawn, bucket)
        given = {"undrawn": undrawn, "said": said, "layers": layers, **named}
        ending = variant._replace(states=NO_STATES).ending
        parts: list[tuple[np.ndarray | None, StepOutput]] = [
            (part.rows, self._run((part.kind + ending, bucket), slots=each, **given))
            for part, each in zip(batch.parts, slots.values(), strict=True)
        ]
        return DrawnParts(parts, inside)

    def _slots_by_kind(self, batch: Batch, bucket: int) -> Iterator[tuple[str, np.ndarray]]:
        """For each part of a batch: [bucket] int32, the slots of its rows, R for all others."""
        sequences = batch.sequences
        for part in batch.parts:
            slots = np.full(bucket, self._facts.config.program.max_rows, np.int32)
            slots[part.rows] = [sequences[row].slot for row in part.rows]
            yield part.kind, slots

    def _places(self, batch: ExtendBatch, bucket: int) -> tuple[np.ndarray, np.ndarray]:
        """Where an extend step's last tokens are, and what they are: see `chained.pick_rows`."""
        places, tokens = np.zeros((2, bucket), np.int32), np.zeros(bucket, np.int32)
        places[1] = -1
        for number, row in enumerate(batch.rows):
            ran = batch.rows[row.leader] if row.leader >= 0 else row
            places[0, number] = ran.packed_start + ran.stop - ran.start - 1
            if row.carried:
                places[1, number] = row.sequence.slot
            elif row.samples:
                (tokens[number],) = row.sequence.tokens(row.stop - 1, row.stop)
        return places, tokens


def _padded(values: np.ndarray, size: int, padding: int = 0) -> np.ndarray:
    """With `padding` behind, `size` of them in all."""
    padded = np.full((size, *values.shape[1:]), padding, values.dtype)
    padded[: len(values)] = values
    return padded
