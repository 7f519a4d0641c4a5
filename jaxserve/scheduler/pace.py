"""How much of a step prompts may take while others run. No jax."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

from jaxserve.packing.buckets import ALIGNMENT, padded_length

if TYPE_CHECKING:
    from jaxserve.machine import Pacing
    from jaxserve.models.config import ModelConfig

SHARE = 4
"""The part of the largest extend step that a streaming request is made to wait for: 2,048 tokens of
an 8B model take an H100 50 ms."""


@dataclasses.dataclass(frozen=True, slots=True)
class Pace:
    """What running requests are spared while prompts come in. Work is counted in tokens, one
    without context being 1."""

    work: int
    """Of an extend step while a running request streams. A step may have more, but not for more
    than one wave of a prompt."""
    attention: float = 0.0
    """What it costs more to attend to one cached token."""
    riders: int = 0
    """Most running requests whose next tokens an extend step may compute along with its prompts."""
    wave: int = 8
    """Tokens that the attention kernel works on at once: fewer cost as much."""
    reach: float = math.inf
    """Tokens of context that a rider may have."""
    patch: float = 0.0
    """What a patch of a picture costs, in its tower."""

    @classmethod
    def of(cls, model: ModelConfig, tokens: int, machine: Pacing, mixed: bool | None) -> Pace:
        """For extend steps of up to `tokens` tokens of `model`. mixed: whether running requests may
        ride; None: where that is faster than a decode step of their own."""
        work = padded_length(max(tokens // SHARE, 1))
        wave = machine.wave(model.num_heads)
        wave = max(min(wave, work // 2) // ALIGNMENT, 1) * ALIGNMENT
        attention = attention_cost(model, machine.attention_slowness)
        # an extend step does not share the work on one context among multiprocessors, as a decode
        # step does
        reach = math.inf if mixed or not attention else work / 8 / (attention * wave)
        riders = machine.riders if (machine.rides if mixed is None else mixed) else 0
        return cls(work, attention, riders, wave, reach)

    @property
    def overhead(self) -> float:
        """Work that comes with each extend step: mostly the decode step after it."""
        return self.work / 8

    def attending(self, start: int, count: int) -> float:
        """Work of `count` tokens behind `start` others, beside the 1 that each token is."""
        whole = -(-count // self.wave) * self.wave
        return self.attention * whole * (start + count / 2)


def attention_cost(model: ModelConfig, slowness: float) -> float:
    """`Pace.attention` of a model, where a FLOP in attention takes `slowness` times the seconds of
    one in products. Layers with a window count as ones without context: the windows
    are short beside the contexts for which this matters."""
    heads = model.num_heads * model.head_dim
    kv_heads = model.num_kv_heads * model.head_dim
    matrices = 2 * heads + 2 * kv_heads + 3 * model.intermediate_size
    token = 2 * model.num_layers * model.hidden_size * matrices
    attended = 4 * heads * model.windows.count(None)
    return slowness * attended / token
