"""Hugging Face tensors -> our parameters, one at a time, and back.

Host memory: on CPU the parameters themselves plus one source tensor, where it is dequantized or
quantized; elsewhere one source tensor (fusing, transposing and quantizing happen on the device,
which holds one source tensor beside the parameters).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding

from converters import finite, quantize, sizes
from converters.messages import plain, some_of
from converters.placement import Placement, on_cpu
from converters.sources import TensorSource
from converters.stored_array import StoredArray, copy_block
from converters.tables import Table, table_for
from jaxserve.errors import ModelLoadError
from jaxserve.models.config import ModelConfig
from jaxserve.models.registry import Declaration

_ALIGNMENT = 64
"""Bytes; XLA on CPU takes over host buffers aligned like this without a copy."""
_CHANNELS = 64
"""Output channels read at a time where they are quantized on the host."""


@dataclasses.dataclass(frozen=True)
class Part:
    """One source tensor of a parameter: columns of it.

    The columns of a parameter are all that its axes behind `rows` hold, in `groups` equal groups;
    a part has the same columns of each group.
    """

    name: str
    """In the checkpoint."""
    shape: tuple[int, ...]
    """There."""
    rows: tuple[int, ...]
    """The parameter's axes that are no columns, and the source's."""
    transpose: bool
    """[columns, *rows] there, [*rows, columns] here."""
    groups: int
    """1: the parts lie one behind the other."""
    group: int
    """Columns of a group, over all parts."""
    start: int
    """Its first column in each group."""
    width: int
    """Its columns in each group."""

    def view(self, parameter: np.ndarray) -> np.ndarray:
        """What is this part's of a parameter: [*rows, groups, width]."""
        grouped = parameter.reshape(*self.rows, self.groups, self.group)
        return grouped[..., self.start : self.start + self.width]

    def blocks(self, source: TensorSource, most: int) -> Iterator[tuple[np.ndarray, slice]]:
        """Up to `most` rows of the source at a time, and the parameter's columns that they are."""
        done = 0
        for block in source.blocks(self.name, most):
            while len(block):
                group, at = divmod(done, self.width)
                piece, block = np.split(block, [self.width - at])
                first = group * self.group + self.start + at
                yield piece, slice(first, first + len(piece))
                done += len(piece)


def parts_of(path: str, shape: tuple[int, ...], config: ModelConfig, table: Table) -> list[Part]:
    """The source tensors of parameter `path` of `shape`, with the shapes they must have."""
    rule, layer = table.rule(path)
    widths = rule.widths(config) if rule.widths else (shape[-1],)
    groups = rule.groups(config) if rule.groups else 1
    # fused parameters are kernels [in, *out], which are transposed, and biases [*out]
    rows = shape[:1] if rule.transpose else () if rule.widths else shape[:-1]
    group = sum(widths) // groups
    parts, start = [], 0
    for source, width in zip(rule.sources, widths, strict=True):
        expected = (width, *rows) if rule.transpose else (*rows, width)
        name, share = source.replace("{i}", layer), width // groups
        parts.append(Part(name, expected, rows, rule.transpose, groups, group, start, share))
        start += share
    return parts


def convert(
    source: TensorSource,
    declaration: Declaration,
    placement: Placement,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, jax.Array]:
    """Reads every parameter of `declaration` from `source`, quantizes it where declared, and
    places it.

    placement: where each parameter goes. progress: called with the numbers of parameters done and
    in all after each; a kernel and its scale are one.
    Raises ModelLoadError that lists all missing, unexpected and wrongly shaped tensors, before
    any is read, and with the name of a tensor that holds infinity or NaN.
    """
    config, specs = declaration.config, declaration.specs
    table = table_for(config)
    scales = declaration.scales
    plan = {
        path: parts_of(path, spec.shape, config, table)
        for path, spec in specs.items()
        if path not in scales.values()
    }
    _check(source, [part for parts in plan.values() for part in parts], table, config)
    params, flags = {}, {}
    for done, (path, parts) in enumerate(plan.items(), start=1):
        spec, sharding = specs[path], placement(path)
        if path in scales:
            make = _quantize_on_host if on_cpu(sharding) else _quantize_on_device
            kernel, scale = make(source, parts, spec, sharding)
            params[path] = kernel
            params[scales[path]] = jax.device_put(scale, placement(scales[path]))
        elif on_cpu(sharding):
            params[path] = _fuse_on_host(source, parts, spec, sharding)
        else:
            params[path] = _fuse_on_device(source, parts, spec, sharding, flags)
        if progress is not None:
            progress(done, len(plan))
    finite.check(flags, declaration.dtype)
    return {path: params[path] for path in specs}


def _check(source: TensorSource, parts: list[Part], table: Table, config: ModelConfig) -> None:
    present = set(source.names())
    wanted = {part.name for part in parts}
    missing = sorted(wanted - present)
    unexpected = sorted(plain(name) for name in present - wanted if not table.ignores(name))
    misshaped = [
        f"{part.name} is {list(source.shape(part.name))}, should be {list(part.shape)}"
        for part in parts
        if part.name in present and tuple(source.shape(part.name)) != part.shape
    ]
    problems = (("missing", missing), ("unexpected", unexpected), ("wrongly shaped", misshaped))
    if any(found for _, found in problems):
        lines = [
            f"{len(found)} {kind}:\n    " + some_of(found, "\n    ")
            for kind, found in problems
            if found
        ]
        raise ModelLoadError(
            f"the checkpoint does not fit its config ({sizes.stated(config)}):\n  "
            + "\n  ".join(lines)
        )


