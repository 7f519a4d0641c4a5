"""What one step runs: frozen when built, no fields filled later. No jax."""

from __future__ import annotations

import dataclasses

from jaxserve.packing.media import Encoding
from jaxserve.packing.parts import Part, parts_of
from jaxserve.packing.sequence import Sequence
from jaxserve.packing.slots import Rows
from jaxserve.packing.wanted import Wanted


@dataclasses.dataclass(frozen=True, slots=True)
class ExtendRow:
    """One row of an extend step.

    A row runs `stop - start` tokens of its sequence (positions start..stop-1), packed from row
    `packed_start`. Or it is a fork: a sample of the same prompt that runs no token, and samples
    from the last token of `leader`'s row in the same batch. Or it is `carried`: the decode step of
    a running sequence, whose one token is the device's own last sample.
    """

    sequence: Sequence
    start: int
    stop: int
    packed_start: int
    samples: bool
    """False for a chunk that is not the last of its sequence."""
    fresh: bool
    """True for the first chunk of an admission: the slot's counters start from zero."""
    epoch: int
    """The slot's, see Slots: whether the sequence was retracted meanwhile."""
    leader: int = -1
    """Index of the leader's row for a fork, else -1."""
    carried: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class ExtendBatch:
    """Packed prompts (or chunks of them) of several sequences, and running ones' next tokens.

    tokens: bucket T of packed tokens. row_bucket: bucket B of rows.
    page_copies: (source, destination) pages to copy after the step, for forks.
    encodings: pictures to put on the device before it.
    """

    rows: tuple[ExtendRow, ...]
    tokens: int
    row_bucket: int
    page_copies: tuple[tuple[int, int], ...] = ()
    encodings: tuple[Encoding, ...] = ()

    @property
    def wanted(self) -> Wanted:
        """What the rows want beside tokens."""
        return Wanted.of(row.sequence.request for row in self.rows)

    @property
    def samples(self) -> bool:
        """Whether any row samples a token."""
        return any(row.samples for row in self.rows)

    @property
    def mixed(self) -> bool:
        """Whether running sequences ride along."""
        return any(row.carried for row in self.rows)

    @property
    def sampled(self) -> list[tuple[int, Sequence]]:
        """(row number, sequence) of the rows whose sampled token counts."""
        return [(i, row.sequence) for i, row in enumerate(self.rows) if row.samples]

    @property
    def parts(self) -> tuple[Part, ...]:
        """The rows that are drawn by programs of their own."""
        return parts_of(((i, s.request) for i, s in self.sampled), all_or_none=False)

    @property
    def guided(self) -> tuple[int, ...]:
        """The numbers of the rows with guides that sample."""
        return tuple([i for i, sequence in self.sampled if sequence.request.guides])

    @property
    def sequences(self) -> list[Sequence]:
        return [row.sequence for row in self.rows]


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class DecodeBatch:
    """One or several tokens for each running sequence.

    row_bucket: bucket B. new_pages: (row number, page) for rows that begin a page in these steps.
    """

    rows: Rows
    row_bucket: int
    new_pages: tuple[tuple[int, int], ...] = ()
    steps: int = 1

    @property
    def kind(self) -> str:
        """Of the program that runs the rows, or would if none were drawn apart."""
        return "decode" if self.steps == 1 else "decode_many"

    @property
    def samples(self) -> bool:
        """As of an ExtendBatch."""
        return True

    @property
    def sequences(self) -> tuple[Sequence, ...]:
        return self.rows.sequences

    @property
    def wanted(self) -> Wanted:
        """As of an ExtendBatch."""
        return self.rows.wanted

    @property
    def parts(self) -> tuple[Part, ...]:
        """All rows, if one is drawn by a program of its own."""
        return self.rows.parts

    @property
    def guided(self) -> tuple[int, ...]:
        """As of an ExtendBatch."""
        return self.rows.guided


Batch = ExtendBatch | DecodeBatch
