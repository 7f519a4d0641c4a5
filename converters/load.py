"""Reads a checkpoint: what the engine calls to get a model's config and parameters."""

from __future__ import annotations

import dataclasses
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
from converters.vision_names import RenamedSource
from converters.whole import Whole
from jaxserve.errors import ModelLoadError, NotSupportedError
from jaxserve.models import registry, values
from jaxserve.models.config import ModelConfig
from jaxserve.models.registry import Declaration, TowerDeclaration
from jaxserve.models.vision.tower import TowerConfig
from jaxserve.shown import quoted

CONFIG_NAME = "config.json"
GENERATION_NAME = "generation_config.json"
PROCESSOR_NAMES = ("preprocessor_config.json", "processor_config.json")
"""How an image processor's sizes are called, the first that is there counts."""


@dataclasses.dataclass(frozen=True, eq=False)
class LoadedTower:
    """What makes of pictures the rows that a model's decoder takes in tokens' places: a module, and
    parameters, of its own."""

    declaration: TowerDeclaration
    """The module's structure, and the parameters' shapes and dtypes."""
    params: dict[str, jax.Array]
    """By dotted path, in the order of `declaration.specs`; each device has all of them."""

    @property
    def config(self) -> TowerConfig:
        """Sizes, of the family's own `config_class`."""
        return self.declaration.config


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
    tower: LoadedTower | None = None
    """Of a model that takes pictures."""
    processor_config: dict[str, Any] | None = None
    """Of its preprocessor_config.json, or of processor_config.json; None where neither is there."""

    @property
    def whole(self) -> Whole:
        """Decoder and tower, as they are converted and saved."""
        return Whole(self.declaration, None if self.tower is None else self.tower.declaration)

    def everything(self) -> dict[str, jax.Array]:
        """The parameters of both, by the paths of `whole`."""
        return self.whole.joined(self.params, {} if self.tower is None else self.tower.params)


def load(
    model_path: str,
    *,
    load_format: str = "auto",
    dtype: str = "auto",
    quantization: str | None = None,
    towers: bool = True,
    sharding: Sharding | Placement | None = None,
    placing: Callable[[ModelConfig], Placement] | None = None,
    config_overrides: dict[str, Any] | None = None,
    context_length: int | None = None,
    revision: str | None = None,
    download_dir: str | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> LoadedModel:
    """Loads a Hugging Face folder, a .gguf file, an Orbax folder of ours, or makes dummy weights.
    Of a model that takes pictures, decoder and tower; .gguf files hold no towers.

    model_path: local path or Hub id. load_format: auto, safetensors, gguf, orbax, or dummy (needs
    config.json only). dtype: of every parameter; "auto" is float32 on CPU, else bfloat16.
    quantization: "fp8" or "w8a16_int8" quantizes the layers' linear kernels, from the checkpoint's
    precision (see models.quantization), never a tower's; an Orbax folder saved quantized loads as
    it is.
    towers: False loads the decoder alone of a model that takes pictures.
    sharding: for every parameter, or a function from a parameter's path to its sharding; None is
    the default device. placing: makes such a function for a model's sizes, instead of sharding;
    what it raises, it raises before anything large is read. config_overrides: keys that replace
    config.json's; those that it does not have are its text_config's, too, if it has one.
    context_length: the longest sequence in tokens that there will be, where that is not the model's
    (see ModelConfig.within). revision, download_dir: for Hub ids. seed: of dummy weights. progress:
    called with the numbers of parameters done and in all (safetensors and GGUF, which are converted
    one at a time).

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
    hf_config = _overridden(read_config(path), config_overrides or {})
    try:
        _refuse_quantized(hf_config)
        config = registry.config_from_hf(hf_config)
        if context_length is not None:
            config = config.within(context_length)
        tower_config = registry.tower_config_from_hf(hf_config, config)
    except ModelLoadError as error:
        raise ModelLoadError(f"{path}: {error}") from error
    if placing is not None:
        placement = placing(config)
    if kind == "orbax":
        quantization = stored_quantization(path, quantization) or quantization
    resolved = resolve_dtype(dtype, placement("embed.embedding"))
    tower = None
    if towers and tower_config is not None:
        tower = registry.declare_tower(tower_config, resolved)

    def declare() -> Whole:
        return Whole(registry.declare(config, resolved, quantization), tower)

    if kind == "dummy":
        sizes.check_room(config, tower, np.dtype(resolved).itemsize, placement("embed.embedding"))
        whole = declare()
        params = dummy_params(whole, placement, seed)
    elif kind == "orbax":
        sizes.check_layers(config, parameter_names(path))
        whole = declare()
        params = restore(path, whole, placement)
    else:
        wanted = None if tower_config is None else tower is not None
        source = open_source(path, kind, tower=wanted)
        try:
            sizes.check_layers(config, source.names())
            whole = declare()
            params = convert(source, whole, placement, progress)
        except ModelLoadError as error:
            raise ModelLoadError(f"{path}: {error}") from error
        finally:
            source.close()
    jax.block_until_ready(params)
    params, of_tower = whole.apart(params)
    return LoadedModel(
        config=config,
        declaration=whole.decoder,
        params=params,
        eos_token_ids=_eos_token_ids(path, config),
        path=str(path),
        format=kind,
        load_seconds=time.perf_counter() - started,
        hf_config=hf_config,
        tower=None if tower is None else LoadedTower(tower, of_tower),
        processor_config=None if tower is None else _processor_config(path),
    )


def open_source(path: Path, kind: str, *, tower: bool | None = None) -> TensorSource:
    """The tensors of a safetensors folder or a GGUF file under the tables' names.

    tower: of a model that has one, whether it is wanted; None: it has none. Raises ModelLoadError,
    NotSupportedError for a GGUF file of a model that has one.
    """
    if kind == "safetensors":
        source = SafetensorsSource(path)
        return source if tower is None else RenamedSource(source, tower=tower)
    if tower is not None:
        raise NotSupportedError(
            f"{path}: a GGUF file holds no tower (llama.cpp keeps it in a file of its own): load "
            "the safetensors checkpoint, or the text model's architecture"
        )
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


def _processor_config(path: Path) -> dict[str, Any] | None:
    found = next((name for name in PROCESSOR_NAMES if files.has(path, name)), None)
    return None if found is None else json_files.read(path, found).values


def _overridden(hf_config: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    text = hf_config.get("text_config")
    if not isinstance(text, dict):
        return hf_config | overrides
    new = {key: value for key, value in overrides.items() if key not in hf_config}
    return hf_config | {"text_config": text | new} | overrides


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
