"""Slots and pages to sequences, and back. No jax."""

from __future__ import annotations

import math
import time

from jaxserve.cache.prefix import Lease, PrefixCache
from jaxserve.scheduler.sequence import Sequence
from jaxserve.scheduler.slots import Slots


class Admission:
    """Takes what a sequence needs to run, its cached prefix first, and gives it back.

    conservativeness: pages that are left free for each admitted sequence to grow into when another
    one comes (fewer where it may not generate as much). Nothing is reserved for the rest of an
    output: retraction is cheap, and most end early. alignment: cached prefixes end at multiples of
    it, a multiple of the page size, or 1 for any page.
    """

    def __init__(
        self, pages: PrefixCache, slots: Slots, page_size: int, conservativeness: float = 1.0,
        alignment: int = 1,
    ):  # fmt: skip
        self._pages = pages
        self._slots = slots
        self._page_size = page_size
        self._unit = max(page_size, alignment)
        self._margin = math.ceil(conservativeness * page_size)

    @property
    def version(self) -> tuple[int, int]:
        """Changes when a slot is taken or given back, and when a prefix is cached: one who had no
        room may have some now."""
        return self._slots.available, self._pages.tree.version

    def cached_pages(self, sequence: Sequence) -> int:
        """How long its cached prefix is."""
        return self._pages.tree.length(sequence.request.cache_salt, self._known(sequence))

    def has_room(self, sequence: Sequence) -> bool:
        """Whether `admit` would succeed."""
        room = self._find_room(sequence)
        if room is not None:
            self._pages.end(room[0], room[1])
        return room is not None

    def admit(self, sequence: Sequence) -> bool:
        """Take a slot, the cached prefix and pages for all tokens of `sequence`; False, if there is
        no room, changes nothing."""
        room = self._find_room(sequence)
        if room is None:
            return False
        lease, shared, own = room
        self._pages.used(lease)
        sequence.lease = lease
        sequence.reused = len(shared) * self._page_size
        self._take_slot(sequence, sequence.reused)
        self.hold(sequence, shared + self._pages.allocate(own))
        sequence.kv_len = sequence.reused
        return True

    def fork(self, sibling: Sequence, leader: Sequence) -> list[tuple[int, int]] | None:
        """Admit a sample of the same prompt as `leader`'s, whose KV is scheduled: they share its
        full pages. The page to copy into another, if the last is partly filled; None if there is
        no room."""
        full, partial = divmod(leader.prompt_len, self._page_size)
        enough = self._pages.available >= bool(partial) + self._reserve()
        if not (self._slots.available and enough):
            return None
        most = leader.prompt_len - 1
        self._take_slot(sibling, most - most % self._page_size if self._pages.enabled else 0)
        sibling.share_prompt(leader)
        sibling.lease = self._pages.copy(leader.lease)
        shared = leader.pages[:full]
        self._pages.share(shared)
        own = self._pages.allocate(1 if partial else 0)
        self.hold(sibling, shared + own)
        sibling.kv_len = leader.prompt_len
        return [(leader.pages[full], page) for page in own]

    def publish(self, sequence: Sequence) -> None:
        """Let others begin with the full pages of `sequence` that are scheduled."""
        if self._pages.enabled:
            full = sequence.kv_len - sequence.kv_len % self._unit
            self._pages.publish(sequence.lease, sequence.token_bytes(full), sequence.pages)

    def hold(self, sequence: Sequence, pages: list[int]) -> None:
        """Add pages to those of an admitted sequence."""
        sequence.pages += pages
        self._slots.capacity[sequence.slot] = len(sequence.pages) * self._page_size

    def release(self, sequence: Sequence) -> None:
        """Give back slot and pages. Full pages of tokens that have been read stay cached, except
        for the last output's: the step that computes its KV may not have run. (None of the outputs,
        where they are to be decoded again.)"""
        sequence.drain()
        tokens = b""
        if self._pages.enabled:
            outputs = self._slots.kept(sequence.request)
            known = min(sequence.kv_len, sequence.prompt_len + max(outputs - 1, 0))
            tokens = sequence.token_bytes(known - known % self._unit)
        self._pages.end(sequence.lease, sequence.pages, tokens)
        self._slots.release(sequence.slot)
        sequence.lease = Lease()
        sequence.pages = []
        sequence.slot = -1

    def _reserve(self) -> int:
        """Pages to leave to what is admitted already."""
        return self._slots.growth(self._margin, self._page_size)

    def _find_room(self, sequence: Sequence) -> tuple[Lease, list[int], int] | None:
        """The cached prefix of `sequence`, leased, its pages, and how many it needs beside them;
        None if that is too much, or will be when it has decoded again what it has."""
        if not self._slots.available:
            return None
        request = sequence.request
        lease, shared = self._pages.lease(request.cache_salt, self._known(sequence))
        own = -(-sequence.total_tokens // self._page_size) - len(shared)
        again = sequence.prompt_len + len(request.output_ids)
        needed = -(-again // self._page_size) - len(shared)
        if needed + self._reserve() > self._pages.available:
            self._pages.end(lease, shared)
            return None
        return lease, shared, own

    def _known(self, sequence: Sequence) -> bytes:
        """The tokens of `sequence` to look for in the cache."""
        if not self._pages.enabled:
            return b""
        tokens = sequence.token_bytes(sequence.reusable)
        if self._unit == self._page_size:
            return tokens
        cached = self._pages.tree.length(sequence.request.cache_salt, tokens) * self._page_size
        return tokens[: 4 * (cached - cached % self._unit)]

    def _take_slot(self, sequence: Sequence, cached: int) -> None:
        """cached: leading tokens that need not run."""
        request = sequence.request
        sequence.slot = self._slots.take(request)
        if request.admitted_time is None:
            request.admitted_time = time.perf_counter()
            request.cached_tokens = cached
