"""What an engine says of itself: its counters, and the sizes of its parts. No jax."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from jaxserve.cache.host import HostPages
from jaxserve.output.stats import Stats

if TYPE_CHECKING:
    from jaxserve.scheduler.scheduler import Scheduler
    from jaxserve.step.runner import Runner


def collect(
    scheduler: Scheduler, runner: Runner, stats: Stats, host: HostPages | None
) -> dict[str, Any]:
    """Counters and sizes between two steps, see docs/api.md."""
    config, programs, cache = runner.config, runner.programs, scheduler.pages
    size, pages, free = config.program.page_size, cache.num_pages, cache.available
    host, ready = HostPages(0, 0) if host is None else host, runner.ready.buckets
    return {
        "page_size": size,
        "num_pages": pages,
        "num_used_pages": pages - free,
        "token_usage": 1 - free / pages,
        "available_tokens": free * size,
        "cached_prefix_tokens": cache.cached * size,
        "num_host_pages": host.num_blocks * host.width,
        "num_used_host_pages": len(host),
        "pages_moved_out": host.moved_out,
        "pages_moved_in": host.moved_in,
        "images_encoded": scheduler.stage.encoded,
        "max_total_num_tokens": pages * size,
        "max_running_requests": config.program.max_rows,
        "num_continuous_decode_steps": config.program.steps_per_dispatch,
        "late_compiles": programs.late_compiles,
        "programs": len(programs),
        "programs_compiling": programs.compiling,
        "programs_untimed": programs.untimed,
        "decode_buckets": list(ready.decode),
        "extend_buckets": list(ready.extend),
        "compile_seconds": programs.compile_seconds,
        "all_reduce": runner.all_reduce,
        "num_running": len(scheduler.live) - len(scheduler.waiting),
        "num_waiting": len(scheduler.waiting),
        "memory_usage": runner.memory_usage(),
        **stats.as_dict(scheduler.live),
    }
