"""Named batches for sample: random mixes of all parameters, and the edges where samplers break."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from pallas_kernels.sample.api import FLOATS, SampleRows, SlotLists

NEUTRAL: dict[str, Any] = {
    "temperature": 1.0, "top_p": 1.0, "min_p": 0.0, "frequency": 0.0, "presence": 0.0,
    "repetition": 1.0, "top_k": 1 << 30, "seed": 0, "sample_index": 0, "position": 0, "num_bias": 0,
    "num_top": 0, "num_named": 0, "wants_logprob": 0, "slot": 0, "live": 1,
}  # fmt: skip
LIVE_FOREVER = 2**31 - 1


def row_params(rows: Sequence[Mapping[str, Any]]) -> SampleRows:
    """Arrays for rows given as dicts over NEUTRAL; slot: the row's number unless given."""
    full = [{**NEUTRAL, "slot": i, **row} for i, row in enumerate(rows)]
    return SampleRows(
        *(
            np.asarray([row[name] for row in full], np.float32 if name in FLOATS else np.int32)
            for name in SampleRows._fields
        )
    )


def empty_lists(slots: int, vocab: int, *, bias: int = 4, named: int = 3) -> SlotLists:
    return SlotLists(
        np.zeros((slots, vocab), np.int32),
        np.zeros((slots, bias), np.int32),
        np.zeros((slots, bias), np.float32),
        np.zeros((slots, bias), np.int32),
        np.zeros((slots, named), np.int32),
    )


def random_row(rng: np.random.Generator, vocab: int, *, bias: int, top: int, named: int) -> dict:
    """Parameters of one row: each feature on or off by chance."""

    def maybe(chance: float, value: Any, otherwise: Any) -> Any:
        return value if rng.random() < chance else otherwise

    return {
        "temperature": rng.choice([0.3, 0.8, 1.0, 1.7]),
        "top_p": maybe(0.5, rng.uniform(0.05, 1.0), 1.0),
        "min_p": maybe(0.3, rng.uniform(0.0, 0.3), 0.0),
        "frequency": maybe(0.3, rng.uniform(-2, 2), 0.0),
        "presence": maybe(0.3, rng.uniform(-2, 2), 0.0),
        "repetition": maybe(0.3, rng.uniform(0.5, 2), 1.0),
        "top_k": maybe(0.4, int(rng.integers(1, vocab + 5)), maybe(0.2, 1, 1 << 30)),
        "seed": int(rng.integers(-(2**31), 2**31)),
        "sample_index": int(rng.integers(0, 4)),
        "position": int(rng.integers(0, 1000)),
        "num_bias": maybe(0.4, int(rng.integers(1, bias + 1)), 0),
        "num_top": maybe(0.5, int(rng.integers(1, top + 1)), 0),
        "num_named": maybe(0.5, int(rng.integers(1, named + 1)), 0),
        "wants_logprob": maybe(0.6, 1, 0),
        "live": maybe(0.9, 1, 0),
    }


@dataclasses.dataclass(frozen=True)
class Case:
    """batch B, vocab V; scale: standard deviation of the logits; top: columns of the best logprobs;
    rows: parameters of row i over NEUTRAL are rows[i % len(rows)], None for random ones; change:
    last word on (logits, slots), in place."""

    name: str
    batch: int
    vocab: int
    scale: float = 2.5
    top: int = 5
    rows: tuple[Mapping[str, Any], ...] | None = None
    change: Callable[[np.ndarray, SlotLists], None] | None = None
    bias: int = 72
    named: int = 3

    def inputs(self, seed: int) -> tuple[np.ndarray, SampleRows, SlotLists]:
        """(logits, rows, slots), random; rows use the slots in shuffled order."""
        rng = np.random.default_rng(seed)
        shape = (self.batch, self.vocab)
        logits = rng.standard_normal(shape, dtype=np.float32) * np.float32(self.scale)
        slots = empty_lists(self.batch + 1, self.vocab, bias=self.bias, named=self.named)
        chosen = rng.random(slots.counts.shape) < 0.2
        slots.counts[chosen] = rng.integers(1, 5, int(chosen.sum()))
        slots.bias_ids[...] = rng.integers(0, self.vocab, slots.bias_ids.shape)
        slots.bias_values[...] = rng.normal(0, 4, slots.bias_values.shape)
        slots.bias_until[...] = rng.choice([0, 500, LIVE_FOREVER], slots.bias_until.shape)
        slots.named_ids[...] = rng.integers(0, self.vocab, slots.named_ids.shape)
        order = rng.permutation(self.batch + 1)
        limits = {"bias": self.bias, "top": max(self.top, 1), "named": self.named}
        rows = []
        for i in range(self.batch):
            if self.rows is None:
                row = random_row(rng, self.vocab, **limits)
            else:
                fresh = {"seed": int(rng.integers(2**31)), "position": int(rng.integers(1000))}
                row = {**fresh, **self.rows[i % len(self.rows)]}
            rows.append({"slot": int(order[i]), **row})
        if self.change:
            self.change(logits, slots)
        return logits, row_params(rows), slots


def _rounded(logits: np.ndarray, slots: SlotLists) -> None:
    logits[...] = np.round(logits)


