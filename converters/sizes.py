"""Whether a config's sizes are those of its tensors, or of a model that the device can hold: asked
before anything of these sizes is made."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable

from jax.sharding import Sharding

from jaxserve.errors import ModelLoadError
from jaxserve.memory import device_memory
from jaxserve.models.config import ModelConfig

_LAYER = re.compile(r"(?:model\.)?layers\.(\d+)\.")
"""Of Hugging Face's names and of ours."""


def check_layers(config: ModelConfig, names: Iterable[str]) -> None:
    """Compares num_hidden_layers with the layers that a checkpoint's tensors are of. (The other
    sizes are compared with every tensor by whoever reads it; a declaration of theirs is small.)

    names: Hugging Face's, or ours (an Orbax folder's). Raises ModelLoadError.
    """
    layers = {match[1] for name in names if (match := _LAYER.match(name))}
    if len(layers) != config.num_layers:
        raise ModelLoadError(
            f"the config says num_hidden_layers={config.num_layers}, but the checkpoint has "
            f"tensors of {len(layers)} layers"
        )


def check_room(config: ModelConfig, itemsize: int, sharding: Sharding) -> None:
    """Where no tensors confirm a config (dummy weights): whether parameters of `itemsize` bytes
    each have room on the devices of `sharding`.

    Raises ModelLoadError that names the keys and their values.
    """
    wanted = count_parameters(config) * itemsize
    room = sum(device_memory(device) for device in sharding.device_set)
    if wanted > room:
        raise ModelLoadError(
            f"{stated(config)} make {wanted / 1e9:.1f} GB of parameters; {room / 1e9:.1f} GB are "
            "free"
        )


def stated(config: ModelConfig) -> str:
    """The sizes as config.json names them."""
    return (
        f"num_hidden_layers={config.num_layers}, vocab_size={config.vocab_size}, "
        f"hidden_size={config.hidden_size}, intermediate_size={config.intermediate_size}, "
        f"num_attention_heads={config.num_heads}, num_key_value_heads={config.num_kv_heads}, "
        f"head_dim={config.head_dim}"
    )


def count_parameters(config: ModelConfig) -> int:
    """Elements of the matrices; norms and biases are a thousandth of them."""
    dim, heads = config.hidden_size, 2 * (config.num_heads + config.num_kv_heads)
    layer = math.prod((dim, heads, config.head_dim)) + 3 * dim * config.intermediate_size
    tables = 1 if config.tie_word_embeddings else 2
    return config.num_layers * layer + tables * config.vocab_size * dim
