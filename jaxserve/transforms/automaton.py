"""A regular expression that the text must match, as a table on the device."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxserve import checks
from jaxserve.automata.tokens import NEVER, token_table
from jaxserve.errors import InvalidRequestError
from jaxserve.text.vocabulary import token_bytes
from jaxserve.transforms.context import Context
from jaxserve.transforms.transform import Params, State, Transform


def automaton(
    regex: str,
    tokenizer: Any,
    end_tokens: Sequence[int] | None = None,
    timeout: float = 10.0,
) -> Transform:
    """The output matches `regex` from its first character to its last (Willard and Louf 2023,
    "Efficient Guided Generation for Large Language Models"): the tokens stay that some text which
    matches goes on with. Of the syntax of the sampling parameter `regex` what is regular and
    Python's `re` has too, with the same meaning.

    tokenizer: of the model (`engine.tokenizer`), of byte-level BPE or SentencePiece. end_tokens:
    ids that may come where the text matches, and are all that may behind; None: the tokenizer's
    `eos_token_id`. timeout: seconds that making the table may take.

    Where transforms in front of it have removed all tokens that it lets come, they count as the
    model has them. A token that it has not let come, drawn all the same, counts as the end.

    InvalidRequestError: `regex` is wrong or has what is not supported; takes more than `timeout`,
    16,384 states or 16,777,216 entries of the table (32 MiB); or nothing matches it.
    NotSupportedError: another kind of tokenizer.
    """
    regex = checks.encodable("regex", checks.text("regex", regex))
    timeout = checks.number("timeout", timeout, 0.0)
    tokens = token_bytes(tokenizer)
    if end_tokens is None:
        end_tokens = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ends = [checks.integer("end_tokens", token, 0, len(tokens) - 1) for token in end_tokens]
    if not ends:
        raise InvalidRequestError(
            "end_tokens must be ids of tokens that end a text, and the tokenizer names none"
        )
    table = token_table(regex, tokens, ends, timeout)
    digest = hashlib.sha256(table.next.tobytes() + table.classes.tobytes()).hexdigest()[:16]
    following, classes = f"automaton_{digest}", f"automaton_classes_{digest}"
    last = table.next.shape[0] - 1

    def apply(logits: jax.Array, state: State, params: Params, context: Context) -> jax.Array:
        of_token = context.tables[classes][: logits.shape[0]]
        missing = logits.shape[0] - of_token.shape[0]  # of ids that the tokenizer does not have
        of_token = jnp.pad(of_token, (0, missing), constant_values=NEVER)
        allowed = (context.tables[following][state] >= 0)[of_token]
        left = jnp.where(allowed, logits, -jnp.inf)
        return jnp.where(left.max() > -jnp.inf, left, jnp.where(allowed, context.raw, -jnp.inf))

    def init(params: Params) -> State:
        return jnp.int32(0)

    def observe(state: State, params: Params, token: jax.Array, logprob: jax.Array) -> State:
        kind = params[classes].at[token].get(mode="fill", fill_value=NEVER)
        after = params[following][state, kind].astype(jnp.int32)
        return jnp.where(after >= 0, after, last)

    return Transform(apply, init, observe, tables={following: table.next, classes: table.classes})
