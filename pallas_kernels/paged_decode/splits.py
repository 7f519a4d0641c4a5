"""How many programs share one row's tokens in decode."""

from __future__ import annotations

# streaming multiprocessors of an H100 or H200, assumed where the device does not say
HOPPER_CORES = 132
MAX_SPLITS = 64


def choose_splits(programs: int, tiles: int, cores: int) -> int:
    """Splits (a power of two) for `programs` = B*K programs without, of at most `tiles` tiles each.

    At most two programs a core: they keep the memory busy, more only add launches and partial
    results to merge. A row shorter than the page table allows leaves splits without work, which
    exit at once.
    """
    most = min(tiles, MAX_SPLITS, 2 * (cores or HOPPER_CORES) // programs)
    return 1 << (max(most, 1).bit_length() - 1)
