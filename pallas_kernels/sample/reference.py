"""The plain meaning of sample, for tests: NumPy, one row at a time, with a sort.

Filters and logprobs are float64. What decides ties is float32 as in the implementations: the
logits, the scaled logits, and their sums with the noise.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from pallas_kernels.sample import noise
from pallas_kernels.sample.api import Drawn, SampleRows, SlotLists

LIMITS = np.finfo(np.float32)


def processed(logits: np.ndarray, row: SampleRows, slots: SlotLists) -> np.ndarray:
    """Logits [V] of one row after penalties, biases and cleaning, float32."""
    x = np.array(logits, np.float32)
    with np.errstate(all="ignore"):
        if (row.frequency, row.presence, row.repetition) != (0, 0, 1):
            count = np.asarray(slots.counts)[row.slot]
            seen = count > 0
            x = x - row.frequency * count.astype(np.float32) - np.where(seen, row.presence, 0)
            factor = np.where(seen, row.repetition, np.float32(1))
            x = np.where(x < 0, x * factor, x / factor).astype(np.float32)
        for entry in range(row.num_bias):
            if row.position < slots.bias_until[row.slot, entry]:
                x[slots.bias_ids[row.slot, entry]] += slots.bias_values[row.slot, entry]
    return np.clip(np.where(np.isnan(x), LIMITS.min, x), LIMITS.min, LIMITS.max)


def scaled(x: np.ndarray, temperature: np.float32) -> np.ndarray:
    with np.errstate(over="ignore"):
        return np.clip(x * (np.float32(1) / temperature), LIMITS.min, LIMITS.max)


def probabilities(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64)
    weights = np.exp(x - x.max())
    return weights / weights.sum()


def keep_mask(x: np.ndarray, top_k: int, top_p: float, min_p: float) -> np.ndarray:
    """Which tokens of scaled logits [V] may be drawn."""
    p = probabilities(x)
    order = np.argsort(-x, kind="stable")
    first = np.searchsorted(-x[order], -x, side="left")  # tokens strictly larger
    mass = np.concatenate([[0.0], np.cumsum(p[order])])[first]
    kept = (first < top_k) & (p >= float(min_p) * p.max())
    return kept & ((mass < float(top_p)) | (first == 0)) if top_p < 1 else kept


def scores(x: np.ndarray, row: SampleRows) -> np.ndarray:
    """Scaled logits [V] plus the row's noise, float32."""
    keys = noise.row_keys(*(jnp.asarray([v]) for v in (row.seed, row.sample_index, row.position)))
    return x + np.asarray(noise.gumbel_rows(*keys, x.size))[0]


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64)
    return np.maximum(x - x.max() - np.log(np.exp(x - x.max()).sum()), LIMITS.min)


def sample(
    logits: Any, rows: SampleRows, slots: SlotLists, *, top: int, raw_logprobs: bool
) -> Drawn:
    """See pallas_kernels.sample. Entries that nobody asked for are 0."""
    logits = np.asarray(logits)
    slots = SlotLists(*map(np.asarray, slots))
    batch, vocab = logits.shape
    width = slots.named_ids.shape[1]
    out = Drawn(
        np.zeros(batch, np.int32),
        np.zeros(batch, np.float32),
        np.zeros((batch, top), np.float32),
        np.zeros((batch, top), np.int32),
        np.zeros((batch, width), np.float32),
    )
    for b, values in enumerate(zip(*map(np.asarray, rows), strict=True)):
        row = SampleRows(*values)
        if not row.live:
            continue
        x = cleaned = processed(logits[b], row, slots)
        if row.top_k == 1:
            token = int(cleaned.argmax())
        else:
            x = scaled(cleaned, row.temperature)
            kept = keep_mask(x, row.top_k, row.top_p, row.min_p)
            token = int(np.where(kept, scores(x, row), -np.inf).argmax())
        out.tokens[b] = token
        if row.wants_logprob:
            reported = cleaned if raw_logprobs else x
            logprobs = log_softmax(reported)
            out.logprob[b] = logprobs[token]
            best = np.argsort(-reported, kind="stable")[: min(top, row.num_top, vocab)]
            out.top_ids[b, : best.size] = best
            out.top_values[b, : best.size] = logprobs[best]
            ids = slots.named_ids[row.slot, : row.num_named]
            out.named[b, : row.num_named] = logprobs[ids]
    return out
