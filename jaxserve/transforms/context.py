"""What a transform may know of the row beside its logits."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Context:
    """One row, as the token at `position` is about to be drawn. All values are traced."""

    position: jax.Array
    """int32: of the token that is drawn now; the prompt's first token has 0."""
    prompt_len: jax.Array
    """int32: tokens of the prompt."""
    last_token: jax.Array
    """int32: the token before, of the prompt or drawn."""
    raw: jax.Array
    """[V] float32: the model's logits, before penalties, biases and all transforms."""
    hidden: jax.Array
    """[D], of the model's dtype: what the logits were made of, after the final norm."""
    seed: jax.Array
    """int32: the bits of the request's seed."""
    sample_index: jax.Array
    """int32: which of the prompt's `n` samples it is."""
    recent: Callable[[int], tuple[jax.Array, jax.Array]]
    """What `history` asks."""
    tables: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Arrays that the chain was registered with, by name: the same for all rows."""
    inner: Mapping[int, jax.Array] = dataclasses.field(default_factory=dict)
    """What `layer` finds: by the layer's index, [D]."""
    num_layers: int = 0
    """L, of the model."""
    head: Callable[[jax.Array], jax.Array] | None = None
    """What `logits` asks."""
    known_top: jax.Array | None = None
    """What `top` answers, where a chain knows it from the transforms before."""

    @property
    def step(self) -> jax.Array:
        """int32: how many tokens of the request have been drawn."""
        return self.position - self.prompt_len

    def history(self, count: int) -> tuple[jax.Array, jax.Array]:
        """The last `count` tokens of prompt and outputs, the newest last: ids [count] int32, and
        which of them there are, [count] bool (a short text has none in front). `count` is a Python
        int: a program has one size. ValueError: it is less than 1."""
        if count < 1:
            raise ValueError(f"history(count) must be at least 1, got {count}")
        return self.recent(count)

    def layer(self, index: int) -> jax.Array:
        """The hidden state [D] behind layer `index`, of the model's dtype: 0 the embedding, L what
        the final norm gives, -1 the same, as `hidden_state_layers` counts them. ValueError: the
        engine was not started with that layer among them."""
        wanted = index + self.num_layers + 1 if index < 0 else index
        if wanted == self.num_layers:
            return self.hidden
        if wanted not in self.inner:
            known = sorted(self.inner)
            raise ValueError(
                f"layer({index}) is not reported: Engine(hidden_state_layers=[{index}], "
                f"enable_return_hidden_states=True) would; this engine's are {known}"
            )
        return self.inner[wanted]

    def logits(self, state: jax.Array) -> jax.Array:
        """What the final norm and the LM head make of an inner layer's state [D]: [V] float32, an
        early answer of the model (nostalgebraist 2020, "logit lens"). It reads the head's weights
        once more."""
        assert self.head is not None, "engines give one"
        return self.head(state)

    def top(self, logits: jax.Array) -> jax.Array:
        """`logits.max()` of the logits that `apply` was given. XLA cannot know that a filter leaves
        the largest where it is, and would read all of them again in each transform of a chain."""
        return logits.max() if self.known_top is None else self.known_top

    def uniform(self, tag: int) -> jax.Array:
        """A number of [0, 1), float32, that depends on the request's seed, the sample, the position
        and `tag` alone: the same after a retraction and in any batch. Transforms of one chain that
        want different coins use different tags."""
        key = jax.random.key(self.seed.astype(jnp.uint32))
        for part in (self.sample_index, self.position, tag):
            key = jax.random.fold_in(key, part)
        return jax.random.uniform(key)
