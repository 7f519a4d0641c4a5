"""How parameters are made: handed to every part of a model instead of what each would pass on."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

_INIT_STD = 0.02


@dataclasses.dataclass(frozen=True)
class Make:
    """What a model's constructor is given, and gives to its parts."""

    dtype: jnp.dtype
    """Of every parameter, the quantized kernels, their scales and float32 norms excepted."""
    rngs: nnx.Rngs | None = None
    """Source of random weights (training from scratch); None starts from zeros, for a declaration,
    which needs shapes only."""
    quantization: str | None = None
    """A scheme of models.quantization for the layers' linear kernels; embeddings, LM head, norms
    and biases keep `dtype`."""
    parts: int = 1
    """Devices that the model is cut over: what is made is the part of one of them, and heads, the
    MLP's dim and the vocabulary are divided by this."""
    axis: str | None = None
    """The mesh axis of these devices, inside `jax.shard_map`; None: there is one."""

    def normal(self, *shape: int) -> nnx.Param:
        """Normally distributed weights of standard deviation 0.02."""
        if self.rngs is None:
            return self.zeros(*shape)
        return nnx.Param(_INIT_STD * jax.random.normal(self.rngs.params(), shape, self.dtype))

    def ones(self, *shape: int) -> nnx.Param:
        """The scales of a norm that changes nothing yet."""
        return nnx.Param(jnp.ones(shape, self.dtype))

    def zeros(self, *shape: int) -> nnx.Param:
        """A bias that changes nothing yet."""
        return nnx.Param(jnp.zeros(shape, self.dtype))
