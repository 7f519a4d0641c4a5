"""Whether a config's sizes are those of its tensors, or of a model that the device can hold: asked
before anything of these sizes is made."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable

from jax.sharding import Sharding

from jaxserve.errors import ModelLoadError
from jaxserve.memory import device_memory
from jaxserve.models.config import ModelConfig
from jaxserve.models.registry import TowerDeclaration
from jaxserve.models.vision.tower import TowerConfig

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


def check_room(
    config: ModelConfig, tower: TowerDeclaration | None, itemsize: int, sharding: Sharding
) -> None:
    """Where no tensors confirm a config (dummy weights): whether parameters of `itemsize` bytes
    each, and a tower's on each device, have room on the devices of `sharding`.

    Raises ModelLoadError that names the keys and their values.
    """
    devices = sharding.device_set
    more = () if tower is None else (math.prod(spec.shape) for spec in tower.specs.values())
    wanted = (count_parameters(config) + len(devices) * sum(more)) * itemsize
    room = sum(device_memory(device) for device in devices)
    if wanted > room:
        sizes = stated(config, None if tower is None else tower.config)
        raise ModelLoadError(
            f"{sizes} make {wanted / 1e9:.1f} GB of parameters; {room / 1e9:.1f} GB are free"
        )


def stated(config: ModelConfig, tower: TowerConfig | None = None) -> str:
    """The sizes: the decoder's as config.json names them, and those that follow of its tower."""
    decoder = (
        f"num_hidden_layers={config.num_layers}, vocab_size={config.vocab_size}, "
        f"hidden_size={config.hidden_size}, intermediate_size={config.intermediate_size}, "
        f"num_attention_heads={config.num_heads}, num_key_value_heads={config.num_kv_heads}, "
        f"head_dim={config.head_dim}"
    )
    if tower is None:
        return decoder
    fields = [(field.name, getattr(tower, field.name)) for field in dataclasses.fields(tower)]
    numbers = [f"{name}={value}" for name, value in fields if type(value) is int]
    return f"{decoder}; tower: {', '.join(numbers)}"


def count_parameters(config: ModelConfig) -> int:
    """Elements of the matrices; norms and biases are a thousandth of them."""
    dim, heads = config.hidden_size, 2 * (config.num_heads + config.num_kv_heads)
    layer = math.prod((dim, heads, config.head_dim)) + 3 * dim * config.intermediate_size
    tables = 1 if config.tie_word_embeddings else 2
    return config.num_layers * layer + tables * config.vocab_size * dim
