"""A device made of Python dicts: runs batches by writing tokens into pages, and checks on every
step that each row sees exactly its own tokens through its page table."""

from __future__ import annotations

import numpy as np

from jaxserve.cache.host import Copies
from jaxserve.packing.batch import Batch, DecodeBatch, ExtendBatch, ExtendRow
from jaxserve.packing.sequence import Sequence
from jaxserve.request import Request


def next_token(rid: str, sample: int, position: int) -> int:
    """The token that the pretended model samples for `position`."""
    return hash((rid, sample, position)) % 1000


class PagedDevice:
    """Mirrors what the device keeps between steps: page contents, page tables, lengths, tokens."""

    def __init__(self, page_size: int, window: int | None = None):
        self.page_size = page_size
        self.window = window
        self.memory: dict[tuple[int, int], int] = {}
        self.host: dict[tuple[int, int], dict[int, int]] = {}
        self.tables: dict[int, list[int]] = {}
        self.lengths: dict[int, int] = {}
        self.last: dict[int, int] = {}
        self.epochs: dict[int, int] = {}
        self.tokens_run = 0
        self.counted: dict[Request, int] = {}
        self.pictures: dict[int, tuple[bytes, int]] = {}

    def run(self, batch: Batch, accepted: np.ndarray | None = None) -> np.ndarray:
        """Tokens [n, B] by step and row, for rows that sample. accepted [B]: how many of its tokens
        each row of a decode batch keeps; the others are as if they had never been drawn, but their
        keys and values have been written."""
        if isinstance(batch, DecodeBatch):
            tokens = np.asarray(self._decode(batch))
            if accepted is not None:
                self._keep(batch, tokens, accepted)
            return tokens
        writes: set[tuple[int, int]] = set()
        self._check_packing(batch)
        for picture, rows in batch.encodings:
            self.pictures.update({r: (picture.digest, i) for i, r in enumerate(rows.tolist())})
        for row in batch.rows:
            sequence = row.sequence
            self.tables[sequence.slot] = list(sequence.pages)
            assert row.epoch == int(sequence.slots.epoch[sequence.slot])
            assert row.fresh == (self.epochs.get(sequence.slot) != row.epoch)
            self.epochs[sequence.slot] = row.epoch
            if row.carried:
                assert row.samples and row.stop - row.start == 1
                assert row.start == self.lengths[sequence.slot]
                self._write(sequence.slot, row.start, self.last[sequence.slot], writes)
            elif row.leader < 0:
                self._check_what_must_run(row)
                self._check_pictures(row)
                assert row.stop > row.start
                for position in range(row.start, row.stop):
                    token = sequence.tokens(position, position + 1)[0]
                    self._write(sequence.slot, position, token, writes)
                self.tokens_run += row.stop - row.start
            self.lengths[sequence.slot] = row.stop
        for row in batch.rows:
            if row.leader < 0:
                self._check_seen(row.sequence, row.start, row.stop)
        for source, target in batch.page_copies:
            for offset in range(self.page_size):
                if (source, offset) in self.memory:
                    self.memory[target, offset] = self.memory[source, offset]
        tokens = [0] * len(batch.rows)
        for i, sequence in batch.sampled:
            tokens[i] = self._sample(sequence)
        return np.asarray([tokens])

    def copy(self, copies: Copies) -> None:
        """Pages to blocks of host memory, then from there."""
        size = self.page_size
        for block, pages in copies.out:
            for old in [place for place in self.host if place[0] == block]:
                del self.host[old]
            for index, page in enumerate(pages):
                self.host[block, index] = {
                    offset: self.memory[page, offset] for offset in range(size)
                }
        targets = [page for _, wanted in copies.into for _, page in wanted]
        assert len(set(targets)) == len(targets)
        for block, wanted in copies.into:
            for index, page in wanted:
                for offset, token in self.host[block, index].items():
                    self.memory[page, offset] = token

    def _check_packing(self, batch: ExtendBatch) -> None:
        """Rows are in order, in tiles of their own, and as many as the buckets hold."""
        end = 0
        for row in batch.rows:
            if row.leader < 0:
                assert row.packed_start % 8 == 0 and row.packed_start >= end
                end = row.packed_start + row.stop - row.start
        assert end <= batch.tokens and len(batch.rows) <= batch.row_bucket
        sequences = [id(row.sequence) for row in batch.rows]
        assert len(set(sequences)) == len(sequences)

    def _check_what_must_run(self, row: ExtendRow) -> None:
        """Nothing is reused that has to run: input logprobs, and outputs that penalties count."""
        request, counted = row.sequence.request, self.counted
        if row.fresh:
            counted[request] = row.start
        assert counted[request] == row.start
        counted[request] = row.stop
        for extra in request.extras:
            if row.fresh and extra.prompt and not extra.complete:
                assert row.start <= extra.prompt.start
        if row.fresh and request.params.frequency_penalty:
            assert row.start <= len(request.prompt_ids)

    def _check_pictures(self, row: ExtendRow) -> None:
        """Where its tokens stand for a picture's, that picture is on the device; and pictures that
        are seen as blocks are run as such."""
        media = row.sequence.request.media
        if media is None:
            return
        for position in range(row.start, min(row.stop, len(media.owners))):
            owner = media.owners[position]
            if owner >= 0:
                picture = (media.pictures[owner].digest, media.offsets[position])
                assert self.pictures[int(row.sequence.media_rows[position])] == picture
        if media.reach is not None:
            for end in {row.start, row.stop}:
                assert not 0 < end < len(media.owners) or media.reach[end - 1] == end - 1

    def _decode(self, batch: DecodeBatch) -> list[list[int]]:
        for row, page in batch.new_pages:
            self.tables[batch.sequences[row].slot].append(page)
        return [self._decode_step(batch) for _ in range(batch.steps)]

    def _decode_step(self, batch: DecodeBatch) -> list[int]:
        writes: set[tuple[int, int]] = set()
        for sequence in batch.sequences:
            position = self.lengths[sequence.slot]
            self._write(sequence.slot, position, self.last[sequence.slot], writes)
            self.lengths[sequence.slot] = position + 1
        return [self._sample(sequence) for sequence in batch.sequences]

    def _keep(self, batch: DecodeBatch, tokens: np.ndarray, accepted: np.ndarray) -> None:
        for row, (sequence, count) in enumerate(zip(batch.sequences, accepted, strict=True)):
            self.lengths[sequence.slot] -= batch.steps - int(count)
            self.last[sequence.slot] = tokens[count - 1, row]
            tokens[count:, row] = -1

    def _write(self, slot: int, position: int, token: int, writes: set[tuple[int, int]]) -> None:
        place = (self.tables[slot][position // self.page_size], position % self.page_size)
        assert place not in writes, "two rows write to one place in the same step"
        writes.add(place)
        self.memory[place] = token

    def _sample(self, sequence: Sequence) -> int:
        """Check that attention would read the sequence's own tokens, then sample."""
        slot, request = sequence.slot, sequence.request
        length = self.lengths[slot]
        self._check_seen(sequence, length - 1, length)
        token = next_token(request.rid, request.sample_index, length)
        self.last[slot] = token
        return token

    def _check_seen(self, sequence: Sequence, start: int, stop: int) -> None:
        """What positions start..stop-1 attend to is what the sequence has there."""
        slot, request = sequence.slot, sequence.request
        first = 0 if self.window is None else max(start - self.window + 1, 0)
        seen = [
            self.memory[self.tables[slot][p // self.page_size], p % self.page_size]
            for p in range(first, stop)
        ]
        expected = request.prompt_ids + [
            next_token(request.rid, request.sample_index, p)
            for p in range(len(request.prompt_ids), stop)
        ]
        assert seen == expected[first:stop]
