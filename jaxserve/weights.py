"""How the parameters lie in the device's memory."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxserve.errors import InvalidRequestError
from jaxserve.machine import Crossovers
from jaxserve.models.registry import declare
from jaxserve.parallel.mesh import TENSOR
from jaxserve.parallel.rules import WHOLE, partition, whole_shape
from jaxserve.parallel.rules import turned as turned_partition

if TYPE_CHECKING:
    from jaxserve.models.config import ModelConfig
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


@dataclasses.dataclass(frozen=True, eq=False)
class Kept:
    """The parameters as the step takes them, a flat tuple with some transposed, which XLA folds
    into the products."""

    specs: dict[str, jax.ShapeDtypeStruct]
    """By path, of one device's part."""
    partitions: dict[str, PartitionSpec]
    """How the whole is cut."""
    turned: dict[str, bool]
    """Whether it is transposed."""
    bind: Bind
    """Makes the module of one device's parts."""

    def abstract(self, mesh: Mesh) -> tuple[jax.ShapeDtypeStruct, ...]:
        """The whole parameters on `mesh`, in the order in which `bind` takes their parts."""
        return tuple(
            jax.ShapeDtypeStruct(
                whole_shape(spec.shape, self.partitions[name], mesh.shape[TENSOR]),
                spec.dtype,
                sharding=NamedSharding(mesh, self.partitions[name]),
            )
            for name, spec in self.specs.items()
        )


def kept(declaration: Declaration, crossovers: Crossovers) -> Kept:
    """The parameters of `declaration` as the step takes them."""
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

    tied = declaration.config.tie_word_embeddings
    cuts = {
        name: partition(name, tied) if declaration.parts > 1 else WHOLE
        for name in declaration.specs
    }
    return Kept(
        {name: turn(x) if turned[name] else x for name, x in declaration.specs.items()},
        {
            name: turned_partition(cuts[name], len(x.shape)) if turned[name] else cuts[name]
            for name, x in declaration.specs.items()
        },
        turned,
        bind,
    )


def cut_over(declaration: Declaration, mesh: Mesh) -> Declaration:
    """A whole model as one device of `mesh` has it."""
    parts = mesh.shape[TENSOR]
    if parts == 1:
        return declaration
    of = declaration
    return declare(of.config, of.dtype, of.quantization, parts=parts, axis=TENSOR)


def placement(config: ModelConfig, mesh: Mesh) -> Callable[[str], NamedSharding]:
    """Where each parameter goes when it is read, by its path: cut over the devices of `mesh`.
    Where KV heads are fewer, kernels of attention are cut by rows, and `arrange` cuts them anew; so
    no device holds those of all layers whole. InvalidRequestError: the model cannot be cut over so
    many."""
    parts = mesh.shape[TENSOR]
    _check_divides(config, parts)
    by_rows = WHOLE if config.hidden_size % parts else PartitionSpec(TENSOR)

    def sharding(path: str) -> NamedSharding:
        if parts == 1:
            return NamedSharding(mesh, WHOLE)
        if path.startswith("layers.") and _columns(path) and config.num_kv_heads < parts:
            return NamedSharding(mesh, by_rows if path.endswith(".kernel") else WHOLE)
        return NamedSharding(mesh, partition(path, config.tie_word_embeddings))

    return sharding


def _check_divides(config: ModelConfig, parts: int) -> None:
    sizes = {
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.intermediate_size,
        "vocab_size": config.vocab_size,
    }
    uneven = [f"{name}={size}" for name, size in sizes.items() if size % parts]
    kv_heads = config.num_kv_heads
    if kv_heads % parts and parts % kv_heads:
        uneven.append(f"num_key_value_heads={kv_heads} (nor is it divided by that)")
    if uneven:
        raise InvalidRequestError(
            f"tp_size={parts} does not divide the model's {', '.join(uneven)}: each device gets an "
            "equal part"
        )


def arrange(
    declaration: Declaration, params: dict[str, jax.Array], crossovers: Crossovers, mesh: Mesh
) -> tuple[Arrays, Kept]:
    """(arrays, kept): whole parameters, which lie as `placement` says, as the step takes them.

    declaration: of one device's part. Takes the arrays out of `params`, so that the original of
    what is made anew is freed at once.
    """
    found = kept(declaration, crossovers)
    config, parts = declaration.config, declaration.parts
    repeated = config.kv_heads(parts) // config.num_kv_heads

    def place(name: str, cut: PartitionSpec) -> jax.Array:
        array = params.pop(name)
        if repeated == 1 and not found.turned[name]:
            return array
        if repeated > 1 and (shared := _columns(name)):
            array = repeat_kv_heads(array, config, repeated, shared)
        if found.turned[name]:
            array = jnp.moveaxis(array, 0, -1)
        return jax.block_until_ready(jax.device_put(array, NamedSharding(mesh, cut)))

    return tuple(place(*each) for each in found.partitions.items()), found


def _columns(path: str) -> int:
    """How many heads a KV head has in parameter `path` beside those of q, if its columns are so
    grouped: k and v, or k alone; else 0."""
    return 2 * (".attn.qkv." in path) + (".attn.whole_norm." in path)


def repeat_kv_heads(qkv: jax.Array, config: ModelConfig, times: int, shared: int = 2) -> jax.Array:
    """Columns of q, k and v by KV head, [..., (N + 2K) * H] -> those by `times` K heads, each of
    which has its share of the heads of q, and the same k and v as its siblings. shared: heads
    behind those of q, 1 where there is no v."""
    group = config.num_heads // config.num_kv_heads
    columns = np.arange(qkv.shape[-1], dtype=np.int32)
    heads = columns.reshape(config.num_kv_heads, group + shared, config.head_dim)
    q, kv = heads[:, :group], np.repeat(heads[:, group:], times, axis=0)
    q = q.reshape(len(kv), group // times, config.head_dim)
    columns = np.concatenate([q, kv], axis=1).reshape(-1)
    return qkv.at[..., columns].get(mode="promise_in_bounds")
