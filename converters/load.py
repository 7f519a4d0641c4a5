"""Reads a checkpoint: what the engine calls to get a model's config and parameters."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding

from converters import files, json_files, locate, sizes
from converters.convert import convert
from converters.dummy import dummy_params
from converters.orbax_format import parameter_names, restore, stored_quantization
from converters.placement import Placement, placement_for, resolve_dtype
from converters.sources import SafetensorsSource, TensorSource
from jaxserve.errors import ModelLoadError, NotSupportedError
from jaxserve.models import registry, values
from jaxserve.models.config import ModelConfig
from jaxserve.models.registry import Declaration
from jaxserve.shown import quoted

CONFIG_NAME = "config.json"
GENERATION_NAME = "generation_config.json"


@dataclasses.dataclass(frozen=True, eq=False)
class LoadedModel:
    """A model ready to run."""

    config: ModelConfig
    """Sizes."""
    declaration: Declaration
    """The module's structure, and the parameters' shapes and dtypes."""
    params: dict[str, jax.Array]
    """By dotted path, in the order of `declaration.specs`."""
    eos_token_ids: tuple[int, ...]
    """Of config.json, then those that only generation_config.json has."""
    path: str
    """The local folder or file that was read."""
    format: str
    """safetensors, gguf, orbax or dummy."""
    load_seconds: float
    """Reading, converting and placing."""
    hf_config: dict[str, Any]
    """config.json with the caller's overrides."""


def load(
    model_path: str,
    *,
    load_format: str = "auto",
    dtype: str = "auto",
    quantization: str | None = None,
    sharding: Sharding | Placement | None = None,
    placing: Callable[[ModelConfig], Placement] | None = None,
    config_overrides: dict[str, Any] | None = None,
    revision: str | None = None,
    download_dir: str | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> LoadedModel:
    """Loads a Hugging Face folder, a .gguf file, an Orbax folder of ours, or makes dummy weights.

    model_path: local path or Hub id. load_format: auto, safetensors, gguf, orbax, or dummy (needs
    config.json only). dtype: of every parameter; "auto" is float32 on CPU, else bfloat16.
    quantization: "fp8" or "w8a16_int8" quantizes the layers' linear kernels, from the checkpoint's
    precision (see models.quantization); an Orbax folder saved quantized loads as it is.
    sharding: for every parameter, or a function from a parameter's path to its sharding; None is
    the default device. placing: makes such a function for a model's sizes, instead of sharding;
    what it raises, it raises before anything large is read. config_overrides: keys that replace
    config.json's. revision, download_dir: for Hub ids. seed: of dummy weights. progress: called
    with the numbers of parameters done and in all (safetensors and GGUF, which are converted one at
    a time).

    Raises ModelLoadError (missing, damaged or unfitting files), NotSupportedError (architecture,
    load_format, quantization, quantized weights), InvalidRequestError (dtype, an Orbax folder
    quantized in another way).
    """
    started = time.perf_counter()
    locate.check_format(load_format)
    placement = placement_for(sharding)
    local = locate.find_local(
        model_path, revision=revision, download_dir=download_dir, weights=load_format != "dummy"
    )
    path, kind = locate.detect_format(local, load_format)
    hf_config = read_config(path) | (config_overrides or {})
    try:
        _refuse_quantized(hf_config)
        config = registry.config_from_hf(hf_config)
    except ModelLoadError as error:
        raise ModelLoadError(f"{path}: {error}") from error
    if placing is not None:
        placement = placing(config)
    if kind == "orbax":
        quantization = stored_quantization(path, quantization) or quantization
    resolved = resolve_dtype(dtype, placement("embed.embedding"))
    declare = functools.partial(registry.declare, config, resolved, quantization)
    if kind == "dummy":
        sizes.check_room(config, np.dtype(resolved).itemsize, placement("embed.embedding"))
        declaration = declare()
        params = dummy_params(declaration, placement, seed)
    elif kind == "orbax":
        sizes.check_layers(config, parameter_names(path))
        declaration = declare()
        params = restore(path, declaration, placement)
    else:
        source = open_source(path, kind)
        try:
            sizes.check_layers(config, source.names())
            declaration = declare()
            params = convert(source, declaration, placement, progress)
        except ModelLoadError as error:
            raise ModelLoadError(f"{path}: {error}") from error
        finally:
            source.close()
    jax.block_until_ready(params)
    return LoadedModel(
        config=config,
        declaration=declaration,
        params=params,
        eos_token_ids=_eos_token_ids(path, config),
        path=str(path),
        format=kind,
        load_seconds=time.perf_counter() - started,
        hf_config=hf_config,
    )


def open_source(path: Path, kind: str) -> TensorSource:
    """The tensors of a safetensors folder or a GGUF file under Hugging Face names."""
    if kind == "safetensors":
        return SafetensorsSource(path)
    # The gguf package is an extra: imported only for those who need it.
    from converters import gguf_weights

    return gguf_weights.tensors(str(path))


def read_config(path: Path) -> dict[str, Any]:
    """config.json of a folder, or the same made from a GGUF file's metadata."""
    if files.is_file(path):
        from converters import gguf_config

        return gguf_config.read_config(str(path))
    if not files.has(path, CONFIG_NAME):
        raise ModelLoadError(
            f"{path / CONFIG_NAME} does not exist: the model's folder must hold its config"
        )
    return json_files.read(path, CONFIG_NAME).values


def _refuse_quantized(hf_config: dict[str, Any]) -> None:
    quantization = values.table(hf_config, "quantization_config")
    if quantization:
        method = quoted(quantization.get("quant_method", quantization))
        raise NotSupportedError(
            f"config.json: quantized checkpoints are not supported yet (quant_method={method}); "
            "use the unquantized checkpoint or a GGUF file"
        )


def _eos_token_ids(path: Path, config: ModelConfig) -> tuple[int, ...]:
    """Of config.json, then of generation_config.json. Raises ModelLoadError for what is no id."""
    generation: dict[str, Any] = {}
    if not files.is_file(path) and files.has(path, GENERATION_NAME):
        generation = json_files.read(path, GENERATION_NAME).values
    more = values.token_ids(
        generation, "eos_token_id", config.vocab_size, str(path / GENERATION_NAME)
    )
    return tuple(dict.fromkeys(config.eos_token_ids + more))
