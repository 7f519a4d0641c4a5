"""Quantized blocks of GGUF files -> float32, of the types that are numbers times a scale.

The same arithmetic as the gguf package's, bit by bit. That one makes a new array in each of a dozen
steps; here all happens where the result is, which takes a small model's file a quarter of the time.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

_HALF = np.dtype("<f2")
BYTES = {2: 18, 3: 20, 8: 34}
"""Of a block of 32 numbers, by ggml type: Q4_0, Q4_1, Q8_0."""


def decoder(kind: int) -> Callable[[np.ndarray], np.ndarray] | None:
    """Of ggml type `kind`: raw uint8 [rows, bytes] of whole blocks -> float32 [rows, numbers].
    None: the type is not one of these."""
    return {2: _q4_0, 3: _q4_1, 8: _q8_0}.get(kind)


def _q4_0(raw: np.ndarray) -> np.ndarray:
    blocks = raw.reshape(-1, BYTES[2])
    out = _nibbles(blocks[:, 2:])
    out -= np.float32(8)
    out *= _column(blocks, 0)
    return out.reshape(len(raw), -1)


def _q4_1(raw: np.ndarray) -> np.ndarray:
    blocks = raw.reshape(-1, BYTES[3])
    out = _nibbles(blocks[:, 4:])
    out *= _column(blocks, 0)
    out += _column(blocks, 2)
    return out.reshape(len(raw), -1)


def _q8_0(raw: np.ndarray) -> np.ndarray:
    blocks = raw.reshape(-1, BYTES[8])
    out = np.multiply(blocks[:, 2:].view(np.int8), _column(blocks, 0), dtype=np.float32)
    return out.reshape(len(raw), -1)


def _nibbles(packed: np.ndarray) -> np.ndarray:
    """[n, 16] of two numbers each -> float32 [n, 32], the low halves first."""
    out = np.empty((len(packed), 32), np.float32)
    out[:, :16] = packed & np.uint8(15)
    out[:, 16:] = packed >> np.uint8(4)
    return out


def _column(blocks: np.ndarray, at: int) -> np.ndarray:
    """A float16 number of each block, from byte `at` on: float32 [n, 1]."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view(_HALF).astype(np.float32)
