"""Runs batches: host arrays in, device results out. Owns parameters, cache and state."""

from __future__ import annotations

import dataclasses
import functools
import os
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.attention.paged import PagedOps
from jaxserve.batch import pack
from jaxserve.batch.batch import Batch, DecodeBatch, ExtendBatch
from jaxserve.batch.pack import ExtendLayout
from jaxserve.cache.host import Copies, scatter_targets
from jaxserve.cache.host_pool import BLOCK_BYTES, COPYING_BYTES, HostPool, pages_per_block
from jaxserve.cache.pool import cache_dtype, count_pages, make_cache, page_bytes
from jaxserve.config import EngineConfig
from jaxserve.sampler.sampler import Sampler
from jaxserve.step import step
from jaxserve.step.compile import ProgramKey, Programs
from jaxserve.step.result import Prepared, StepResult
from jaxserve.step.state import DeviceState, initial_state
from jaxserve.step.stored import StoredPrograms
from jaxserve.step.wide import WIDE, WideIds
from jaxserve.step.xla_options import xla_options
from jaxserve.weights import arrange
from pallas_kernels import decode_implementation

if TYPE_CHECKING:
    from converters import LoadedModel

phase = jax.profiler.TraceAnnotation
"""Names a phase of the loop in a profiler's trace; costs next to nothing without one."""
COPY_WIDTH = 16
"""Pages copied by one call of the copy program."""


