"""`sglang.srt.entrypoints.engine`."""

from jaxserve.sglang_alias.engine import Engine

__all__ = ["Engine"]
