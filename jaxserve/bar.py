"""Progress bars that end with what they show."""

from __future__ import annotations

from tqdm import tqdm


class Bar(tqdm):
    monitor_interval = 0
    """No monitor: that is a thread which outlives the engine."""
