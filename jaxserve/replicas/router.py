"""Which replica gets a prompt: the option `load_balance_method`. No jax."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterable, Sequence

from jaxserve.replicas.prefixes import Block, PrefixIndex, block_tokens, blocks_of
from jaxserve.replicas.replica import Load, Replica, tokens_of
from jaxserve.request import Request

SHARE = 0.5
"""How much more than the least busy replica one may have to do and still get what it has cached;
beyond it, the tokens that the cache saves count once more."""

Group = list[Request]
"""The samples of one prompt, which share its pages."""


def groups_of(requests: Iterable[Request]) -> list[Group]:
    """Neighbours of one group together."""
    by_group = itertools.groupby(requests, key=lambda request: request.group or id(request))
    return [list(group) for _, group in by_group]


class Router:
    """Thread-safe: its lock is held for its own books alone, a few microseconds a prompt."""

    def __init__(self, method: str, page_size: int, cached_tokens: int, replicas: int) -> None:
        """method: of load_balance_method. cached_tokens: that a replica's prefix cache can hold; 0
        is no cache. replicas: their number."""
        self._block = block_tokens(page_size)
        self._caches = cached_tokens > 0 and method == "auto"
        self._indices = [PrefixIndex(cached_tokens // self._block) for _ in range(replicas)]
        self._turn = 0
        self._choose: Callable[[Group, list[Replica], list[Load], list[int]], int] = {
            "auto": self._by_prefix,
            "round_robin": self._in_turn,
            "total_requests": self._fewest_requests,
            "total_tokens": self._fewest_tokens,
        }[method]
        # Re-entrant: a signal handler may submit while its own thread does.
        self._lock = threading.RLock()

    def route(self, groups: Sequence[Group], replicas: list[Replica]) -> dict[Replica, list[Group]]:
        """Divides prompts among `replicas`, at least one, and counts them as given."""
        blocks = [self._blocks(group[0]) for group in groups]
        loads = [replica.load for replica in replicas]
        parts: dict[Replica, list[Group]] = {}
        with self._lock:
            for group, prompt in zip(groups, blocks, strict=True):
                indices = [self._indices[replica.rank] for replica in replicas]
                matched = [index.match(prompt) * self._block for index in indices]
                chosen = self._choose(group, replicas, loads, matched)
                replica = replicas[chosen]
                self._give(replica, group, prompt)
                loads[chosen].requests += len(group)
                loads[chosen].tokens += sum(map(tokens_of, group))
                parts.setdefault(replica, []).append(group)
        return parts

    def pin(self, groups: Sequence[Group], replica: Replica) -> None:
        """All of them are for `replica`."""
        blocks = [self._blocks(group[0]) for group in groups]
        with self._lock:
            for group, prompt in zip(groups, blocks, strict=True):
                self._give(replica, group, prompt)

    def take_back(self, groups: Iterable[Group], replica: Replica) -> None:
        """They were not queued there."""
        with self._lock:
            for group in groups:
                replica.take_back(group)

    def forget_prefixes(self) -> None:
        """Caches are empty."""
        with self._lock:
            for index in self._indices:
                index.clear()

    def _blocks(self, request: Request) -> list[Block]:
        return blocks_of(request, self._block) if self._caches else []

    def _give(self, replica: Replica, group: Group, prompt: list[Block]) -> None:
        replica.give(group)
        self._indices[replica.rank].add(prompt)

    # -- the methods ------------------------------------------------------------------------------

    def _by_prefix(
        self, group: Group, replicas: list[Replica], loads: list[Load], matched: list[int]
    ) -> int:
        """The longest cached prefix, unless much more is to be done there than elsewhere; of equal
        ones the least to do."""
        least = min(load.tokens for load in loads)
        numbers = [
            number
            for number, load in enumerate(loads)
            if load.tokens <= (1 + SHARE) * least + matched[number]
        ]
        return min(numbers, key=lambda n: (-matched[n], loads[n].tokens, loads[n].requests))

    def _in_turn(
        self, group: Group, replicas: list[Replica], loads: list[Load], matched: list[int]
    ) -> int:
        self._turn += 1
        return (self._turn - 1) % len(replicas)

    def _fewest_requests(
        self, group: Group, replicas: list[Replica], loads: list[Load], matched: list[int]
    ) -> int:
        return min(range(len(loads)), key=lambda n: (loads[n].requests, loads[n].tokens))

    def _fewest_tokens(
        self, group: Group, replicas: list[Replica], loads: list[Load], matched: list[int]
    ) -> int:
        return min(range(len(loads)), key=lambda n: (loads[n].tokens, loads[n].requests))
