"""What the tokens of a tokenizer stand for."""

from __future__ import annotations

import json
import re
from typing import Any

from jaxserve.checks import shown
from jaxserve.errors import NotSupportedError
from jaxserve.text.codec import byte_letters

SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
"""Stands for a space in vocabularies of SentencePiece."""
BYTE = re.compile(r"<0x([0-9A-F]{2})>")
"""A token of one byte there."""


def token_bytes(tokenizer: Any) -> list[bytes | None]:
    """By token id. None: of special tokens, and of ids without any token.

    tokenizer: of transformers, a fast one, of byte-level BPE or SentencePiece. NotSupportedError:
    of another one.
    """
    from tokenizers import Tokenizer

    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise NotSupportedError(
            f"the tokens' bytes are known of fast tokenizers only, got {shown(tokenizer)}"
        )
    decoders = _types(json.loads(backend.to_str())["decoder"])
    vocabulary = backend.get_vocab(with_added_tokens=False)
    found: list[bytes | None] = [None] * (1 + max(backend.get_vocab().values(), default=-1))
    if "ByteLevel" in decoders:
        of_letter = {letter: byte for byte, letter in enumerate(byte_letters())}
        for text, token in vocabulary.items():
            if all(letter in of_letter for letter in text):
                found[token] = bytes(of_letter[letter] for letter in text)
    elif decoders & {"Metaspace", "ByteFallback"}:
        for text, token in vocabulary.items():
            byte = BYTE.fullmatch(text) if "ByteFallback" in decoders else None
            found[token] = bytes.fromhex(byte[1]) if byte else text.replace(SPACE, " ").encode()
    else:
        raise NotSupportedError(
            "the tokens' bytes are known of byte-level BPE and SentencePiece only; this tokenizer "
            f"decodes with {', '.join(sorted(decoders)) or 'nothing'}"
        )
    for token, added in backend.get_added_tokens_decoder().items():
        found[token] = None if added.special else added.content.encode()
    return found


def _types(decoder: dict[str, Any] | None) -> set[str]:
    """Names of a decoder and of all that it consists of."""
    if decoder is None:
        return set()
    return {decoder["type"]}.union(*map(_types, decoder.get("decoders", ())))
