"""How much of a step prompts may take while others run. No jax."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxserve.models.config import ModelConfig

SHARE = 4
"""The part of the largest extend step that a streaming request is made to wait for: 2,048 tokens of
an 8B model take an H100 60 ms."""
ATTENTION_SLOWNESS = 2.0
"""Seconds a FLOP in attention, over those in products (H100: 350 and 700 TFLOP/s)."""


@dataclasses.dataclass(frozen=True, slots=True)
class Pace:
    """What running requests are spared while prompts come in.

    Work is counted in tokens, one without context being 1; to attend to one cached token costs
    `attention` more. work: of an extend step while a running request streams. riders: most running
    requests whose next tokens an extend step may compute along with its prompts.
    """

    work: int
    attention: float = 0.0
    riders: int = 0

    def attending(self, start: int, count: int) -> float:
        """Work of `count` tokens behind `start` others, beside the 1 that each token is."""
        return self.attention * count * (start + count / 2)

    def longest(self, start: int, work: float) -> int:
        """How many tokens behind `start` others are at most `work`."""
        one = 1 + self.attention * start
        # the positive root of attention / 2 * n**2 + one * n - work, in the form without a quotient
        # by `attention`, which may be 0
        return int(2 * work / (one + math.sqrt(one * one + 2 * self.attention * work)))


def attention_cost(model: ModelConfig) -> float:
    """`Pace.attention` of a model. Layers with a window count as ones without context: the windows
    are short beside the contexts for which this matters."""
    heads = model.num_heads * model.head_dim
    kv_heads = model.num_kv_heads * model.head_dim
    matrices = 2 * heads + 2 * kv_heads + 3 * model.intermediate_size
    token = 2 * model.num_layers * model.hidden_size * matrices
    attended = 4 * heads * model.windows.count(None)
    return ATTENTION_SLOWNESS * attended / token
