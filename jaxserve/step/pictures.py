"""Pictures in a step: put on the device by a tower, read where their tokens run.

Letters: P patches, C colour channels, p a patch's side in pixels, D the model's dim.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp

if TYPE_CHECKING:
    from jaxserve.media.normal import Normal
    from jaxserve.models.decoder import Decoder
    from jaxserve.models.vision.attention import RangeAttention
    from jaxserve.models.vision.tower import Tower


class Embedded(NamedTuple):
    """What the decoder begins with."""

    x: jax.Array
    """[T, D]."""
    added: tuple[jax.Array, ...] = ()
    """What is added to the stream after layers 0, 1, ...: each [T, D], of text zeros."""


class Shown(NamedTuple):
    """What stands in tokens' places."""

    media: jax.Array
    """[rows, width]: the device's buffer of pictures, of each token the rows of a tower."""
    rows: jax.Array
    """[T] int32: the token's in it; -1 for text."""


def embed(module: Decoder, tokens: jax.Array, shown: Shown | None = None) -> Embedded:
    """Token ids [T] as the decoder takes them, with pictures in the places of some."""
    x = module.embed(tokens)
    if shown is None:
        return Embedded(x)
    picture = (shown.rows >= 0)[:, None]
    found = shown.media[jnp.maximum(shown.rows, 0)].astype(x.dtype)
    first, *others = jnp.split(found, found.shape[1] // x.shape[1], axis=1)
    added = tuple(jnp.where(picture, other, 0) for other in others)
    return Embedded(jnp.where(picture, first, x), added)


class TowerModel(NamedTuple):
    """A tower as its programs see it."""

    bind: Callable[[tuple[jax.Array, ...]], Tower]
    """Flat parameters -> module."""
    dtype: jnp.dtype
    """Of activations."""
    normal: Normal
    """What pixels become before the tower."""
    attention: RangeAttention
    """Of patches."""


def encode(
    model: TowerModel,
    params: tuple[jax.Array, ...],
    media: jax.Array,
    patches: jax.Array,
    facts: Mapping[str, jax.Array],
    rows: jax.Array,
) -> tuple[tuple[jax.Array], tuple[()]]:
    """P patches through the tower, into `media` (donated).

    patches [P, C * p * p]: uint8 pixels, or float32, normalized already. facts: see `Tower.facts`.
    rows [P / patches_per_token] int32: of `media`, past its end for padding.
    """
    if patches.dtype == jnp.uint8:
        patches = model.normal.apply(patches.astype(jnp.float32))
    features = model.bind(params)(patches.astype(model.dtype), facts, model.attention)
    return (media.at[rows].set(features.astype(media.dtype), mode="drop"),), ()


def place_features(
    media: jax.Array, features: jax.Array, rows: jax.Array
) -> tuple[tuple[jax.Array], tuple[()]]:
    """Features [N, width] float32 that somebody else has made of a picture, into `media` (donated)
    at rows [N] int32."""
    return (media.at[rows].set(features.astype(media.dtype), mode="drop"),), ()
