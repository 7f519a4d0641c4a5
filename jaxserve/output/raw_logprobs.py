"""Logprobs of tokens as the model has them, as a request's extra. No jax."""

from __future__ import annotations

from typing import Any

import numpy as np

from jaxserve.output.extras import Collected, Extra, ExtraSpec, View
from jaxserve.output.logprobs import tuples


class RawLogprobsSpec(ExtraSpec):
    """Of all tokens that are drawn."""

    def extra(self, prompt_len: int) -> RawLogprobs:
        return RawLogprobs()


class RawLogprobs(Extra[list[float]]):
    """Of the distribution before penalties, biases, masks, transforms and temperature."""

    name = "raw_logprobs"

    def empty(self) -> list[float]:
        return []

    def values(self, opened: np.ndarray, start: int, count: int) -> list[float]:
        return opened[start : start + count].tolist()

    def as_meta(self, collected: Collected, first: int, view: View) -> dict[str, Any]:
        found = collected.output
        pairs = zip(found[first:], view.output_ids[first : len(found)], strict=True)
        return {"output_token_raw_logprobs": tuples(pairs, view)}
