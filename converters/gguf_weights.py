"""The tensors of a GGUF file under their Hugging Face names, dequantized one at a time."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any

import ml_dtypes
import numpy as np

from converters import gguf_blocks, gguf_config
from converters.files import open_named
from converters.gguf_families import ONE_PLUS, PERMUTED
from converters.gguf_reader import BF16, F16, F32, GGUFFile, type_name
from converters.gguf_rope import FACTORS, LONG, SHORT
from converters.messages import plain
from converters.stored_array import Check, StoredArray, checked
from jaxserve.errors import ModelLoadError, NotSupportedError

_PLAIN: dict[int, np.dtype[Any]] = {
    F32: np.dtype("<f4"),
    F16: np.dtype("<f2"),
    BF16: np.dtype(ml_dtypes.bfloat16),
}
GLOBAL = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GEMMA = {"ffn_norm": "pre_feedforward_layernorm"}
_OWN: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        "gemma2": _GEMMA,
        "gemma3": _GEMMA,
        "glm4": {
            "post_attention_norm": "post_self_attn_layernorm",
            "post_ffw_norm": "post_mlp_layernorm",
            "ffn_up": "mlp.gate_up_proj",
        },
        "phi3": {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"},
    }
)
"""What is otherwise in the layers of some architectures."""
_NAME = re.compile(r"(?:blk\.(?P<layer>\d+)\.)?(?P<stem>\w+)\.(?P<kind>weight|bias)")
_ROTATED = re.compile(r"blk\.\d+\.attn_(?P<which>[qk])\.(?:weight|bias)")
_ROWS = 64
"""Rows copied at a time: both sides of a transposition stay in the cache."""
_CHUNK = 1 << 18
"""Elements dequantized at a time, which bounds temporary copies: a mebibyte of float32, that is
still in the cache when it is copied to where it belongs."""


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
        if arch in PERMUTED:
            self._heads = {
                "q": gguf_config.head_count(self._file, arch),
                "k": gguf_config.kv_head_count(self._file, arch),
            }
        self._one_plus = arch in ONE_PLUS
        # The factors are part of the config (gguf_rope), not of the parameters.
        self._names = {
            _hf_name(name, arch): name
            for name in self._file.tensors
            if name not in (FACTORS, LONG, SHORT)
        }
        self._check_types()
        for name in self._file.tensors:
            self._file.check_extent(name, self._size(name))

    def names(self) -> list[str]:
        return list(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._file.tensors[self._names[name]].shape

    def tensor(self, name: str) -> StoredArray | DecodedTensor:
        """float32 when quantized, else in its own type (float32, float16, bfloat16). Reading raises
        ModelLoadError after `close`, and where the file was written to meanwhile."""
        name = self._names[name]
        shape, kind, offset = self._file.tensors[name]
        heads = self._permuted_heads(name, shape)
        if kind in _PLAIN and self._one_plus and name.endswith("norm.weight"):
            stored = StoredArray(self._open, offset, shape, _PLAIN[kind])
            return DecodedTensor(shape, stored, lambda x: x.astype(np.float32) - 1, None)
        if kind in _PLAIN:
            plain_array = StoredArray(self._open, offset, shape, _PLAIN[kind])
            return plain_array if heads is None else DecodedTensor(shape, plain_array, None, heads)
        rows = math.prod(shape[:-1])
        raw = (rows, self._size(name) // rows)
        stored = StoredArray(self._open, offset, raw, np.dtype(np.uint8))
        code = self._gguf.GGMLQuantizationType(kind)
        decode = gguf_blocks.decoder(kind) or (lambda x: self._gguf.dequantize(x, code))
        return DecodedTensor(shape, stored, decode, heads)

    def _permuted_heads(self, name: str, shape: tuple[int, ...]) -> int | None:
        rotated = _ROTATED.fullmatch(name)
        if not rotated or not self._heads:
            return None
        heads = self._heads[rotated["which"]]
        if shape[0] % (2 * heads):
            raise ModelLoadError(
                f"{self._file.path}: tensor {plain(name)} of shape {shape} does not hold "
                f"pairs of rows for {heads} heads"
            )
        return heads

    def close(self) -> None:
        self._open.close()

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


@dataclasses.dataclass(frozen=True, eq=False)
class DecodedTensor:
    """A tensor that does not lie in the file as it is used: made a few rows at a time."""

    shape: tuple[int, ...]
    """[rows, ...]."""
    stored: StoredArray
    """Of the same shape; if quantized [rows of the last axis, bytes of one]."""
    dequantize: Callable[[np.ndarray], np.ndarray] | None
    """Rows of `stored` -> float32; None if they are numbers, and those that are meant."""
    heads: int | None
    """Whose rows llama.cpp's converter reordered; None: they are in order."""

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.stored.dtype if self.dequantize is None else np.dtype(np.float32)

    def read_into(self, out: np.ndarray, first: int = 0, check: Check | None = None) -> None:
        for at, values in self._steps(first, first + len(out)):
            for row in range(0, len(values), _ROWS):
                block = checked(values[row : row + _ROWS], out.dtype, check)
                to = at - first + row
                out[to : to + len(block)] = block

    def blocks(self) -> Iterator[np.ndarray]:
        for _, values in self._steps(0, self.shape[0]):
            for row in range(0, len(values), _ROWS):
                yield values[row : row + _ROWS]

    def _steps(self, first: int, last: int) -> Iterator[tuple[int, np.ndarray]]:
        """Rows in order behind the number of the first; whole heads together, where they start."""
        head = 1 if self.heads is None else self.shape[0] // self.heads
        step = -(-max(1, _CHUNK // math.prod(self.shape[1:])) // head) * head
        at = first
        while at < last:
            start = at // head * head
            until = min(start + step, self.shape[0])
            values = self._decoded(start, until)
            if self.heads is not None:
                values = unpermute(values, (until - start) // head)
            yield at, values[at - start : last - start]
            at = until

    def _decoded(self, first: int, last: int) -> np.ndarray:
        shape = (last - first, *self.shape[1:])
        if self.dequantize is None:
            out = np.empty(shape, self.dtype)
            self.stored.read_into(out, first)
            return out
        if len(self.shape) == 1:
            return self.dequantize(self.stored.read()).reshape(-1)[first:last]
        rows = math.prod(self.shape[1:-1])
        raw = np.empty(((last - first) * rows, self.stored.shape[1]), np.uint8)
        self.stored.read_into(raw, first * rows)
        return self.dequantize(raw).reshape(shape)


def unpermute(values: np.ndarray, heads: int) -> np.ndarray:
    """Undoes the row order that llama.cpp wants for its rotation of neighbouring pairs.

    values: [heads*H, ...], rows of a head as (0, H/2, 1, H/2+1, ...) -> the same shape, rows as
    (0, 1, ..., H-1), where pairs are (i, i + H/2) as in Hugging Face.
    """
    half = values.shape[0] // heads // 2
    pairs = values.reshape(heads, half, 2, *values.shape[1:])
    return pairs.swapaxes(1, 2).reshape(values.shape)


def _hf_name(name: str, arch: str) -> str:
    match = _NAME.fullmatch(name)
    table = GLOBAL if match and match["layer"] is None else {**LAYER, **_OWN.get(arch, {})}
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
