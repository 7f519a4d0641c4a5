"""Text to token ids and back: the one place of an engine that calls a tokenizer.

It works on a copy made when the engine starts, so that nothing a user does with
`engine.tokenizer` (truncation and padding are state of the shared object) reaches a request. The
copy is never changed, so any number of threads may use it at a time, without a lock.
"""

from __future__ import annotations

import copy
import functools
import json
from typing import Any, Protocol

from jaxserve.errors import InvalidRequestError, ModelLoadError, RequestFailedError, is_panic

SPLITTING = frozenset(("ByteLevel", "Split", "Digits", "Metaspace"))
"""Pre-tokenizers that lose no character (`Split` unless it is told to)."""


class _Backend(Protocol):
    def encode(self, texts: list[str], special: bool) -> list[list[int]]: ...
    def decode(self, ids: list[int], skip: bool, spaces: bool) -> str: ...


class Codec:
    """Encodes and decodes as the transformers tokenizer did that it was made of.

    Failures of the tokenizer are RequestFailedError, panics of its Rust code included: those are
    BaseExceptions, and would end the engine's thread.
    """

    def __init__(self, tokenizer: Any) -> None:
        """Raises ModelLoadError if the tokenizer cannot be copied."""
        self._backend: _Backend
        try:
            self._backend = _Rust(tokenizer) if _is_plain(tokenizer) else _Python(tokenizer)
        except BaseException as error:
            _reraise_unless_failure(error)
            raise ModelLoadError(
                f"the tokenizer ({type(tokenizer).__name__}) cannot be copied: {str(error)[:2000]}"
            ) from error

    def encode(
        self, name: str, texts: list[str], *, add_special_tokens: bool = True
    ) -> list[list[int]]:
        """Token ids of each text. add_special_tokens: with those that the tokenizer puts around a
        prompt.

        Raises InvalidRequestError, with `name` and the row, for text that is no Unicode (lone
        surrogates).
        """
        try:
            return self._backend.encode(texts, add_special_tokens)
        except BaseException as error:
            _reraise_unless_failure(error)
            for row, text in enumerate(texts):
                check_unicode(f"{name} {row} of the batch" if len(texts) > 1 else name, text)
            raise _failed("encode", error) from error

    def decode(
        self,
        token_ids: list[int],
        *,
        skip_special_tokens: bool = False,
        spaces_between_special_tokens: bool = True,
    ) -> str:
        """The text of token ids. spaces_between_special_tokens: of tokenizers that know it."""
        try:
            return self._backend.decode(
                token_ids, skip_special_tokens, spaces_between_special_tokens
            )
        except BaseException as error:
            _reraise_unless_failure(error)
            raise _failed("decode", error) from error

    @functools.cached_property
    def longest_token(self) -> int | None:
        """Bytes of text that one token stands for at most; None where no bound is known, because
        the tokenizer drops or shortens text. A text has at least as many tokens as this goes into
        its bytes."""
        backend = self._backend
        return _longest_token(backend.tokenizer) if isinstance(backend, _Rust) else None


class _Rust:
    """A private copy of a fast tokenizer's own backend, called directly."""

    def __init__(self, tokenizer: Any) -> None:
        backend = tokenizer.backend_tokenizer
        self.tokenizer = type(backend).from_str(backend.to_str())
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.tokenizer.encode_special_tokens = tokenizer.split_special_tokens

    def encode(self, texts: list[str], special: bool) -> list[list[int]]:
        # The only one of its methods that lets other Python threads run meanwhile.
        encoded = self.tokenizer.encode_batch_fast(texts, add_special_tokens=special)
        return [text.ids for text in encoded]

    def decode(self, ids: list[int], skip: bool, spaces: bool) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=skip)


