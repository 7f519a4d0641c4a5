"""What a replica's prefix cache is likely to have: a digest of what was sent there. No jax."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from jaxserve.request import Request

LEAST_BLOCK = 64
"""Tokens that one entry stands for, or a page where that is more."""
Block = int
"""The hash of a prefix that ends with a whole block. Two that are equal by chance cost a detour:
the caches themselves compare tokens."""


class PrefixIndex:
    """Blocks of the prompts that one replica was sent, the last used ones. Not thread-safe.

    The radix tree itself is the engine thread's, and changes while it would be read. Outputs are
    not in here: of a conversation's next turn the earlier prompts are found.
    """

    def __init__(self, most: int) -> None:
        """most: blocks that are kept, as many as the cache can hold."""
        self._most = most
        self._blocks: OrderedDict[Block, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._blocks)

    def match(self, blocks: Sequence[Block]) -> int:
        """How many of a prompt's blocks, from its first, are here."""
        known = self._blocks
        for count, block in enumerate(blocks):
            if block not in known:
                return count
        return len(blocks)

    def add(self, blocks: Sequence[Block]) -> None:
        """A prompt of these blocks was sent."""
        known = self._blocks
        for block in reversed(blocks):  # what everything else stands on goes last
            known[block] = None
            known.move_to_end(block)
        while len(known) > self._most:
            known.popitem(last=False)

    def clear(self) -> None:
        """Nothing is cached any more."""
        self._blocks.clear()


def block_tokens(page_size: int) -> int:
    """Tokens of a block: whole pages."""
    return -(-LEAST_BLOCK // page_size) * page_size


def blocks_of(request: Request, tokens: int) -> list[Block]:
    """The blocks of `tokens` tokens of a request's prompt, without the last token, which always
    runs. Some 10 us for a thousand tokens."""
    keys = request.prompt_ids if request.prompt_keys is None else request.prompt_keys
    block, blocks = hash(request.namespace), []
    for start in range(0, len(keys) - tokens, tokens):
        block = hash((block, *keys[start : start + tokens]))
        blocks.append(block)
    return blocks
