"""Random prompts, an engine for them, and what comes of them."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from typing import Any

SMALL = {
    "skip_tokenizer_init": True, "context_length": 512, "max_running_requests": 8,
    "cuda_graph_bs": [8], "chunked_prefill_size": 64, "dtype": "float32", "precompile": False,
    "page_size": 16,
}  # fmt: skip
"""Options of an engine for tiny checkpoints, of which an extend and a decode program are all that
most calls need."""
GREEDY = {"temperature": 0, "max_new_tokens": 24, "ignore_eos": True}


def text(seed: int, length: int) -> list[int]:
    """Token ids that every tiny checkpoint knows, none of them special."""
    random_ = random.Random(seed)
    return [random_.randrange(4, 500) for _ in range(length)]


def ids(results: Iterable[Mapping[str, Any]]) -> list[list[int]]:
    """The output of each."""
    return [result["output_ids"] for result in results]
