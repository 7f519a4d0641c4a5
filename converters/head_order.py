"""Where the rows of a head of q and k go, so that the pairs that RoPE rotates lie at (i, H/2 + i).

Scores are sums over a head: any order that q and k share gives the same ones. So a checkpoint that
pairs its rows in another way, or rotates a part of a head, costs nothing at run time.
"""

from __future__ import annotations

from jaxserve.models.config import ModelConfig

Order = tuple[int, ...]
"""[H]: which row of a checkpoint's head is each of ours."""


def half_split(config: ModelConfig) -> Order:
    """Of heads whose first r rows are rotated, in pairs (i, r/2 + i): Phi-3, GPT-NeoX."""
    half = config.rope.rotated(config.head_dim) // 2
    return _with_others(range(half), range(half, 2 * half), config.head_dim)


def interleaved(config: ModelConfig) -> Order:
    """Of heads whose first r rows are rotated, in pairs (2i, 2i + 1): GLM, Cohere, GPT-J."""
    rotated = config.rope.rotated(config.head_dim)
    return _with_others(range(0, rotated, 2), range(1, rotated, 2), config.head_dim)


def _with_others(first: range, second: range, head_dim: int) -> Order:
    """The rows behind the rotated ones fill both halves up."""
    middle = (len(first) + len(second) + head_dim) // 2
    others = range(len(first) + len(second), middle), range(middle, head_dim)
    return (*first, *others[0], *second, *others[1])
