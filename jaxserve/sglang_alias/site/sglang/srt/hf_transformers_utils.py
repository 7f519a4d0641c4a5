"""`sglang.srt.hf_transformers_utils`, where earlier releases had `get_tokenizer`."""

from .utils.hf_transformers_utils import get_tokenizer

__all__ = ["get_tokenizer"]
