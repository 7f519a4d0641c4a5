"""Text to token ids and back: the one place of an engine that calls a tokenizer.

It works on a copy made when the engine starts, so that nothing a user does with
`engine.tokenizer` (truncation and padding are state of the shared object) reaches a request. The
copy is never changed, so any number of threads may use it at a time, without a lock.
"""

from __future__ import annotations

import copy
import functools
import json
from typing import Any, NamedTuple, Protocol

from jaxserve.checks import encodable
from jaxserve.errors import InvalidRequestError, ModelLoadError, RequestFailedError, is_panic

SPLITTING = frozenset(("ByteLevel", "Split", "Digits", "Metaspace"))
"""Pre-tokenizers that lose no character (`Split` unless it is told to)."""


class Serialized(NamedTuple):
    """A tokenizer as a library in another language reads it."""

    json: str
    """A tokenizer.json."""
    tokens: int
    """One more than its largest id."""


class _Backend(Protocol):
    def encode(self, texts: list[str], special: bool) -> list[list[int]]: ...
    def decode(self, ids: list[int], skip: bool, spaces: bool) -> str: ...
    def special_ids(self) -> list[int]: ...
    def serialized(self) -> Serialized | None: ...


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
                encodable(f"{name} {row} of the batch" if len(texts) > 1 else name, text)
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

    def least_tokens(self, text: str) -> int:
        """How many tokens a text has at least, by its bytes: it is not encoded. 0 where no bound is
        known, because the tokenizer shortens text or drops it."""
        if self._bound is None:
            return 0
        longest, lost = self._bound
        return len(text.encode(errors="replace").translate(None, lost)) // longest

    def serialized(self) -> Serialized | None:
        """What makes the same tokenizer elsewhere; None of one that is not tokenizers'."""
        return self._backend.serialized()

    @functools.cached_property
    def special_ids(self) -> frozenset[int]:
        """The tokens that `skip_special_tokens` leaves out."""
        return frozenset(self._backend.special_ids())

    @functools.cached_property
    def _bound(self) -> tuple[int, bytes] | None:
        backend = self._backend
        return _token_bound(backend.tokenizer) if isinstance(backend, _Rust) else None


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

    def special_ids(self) -> list[int]:
        added = self.tokenizer.get_added_tokens_decoder()
        return [token_id for token_id, token in added.items() if token.special]

    def serialized(self) -> Serialized | None:
        return _serialized(self.tokenizer)


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

    def special_ids(self) -> list[int]:
        return self.tokenizer.all_special_ids

    def serialized(self) -> Serialized | None:
        return _serialized(getattr(self.tokenizer, "backend_tokenizer", None))


def _serialized(backend: Any) -> Serialized | None:
    from tokenizers import Tokenizer

    if not isinstance(backend, Tokenizer):
        return None
    return Serialized(backend.to_str(), 1 + max(backend.get_vocab().values(), default=-1))


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


def _token_bound(backend: Any) -> tuple[int, bytes] | None:
    """How many bytes of text one token stands for at most, and the bytes that the vocabulary does
    not know, which are dropped. None for other than byte-level BPE, or BPE with bytes to fall back
    on, that keeps all the text."""
    from tokenizers.models import BPE

    model, splitters = backend.model, _parts(backend.pre_tokenizer)
    if not isinstance(model, BPE) or model.continuing_subword_prefix or model.end_of_word_suffix:
        return None
    if not all(map(_keeps_length, _parts(backend.normalizer))) or not all(
        part["type"] in SPLITTING and part.get("behavior") != "Removed" for part in splitters
    ):
        return None
    added = list(backend.get_added_tokens_decoder().values())
    if any(token.lstrip or token.rstrip for token in added):
        return None
    vocabulary: dict[str, int] = backend.get_vocab(with_added_tokens=False)
    if any(part["type"] == "ByteLevel" for part in splitters):
        if model.unk_token is not None:
            return None
        lost = bytes(b for b, letter in enumerate(byte_letters()) if letter not in vocabulary)
        longest = max(map(len, vocabulary))  # letters stand for a byte each
    elif model.byte_fallback and all(f"<0x{byte:02X}>" in vocabulary for byte in range(256)):
        lost, longest = b"", max(len(token.encode()) for token in vocabulary)
    else:
        return None
    return max([longest, *(len(token.content.encode()) for token in added)]), lost


def byte_letters() -> list[str]:
    """The letter of each byte in byte-level vocabularies (GPT-2's bytes_to_unicode): printable
    ones of Latin-1 are their own, the others follow from U+0100 on."""
    own = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte if byte in own else next(others)) for byte in range(256)]


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
