"""`sglang.srt.utils.hf_transformers_utils`: the tokenizer that an engine would have."""

from __future__ import annotations

from typing import Any

import converters


def get_tokenizer(
    tokenizer_name: str,
    *,
    tokenizer_mode: str = "auto",
    trust_remote_code: bool = False,
    tokenizer_revision: str | None = None,
) -> Any:
    """A transformers tokenizer, of a folder, a .gguf file or a Hub id.

    trust_remote_code has no effect: jaxserve never runs a checkpoint's code. Raises what
    `converters.load_tokenizer` does.
    """
    del trust_remote_code
    return converters.load_tokenizer(
        tokenizer_name, tokenizer_mode=tokenizer_mode, revision=tokenizer_revision
    )
