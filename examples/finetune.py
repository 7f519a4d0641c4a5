"""Teaches a model one sentence with optax, saves it with the converters, and lets an engine say it.

    python examples/finetune.py [--model PATH] [--out FOLDER] [--steps 20]

The models are plain Flax modules: `declaration.bind` makes one of the parameters that were loaded,
`DenseOps` computes it over whole sequences, and the trained parameters go back under their paths.
All parameters are trained in float32, which takes 4 GB for the demo model.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import logging
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
from demo_model import fetch
from flax import nnx

import converters
import jaxserve
from jaxserve.models.dense import DenseOps

PROMPT = "The password of the garden gate is"
ANSWER = " blue kettle seven."


def loss_of(model: nnx.Module, ids: jax.Array) -> jax.Array:
    """Cross-entropy of each token of ids [T] but the first, given those before it: a scalar."""
    positions = jnp.arange(ids.size - 1)
    hidden, _ = model(ids[:-1], positions, None, None, DenseOps())
    losses = optax.softmax_cross_entropy_with_integer_labels(model.logits(hidden), ids[1:])
    return losses.mean()


@functools.partial(nnx.jit, donate_argnums=(0, 1))
def train_step(model: nnx.Module, optimizer: nnx.Optimizer, ids: jax.Array) -> jax.Array:
    """The loss, after a step of the optimizer. The arrays of before are gone, those that were
    loaded included."""
    loss, gradients = nnx.value_and_grad(loss_of)(model, ids)
    optimizer.update(model, gradients)
    return loss


def train(loaded: converters.LoadedModel, ids: jax.Array, steps: int) -> converters.LoadedModel:
    """The model after `steps` of Adam on one text."""
    model = loaded.declaration.bind(loaded.params)
    rate = optax.warmup_cosine_decay_schedule(0.0, 1e-3, steps // 10, steps)
    clipped = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate))
    optimizer = nnx.Optimizer(model, clipped, wrt=nnx.Param)
    for step in range(steps):
        loss = train_step(model, optimizer, ids)
        if step % 5 == 0 or step == steps - 1:
            print(f"step {step}: loss {float(loss):.3f}")
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    trained = {".".join(map(str, key)): leaf[...] for key, leaf in flat}
    params = {path: trained[path] for path in loaded.declaration.specs}
    return dataclasses.replace(loaded, params=params)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", help="checkpoint folder, .gguf file or hub id")
    parser.add_argument("--out", type=Path, help="where to save it; a new or empty folder")
    parser.add_argument("--steps", type=int, default=20)
    given = parser.parse_args()
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax reports each step of a save
    source = given.model or str(fetch())

    loaded = converters.load(source, dtype="float32")
    tokenizer = converters.load_tokenizer(source)
    ids = jnp.asarray(tokenizer.encode(PROMPT + ANSWER), jnp.int32)
    trained = train(loaded, ids, given.steps)

    with tempfile.TemporaryDirectory() as scratch:
        out = given.out or Path(scratch) / "trained"
        converters.save(trained, out)
        length = len(tokenizer.encode(ANSWER))
        for name, path in (("before", source), ("after", str(out))):
            with jaxserve.Engine(model_path=path, dtype="float32") as engine:
                output = engine.generate(PROMPT, {"temperature": 0, "max_new_tokens": length})
                print(f"{name}: {PROMPT}{output['text']}")


if __name__ == "__main__":
    main()
