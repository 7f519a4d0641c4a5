"""The tensors of a GGUF file under their Hugging Face names, dequantized one at a time."""

from __future__ import annotations

import math
import re
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np

from converters import gguf_config
from converters.gguf_reader import BF16, F16, F32, GGUFFile, type_name
from converters.gguf_rope import FACTORS
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
        self._file = GGUFFile.open(path)
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
        self._map: np.ndarray | None = np.memmap(path, np.uint8, mode="r").view(np.ndarray)

    def names(self) -> list[str]:
        return list(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._file.tensors[self._names[name]].shape

    def read(self, name: str) -> np.ndarray:
        """The tensor: float32 when quantized, else in its own type (float32, float16, bfloat16)
        as a read-only view of the mapped file. Raises ModelLoadError after `close`."""
        if self._map is None:
            raise ModelLoadError(f"{self._file.path}: read of tensor {name} after close")
        name = self._names[name]
        info = self._file.tensors[name]
        raw = self._map[info.offset : info.offset + self._size(name)]
        if info.type_id in _PLAIN:
            values = raw.view(_PLAIN[info.type_id]).reshape(info.shape)
        else:
            values = self._dequantize(raw, info.type_id, info.shape)
        rotated = _ROTATED.fullmatch(name)
        if rotated and self._heads:
            heads = self._heads[rotated["which"]]
            if info.shape[0] % (2 * heads):
                raise ModelLoadError(
                    f"{self._file.path}: tensor {name} of shape {info.shape} does not hold pairs "
                    f"of rows for {heads} heads"
                )
            values = unpermute(values, heads)
        return values

    def close(self) -> None:
        """Drops the map; views of it that are still alive keep it."""
        self._map = None

    def _dequantize(self, raw: np.ndarray, kind: int, shape: tuple[int, ...]) -> np.ndarray:
        code = self._gguf.GGMLQuantizationType(kind)
        columns = shape[-1]
        rows = math.prod(shape[:-1])
        raw = raw.reshape(rows, -1)
        values = np.empty((rows, columns), np.float32)
        step = max(1, _CHUNK // columns)
        for start in range(0, rows, step):
            values[start : start + step] = self._gguf.dequantize(raw[start : start + step], code)
        return values.reshape(shape)

    def _size(self, name: str) -> int:
        """Bytes. Raises ModelLoadError when the rows are no whole number of blocks."""
        shape, kind, _ = self._file.tensors[name]
        block, size = self._gguf.GGML_QUANT_SIZES[self._gguf.GGMLQuantizationType(kind)]
        if (shape[-1] if shape else 1) % block:
            raise ModelLoadError(
                f"{self._file.path}: damaged GGUF file: tensor {name} of shape {shape} has rows "
                f"that are not a multiple of its {block}-element blocks"
            )
        return math.prod(shape) // block * size

    def _check_types(self) -> None:
        """Raises NotSupportedError before anything is converted, rather than halfway."""
        for name, info in self._file.tensors.items():
            if info.type_id in _PLAIN:
                continue
            try:
                code = self._gguf.GGMLQuantizationType(info.type_id)
                blank = np.zeros((1, self._gguf.GGML_QUANT_SIZES[code][1]), np.uint8)
                self._gguf.dequantize(blank, code)
            except (ValueError, NotImplementedError) as error:
                raise NotSupportedError(
                    f"{self._file.path}: tensor {name} has ggml type {type_name(info.type_id)}, "
                    f"which the installed gguf package cannot dequantize: {error}"
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
