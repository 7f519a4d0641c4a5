"""`sglang.srt.server_args`."""

from jaxserve.server_args import ServerArgs

__all__ = ["ServerArgs"]
