"""What calls ask for of grammars: one object for an engine, any thread."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from concurrent.futures import Future
from functools import partial
from typing import TYPE_CHECKING

from jaxserve.checks import quoted
from jaxserve.errors import InvalidRequestError, NotSupportedError, RequestFailedError, is_panic
from jaxserve.grammars.compiler import Compiled, Compiler
from jaxserve.grammars.guide import GrammarSpec
from jaxserve.grammars.library import Library

if TYPE_CHECKING:
    from jaxserve.sampling_params import Grammar
    from jaxserve.server_args import ServerArgs
    from jaxserve.text.codec import Codec

NONE = "none"
"""The `grammar_backend` that there is none of."""


class Grammars:
    """Thread-safe. What it needs of llguidance is made when a grammar is first asked for, or with
    `grammar_backend="llguidance"` at once."""

    def __init__(
        self, args: ServerArgs, codec: Codec | None, vocab_size: int, eos_ids: Iterable[int]
    ) -> None:
        """codec: None with skip_tokenizer_init. Raises, with `grammar_backend="llguidance"`, as
        `ask`."""
        self._args, self._codec = args, codec
        self._vocab_size, self._eos_ids = vocab_size, eos_ids
        self._lock = threading.RLock()
        self._compiler: Compiler | None = None
        self._library: Library | None = None
        if args.grammar_backend == "llguidance" and codec is not None:
            self._open(codec)

    def ask(self, grammar: Grammar) -> Future[Compiled]:
        """Begin to compile a grammar, if it is not there, without waiting for it.

        NotSupportedError: there is no backend, it is not installed, or the tokenizer is none that
        it reads. InvalidRequestError: there is no tokenizer.
        """
        if self._args.grammar_backend == NONE:
            raise NotSupportedError(
                "Grammar-based generation (json_schema, regex, ebnf, structural_tag) is not "
                f"supported with grammar_backend='none', got {named(grammar)}"
            )
        if self._codec is None:
            raise InvalidRequestError(
                f"{named(grammar)} needs a tokenizer, and skip_tokenizer_init=True is set"
            )
        try:
            library, _ = self._open(self._codec)
        except (InvalidRequestError, NotSupportedError) as error:
            raise type(error)(f"{named(grammar)}: {error}") from error
        return library.ask(grammar)

    def spec(self, grammar: Grammar, future: Future[Compiled]) -> GrammarSpec:
        """What `ask` has returned, once it is there. InvalidRequestError: it is no grammar, or took
        longer than the option grammar_timeout."""
        assert self._library is not None and self._compiler is not None
        seconds = self._args.grammar_timeout
        try:
            compiled = future.result(seconds)
        except TimeoutError:
            raise self._timed_out(grammar) from None
        except BaseException as error:
            if isinstance(error, Exception) or is_panic(error):
                raise RequestFailedError.caused_by(error) from error
            raise
        if compiled.seconds > seconds:  # it would go on as slowly, and others with it
            raise self._timed_out(grammar)
        if compiled.matcher is None:
            raise InvalidRequestError(
                f"Invalid grammar request: {named(grammar)}: {compiled.refusal}"
            )
        failed = partial(self._library.forget, grammar)
        return GrammarSpec(named(grammar), compiled.matcher, self._compiler.words, failed)

    def _timed_out(self, grammar: Grammar) -> InvalidRequestError:
        return InvalidRequestError(
            f"Grammar preprocessing timed out: {named(grammar)} was not compiled within "
            f"grammar_timeout={self._args.grammar_timeout:g} seconds"
        )

    def _open(self, codec: Codec) -> tuple[Library, Compiler]:
        with self._lock:
            if self._library is None or self._compiler is None:
                self._compiler = Compiler(self._args, codec, self._vocab_size, self._eos_ids)
                self._library = Library(self._compiler.compile)
            return self._library, self._compiler


def named(grammar: Grammar) -> str:
    """The parameter and its value."""
    return f"{grammar.kind}={quoted(grammar.text)}"
