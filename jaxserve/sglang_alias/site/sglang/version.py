"""`sglang.version`."""

from jaxserve.sglang_alias import VERSION as __version__

__all__ = ["__version__"]