class _Python:
    """A copy of a tokenizer that does part of its work in Python."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = copy.deepcopy(tokenizer)

    def encode(self, texts: list[str], special: bool) -> list[list[int]]:
        for text in texts:
            text.encode()  # some take what is no Unicode
        # verbose=False: its warning of long inputs is about a limit that is not the engine's.
        return self.tokenizer(texts, add_special_tokens=special, verbose=False)["input_ids"]

    def decode(self, ids: list[int], skip: bool, spaces: bool) -> str:
        return self.tokenizer.decode(
            ids,
            skip_special_tokens=skip,
            # Cleaning up removes spaces already shown, and transformers skips it for BPE anyway.
            clean_up_tokenization_spaces=False,
            spaces_between_special_tokens=spaces,
        )


def check_unicode(name: str, text: str) -> None:
    """Raises InvalidRequestError if `text` has half of a surrogate pair, which no encoding of
    Unicode can write."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequestError(
            f"{name} is not Unicode text: character {error.start} is the lone surrogate "
            f"U+{ord(text[error.start]):04X}"
        ) from error


def _is_plain(tokenizer: Any) -> bool:
    """Whether a transformers tokenizer only hands text to its backend and back."""
    from transformers import PreTrainedTokenizerFast

    return isinstance(tokenizer, PreTrainedTokenizerFast) and all(
        getattr(type(tokenizer), name) is getattr(PreTrainedTokenizerFast, name)
        for name in ("__call__", "_encode_plus", "decode", "_decode")
    )


def _reraise_unless_failure(error: BaseException) -> None:
    """Ctrl-C and the interpreter's end are nobody's failures, and our errors are named already."""
    if isinstance(error, RequestFailedError | InvalidRequestError):
        raise error
    if not isinstance(error, Exception) and not is_panic(error):
        raise error


def _failed(verb: str, error: BaseException) -> RequestFailedError:
    return RequestFailedError(
        f"the tokenizer failed to {verb}: {type(error).__name__}: {str(error)[:2000]}"
    )


def _longest_token(backend: Any) -> int | None:
    """See `Codec.longest_token`: of BPE whose alphabet is complete: of bytes, or with bytes to fall
    back on."""
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel

    model, splitters = backend.model, _parts(backend.pre_tokenizer)
    if not isinstance(model, BPE) or model.continuing_subword_prefix or model.end_of_word_suffix:
        return None
    if not all(map(_keeps_length, _parts(backend.normalizer))) or not all(
        part["type"] in SPLITTING and part.get("behavior") != "Removed" for part in splitters
    ):
        return None
    vocabulary: dict[str, int] = backend.get_vocab(with_added_tokens=False)
    by_bytes = any(part["type"] == "ByteLevel" for part in splitters)
    if by_bytes:
        complete = all(letter in vocabulary for letter in ByteLevel.alphabet())
    else:
        complete = model.byte_fallback and all(
            f"<0x{byte:02X}>" in vocabulary for byte in range(256)
        )
    added = backend.get_added_tokens_decoder().values()
    if not complete or any(token.lstrip or token.rstrip for token in added):
        return None
    # Letters of the byte alphabet stand for a byte each.
    longest = max(map(len, vocabulary)) if by_bytes else max(len(t.encode()) for t in vocabulary)
    return max([longest, *(len(token.content.encode()) for token in added)])


def _state(part: Any) -> dict[str, Any]:
    return {} if part is None else json.loads(part.__getstate__())


def _parts(part: Any) -> list[dict[str, Any]]:
    """A component's parts, of sequences within sequences too."""
    todo, found = [_state(part)], []
    while todo:
        state = todo.pop()
        inner = state.get("normalizers") or state.get("pretokenizers")
        if inner:
            todo += inner
        elif state:
            found.append(state)
    return found


def _keeps_length(normalizer: dict[str, Any]) -> bool:
    """Whether a normalizer never makes text shorter, in bytes."""
    if normalizer["type"] == "Prepend":
        return True
    pattern = normalizer.get("pattern", {}).get("String")
    return (
        normalizer["type"] == "Replace"
        and pattern is not None
        and len(normalizer["content"].encode()) >= len(pattern.encode())
    )
