"""Our own folder format: parameters as we use them, in an uncompressed Orbax checkpoint.

    config.json, generation_config.json, tokenizer files    as in the Hugging Face folder
    jaxserve.json                                           the marker: format version and dtype
    params/                                                 the Orbax checkpoint

Orbax writes each parameter as a zarr array of one uncompressed chunk, so a chunk file is the
array's bytes. We map those files instead of restoring through Orbax: 0.1 s against 0.5 s for
513 MiB in 212 arrays on a CPU, and each shard of a sharded parameter reads its own bytes only.
Stock Orbax restores the folder as well (`PyTreeCheckpointer().restore(folder / "params")`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np

from converters.convert import place_rows
from converters.placement import Placement
from jaxserve.errors import ModelLoadError
from jaxserve.models.registry import Declaration

MARKER = "jaxserve.json"
_PARAMS = "params"
_VERSION = 1


def is_orbax_folder(folder: Path) -> bool:
    """Whether `folder` was written by `save`."""
    return (folder / MARKER).is_file()


def save(folder: Path, params: Mapping[str, jax.Array], dtype: str) -> None:
    """Writes `params` (dotted path -> array) into `folder`, and the marker last: a folder with a
    marker is complete. Sharded parameters are gathered on the host."""
    # Imported late: orbax takes a second, and only saving needs it.
    import orbax.checkpoint as ocp

    host = {path: np.asarray(array) for path, array in params.items()}
    with ocp.PyTreeCheckpointer(use_ocdbt=False, use_compression=False) as checkpointer:
        checkpointer.save((folder / _PARAMS).absolute(), host)
    marker = {"format": "orbax", "version": _VERSION, "dtype": dtype}
    (folder / MARKER).write_text(json.dumps(marker, indent=2) + "\n", encoding="utf-8")


def restore(folder: Path, declaration: Declaration, placement: Placement) -> dict[str, jax.Array]:
    """Reads the parameters of `declaration` onto their shardings, cast to its dtype.

    Raises ModelLoadError when the folder is damaged or was written for another config; all
    missing, unexpected and wrongly shaped parameters are in one message.
    """
    _check_version(folder)
    headers = {
        path.parent.name: _read_header(path) for path in (folder / _PARAMS).glob("*/.zarray")
    }
    _check_shapes(folder, {path: shape for path, (shape, _) in headers.items()}, declaration)
    params = {}
    for path, spec in declaration.specs.items():
        stored = _map_chunk(folder / _PARAMS / path, *headers[path])
        params[path] = place_rows(stored, spec, placement(path))
    return params


def _check_version(folder: Path) -> None:
    try:
        version = json.loads((folder / MARKER).read_text(encoding="utf-8"))["version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelLoadError(f"{folder / MARKER}: missing or damaged: {error!r}") from error
    if version != _VERSION:
        raise ModelLoadError(
            f"{folder} has format version {version!r}, this jaxserve reads {_VERSION}: convert anew"
        )


def _read_header(path: Path) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """(shape, dtype) of a zarr 2 array stored as one raw chunk."""
    try:
        header = json.loads(path.read_text(encoding="utf-8"))
        shape, chunks = tuple(header["shape"]), tuple(header["chunks"])
        code = header["dtype"]
        dtype = np.dtype(ml_dtypes.bfloat16 if code == "bfloat16" else code)
        raw = header["compressor"] is None and not header["filters"] and header["order"] == "C"
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelLoadError(f"{path}: damaged: {error!r}") from error
    if chunks != shape or not raw:
        raise ModelLoadError(f"{path}: should be one uncompressed chunk; convert again")
    return shape, dtype


def _map_chunk(folder: Path, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
    chunk = folder / ".".join("0" * len(shape))
    expected = math.prod(shape) * dtype.itemsize
    try:
        size = chunk.stat().st_size
    except OSError as error:
        raise ModelLoadError(f"{chunk}: missing: {error}") from error
    if size != expected:
        raise ModelLoadError(f"{chunk}: damaged: {size} bytes long, should be {expected}")
    return np.memmap(chunk, dtype, "r", shape=shape).view(np.ndarray)


def _check_shapes(
    folder: Path, found: Mapping[str, tuple[int, ...]], declaration: Declaration
) -> None:
    specs = declaration.specs
    problems = [f"missing {path}" for path in specs if path not in found]
    problems += [f"unexpected {path}" for path in found if path not in specs]
    problems += [
        f"{path} is {list(found[path])}, should be {list(spec.shape)}"
        for path, spec in specs.items()
        if found.get(path, spec.shape) != spec.shape
    ]
    if problems:
        raise ModelLoadError(
            f"{folder}: the parameters do not fit config.json:\n  " + "\n  ".join(problems)
        )
