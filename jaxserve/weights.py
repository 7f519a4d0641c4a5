"""How the parameters lie in the device's memory."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from jaxserve.machine import Crossovers

if TYPE_CHECKING:
    from jaxserve.models.decoder import Decoder
    from jaxserve.models.registry import Declaration


def kept_transposed(kernel: jax.Array | jax.ShapeDtypeStruct, crossovers: Crossovers) -> bool:
    """Whether a kernel [in, *out] (an array, a tracer or a spec) is kept as [*out, in], its
    contraction axis last.

    Products with few rows then read small and one-byte kernels faster: at B=1 the four of a layer
    take XLA 24.8 us against 32.1 (0.5B shape, bfloat16) and 97 against 117 (8B, float8), while
    large bfloat16 ones are better left alone: 163 against 157 us (8B; H100, jax 0.11.2).
    """
    if crossovers.transposed_bytes is None:
        return False
    itemsize = kernel.dtype.itemsize
    return itemsize == 1 or math.prod(kernel.shape) * itemsize < crossovers.transposed_bytes


Arrays = tuple[jax.Array, ...]


Bind = Callable[[Arrays], "Decoder"]
"""Parameters (or tracers) as they are kept -> the module."""


def kept(
    declaration: Declaration, crossovers: Crossovers
) -> tuple[dict[str, jax.ShapeDtypeStruct], Bind]:
    """(by path, the parameters as the step takes them, a flat tuple with some transposed; what
    makes the module of them): XLA folds the transposition into the product."""
    turned = {
        name: name.endswith(".kernel") and kept_transposed(spec, crossovers)
        for name, spec in declaration.specs.items()
    }

    def turn(spec: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((*spec.shape[1:], spec.shape[0]), spec.dtype)

    def turn_back(x: jax.Array) -> jax.Array:
        # flat, [in, out], at once: one transposition is then all there is for XLA to fold
        return x.reshape(-1, x.shape[-1]).T

    def bind(arrays: Arrays) -> Decoder:
        parts = zip(turned.items(), arrays, strict=True)
        return declaration.bind({name: turn_back(x) if back else x for (name, back), x in parts})

    specs = {name: turn(spec) if turned[name] else spec for name, spec in declaration.specs.items()}
    return specs, bind


def arrange(
    declaration: Declaration, params: dict[str, jax.Array], crossovers: Crossovers
) -> tuple[Arrays, Bind]:
    """(arrays, bind): the parameters as `kept` has them.

    Takes the arrays out of `params`, so that a transposed one's original is freed at once.
    """
    specs, bind = kept(declaration, crossovers)

    def place(name: str, spec: jax.ShapeDtypeStruct) -> jax.Array:
        array = params.pop(name)
        turn = spec is not declaration.specs[name]
        return jax.block_until_ready(jnp.moveaxis(array, 0, -1)) if turn else array

    return tuple(place(*each) for each in specs.items()), bind
