"""Slots and pages to sequences, and back. No jax."""

from __future__ import annotations

import math
import time

import numpy as np

from jaxserve.cache.prefix import Lease, PrefixCache
from jaxserve.cache.window import Window
from jaxserve.packing.sequence import Sequence
from jaxserve.packing.slots import Rows, Slots
from jaxserve.scheduler.stage import Stage


class Admission:
    """Takes what a sequence needs to run, its cached prefix first, and gives it back."""

    def __init__(
        self,
        pages: PrefixCache,
        slots: Slots,
        stage: Stage,
        page_size: int,
        conservativeness: float = 1.0,
        alignment: int = 1,
        window: Window | None = None,
        chunk: int = 1,
    ):
        self._pages = pages
        self._slots = slots
        self._stage = stage
        self._page_size = page_size
        self._unit = max(page_size, alignment)
        """Cached prefixes end at multiples of so many tokens. (`alignment` is a multiple of the
        page size, or 1 for any.)"""
        self._margin = math.ceil(conservativeness * page_size)
        """Tokens that stay free for each admitted sequence to grow into when another one comes,
        fewer where it may not generate as much. Nothing is reserved for the rest of an output:
        retraction is cheap, and most end early."""
        self._window = window
        """Of models in which no layer sees further: pages outside are given back."""
        self._ring = None if window is None else min(window.ring(chunk), pages.num_pages)
        """Pages that a sequence for which there is no room as a whole takes over and over, to run
        `chunk` tokens at a time. The pool holds a ring for `alignment` tokens at least."""
        beside = 0 if window is None else window.ring(1)
        self._longest = (pages.num_pages - beside) * page_size

    @property
    def version(self) -> tuple[int, int]:
        """Changes when a slot is taken or given back, and when a prefix is cached: one who had no
        room may have some now."""
        return self._slots.available, self._pages.tree.version

    def cached_pages(self, sequence: Sequence) -> int:
        """How long its cached prefix is."""
        return self._pages.tree.length(sequence.request.namespace, self._known(sequence))

    def to_run(self, sequence: Sequence, enough: int) -> int:
        """Tokens of a waiting sequence that are not cached; if all are at most `enough`, all."""
        total = sequence.total_tokens
        if total <= enough:
            return total
        return total - self.cached_pages(sequence) * self._page_size

    def has_room(self, sequence: Sequence) -> bool:
        """Whether `admit` would succeed."""
        room = self._find_room(sequence)
        if room is not None:
            self._pages.end(room[0], room[1])
        return room is not None

    def admit(self, sequence: Sequence) -> bool:
        """Take a slot, the cached prefix and pages for all tokens of `sequence`, or a ring of them;
        False, if there is no room, changes nothing."""
        room = self._find_room(sequence)
        if room is None:
            return False
        lease, shared, own = room
        self._pages.used(lease)
        found = []
        if self._pages.host is not None:
            unit = self._unit // self._page_size
            found = self._pages.find_on_host(lease, self._reusable(sequence), own, unit)
            whole = self._whole(sequence, (len(shared) + len(found)) * self._page_size)
            found = found[: whole // self._page_size - len(shared)]
        new = self._pages.allocate(own)
        if found:
            self._pages.load(found, new[: len(found)])
        sequence.lease, sequence.dropped = lease, 0
        sequence.reused = (len(shared) + len(found)) * self._page_size
        self._take_slot(sequence, sequence.reused, len(found) * self._page_size)
        self.hold(sequence, shared + new)
        sequence.most_kv = sequence.reused
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
        self._pages.share(shared[leader.dropped :])
        own = self._pages.allocate(1 if partial else 0)
        self.hold(sibling, shared + own)
        sibling.dropped = leader.dropped
        sibling.most_kv = leader.prompt_len
        return [(leader.pages[full], page) for page in own]

    def publish(self, sequence: Sequence) -> None:
        """Let others begin with the full pages of `sequence` that are scheduled, unless it needs
        them again for its own next ones, or their lock could keep it from going on."""
        full = sequence.most_kv - sequence.most_kv % self._unit
        whole = sequence.capacity >= sequence.total_tokens and not sequence.dropped
        if self._pages.enabled and whole and full <= self._longest:
            self._pages.publish(sequence.lease, sequence.keys(full), sequence.pages)

    def hold(self, sequence: Sequence, pages: list[int]) -> None:
        """Add pages to those of an admitted sequence."""
        sequence.pages += pages
        self._slots.capacity[sequence.slot] = len(sequence.pages) * self._page_size

    def slide(self, sequence: Sequence) -> None:
        """Give back the pages that no token to come sees. Steps in flight may still read them:
        whoever takes them next runs later. The prefix shared with the cache goes as a whole."""
        if self._window is None:
            return
        passed = self._window.passed(sequence.most_kv)
        if passed <= sequence.dropped or passed < sequence.lease.count:
            return
        self._pages.end(sequence.lease, sequence.pages[sequence.dropped : passed])
        sequence.lease = sequence.lease.none()
        sequence.dropped = passed

    def advance(self, sequence: Sequence) -> None:
        """Before a chunk: slide, and take the pages for further tokens, if those of an admitted
        sequence do not reach to its last one."""
        if self._ring is None:  # it has had them all since it was admitted
            return
        self.slide(sequence)
        missing = self._count_pages(sequence.total_tokens) - len(sequence.pages)
        if missing > 0:
            free = self._ring - (len(sequence.pages) - sequence.dropped)
            self.hold(sequence, self._pages.allocate(max(min(missing, free), 0)))

    def grow(self, rows: Rows, new_pages: list[tuple[int, int]], steps: int) -> bool:
        """Give a page to each of `rows` whose last one has no room for `steps` tokens, in their
        order. True when pages ran out on the way."""
        full = self._slots.most_kv.take(rows.slots) + steps > self._slots.capacity.take(rows.slots)
        for row in np.flatnonzero(full).tolist():
            self.slide(rows.sequences[row])
            if not self._pages.available:
                return True
            page = self._pages.allocate(1)
            self.hold(rows.sequences[row], page)
            new_pages.append((row, page[0]))
        return False

    def shrink(self, rows: Rows, new_pages: list[tuple[int, int]]) -> None:
        """Take back what `grow` gave."""
        for row, page in new_pages:
            rows.sequences[row].pages.pop()
            self.hold(rows.sequences[row], [])
            self._pages.release([page])
        new_pages.clear()

    def release(self, sequence: Sequence) -> None:
        """Give back slot and pages. Full pages of tokens that have been read stay cached, except
        for the last output's: the step that computes its KV may not have run. (None of the outputs,
        where they are to be decoded again.)"""
        sequence.drain()
        self._stage.leave(sequence)
        keys = b""
        if self._pages.enabled and not sequence.dropped:
            outputs = self._slots.kept(sequence.request)
            known = min(sequence.most_kv, sequence.prompt_len + max(outputs - 1, 0))
            keys = sequence.keys(known - known % self._unit)
        self._pages.end(sequence.lease, sequence.pages[sequence.dropped :], keys)
        self._slots.release(sequence.slot)
        sequence.lease = sequence.lease.none()
        sequence.pages = []
        sequence.slot = -1

    def _reserve(self) -> int:
        """Pages to leave to what is admitted already."""
        return self._slots.growth(self._margin, self._page_size)

    def _count_pages(self, tokens: int) -> int:
        return -(-tokens // self._page_size)

    def _find_room(self, sequence: Sequence) -> tuple[Lease, list[int], int] | None:
        """The cached prefix of `sequence`, leased, its pages, and how many it takes beside them;
        None if that is too much, or will be when it has decoded again what it has."""
        if not self._slots.available:
            return None
        request = sequence.request
        lease, shared = self._pages.lease(request.namespace, self._known(sequence))
        reserve = self._reserve()
        own = self._count_pages(sequence.total_tokens) - len(shared)
        again = sequence.prompt_len + len(request.output_ids)
        needed = self._count_pages(again) - len(shared)
        if self._ring is not None and needed + reserve > self._pages.available:
            own, needed = min(own, self._ring), min(needed, self._ring)
            if shared and needed + reserve > self._pages.available:  # the prefix is in the way
                self._pages.end(lease, shared)
                lease, shared = lease.none(), []
                own = min(self._count_pages(sequence.total_tokens), self._ring)
                needed = min(self._count_pages(again), self._ring)
        if needed + reserve > self._pages.available:
            self._pages.end(lease, shared)
            return None
        return lease, shared, own

    def _reusable(self, sequence: Sequence) -> bytes:
        """The keys of its tokens whose KV may come from the cache."""
        return sequence.keys(sequence.reusable) if self._pages.enabled else b""

    def _known(self, sequence: Sequence) -> bytes:
        """The keys to look for in the cache: as many as are there, where not any page will do."""
        keys, media = self._reusable(sequence), sequence.request.media
        if self._unit == self._page_size and (media is None or media.reach is None):
            return keys
        cached = self._pages.tree.length(sequence.request.namespace, keys) * self._page_size
        return keys[: 4 * self._whole(sequence, cached)]

    def _whole(self, sequence: Sequence, cached: int) -> int:
        """How many of its `cached` leading tokens need not run: whole pages, units and blocks."""
        media, count = sequence.request.media, cached - cached % self._unit
        while media is not None and (uncut := media.uncut(count)) < count:
            count = uncut - uncut % self._unit
        return count

    def _take_slot(self, sequence: Sequence, cached: int, on_host: int = 0) -> None:
        """cached: leading tokens that need not run. on_host: those of them in host memory."""
        request = sequence.request
        sequence.slot = self._slots.take(request)
        if request.admitted_time is None:
            request.admitted_time = time.perf_counter()
            request.cached_tokens = cached
            request.cached_host_tokens = None if self._pages.host is None else on_host