class Runner:
    """One model on one device. Not thread-safe: the engine thread calls it."""

    def __init__(self, config: EngineConfig, loaded: LoadedModel):
        self.config = config
        self.model_config = loaded.config
        self.params, self._bind = arrange(
            loaded.declaration, loaded.params, config.program.crossovers
        )
        self.dtype = loaded.declaration.dtype
        self._quantized = loaded.declaration.quantization is not None
        self.cache_dtype = cache_dtype(config.program.kv_cache_dtype, self.dtype)
        self.weight_bytes = sum(p.nbytes for p in self.params)
        self._device = next(iter(self.params[0].devices()))
        self.cache: step.Cache
        self.state: DeviceState
        self.num_pages = self._size_pool(0)
        self.programs = self._make_programs()
        if config.program.platform != "cpu":
            self._fit_pool()
        self.host = self._make_host_pool()
        self.reset()

    # -- memory -----------------------------------------------------------------------------------

    def _size_pool(self, program_bytes: int) -> int:
        """Pages of a pool beside `program_bytes` and the state. Where a sequence cannot be longer
        than the pool, page tables are no wider than that."""
        state = jax.eval_shape(
            lambda: initial_state(self.config.program, self.model_config.vocab_size)
        )
        others = program_bytes + sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
        pages = count_pages(
            self.config, self.model_config, self.cache_dtype, self._device, self.weight_bytes,
            others,
        )  # fmt: skip
        if self.model_config.window is None and pages < self.config.program.table_width:
            program = dataclasses.replace(self.config.program, table_width=pages)
            self.config = dataclasses.replace(self.config, program=program)
        return pages

    def _fit_pool(self) -> None:
        """Make sure that the largest programs' temporaries fit beside the pool."""
        buckets = self.config.buckets
        largest: list[ProgramKey] = [("extend", buckets.max_tokens)]
        largest += [(kind, buckets.decode[-1]) for kind in self._decode_kinds]
        first = self._mosaic_keys + largest if self.config.precompile else largest
        self.programs.build(dict.fromkeys(first), threads=os.cpu_count() or 1)
        copies = 0 if self.config.host is None else 2 * (COPYING_BYTES + BLOCK_BYTES)
        pages = self._size_pool(max(map(self.programs.memory, largest)) + copies)
        if pages < self.num_pages:
            self.num_pages = pages
            del self._cache_spec, self._state_spec
            self.programs.close()
            self.programs = self._make_programs()

    @functools.cached_property
    def _block_pages(self) -> int:
        """Pages of one copy to the host."""
        return pages_per_block(self._page_bytes, self.num_pages)

    @property
    def _page_bytes(self) -> int:
        return page_bytes(self.model_config, self.config.program.page_size, self.cache_dtype)

    @property
    def _block_shape(self) -> tuple[int, ...]:
        layers, page = self.model_config.num_layers, self._cache_spec.k.shape[1:]
        return 2, layers, self._block_pages, *page

    def _make_host_pool(self) -> HostPool | None:
        option = self.config.host
        if option is None:
            return None
        num_bytes = option.num_bytes(self.num_pages * self._page_bytes)
        return HostPool(self._device, self._block_shape, self.cache_dtype, num_bytes, option.name)

    def reset(self) -> None:
        """A fresh cache and state: at the start, and after a failure on the device."""
        self._free()
        if self.host is not None:
            self.host.reset()
        with jax.default_device(self._device):
            self.cache = make_cache(
                self.model_config, self.num_pages, self.config.program.page_size,
                self.config.program.max_rows, self.cache_dtype,
            )  # fmt: skip
            self.state = initial_state(self.config.program, self.model_config.vocab_size)
        self._upload: tuple[np.ndarray, jax.Array] | None = None
        _, width = self.config.program.logprob_columns(wide=True)
        self._wide_ids = WideIds(self.config.program.max_rows, width, self._device)

    def memory_usage(self) -> dict[str, float]:
        """GiB by use, and the device's own count where it keeps one."""
        gib = 2.0**30
        usage = {
            "weight": self.weight_bytes / gib,
            "kvcache": (self.cache.k.nbytes + self.cache.v.nbytes) / gib,
            "state": sum(x.nbytes for x in jax.tree.leaves(self.state)) / gib,
            "token_capacity": self.num_pages * self.config.program.page_size,
        }
        if self.host is not None:
            usage["host_kvcache"] = self.host.nbytes / gib
        stats = self._device.memory_stats() if self.config.program.platform != "cpu" else None
        if stats:
            usage["in_use"] = stats["bytes_in_use"] / gib
            usage["peak"] = stats["peak_bytes_in_use"] / gib
            usage["limit"] = stats["bytes_limit"] / gib
        return usage

    # -- programs ---------------------------------------------------------------------------------

    def precompile(self) -> None:
        """Compile every program a batch can need.

        Those with a Mosaic kernel come first and alone: such a kernel is compiled with options of
        LLVM that are not XLA's, so it waits until no other program is in LLVM, and its program
        waits with it (jaxlib 0.11.2). Among programs without, that is at the end.
        """
        buckets, threads = self.config.buckets, os.cpu_count() or 1
        self.programs.build(self._mosaic_keys, threads)
        keys = [(kind, b) for kind in self._decode_kinds for b in reversed(buckets.decode)]
        keys += [("input_logprobs", t) for t in reversed(buckets.extend)]
        keys += [("copy_pages", COPY_WIDTH), ("install_sparse", 0)]
        if self.host is not None:
            keys += [("gather_pages", self._block_pages), ("scatter_pages", self._block_pages)]
        self.programs.precompile(keys, threads)

    @property
    def _mosaic_keys(self) -> list[ProgramKey]:
        """Of the programs with Mosaic kernels, the largest first: extend steps, and decode steps of
        few rows. (Being wrong about it only costs time at the first start.)"""
        buckets = self.config.buckets
        few = [b for b in reversed(buckets.decode) if self._decodes_with_mosaic(b)]
        keys = [("extend", t) for t in reversed(buckets.extend)]
        return keys + [(kind, b) for kind in self._decode_kinds for b in few]

    def _decodes_with_mosaic(self, rows: int) -> bool:
        model, program = self.model_config, self.config.program
        q = jax.ShapeDtypeStruct((rows, model.num_heads, model.head_dim), self.dtype)
        table = jax.ShapeDtypeStruct((rows, program.table_width), jnp.int32)
        with jax.default_device(self._device):
            name = decode_implementation(q, self._cache_spec.k, table, program.attention)
        return name.startswith("mosaic")

    @property
    def _decode_kinds(self) -> tuple[str, ...]:
        """Of the programs with one decode step and, where there are any, with several."""
        several = self.config.program.steps_per_dispatch > 1
        return ("decode", "decode_many") if several else ("decode",)

    def _make_programs(self) -> Programs:
        options = functools.partial(xla_options, self.config.program, quantized=self._quantized)
        return Programs(self._program, self._device, options, self._stored)

    @functools.cached_property
    def _stored(self) -> StoredPrograms | None:
        if self.config.program_folder is None:
            return None
        facts = (self.config.program, self.model_config)
        stored = StoredPrograms(self.config.program_folder, self._device, facts)
        stored.prune()
        return stored

    def _layout(self, tokens: int) -> ExtendLayout:
        rows = self.config.buckets.extend_rows(tokens)
        return ExtendLayout(tokens, rows, self.config.program.table_width)

    def _model(self, top: int) -> step.StepModel:
        """The model over a cache of the present size; top: columns of the best logprobs."""
        config = self.config.program
        ops = PagedOps(
            config.attention, config.other_kernels, self.num_pages, config.crossovers,
            fixed_tiles=config.deterministic,
        )  # fmt: skip
        sampler = Sampler(
            top, config.raw_logprobs, config.other_kernels,
            fixed_split=config.deterministic,
        )  # fmt: skip
        return step.StepModel(
            bind=self._bind,
            ops=ops,
            sampler=sampler,
            page_size=config.page_size,
        )

    @functools.cached_property
    def _cache_spec(self) -> step.Cache:
        return jax.eval_shape(
            lambda: make_cache(
                self.model_config, self.num_pages, self.config.program.page_size,
                self.config.program.max_rows, self.cache_dtype,
            )
        )  # fmt: skip

    @functools.cached_property
    def _state_spec(self) -> DeviceState:
        return jax.eval_shape(
            lambda: initial_state(self.config.program, self.model_config.vocab_size)
        )

    def _program(self, key: ProgramKey) -> tuple[Any, tuple[Any, ...], tuple[int, ...]]:
        """Function, abstract arguments and donated arguments of the program `key`."""
        kind, bucket = key
        wide = kind.endswith(WIDE)
        kind = kind.removesuffix(WIDE)
        top, named = self.config.program.logprob_columns(wide)

        def ints(*shape: int) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(shape, jnp.int32)

        cache = self._cache_spec
        params = tuple(jax.ShapeDtypeStruct(p.shape, p.dtype) for p in self.params)
        progress, sampled, row_params, sparse = self._state_spec
        sparse = sparse._replace(logprob_ids=ints(self.config.program.max_rows + 1, named))
        carried = (cache, progress, sampled, row_params, sparse)
        if kind == "extend":
            layout = self._layout(bucket)
            function = functools.partial(step.extend_step, self._model(top), layout)
            return function, (params, *carried, ints(layout.size)), (1, 2, 3, 4)
        if kind == "input_logprobs":
            layout = self._layout(bucket)
            function = functools.partial(step.input_logprobs, self._model(top), layout, top=top)
            hidden = jax.ShapeDtypeStruct((bucket, self.model_config.hidden_size), self.dtype)
            return function, (params, row_params, sparse, ints(layout.size), hidden), ()
        if kind in self._decode_kinds:
            steps = 1 if kind == "decode" else self.config.program.steps_per_dispatch
            function = functools.partial(step.decode_steps, self._model(top), steps)
            return function, (params, *carried, ints(2, bucket)), (1, 2, 3)
        if kind == "copy_pages":
            copy = functools.partial(step.copy_pages, self.model_config.num_layers)
            return copy, (cache, ints(bucket), ints(bucket)), (0,)
        if kind == "gather_pages":
            gather = functools.partial(step.gather_pages, self.model_config.num_layers)
            return gather, (cache, ints(bucket)), ()
        if kind == "scatter_pages":
            scatter = functools.partial(step.scatter_pages, self.model_config.num_layers)
            block = jax.ShapeDtypeStruct(self._block_shape, self.cache_dtype)
            return scatter, (cache, ints(bucket), block), (0,)
        assert kind == "install_sparse", kind
        row = [jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for x in sparse]
        return step.install_sparse, (sparse, ints(), *row), (0,)

    # -- steps ------------------------------------------------------------------------------------

    def prepare(self, batch: Batch) -> Prepared:
        """Everything the host does for a batch before the device is involved."""
        padding = self.config.program.max_rows
        if isinstance(batch, DecodeBatch):
            return Prepared(batch, pack.pack_decode(batch, padding))
        packed = pack.pack_extend(batch, self._layout(batch.tokens), padding)
        lists = (
            (row.sequence.slot, self._pack_sparse(row.sequence.request))
            for row in batch.rows
            if row.fresh
        )
        return Prepared(batch, packed, tuple((slot, x) for slot, x in lists if x is not None))

    def dispatch(self, prepared: Prepared) -> StepResult:
        """Queue the step on the device, and start copying its results back."""
        batch = prepared.batch
        if isinstance(batch, DecodeBatch):
            output, input_logprobs = self._decode(batch, prepared.upload), None
        else:
            for slot, lists in prepared.sparse:
                sparse = self.programs(
                    ("install_sparse", 0), self.state.sparse, np.int32(slot), *lists
                )
                self.state = self.state._replace(sparse=sparse)
            output, input_logprobs = self._extend(batch, prepared.upload)
        logprobs = output.logprobs if batch.wants_logprobs else None
        for array in (output.tokens, logprobs, input_logprobs):
            if array is not None:
                array.copy_to_host_async()
        top, _ = self.config.program.logprob_columns(batch.wants_wide)
        return StepResult(batch, output.tokens, logprobs, input_logprobs, top)

    def _decode(self, batch: DecodeBatch, upload: np.ndarray) -> step.StepOutput:
        if self._upload is None or not np.array_equal(self._upload[0], upload):
            self._upload = (upload, jax.device_put(upload, self._device))
        kind = "decode" if batch.steps == 1 else "decode_many"
        ending, state = self._reporting(batch)
        self.cache, progress, sampled, output = self.programs(
            (kind + ending, batch.row_bucket), self.params, self.cache, *state, self._upload[1]
        )
        self.state = self.state._replace(progress=progress, sampled=sampled)
        return output

    def _extend(
        self, batch: ExtendBatch, packed: np.ndarray
    ) -> tuple[step.StepOutput, jax.Array | None]:
        # The call itself takes a NumPy array to the device in a fifth of device_put's time.
        ending, state = self._reporting(batch)
        self.cache, progress, sampled, row_params, output, hidden = self.programs(
            ("extend" + ending, batch.tokens), self.params, self.cache, *state, packed
        )
        self.state = DeviceState(progress, sampled, row_params, self.state.sparse)
        for start in range(0, len(batch.page_copies), COPY_WIDTH):
            self._copy_pages(batch.page_copies[start : start + COPY_WIDTH])
        if not any(
            pack.wants_input_logprobs(r.sequence.request, r.start, r.stop) for r in batch.rows
        ):
            return output, None
        logprobs = self.programs(
            ("input_logprobs" + ending, batch.tokens), self.params, row_params, state.sparse,
            packed, hidden,
        )  # fmt: skip
        return output, logprobs

    def _reporting(self, batch: Batch) -> tuple[str, DeviceState]:
        """How the kinds of programs end that report all that the batch's rows want, and their
        state."""
        if not batch.wants_wide:
            return "", self.state
        sparse = self.state.sparse._replace(logprob_ids=self._wide_ids.of(batch))
        return WIDE, self.state._replace(sparse=sparse)

    def _copy_pages(self, copies: tuple[tuple[int, int], ...]) -> None:
        sources = np.zeros(COPY_WIDTH, np.int32)
        targets = np.full(COPY_WIDTH, self.num_pages, np.int32)
        sources[: len(copies)], targets[: len(copies)] = zip(*copies, strict=True)
        self.cache = self.programs(("copy_pages", COPY_WIDTH), self.cache, sources, targets)

    def copy(self, copies: Copies) -> None:
        """Queue copies of pages to the host and back, before the next step: the device reads what
        is evicted before anybody writes there. With a host tier only."""
        assert self.host is not None
        for block, evicted in copies.out:
            pages = np.zeros(self._block_pages, np.int32)
            pages[: len(evicted)] = evicted
            content = self.programs(("gather_pages", self._block_pages), self.cache, pages)
            self.host.store(block, content)
        at_once = max(COPYING_BYTES // self.host.block_bytes, 1)
        key = ("scatter_pages", self._block_pages)
        for number, (block, wanted) in enumerate(copies.into, 1):
            content = self.host.load(block)
            for pages in scatter_targets(wanted, self._block_pages, self.num_pages):
                self.cache = self.programs(key, self.cache, pages, content)
            if number % at_once == 0:  # what was copied lies there twice until it is written
                self.cache.k.block_until_ready()

    def _pack_sparse(self, request: Any) -> pack.SparseArrays | None:
        return pack.pack_sparse(
            request, self.config.program.bias_capacity, self.config.program.max_logprob_ids
        )

    def close(self) -> None:
        """Free the device arrays."""
        self.programs.close()
        self._free()
        if self.host is not None:
            self.host.close()
        self.params = ()

    def _free(self) -> None:
        """Give the cache back before a new one is made: the device may not hold two."""
        for array in jax.tree.leaves([getattr(self, name, None) for name in ("cache", "state")]):
            array.delete()
