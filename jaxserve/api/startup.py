"""From constructor options to a running engine thread with its tokenizer."""

from __future__ import annotations

import dataclasses
import functools
import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxserve.api.images import pictures_of, reader_of
from jaxserve.api.model_facts import ModelFacts
from jaxserve.config import cache_folder
from jaxserve.errors import InvalidRequestError
from jaxserve.folders import PrivateFolder
from jaxserve.process import check_jax
from jaxserve.server_args import ServerArgs
from jaxserve.text.codec import Codec

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from jaxserve.core import Core
    from jaxserve.media.reader import Reader

DTYPE_NAMES = {"half": "float16", "float": "float32"}
EXTRA_STOP_TOKENS = ("<|eom_id|>",)
"""Special tokens that end a model's turn though no config says so (Llama 3's tool calls). Those of
a GGUF file are in its config (converters.gguf_config)."""
MOST_CACHE_BYTES = 2 << 30
"""Of JAX's compilation cache, checked at each start. JAX's own limit does the same at every program
that it writes, needs another package, and fails on files that were written without it."""


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class Started:
    """What `Engine` is built on."""

    loop: Core
    """Running."""
    tokenizer: Any
    """A transformers tokenizer; None with skip_tokenizer_init."""
    codec: Codec | None
    """The engine's own copy of it."""
    eos_ids: frozenset[int]
    """All tokens that end a text: the model's and the tokenizer's."""
    load_format: str
    """What was found: safetensors, gguf, orbax or dummy."""
    quantization: str | None = None
    """Of the loaded weights; an Orbax folder may be quantized without the option."""
    reader: Reader | None = None
    """Of images in prompts; None: the engine takes none."""
    model_config: ModelFacts = dataclasses.field(kw_only=True)
    """The model's sizes."""


def start(args: ServerArgs) -> Started:
    """Loads tokenizer and model and starts the engine thread.

    Raises ModelLoadError (missing or damaged files), NotSupportedError (architecture),
    InvalidRequestError (an option that does not fit the model or the machine), ForkedProcessError.
    """
    check_jax()
    # JAX and transformers take seconds to import; scripts that only parse options wait for none.
    from jaxserve.compat import Settings

    with Settings.here().applied():
        return _start(args)


def _start(args: ServerArgs) -> Started:
    import converters
    from jaxserve.compat import find_mosaic_runtime
    from jaxserve.parallel.mesh import first_device, replicas
    from jaxserve.replicas.start import start_on
    from jaxserve.weights import placement

    if args.trust_remote_code:
        warnings.warn(
            "trust_remote_code=True is ignored: jaxserve never runs a checkpoint's code",
            stacklevel=4,
        )
    # Beside the rest: most of either is waiting for files and, on a GPU, for the device and XLA.
    with ThreadPoolExecutor(2, "jaxserve-start") as threads:
        reading = threads.submit(_tokenizer, args)
        mesh = _prepare_jax(args)
        if first_device(mesh).platform == "gpu":
            threads.submit(find_mosaic_runtime)  # which every program would wait for
        loaded = converters.load(
            args.model_path,
            load_format=args.load_format,
            dtype=DTYPE_NAMES.get(args.dtype, args.dtype),
            quantization=args.quantization,
            towers=args.enable_multimodal is not False,
            placing=functools.partial(placement, mesh=replicas(mesh)[0]),
            config_overrides=args.config_overrides,
            context_length=args.context_length,
            revision=args.revision,
            download_dir=args.download_dir,
            seed=args.random_seed or 0,
        )
        reader = reader_of(args, loaded, lambda: reading.result()[1])
        if reading.done():
            reading.result()  # what is wrong with it is said before programs are compiled
        loop = start_on(args, loaded, mesh, None if reader is None else pictures_of(reader, loaded))
        try:
            tokenizer, codec = reading.result()
        except BaseException:
            loop.shutdown()
            raise
    eos_ids = frozenset(loaded.eos_token_ids) | tokenizer_eos(tokenizer)
    facts = ModelFacts.of(args.model_path, loaded, loop.limits.context_length, eos_ids)
    return Started(
        loop,
        tokenizer,
        codec,
        eos_ids,
        loaded.format,
        loaded.declaration.quantization,
        reader=reader,
        model_config=facts,
    )


