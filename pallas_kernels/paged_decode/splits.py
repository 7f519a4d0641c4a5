"""How many programs share one row's tokens in decode."""

from __future__ import annotations

# streaming multiprocessors of an H100 or H200, assumed where the device does not say
HOPPER_CORES = 132
MAX_SPLITS = 64
MAX_CLUSTER = 16
"""Blocks of a cluster that Hopper takes; 8 is what every later device takes too."""
CLUSTER_COLUMNS = 8
"""Of the head dim, at least as many are merged by a block of a cluster."""


def choose_splits(programs: int, tiles: int, cores: int) -> int:
    """Splits (a power of two) for `programs` = B*K programs without, of at most `tiles` tiles each.

    At most two programs a core: they keep the memory busy, more only add launches and partial
    results to merge. A row shorter than the page table allows leaves splits without work, which
    exit at once.
    """
    most = min(tiles, MAX_SPLITS, 2 * (cores or HOPPER_CORES) // programs)
    return 1 << (max(most, 1).bit_length() - 1)


def most_in_cluster(head_dim: int) -> int:
    """Blocks that can share one row in a cluster."""
    return min(MAX_CLUSTER, head_dim // CLUSTER_COLUMNS)
