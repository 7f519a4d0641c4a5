"""Compiles grammars for one engine's tokens."""

from __future__ import annotations

import importlib.util
import re
import time
from typing import TYPE_CHECKING, NamedTuple

from jaxserve.errors import InvalidRequestError, NotSupportedError
from jaxserve.grammars.dialects import READERS, Dialect, layout_of

if TYPE_CHECKING:
    from collections.abc import Iterable

    from llguidance import LLMatcher

    from jaxserve.sampling_params import Grammar
    from jaxserve.server_args import ServerArgs
    from jaxserve.text.codec import Codec

SLOWEST_MASK = 1.0
"""Seconds. One takes 20 us, and at worst some ms; all requests of an engine wait for it."""
LONGEST_REASON = 1_000
"""Characters of a message of llguidance, which may repeat the grammar."""
INTERNAL = re.compile(r"<(backtrace|non-verbose/|state)>")
"""Where in such a message begins what concerns llguidance's authors only."""
DEAD_END = "NoExtensionBias"
"""How llguidance calls a grammar that cannot go on."""


class Compiled(NamedTuple):
    """What became of a grammar: one of the two."""

    matcher: LLMatcher | None
    """At the beginning. To be copied: copies share the automaton, which grows as they use it."""
    refusal: str
    """Why there is none."""
    seconds: float
    """How long it took."""


class Compiler:
    """Of one engine. Making it reads the tokenizer: 0.5 s for 49,000 tokens, 1.5 s for 152,000, in
    which other Python threads stand still."""

    def __init__(
        self, args: ServerArgs, codec: Codec, vocab_size: int, eos_ids: Iterable[int]
    ) -> None:
        """NotSupportedError: llguidance is missing, or cannot read the tokenizer;
        InvalidRequestError: the model has no end of text."""
        if importlib.util.find_spec("llguidance") is None:
            raise NotSupportedError(
                "grammars need the llguidance package: pip install jaxserve[grammar]"
            )
        from llguidance import LLParserLimits, LLTokenizer

        serialized = codec.serialized()
        if serialized is None:
            raise NotSupportedError(
                "grammars need a fast tokenizer, and that of this model is none: see tokenizer_mode"
            )
        ends = sorted(token for token in eos_ids if token < vocab_size)
        if not ends:
            raise InvalidRequestError(
                "grammars need a token that ends a text, and neither model nor tokenizer has one"
            )
        tokens = max(vocab_size, serialized.tokens)
        self.words = -(-tokens // 32)
        """int32 numbers of a mask; more than the model's where its tokenizer has more tokens."""
        try:
            tokenizer = LLTokenizer(serialized.json, n_vocab=tokens, eos_token=ends)
        except ValueError as error:
            raise NotSupportedError(
                f"grammars cannot be used with this tokenizer: {said(str(error))}"
            ) from error
        self._dialect = Dialect(tokenizer, layout_of(args))
        # Whole states of the parser in messages help its authors only.
        self._limits = LLParserLimits(verbose_errors=False)

    def compile(self, grammar: Grammar) -> Compiled:
        """`grammar`, and the first mask, which finds grammars that never get anywhere. Other Python
        threads run meanwhile."""
        started = time.perf_counter()
        try:
            matcher, refusal = self._compile(grammar), ""
        except ValueError as error:
            matcher, refusal = None, said(str(error))
        return Compiled(matcher, refusal, time.perf_counter() - started)

    def _compile(self, grammar: Grammar) -> LLMatcher:
        from llguidance import LLMatcher

        text = READERS[grammar.kind](grammar.text, self._dialect)
        matcher = LLMatcher(self._dialect.tokenizer, text, log_level=0, limits=self._limits)
        first = matcher.deep_copy()
        if not first.is_error():
            started = time.perf_counter()
            first.compute_bitmask()
            seconds = time.perf_counter() - started
            if seconds > SLOWEST_MASK:
                raise ValueError(f"it is too complex: its first mask took {seconds:.1f} s")
        if first.is_error():
            raise ValueError(first.get_error())
        return matcher


def said(message: str) -> str:
    """A message of llguidance, for users."""
    text = INTERNAL.split(message, maxsplit=1)[0].strip()
    if text == DEAD_END:
        return "no text matches it: its rules never come to an end, or no token can go on"
    return text if len(text) <= LONGEST_REASON else f"{text[:LONGEST_REASON]}..."
