"""The contract between the engine and what decides about tokens on the host. No jax.

A step of rows with guides runs the model first. Then the step before is read, the guides are asked,
and what they say goes into the program that draws: the device works meanwhile, and a guide always
knows all tokens.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import numpy as np

if TYPE_CHECKING:
    from jaxserve.request import Request


class Guide:
    """Of one request; the engine thread asks it, before each of its tokens. What it raises fails
    that request alone."""

    masks: ClassVar[bool] = False
    """Whether `mask` is asked."""
    edits: ClassVar[bool] = False
    """Whether `edit` is asked, for which the row's logits come to the host and go back."""

    def mask(self, outputs: Sequence[int], bits: np.ndarray) -> None:
        """Say which tokens may come after `outputs`, all that the request has: clear bits of the
        others in `bits` [ceil(V / 32)] int32, in which all are set. (Bit i % 32 of number i // 32
        is token i's.) `outputs` may be shorter than it was: a request that is retracted can decode
        its tokens again."""
        raise NotImplementedError

    def edit(self, outputs: Sequence[int], logits: np.ndarray) -> np.ndarray:
        """logits [V] float32, after penalties, biases and masks, as they are to be; `outputs` as in
        `mask`. The array may be written to."""
        raise NotImplementedError


class GuideSpec(abc.ABC):
    """What the requests of one prompt ask for, each with a guide of its own."""

    @abc.abstractmethod
    def guide(self, request: Request) -> Guide:
        """For `request`, which is whole but for this."""
