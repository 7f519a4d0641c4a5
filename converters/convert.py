"""Hugging Face tensors -> our parameters, one at a time, and back.

Memory: on CPUs the parameters themselves and a few rows of a file. Elsewhere the host holds one
parameter, as the files have it, and each device its own shard of that beside the parameters (fusing
happens on the host, transposing, casting and quantizing on the devices).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import jax
import numpy as np

from converters import finite, on_device, on_host
from converters.messages import plain, some_of
from converters.parts import Part
from converters.placement import Placement, on_cpu
from converters.sources import TensorSource
from converters.stored_array import checked
from converters.whole import Whole
from jaxserve.errors import ModelLoadError


def convert(
    source: TensorSource,
    wanted: Whole,
    placement: Placement,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, jax.Array]:
    """Reads every parameter of `wanted` from `source`, quantizes it where declared, and
    places it.

    placement: where each parameter goes. progress: called with the numbers of parameters done and
    in all after each; a kernel and its scale are one.
    Raises ModelLoadError that lists all missing, unexpected and wrongly shaped tensors, before
    any is read, and with the name of a tensor that holds infinity or NaN.
    """
    specs, scales = wanted.specs, wanted.scales
    plan = {path: wanted.parts_of(path) for path in specs if path not in scales.values()}
    _check(source, [part for parts in plan.values() for part in parts], wanted)
    params, flags = {}, {}
    for done, (path, parts) in enumerate(plan.items(), start=1):
        spec, sharding = specs[path], placement(path)
        if path in scales:
            make = on_host if on_cpu(sharding) else on_device
            kernel, scale = make.quantized(source, parts, spec, sharding)
            params[path] = kernel
            params[scales[path]] = jax.device_put(scale, placement(scales[path]))
        elif on_cpu(sharding):
            params[path] = on_host.fuse(source, parts, spec, sharding)
        else:
            params[path], flags[path] = on_device.fuse(source, parts, spec, sharding)
        if plus := wanted.table.rule(path)[0].plus:
            params[path] = params[path] + plus
        if progress is not None:
            progress(done, len(plan))
    for path, found in jax.device_get(flags).items():
        if not found.all():
            raise _infinite(source, path, plan[path], wanted.dtype)
    return {path: params[path] for path in specs}


def _infinite(
    source: TensorSource, path: str, parts: list[Part], dtype: np.dtype
) -> ModelLoadError:
    """With the tensor of parameter `path` that holds infinity or NaN as `dtype`, found by reading
    it again."""
    for part in parts:
        blocks = source.tensor(part.name).blocks()
        if not all(finite.all_finite(checked(block, dtype, None)) for block in blocks):
            return finite.error(part.name, dtype)
    return finite.error(path, dtype)


def _check(source: TensorSource, parts: list[Part], wanted: Whole) -> None:
    present = set(source.names())
    named = {part.name for part in parts}
    missing = sorted(named - present)
    table = wanted.table
    unexpected = sorted(plain(name) for name in present - named if not table.ignores(name))
    misshaped = [
        f"{part.name} is {list(source.shape(part.name))}, should be {list(part.stored)}"
        for part in parts
        if part.name in present and tuple(source.shape(part.name)) != part.stored
    ]
    problems = (("missing", missing), ("unexpected", unexpected), ("wrongly shaped", misshaped))
    if any(found for _, found in problems):
        lines = [
            f"{len(found)} {kind}:\n    " + some_of(found, "\n    ")
            for kind, found in problems
            if found
        ]
        raise ModelLoadError(
            f"the checkpoint does not fit its config ({wanted.stated()}):\n  " + "\n  ".join(lines)
        )


def to_hf(parts: list[Part], array: np.ndarray, plus: float = 0.0) -> Iterator[np.ndarray]:
    """The inverse for one parameter: the tensors that it is made of, contiguous, one at a time.
    plus: of its rule."""
    if plus:
        array = array - np.float32(plus)
    for part in parts:
        columns = part.of(array)
        yield np.ascontiguousarray(columns.T if part.transpose else columns)
