"""Writes a loaded model as a folder: our Orbax format, or Hugging Face safetensors."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from converters import companions, files, orbax_format
from converters.convert import to_hf
from converters.load import LoadedModel
from converters.tokenizer import load_tokenizer
from converters.vision_names import hub_name
from jaxserve.errors import InvalidRequestError, NotSupportedError
from jaxserve.shown import quoted

FORMATS = ("orbax", "safetensors")

_CODES = {
    np.dtype(np.float32): "F32",
    np.dtype(np.float16): "F16",
    np.dtype(ml_dtypes.bfloat16): "BF16",
}


def check_empty(folder: Path) -> None:
    """Raises InvalidRequestError when `folder` exists and is not an empty folder."""
    try:
        taken = folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
    except (OSError, ValueError) as error:  # a name too long, no permission, a zero byte
        raise InvalidRequestError(f"{quoted(str(folder))}: cannot be written: {error}") from error
    if taken:
        raise InvalidRequestError(f"{folder} exists and is not an empty folder; give another OUT")


def check_save_format(save_format: str, quantization: str | None) -> None:
    """Raises InvalidRequestError for a format that is not one of FORMATS, NotSupportedError where
    it cannot hold weights quantized by `quantization`."""
    if save_format not in FORMATS:
        raise InvalidRequestError(
            f"save_format must be one of {', '.join(FORMATS)}; got {save_format!r}"
        )
    if quantization is not None and save_format != "orbax":
        raise NotSupportedError(
            f"weights quantized as {quantization!r} cannot be saved as {save_format}; use orbax"
        )


def save(loaded: LoadedModel, folder: str | Path, save_format: str = "orbax") -> None:
    """Writes weights, config.json, generation_config.json and tokenizer files into `folder`.

    Any format that `load` reads can be the origin. save_format: one of FORMATS. A checkpoint
    without a tokenizer is saved without one. Raises InvalidRequestError when `folder` is not empty
    or cannot be written, or the format is unknown, NotSupportedError for quantized weights as
    safetensors, ModelLoadError for files of the origin that are links out of it, or no files.
    """
    folder = Path(folder)
    check_save_format(save_format, loaded.declaration.quantization)
    check_empty(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write(loaded, folder, save_format)
    except OSError as error:
        raise InvalidRequestError(f"{folder}: cannot be written: {error}") from error


def _write(loaded: LoadedModel, folder: Path, save_format: str) -> None:
    dtype = str(loaded.declaration.dtype)
    _write_json(folder / "config.json", _config(loaded.hf_config, dtype))
    _write_companions(loaded, folder)
    if save_format == "orbax":
        orbax_format.save(folder, loaded.everything(), dtype, loaded.declaration.quantization)
    else:
        _write_safetensors(folder / "model.safetensors", loaded)


def _config(hf_config: dict[str, Any], dtype: str) -> dict[str, Any]:
    return {k: v for k, v in hf_config.items() if k != "torch_dtype"} | {"dtype": dtype}


def _write_companions(loaded: LoadedModel, folder: Path) -> None:
    origin = Path(loaded.path)
    if origin.is_dir():
        for name in companions.COMPANIONS:
            if files.has(origin, name):
                content = files.read_inside(origin, name, limit=companions.MAX_BYTES)
                (folder / name).write_bytes(content)
    else:  # a GGUF file, whose tokenizer lies in its metadata
        load_tokenizer(str(origin)).save_pretrained(str(folder))
    if not (folder / "generation_config.json").exists():
        generation: dict[str, Any] = {"eos_token_id": list(loaded.eos_token_ids)}
        if loaded.config.bos_token_id is not None:
            generation["bos_token_id"] = loaded.config.bos_token_id
        _write_json(folder / "generation_config.json", generation)


def _write_safetensors(path: Path, loaded: LoadedModel) -> None:
    """Streams one tensor at a time: header from the shapes alone, then the data in its order."""
    whole, architecture = loaded.whole, loaded.config.architecture
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    dtype, offset = np.dtype(whole.dtype), 0
    for param in whole.specs:
        for part in whole.parts_of(param):
            end = offset + math.prod(part.shape) * dtype.itemsize
            header[hub_name(part.name, architecture)] = {
                "dtype": _CODES[dtype],
                "shape": list(part.stored),
                "data_offsets": [offset, end],
            }
            offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for array in _hf_tensors(loaded):
            file.write(array.view(np.uint8).data)


def _hf_tensors(loaded: LoadedModel) -> Iterator[np.ndarray]:
    whole = loaded.whole
    for param, array in loaded.everything().items():
        plus = whole.table.rule(param)[0].plus
        for tensor in to_hf(whole.parts_of(param), np.asarray(array), plus):
            yield tensor.astype(whole.dtype, copy=False)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
