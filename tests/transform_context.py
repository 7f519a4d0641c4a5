"""What a transform knows of a row, made from a list of tokens, and rows of logits to try it on."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.transforms import Context

ROOM = 64
"""Tokens that the texts of tests have room for, so that they are of one shape."""


def buffer(tokens):
    """`tokens` with what a text of ROOM tokens has behind them: what a context must not see."""
    return jnp.asarray([*tokens, *[7] * (ROOM - len(tokens))], jnp.int32)


def context_at(text, position, prompt_len=0, seed=0, sample_index=0, tables=None, vocab=0):
    """As the token at `position` is drawn: those of `text` [ROOM] before it are there."""
    position, prompt_len = jnp.asarray(position, jnp.int32), jnp.asarray(prompt_len, jnp.int32)

    def recent(count):
        ids = position - count + jnp.arange(count)
        return text[jnp.clip(ids, 0, text.shape[0] - 1)], ids >= 0

    return Context(
        position=position,
        prompt_len=prompt_len,
        last_token=text[jnp.maximum(position - 1, 0)],
        raw=jnp.zeros(vocab),
        hidden=jnp.zeros(1),
        seed=jnp.asarray(seed, jnp.int32),
        sample_index=jnp.asarray(sample_index, jnp.int32),
        recent=recent,
        tables=tables or {},
    )


def params_of(transform, **given):
    """Its parameters as the engine has them: of the defaults' dtypes, shapes and names."""
    assert given.keys() <= transform.params.keys(), given.keys() - transform.params.keys()
    values = {}
    for name, default in transform.params.items():
        default = np.asarray(default)
        dtype = np.int32 if default.dtype.kind == "i" else np.float32
        values[name] = jnp.asarray(given.get(name, default), dtype)
        assert values[name].shape == default.shape, name
    return values


def padded(sequences, count, length):
    """Lists of ids as a parameter of bad words or biased sequences has them."""
    rows = np.full((count, length), -1, np.int32)
    for row, ids in zip(rows, sequences, strict=False):
        row[: len(ids)] = ids
    return rows


def applier(transform):
    """apply(logits [B, V], params, texts, prompt_lens, seeds) of B rows, compiled once a shape. The
    same params for all, a text (a list of tokens) and a seed for each."""

    def row(logits, params, text, position, prompt_len, seed):
        context = context_at(text, position, prompt_len, seed, vocab=logits.shape[0])
        return transform.apply(logits, transform.init(params), params, context)

    program = jax.jit(jax.vmap(row, (0, None, 0, 0, 0, 0)))

    def apply(logits, texts=None, prompt_lens=None, seeds=None, **given):
        count = len(logits)
        texts = texts if texts is not None else [[0]] * count
        prompt_lens = jnp.zeros(count, jnp.int32) if prompt_lens is None else prompt_lens
        seeds = jnp.zeros(count, jnp.int32) if seeds is None else seeds
        arrays = jnp.stack([buffer(text) for text in texts])
        positions = jnp.asarray([len(text) for text in texts], jnp.int32)
        params = params_of(transform, **given)
        args = jnp.asarray(logits), params, arrays, positions, jnp.asarray(prompt_lens), seeds
        return np.asarray(program(*args))

    return apply