def _tokenizer(args: ServerArgs) -> tuple[Any, Codec | None]:
    """The one that `args` ask for, and the engine's copy; None with skip_tokenizer_init."""
    if args.skip_tokenizer_init:
        return None, None
    import converters

    tokenizer = converters.load_tokenizer(
        args.tokenizer_path or args.model_path,
        tokenizer_mode=args.tokenizer_mode,
        revision=args.revision,
        download_dir=args.download_dir,
        chat_template=args.chat_template,
    )
    return tokenizer, Codec(tokenizer)


def tokenizer_eos(tokenizer: Any) -> frozenset[int]:
    """The end-of-text ids that a tokenizer knows. A plain token with the text of one is none."""
    if tokenizer is None:
        return frozenset()
    ids = {
        id_
        for id_, token in tokenizer.added_tokens_decoder.items()
        if token.special and token.content in EXTRA_STOP_TOKENS
    }
    if tokenizer.eos_token_id is not None:
        ids.add(tokenizer.eos_token_id)
    return frozenset(ids)


def _prepare_jax(args: ServerArgs) -> Mesh:
    """Configures JAX for an engine; the devices that it runs on, [data, tensor]."""
    from jaxserve import compat
    from jaxserve.cache.host_pool import pinned_limit
    from jaxserve.cache.pool import ALLOCATOR_FRACTION
    from jaxserve.parallel.mesh import given_mesh, numbered_mesh

    compat.reserve_device_memory(max(ALLOCATOR_FRACTION, args.mem_fraction_static or 0.0))
    if args.enable_hierarchical_cache:
        compat.allow_pinned_memory(pinned_limit(int(args.hicache_size * 1e9)))
    if args.mesh is None:
        devices = _devices(args.device)
        mesh = numbered_mesh(devices, args.mesh_shape, args.base_gpu_id, args.gpu_id_step)
    else:
        mesh = given_mesh(args.mesh)
    if args.compilation_cache_dir != "":
        configured = compat.cache_configured()
        folder = None if configured else _cache_folder(args.compilation_cache_dir)
        if configured or folder:
            compat.enable_compilation_cache(folder)
    return mesh


def _devices(option: str | None) -> list[Any]:
    """This process's jax.Devices of the first platform in `option` ("cuda", "cuda,cpu") that JAX
    has, and of JAX's default for None."""
    import jax

    from jaxserve import compat

    first, *others = (None,) if option is None else option.split(",")
    try:
        return jax.local_devices(backend=first)
    except RuntimeError as error:
        if not others:
            raise InvalidRequestError(
                f"device={option!r} is not available to JAX, whose jax_platforms is "
                f"{compat.platforms()!r}: {error}"
            ) from error
    warnings.warn(f"JAX has no {first} device here: running on {others[0]}", stacklevel=5)
    return _devices(",".join(others))


def _cache_folder(option: str | None) -> str | None:
    """The folder for JAX's compilation cache, made if need be; None where it cannot be used, which
    a warning says."""
    from jaxserve import compat

    folder = cache_folder(option)
    try:
        if not folder:
            raise FileNotFoundError("this user has no home folder")
        private = PrivateFolder(Path(folder))
        private.create()
        if not compat.cache_limited():
            private.prune(suffix="-cache", most_bytes=MOST_CACHE_BYTES)
        if not os.access(folder, os.W_OK):
            raise PermissionError(f"{folder} cannot be written to")
    except OSError as error:
        warnings.warn(
            "compiled programs are not kept, and every start compiles them anew: "
            f"{error}. compilation_cache_dir chooses another folder ('' is none)",
            stacklevel=6,
        )
        return None
    return folder