def _equal(logits: np.ndarray, slots: SlotLists) -> None:
    logits[...] = np.arange(len(logits))[:, None] % 3 - 1


def _broken(logits: np.ndarray, slots: SlotLists) -> None:
    logits[0] = np.nan
    logits[1, ::3] = np.nan
    logits[1, 5] = np.inf
    logits[2, 1:] = -np.inf
    logits[3, [2, 6]] = np.inf
    logits[4] = -np.inf


def _nearly_all_banned(logits: np.ndarray, slots: SlotLists) -> None:
    """The first 70 tokens, one bias each; the others by their logits."""
    logits[:, 70:] = -np.inf
    count = slots.bias_ids.shape[1]
    slots.bias_ids[...] = np.minimum(np.arange(count), 69)
    slots.bias_values[...] = -np.inf
    slots.bias_until[...] = LIVE_FOREVER


def _repeated_bias(logits: np.ndarray, slots: SlotLists) -> None:
    slots.bias_ids[...] = 3
    slots.bias_values[...] = 0.125
    slots.bias_until[...] = LIVE_FOREVER


_REPORT = {"wants_logprob": 1, "num_top": 5, "num_named": 3}
_FILTERS = (
    {**_REPORT, "top_p": 0.9, "temperature": 0.8},
    {**_REPORT, "top_k": 3},
    {**_REPORT, "min_p": 0.2},
    {**_REPORT, "top_p": 0.7, "top_k": 9, "min_p": 0.01},
    {**_REPORT, "top_k": 1, "temperature": 0.5},
)

# few shapes, so that the interpreted kernels are compiled few times; the last block of noise has
# tokens in both halves for 6200, in the first for 9001
EDGES = (
    Case("random tiny", 5, 7),
    Case("random one row", 1, 300),
    Case("random", 5, 300),
    Case("random hot", 5, 300, scale=60.0),
    Case("random across halves", 5, 6200),
    Case("random flat", 5, 6200, scale=0.1),
    Case("random across blocks", 5, 9001),
    Case("random flat across blocks", 5, 9001, scale=0.1),
    Case("ties", 5, 300, rows=_FILTERS, change=_rounded),
    Case("ties across blocks", 5, 9001, rows=_FILTERS, change=_rounded),
    Case("all equal", 5, 6200, rows=_FILTERS, change=_equal),
    Case("NaN and infinities", 5, 300, rows=_FILTERS, change=_broken),
    Case("NaN and infinities, cold", 5, 300, rows=({"temperature": 0.1, **_REPORT},),
         change=_broken),
    Case("top_k of V and more", 5, 300, rows=({"top_k": 300}, {"top_k": 299}, {"top_k": 301})),
    Case("top_k 2", 5, 6200, rows=({"top_k": 2},)),
    Case("tiny top_p", 5, 6200, rows=({"top_p": 1e-6}, {"top_p": 1e-3, "temperature": 1.7})),
    Case(
        "top_p below float32's normal numbers", 5, 6200,
        rows=({"top_p": 1e-38}, {"top_p": 1e-45, "temperature": 1.7}, {"top_p": 0.0}),
    ),
    Case("nearly all of top_p", 5, 6200, rows=({"top_p": 0.9999}, {"top_p": 1.0})),
    Case("min_p 1", 5, 300, rows=({"min_p": 1.0}, {"min_p": 0.9, "top_k": 50})),
    Case("min_p with others", 5, 6200, rows=({"min_p": 0.05, "top_p": 0.99, "top_k": 500},)),
    Case("nearly all banned", 5, 300, rows=({**_REPORT, "num_bias": 68},),
         change=_nearly_all_banned),
    Case("all banned", 5, 300, rows=({**_REPORT, "num_bias": 70, "temperature": 0.5},),
         change=_nearly_all_banned),
    Case("one token with many biases", 5, 300, rows=({"num_bias": 70},), change=_repeated_bias),
    Case("penalties", 5, 6200, rows=({"frequency": 0.7, "presence": -0.3, "repetition": 1.4},)),
    Case("padding", 5, 300, rows=({"live": 0, **_REPORT}, {"top_p": 0.5}, {"live": 0})),
    Case("no lists, no top", 5, 300, top=0, bias=0, named=0, rows=({"wants_logprob": 1},)),
    Case(
        "as many top as chunks have tokens", 3, 2101, top=700,
        rows=({**_REPORT, "num_top": 700}, _REPORT, {**_REPORT, "num_top": 699, "top_k": 1}),
    ),
    Case("more top than V", 5, 7, top=20, rows=({**_REPORT, "num_top": 20},)),
)  # fmt: skip

LARGE = (
    Case("qwen vocabulary", 64, 151_936, top=20),
    Case("top_k of flat logits", 32, 128_256, scale=0.1, rows=({"top_k": 50},)),
    Case("top_p", 256, 151_936, rows=({"temperature": 0.8, "top_p": 0.95},)),
    Case("one row", 1, 151_936, rows=({"temperature": 0.8, "top_p": 0.5, **_REPORT},)),
)
"""Only on a device: interpreting them would take minutes."""
