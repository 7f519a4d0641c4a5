"""Checkpoints of any size with random weights, written without holding them: 64 MiB are drawn once
and repeated.

    write(folder, "safetensors", config)

What the values are does not matter to whoever loads them, but that they are numbers.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from converters.gguf_weights import GLOBAL, LAYER
from converters.orbax_format import MARKER, PARAMS, VERSION
from converters.parts import Part, parts_of
from converters.sources import INDEX_NAME
from converters.tables import table_for
from jaxserve.models import registry
from jaxserve.models.registry import Declaration

FORMATS = ("safetensors", "orbax", "gguf", "gguf_q8_0", "dummy")
"""gguf: 16-bit; dummy: config.json alone."""
SHARDS = 4
_DRAWN = 1 << 25
"""Values."""


class Weights:
    """Endless normal(0, 0.02) weights as the bytes of a file."""

    def __init__(self, q8_0: bool = False):
        """q8_0: 34 bytes for 32 weights, instead of 16 bits for each."""
        draw = np.random.default_rng(0)
        drawn = 0.02 * draw.standard_normal(_DRAWN, np.float32)
        if q8_0:
            import gguf

            blocks = gguf.quantize(drawn.reshape(-1, 32), gguf.GGMLQuantizationType.Q8_0)
        else:
            blocks = drawn.astype(ml_dtypes.bfloat16).view(np.uint8).reshape(-1, 64)
        self._blocks = blocks.reshape(-1)
        self._per_block = blocks.shape[1]
        self._at = 0

    def size(self, values: int) -> int:
        """Bytes of so many weights."""
        return values * self._per_block // 32

    def pieces(self, size: int) -> Iterator[np.ndarray]:
        """The next `size` bytes."""
        while size:
            piece = self._blocks[self._at : self._at + size]
            yield piece
            size -= len(piece)
            self._at = (self._at + len(piece)) % len(self._blocks)


def write(folder: Path, kind: str, config: dict[str, Any]) -> Path:
    """A checkpoint of `config`, a config.json, in a format of FORMATS. What a loader is given:
    `folder`, which is made, or a file in it."""
    folder.mkdir(parents=True)
    config = {**config, "dtype": "bfloat16"}
    declaration = registry.declare(registry.config_from_hf(config), ml_dtypes.bfloat16)
    if kind.startswith("gguf"):
        return _write_gguf(folder / "model.gguf", declaration, kind == "gguf_q8_0", config)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    if kind == "safetensors":
        _write_safetensors(folder, declaration)
    elif kind == "orbax":
        _write_orbax(folder, declaration)
    return folder


def tensors(declaration: Declaration) -> list[tuple[str, Part]]:
    """The checkpoint's tensors, each behind the path of the parameter that it is part of."""
    table = table_for(declaration.config)
    return [
        (path, part)
        for path, spec in declaration.specs.items()
        for part in parts_of(path, spec.shape, declaration.config, table)
    ]


def _write_safetensors(folder: Path, declaration: Declaration) -> None:
    weights = Weights()
    parts = [part for _, part in tensors(declaration)]
    total = sum(weights.size(math.prod(part.shape)) for part in parts)
    files: list[list[Part]] = [[]]
    size = 0
    for part in parts:
        if size > total / SHARDS * len(files):
            files.append([])
        files[-1].append(part)
        size += weights.size(math.prod(part.shape))
    where = {}
    for number, held in enumerate(files, start=1):
        name = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for part in held:
            start, end = end, end + weights.size(math.prod(part.shape))
            header[part.name] = {
                "dtype": "BF16",
                "shape": list(part.shape),
                "data_offsets": [start, end],
            }
            where[part.name] = name
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with (folder / name).open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for piece in weights.pieces(end):
                file.write(piece.data)
    (folder / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": where}))


def _write_orbax(folder: Path, declaration: Declaration) -> None:
    """As `converters.save` has it written, but for the files that only Orbax reads."""
    weights = Weights()
    for path, spec in declaration.specs.items():
        place = folder / PARAMS / path
        place.mkdir(parents=True)
        header = {
            "chunks": list(spec.shape),
            "compressor": None,
            "dtype": "bfloat16",
            "fill_value": None,
            "filters": None,
            "order": "C",
            "shape": list(spec.shape),
            "zarr_format": 2,
        }
        (place / ".zarray").write_text(json.dumps(header))
        with (place / ".".join("0" * len(spec.shape))).open("wb") as file:
            for piece in weights.pieces(weights.size(math.prod(spec.shape))):
                file.write(piece.data)
    marker = {"format": "orbax", "version": VERSION, "dtype": "bfloat16", "quantization": None}
    (folder / MARKER).write_text(json.dumps(marker))


def _write_gguf(path: Path, declaration: Declaration, q8_0: bool, config: dict[str, Any]) -> Path:
    import gguf

    sizes, arch = declaration.config, config["model_type"]
    writer = gguf.GGUFWriter(path, arch)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(sizes.hidden_size)
    writer.add_block_count(sizes.num_layers)
    writer.add_feed_forward_length(sizes.intermediate_size)
    writer.add_head_count(sizes.num_heads)
    writer.add_head_count_kv(sizes.num_kv_heads)
    writer.add_key_length(sizes.head_dim)
    writer.add_value_length(sizes.head_dim)
    writer.add_rope_dimension_count(sizes.head_dim)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(sizes.vocab_size)
    kind = gguf.GGMLQuantizationType.Q8_0 if q8_0 else gguf.GGMLQuantizationType.BF16
    weights, numbers = Weights(q8_0), np.full(sizes.hidden_size, 0.5, np.float32)
    held = [part for _, part in tensors(declaration)]
    for part in held:
        name = gguf_name(part.name)
        if len(part.shape) == 1:
            writer.add_tensor_info(name, part.shape, numbers.dtype, 4 * part.shape[0])
        else:
            rows = (*part.shape[:-1], weights.size(part.shape[-1]))
            size = math.prod(rows)
            writer.add_tensor_info(name, rows, np.dtype(np.uint8), size, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with path.open("ab") as file:
        for part in held:
            file.write(bytes(-file.tell() % gguf.GGUF_DEFAULT_ALIGNMENT))
            if len(part.shape) == 1:
                file.write(numbers[: part.shape[0]].data)
                continue
            for piece in weights.pieces(weights.size(math.prod(part.shape))):
                file.write(piece.data)
    return path


def gguf_name(name: str) -> str:
    """GGUF's name of a Hugging Face tensor."""
    *lead, kind = name.split(".")
    if name.startswith("model.layers."):
        stems = {hf: stem for stem, hf in LAYER.items()}
        return f"blk.{lead[2]}.{stems['.'.join(lead[3:])]}.{kind}"
    return f"{({hf: stem for stem, hf in GLOBAL.items()})['.'.join(lead)]}.{kind}"
