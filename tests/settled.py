"""Engines that must end as they began."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import jaxserve


@contextlib.contextmanager
def settled(folder: Any, **options: Any) -> Iterator[jaxserve.Engine]:
    """An engine of which nothing was compiled late, and all pages are free at the end."""
    with jaxserve.Engine(folder, **options) as engine:
        yield engine
        assert engine.get_server_info()["late_compiles"] == 0
        assert engine.flush_cache().success
        info = engine.get_server_info()
        assert info["available_tokens"] == info["max_total_num_tokens"]
