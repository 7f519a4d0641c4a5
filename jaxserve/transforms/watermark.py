"""A watermark in the choice of tokens, and how it is found again.

Hugging Face shuffles the vocabulary with PyTorch's random numbers, which nothing else can repeat.
Here a token is green if a hash of it, of the tokens before and of the key is small enough, one
after the other, so neither side needs a list of the vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve import checks
from jaxserve.transforms.context import Context
from jaxserve.transforms.transform import Params, State, Transform

KEY = 15485863
RATIO = 0.25


class Detection(NamedTuple):
    """What `detect_watermark` found in n tokens."""

    z: float
    """By how many standard deviations there are more green tokens among the scored ones than text
    without a watermark has on average."""
    green: np.ndarray
    """[n] bool: which are green."""
    scored: np.ndarray
    """[n] bool: which count."""


def kgw_watermark(width: int = 1) -> Transform:
    """Kirchenbauer et al. 2023, "A Watermark for Large Language Models": green tokens, which the
    `width` tokens before decide on together with a key, have a bias. Behind filters in a chain it
    raises some of what they left; in front of them they would judge what it has raised.

    `watermark_bias` (0.0): the paper's delta, often 2; 0 is none. `watermark_ratio` (0.25): gamma,
    the share of tokens that are green. `watermark_key` (15485863): whoever has it can detect.
    """
    checks.integer("width", width, 1)

    def apply(logits: jax.Array, state: State, params: Params, context: Context) -> jax.Array:
        before, there = context.history(width)
        seed = _seed(params["watermark_key"].astype(jnp.uint32), before.astype(jnp.uint32))
        ids = jnp.arange(logits.shape[0], dtype=jnp.uint32)
        bias = params["watermark_bias"]
        raised = _share(seed, ids) < params["watermark_ratio"]
        return jnp.where(raised & there.all() & (bias != 0), logits + bias, logits)

    defaults = {"watermark_bias": 0.0, "watermark_ratio": RATIO, "watermark_key": np.int32(KEY)}
    return Transform(apply, params=defaults, ranges={"watermark_ratio": (0, 1)})


def detect_watermark(
    tokens: Sequence[int],
    prompt: Sequence[int] = (),
    *,
    ratio: float = RATIO,
    key: int = KEY,
    width: int = 1,
    ignore_repeated: bool = False,
) -> Detection:
    """Whether `tokens` were drawn with `kgw_watermark` of these parameters: z of more than 4 is
    once in 30,000 texts by chance. The paper's one-proportion test.

    `prompt` is what stood before them, of which the last `width` tokens matter; without it the
    first `width` tokens are not scored. With `ignore_repeated` a token after the same `width`
    tokens counts once: repetition says nothing new. ValueError: a parameter out of its range, or no
    token to score.
    """
    checks.integer("width", width, 1)
    checks.integer("key", key, -(2**31), 2**31 - 1)
    ratio = checks.number("ratio", ratio, 0.0, 1.0, above=True)
    if ratio == 1.0:
        raise ValueError(f"ratio must be less than 1, got {ratio}")
    text = np.array([*list(prompt)[-width:], *tokens], np.int64).astype(np.uint32)
    first, count = len(text) - len(tokens), max(len(text) - width, 0)
    if count == 0:
        raise ValueError(f"tokens: none of {len(tokens)} has width={width} tokens before it")
    grams = np.lib.stride_tricks.sliding_window_view(text, width + 1)
    seed = _seed(np.full(count, key, np.int64).astype(np.uint32), grams[:, :-1].T)
    green, scored = np.zeros((2, len(text)), bool)
    green[width:] = _share(seed, grams[:, -1]) < np.float32(ratio)
    scored[width:] = True
    if ignore_repeated:
        scored[width:] = False
        scored[width + np.unique(grams, axis=0, return_index=True)[1]] = True
    green, scored = green[first:], scored[first:]
    n, hits = int(scored.sum()), int((green & scored).sum())
    z = (hits - ratio * n) / math.sqrt(n * ratio * (1 - ratio))
    return Detection(z, green, scored)


def _seed(key, before):
    """Of a place, from the tokens `before` it, the oldest first: uint32, NumPy's or JAX's."""
    for token in before:
        key = _mixed(key ^ (token * np.uint32(0x9E3779B1)))
    return key


def _share(seed, tokens):
    """A number of [0, 1), float32, for each of `tokens` at a place, as if drawn by chance."""
    bits = _mixed(_mixed(tokens * np.uint32(0x85EBCA77)) ^ seed)
    return (bits >> np.uint32(8)).astype(np.float32) * np.float32(2.0**-24)


def _mixed(bits):
    """Appleby's finalizer of MurmurHash3: each bit of a uint32 depends on all."""
    bits = (bits ^ (bits >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    bits = (bits ^ (bits >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return bits ^ (bits >> np.uint32(16))
