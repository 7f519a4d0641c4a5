"""`sglang.utils`."""

from jaxserve.utils import (
    async_stream_and_merge,
    print_highlight,
    stream_and_merge,
    terminate_process,
    trim_overlap,
)

__all__ = [
    "async_stream_and_merge",
    "print_highlight",
    "stream_and_merge",
    "terminate_process",
    "trim_overlap",
]
