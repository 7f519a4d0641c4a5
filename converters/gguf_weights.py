"""The tensors of a GGUF file under their Hugging Face names, dequantized one at a time."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np

from converters import gguf_config
from converters.files import open_named
from converters.gguf_reader import BF16, F16, F32, GGUFFile, type_name
from converters.gguf_rope import FACTORS
from converters.messages import plain
from converters.stored_array import Check, StoredArray, copy_block
from jaxserve.errors import ModelLoadError, NotSupportedError

_PLAIN: dict[int, np.dtype[Any]] = {
    F32: np.dtype("<f4"),
    F16: np.dtype("<f2"),
    BF16: np.dtype(ml_dtypes.bfloat16),
}
_GLOBAL = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_NAME = re.compile(r"(?:blk\.(?P<layer>\d+)\.)?(?P<stem>\w+)\.(?P<kind>weight|bias)")
_ROTATED = re.compile(r"blk\.\d+\.attn_(?P<which>[qk])\.(?:weight|bias)")
_PERMUTED = ("llama",)
"""Architectures whose q and k rows llama.cpp's converter reorders; its qwen2, qwen3 keep HF's."""
_ROWS = 64
"""Rows transposed at a time: both sides of the copy stay in the cache."""
_CHUNK = 1 << 22
"""Elements dequantized at a time: bounds the gguf package's own temporary copies."""


def tensors(path: str) -> GGUFTensors:
    """Opens a GGUF file's tensors.

    Raises ModelLoadError when the gguf package is not installed, or the file is missing, truncated
    or damaged; NotSupportedError for an architecture or a tensor type that cannot be read.
    """
    return GGUFTensors(path)


class GGUFTensors:
    """A tensor source: names and shapes as in the model's safetensors files.

    Tensors of unknown name keep their GGUF name, so that whoever compares names reports them.
    """

    def __init__(self, path: str):
        self._gguf = _gguf_package()
        self._open = open_named(Path(path))
        try:
            self._read_table()
        except (ModelLoadError, NotSupportedError):
            self.close()
            raise

    def _read_table(self) -> None:
        self._file = GGUFFile.read(self._open)
        arch = gguf_config.architecture(self._file)
        self._heads = {}
        if arch in _PERMUTED:
            self._heads = {
                "q": gguf_config.head_count(self._file, arch),
                "k": gguf_config.kv_head_count(self._file, arch),
            }
        # The factors are part of the config (gguf_rope), not of the parameters.
        self._names = {_hf_name(name): name for name in self._file.tensors if name != FACTORS}
        self._check_types()
        for name in self._file.tensors:
            self._file.check_extent(name, self._size(name))

    def names(self) -> list[str]:
        return list(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._file.tensors[self._names[name]].shape

    def read(self, name: str) -> np.ndarray:
        """The tensor: float32 when quantized, else in its own type (float32, float16, bfloat16).
        Raises ModelLoadError after `close`, and where the file was written to meanwhile."""
        name = self._names[name]
        info = self._file.tensors[name]
        if info.type_id in _PLAIN:
            dtype = _PLAIN[info.type_id]
            values = StoredArray(self._open, info.offset, info.shape, dtype).read()
        else:
            values = self._dequantize(name)
        rotated = _ROTATED.fullmatch(name)
        if rotated and self._heads:
            heads = self._heads[rotated["which"]]
            if info.shape[0] % (2 * heads):
                raise ModelLoadError(
                    f"{self._file.path}: tensor {plain(name)} of shape {info.shape} does not hold "
                    f"pairs of rows for {heads} heads"
                )
            values = unpermute(values, heads)
        return values

    def read_into(self, name: str, out: np.ndarray, check: Check | None = None) -> None:
        """The same into `out`, which has the tensor's shape. check: sees each block of rows."""
        values = self.read(name)
        for row in range(0, len(values), _ROWS):
            copy_block(values[row : row + _ROWS], out[row : row + _ROWS], check)

    def blocks(self, name: str, rows: int) -> Iterator[np.ndarray]:
        """The same, `rows` of it at a time. (All of it is dequantized first.)"""
        values = self.read(name)
        for start in range(0, len(values), rows):
            yield values[start : start + rows]

    def close(self) -> None:
        self._open.close()

    def _dequantize(self, name: str) -> np.ndarray:
        shape, kind, offset = self._file.tensors[name]
        code = self._gguf.GGMLQuantizationType(kind)
        columns, rows = shape[-1], math.prod(shape[:-1])
        row_bytes = self._size(name) // rows
        values = np.empty((rows, columns), np.float32)
        step = max(1, _CHUNK // columns)
        for row in range(0, rows, step):
            count = min(step, rows - row)
            chunk = (count, row_bytes)
            at = offset + row * row_bytes
            raw = StoredArray(self._open, at, chunk, np.dtype(np.uint8)).read()
            values[row : row + count] = self._gguf.dequantize(raw, code)
        return values.reshape(shape)

    def _size(self, name: str) -> int:
        """Bytes. Raises ModelLoadError when the rows are no whole number of blocks."""
        shape, kind, _ = self._file.tensors[name]
        block, size = self._gguf.GGML_QUANT_SIZES[self._gguf.GGMLQuantizationType(kind)]
        if (shape[-1] if shape else 1) % block:
            raise ModelLoadError(
                f"{self._file.path}: damaged GGUF file: tensor {plain(name)} of shape {shape} has "
                f"rows that are not a multiple of its {block}-element blocks"
            )
        return math.prod(shape) // block * size

    def _check_types(self) -> None:
        """Raises NotSupportedError before anything is converted, rather than halfway."""
        one_of_each = {info.type_id: name for name, info in self._file.tensors.items()}
        for type_id, name in one_of_each.items():
            if type_id in _PLAIN:
                continue
            try:
                code = self._gguf.GGMLQuantizationType(type_id)
                blank = np.zeros((1, self._gguf.GGML_QUANT_SIZES[code][1]), np.uint8)
                self._gguf.dequantize(blank, code)
            except (ValueError, NotImplementedError) as error:
                raise NotSupportedError(
                    f"{self._file.path}: tensor {plain(name)} has ggml type "
                    f"{type_name(type_id)}, which the installed gguf package cannot "
                    f"dequantize: {error}"
                ) from error


def unpermute(values: np.ndarray, heads: int) -> np.ndarray:
    """Undoes the row order that llama.cpp wants for its rotation of neighbouring pairs.

    values: [heads*H, ...], rows of a head as (0, H/2, 1, H/2+1, ...) -> the same shape, rows as
    (0, 1, ..., H-1), where pairs are (i, i + H/2) as in Hugging Face.
    """
    half = values.shape[0] // heads // 2
    pairs = values.reshape(heads, half, 2, *values.shape[1:])
    return pairs.swapaxes(1, 2).reshape(values.shape)


def _hf_name(name: str) -> str:
    match = _NAME.fullmatch(name)
    table = _GLOBAL if match and match["layer"] is None else _LAYER
    if match is None or match["stem"] not in table:
        return name
    layer = "" if match["layer"] is None else f"model.layers.{match['layer']}."
    return f"{layer}{table[match['stem']]}.{match['kind']}"


def _gguf_package() -> ModuleType:
    try:
        import gguf
    except ImportError as error:
        raise ModelLoadError(
            "GGUF files need the gguf package: pip install jaxserve[gguf]"
        ) from error
    return gguf