def _fuse_on_host(
    source: TensorSource, parts: list[Part], spec: jax.ShapeDtypeStruct, sharding: Sharding
) -> jax.Array:
    out = aligned_empty(spec.shape, np.dtype(spec.dtype))
    for part in parts:
        check = finite.checking(part.name)
        if part.groups == 1:
            columns = part.view(out)[..., 0, :]
            source.read_into(part.name, columns.T if part.transpose else columns, check)
            continue
        flat = out.reshape(*part.rows, -1)
        for block, columns in part.blocks(source, _CHANNELS):
            copy_block(block, flat[..., columns].T, check)
    return jax.device_put(out, sharding)


def _fuse_on_device(
    source: TensorSource,
    parts: list[Part],
    spec: jax.ShapeDtypeStruct,
    sharding: Sharding,
    flags: dict[str, jax.Array],
) -> jax.Array:
    """flags: takes whether each tensor is finite, which the device need not have found out yet."""
    # One device transposes and fuses; the result then goes where it belongs.
    device = min(sharding.device_set, key=lambda d: d.id)
    pieces = []
    for part in parts:
        # One host tensor alive at a time: wait until the device has it.
        piece = jax.block_until_ready(jax.device_put(source.read(part.name), device))
        piece = piece.astype(spec.dtype)
        flags[part.name] = finite.on_device(piece)
        pieces.append(piece.T if part.transpose else piece)
    out = _side_by_side(parts, pieces, spec.shape)
    return jax.block_until_ready(jax.device_put(out, sharding))


def _side_by_side(parts: list[Part], pieces: list[jax.Array], shape: tuple[int, ...]) -> jax.Array:
    """Columns of each part, the last axis of its piece -> the parameter of `shape`."""
    if len(pieces) == 1:
        return pieces[0].reshape(shape)
    grouped = [
        piece.reshape(*piece.shape[:-1], part.groups, part.width)
        for part, piece in zip(parts, pieces, strict=True)
    ]
    return jnp.concatenate(grouped, axis=-1).reshape(shape)


def _quantize_on_host(
    source: TensorSource, parts: list[Part], spec: jax.ShapeDtypeStruct, sharding: Sharding
) -> tuple[jax.Array, np.ndarray]:
    kernel = aligned_empty(spec.shape, np.dtype(spec.dtype))
    scale = aligned_empty(spec.shape[1:], np.dtype(np.float32))
    flat, steps = kernel.reshape(len(kernel), -1), scale.reshape(-1)
    for part in parts:
        assert part.transpose, part  # a row is an output channel, and has its own scale
        for block, columns in part.blocks(source, _CHANNELS):
            quantize.on_host(block.T, flat[:, columns], steps[columns])
            quantize.check_finite(part.name, steps[columns])
    return jax.device_put(kernel, sharding), scale


def _quantize_on_device(
    source: TensorSource, parts: list[Part], spec: jax.ShapeDtypeStruct, sharding: Sharding
) -> tuple[jax.Array, jax.Array]:
    device = min(sharding.device_set, key=lambda d: d.id)
    kernels, scales = [], []
    for part in parts:
        weights = jax.block_until_ready(jax.device_put(source.read(part.name), device))
        kernel, scale = jax.block_until_ready(
            quantize.on_device(weights, dtype=np.dtype(spec.dtype), transpose=part.transpose)
        )
        del weights  # before the next one comes
        quantize.check_finite(part.name, scale)
        kernels.append(kernel)
        scales.append(scale)
    kernel = _side_by_side(parts, kernels, spec.shape)
    scale = _side_by_side(parts, scales, spec.shape[1:])
    return jax.block_until_ready(jax.device_put(kernel, sharding)), scale


def place_rows(array: StoredArray, spec: jax.ShapeDtypeStruct, sharding: Sharding) -> jax.Array:
    """`array`, which has spec's shape, on `sharding` in spec's dtype.

    Each shard reads its own part of the file only. Raises ModelLoadError where that fails.
    """
    dtype = np.dtype(spec.dtype)

    def shard(index: Any) -> np.ndarray:
        sizes = zip(index, array.shape, strict=True)
        out = aligned_empty(tuple(len(range(*part.indices(n))) for part, n in sizes), dtype)
        array.read_into(out, index)
        return out

    placed = jax.make_array_from_callback(spec.shape, sharding, shard)
    return jax.block_until_ready(placed)


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Uninitialized array whose memory JAX on CPU adopts instead of copying it."""
    size = math.prod(shape) * dtype.itemsize
    buffer = np.empty(size + _ALIGNMENT, np.uint8)
    offset = -buffer.ctypes.data % _ALIGNMENT
    return buffer[offset : offset + size].view(dtype).reshape(shape)


def to_hf(
    path: str, array: np.ndarray, config: ModelConfig, table: Table
) -> Iterator[tuple[str, np.ndarray]]:
    """The inverse for one parameter: its Hugging Face tensors, contiguous, one at a time."""
    for part in parts_of(path, array.shape, config, table):
        columns = part.view(array).reshape(*part.rows, -1)
        yield part.name, np.ascontiguousarray(columns.T if part.transpose else columns)
