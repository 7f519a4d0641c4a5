"""Blocks are decoded as the gguf package decodes them, bit by bit."""

from __future__ import annotations

import gguf
import numpy as np
import pytest

from converters import gguf_blocks


@pytest.mark.parametrize("kind", gguf_blocks.BYTES)
@pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")
def test_any_bytes_are_the_numbers_of_the_gguf_package(kind):
    """Scales that are infinite or no numbers included."""
    code = gguf.GGMLQuantizationType(kind)
    assert gguf.GGML_QUANT_SIZES[code] == (32, gguf_blocks.BYTES[kind])
    draw = np.random.default_rng(kind)
    raw = draw.integers(0, 256, (67, 5 * gguf_blocks.BYTES[kind]), np.uint8)
    decode = gguf_blocks.decoder(kind)
    assert decode is not None
    expected, found = gguf.dequantize(raw, code), decode(raw)
    assert found.dtype == np.float32 and found.shape == expected.shape == (67, 160)
    assert found.tobytes() == expected.tobytes()


def test_other_types_are_left_to_the_gguf_package():
    assert gguf_blocks.decoder(gguf.GGMLQuantizationType.Q4_K) is None
