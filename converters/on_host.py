"""Parameters on CPU devices: each shard is filled where it stays, straight from the file."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Sharding

from converters import finite, quantize, shards
from converters.parts import Part, filled
from converters.shards import Shard, aligned_empty, placed, shards_of, whole
from converters.sources import TensorSource


def fuse(
    source: TensorSource, parts: Sequence[Part], spec: jax.ShapeDtypeStruct, sharding: Sharding
) -> jax.Array:
    """The parameter that `parts` make up."""
    pieces = shards_of(spec.shape, sharding)
    arrays = [aligned_empty(piece.shape, np.dtype(spec.dtype)) for piece in pieces]
    if filled(parts) is not None:
        for array in arrays:
            array.fill(0)
    for part in parts:
        targets = [part.target(*pair) for pair in zip(pieces, arrays, strict=True)]
        shards.read(source.tensor(part.name), targets, finite.checking(part.name))
    return placed(spec.shape, sharding, pieces, arrays)


def quantized(
    source: TensorSource, parts: Sequence[Part], spec: jax.ShapeDtypeStruct, sharding: Sharding
) -> tuple[jax.Array, np.ndarray]:
    """The same as a kernel of spec's dtype, and its scale: a few channels at a time."""
    pieces = shards_of(spec.shape, sharding)
    kernels = [aligned_empty(piece.shape, np.dtype(spec.dtype)) for piece in pieces]
    scale = aligned_empty(spec.shape[1:], np.dtype(np.float32))
    everything = Shard(whole(scale.shape), ())
    for part in parts:
        assert part.transpose, part  # a row is an output channel, and has its own scale
        targets = [part.target(*pair) for pair in zip(pieces, kernels, strict=True)]
        scales = part.bias().target(everything, scale)
        first = 0
        for block in source.tensor(part.name).blocks():
            channels = np.empty(block.shape, np.dtype(spec.dtype))
            steps = np.empty(len(block), np.float32)
            quantize.on_host(block.T, channels.T, steps)
            quantize.check_finite(part.name, steps)
            for target in targets:
                target.take(first, channels)
            scales.take(first, steps)
            first += len(block)
    return placed(spec.shape, sharding, pieces, kernels), scale
