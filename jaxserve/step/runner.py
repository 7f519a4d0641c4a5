"""Runs batches: host arrays in, device results out. Owns parameters, cache and state."""

from __future__ import annotations

import functools
import os
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.attention.attend import make_attend
from jaxserve.batch import pack
from jaxserve.batch.batch import Batch, DecodeBatch, ExtendBatch
from jaxserve.batch.pack import ExtendLayout
from jaxserve.cache.pool import count_pages, make_cache
from jaxserve.config import EngineConfig
from jaxserve.sampler import sampler
from jaxserve.sampler.logprobs import TokenLogprobs
from jaxserve.step import step
from jaxserve.step.compile import ProgramKey, Programs
from jaxserve.step.state import DeviceState, initial_state

phase = jax.profiler.TraceAnnotation
"""Names a phase of the loop in a profiler's trace; costs next to nothing without one."""
COPY_WIDTH = 16
"""Pages copied by one call of the copy program."""


class Prepared(NamedTuple):
    """A batch and its host arrays; nothing has touched the device yet."""

    batch: Batch
    arrays: tuple[np.ndarray, ...]
    sparse: tuple[tuple[int, pack.SparseArrays], ...] = ()


class StepResult(NamedTuple):
    """Device arrays that are on their way to the host: tokens [B] int32, the sampled rows'
    logprobs and the packed tokens' input logprobs where somebody wants them."""

    batch: Batch
    tokens: jax.Array
    logprobs: TokenLogprobs | None = None
    input_logprobs: TokenLogprobs | None = None


class Runner:
    """One model on one device. Not thread-safe: the engine thread calls it.

    `loaded` is a converters.LoadedModel.
    """

    def __init__(self, config: EngineConfig, loaded: Any):
        self.config = config
        self.model_config = loaded.config
        declaration = loaded.declaration
        names = tuple(declaration.specs)
        self.params = tuple(loaded.params[name] for name in names)
        self.dtype = self.params[0].dtype
        self.weight_bytes = sum(p.nbytes for p in self.params)
        self._device = next(iter(self.params[0].devices()))
        self._model = step.StepModel(
            bind=lambda params: declaration.bind(dict(zip(names, params, strict=True))),
            attend=make_attend(config.attention),
            page_size=config.page_size,
        )
        self._options = sampler.SamplerOptions(config.max_top_logprobs, config.raw_logprobs)
        self.cache: step.Cache = []
        self.state: DeviceState
        self.num_pages = self._count_pages(0)
        self.programs = Programs(self._program, self._device)
        if config.platform != "cpu":
            self._fit_pool()
        self.reset()

    # -- memory -----------------------------------------------------------------------------------

    def _count_pages(self, program_bytes: int) -> int:
        return count_pages(
            self.config, self.model_config, self.dtype, self._device, self.weight_bytes,
            program_bytes,
        )  # fmt: skip

    def _fit_pool(self) -> None:
        """Make sure that the largest programs' temporaries fit beside the pool."""
        buckets = self.config.buckets
        largest = [("extend", buckets.max_tokens), ("sample", buckets.sampler_rows[-1])]
        state = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(self._state_spec))
        pages = self._count_pages(sum(map(self.programs.memory, largest)) + state)
        if pages < self.num_pages:
            self.num_pages = pages
            self.programs.close()
            self.programs = Programs(self._program, self._device)

    def reset(self) -> None:
        """A fresh cache and state: at the start, and after a failure on the device."""
        self._free()
        with jax.default_device(self._device):
            self.cache = make_cache(
                self.model_config, self.num_pages, self.config.page_size, self.dtype
            )
            self.state = initial_state(self.config, self.model_config.vocab_size)
        self._rows: tuple[np.ndarray, jax.Array] | None = None
        self._no_pages: dict[int, jax.Array] = {}

    def memory_usage(self) -> dict[str, float]:
        """GiB by use, and the device's own count where it keeps one."""
        gib = 2.0**30
        usage = {
            "weight": self.weight_bytes / gib,
            "kvcache": sum(k.nbytes + v.nbytes for k, v in self.cache) / gib,
            "state": sum(x.nbytes for x in jax.tree.leaves(self.state)) / gib,
            "token_capacity": self.num_pages * self.config.page_size,
        }
        stats = self._device.memory_stats() if self.config.platform != "cpu" else None
        if stats:
            usage["in_use"] = stats["bytes_in_use"] / gib
            usage["peak"] = stats["peak_bytes_in_use"] / gib
            usage["limit"] = stats["bytes_limit"] / gib
        return usage

    # -- programs ---------------------------------------------------------------------------------

    def precompile(self) -> None:
        """Compile every program a batch can need."""
        buckets = self.config.buckets
        keys: list[ProgramKey] = [("extend", t) for t in reversed(buckets.extend)]
        keys += [("decode", b) for b in reversed(buckets.decode)]
        keys += [("input_logprobs", t) for t in reversed(buckets.extend)]
        keys += [(kind, b) for kind in ("sample", "greedy") for b in buckets.sampler_rows]
        keys += [("copy_pages", COPY_WIDTH), ("install_sparse", 0)]
        self.programs.precompile(keys, threads=os.cpu_count() or 1)

    def _layout(self, tokens: int) -> ExtendLayout:
        rows = self.config.buckets.extend_rows(tokens)
        return ExtendLayout(tokens, rows, self.config.table_width)

    @functools.cached_property
    def _state_spec(self) -> DeviceState:
        return jax.eval_shape(lambda: initial_state(self.config, self.model_config.vocab_size))

    def _program(self, key: ProgramKey) -> tuple[Any, tuple[Any, ...], tuple[int, ...]]:
        """Function, abstract arguments and donated arguments of the program `key`."""
        kind, bucket = key
        vocab = self.model_config.vocab_size

        def ints(*shape: int) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(shape, jnp.int32)

        cache = jax.eval_shape(
            lambda: make_cache(self.model_config, self.num_pages, self.config.page_size, self.dtype)
        )
        params = tuple(jax.ShapeDtypeStruct(p.shape, p.dtype) for p in self.params)
        progress, sampled, row_params, sparse = self._state_spec
        logits = jax.ShapeDtypeStruct((bucket, vocab), jnp.float32)
        if kind == "extend":
            layout = self._layout(bucket)
            function = functools.partial(step.extend_step, self._model, layout)
            arguments = (params, cache, progress, sampled.counts, row_params, ints(layout.size))
            return function, arguments, (1, 2, 3, 4)
        if kind == "input_logprobs":
            layout = self._layout(bucket)
            function = functools.partial(
                step.input_logprobs, self._model, layout, top=self.config.max_top_logprobs
            )
            hidden = jax.ShapeDtypeStruct((bucket, self.model_config.hidden_size), self.dtype)
            return function, (params, row_params, sparse, ints(layout.size), hidden), ()
        if kind == "decode":
            arguments = (
                params, cache, progress, sampled.last_tokens, ints(bucket), ints(bucket)
            )  # fmt: skip
            return functools.partial(step.decode_step, self._model), arguments, (1, 2)
        if kind == "greedy":
            return sampler.sample_greedy, (logits, sampled, ints(bucket)), (1,)
        if kind == "sample":
            function = functools.partial(sampler.sample, options=self._options)
            arguments = (logits, sampled, ints(bucket), progress.lengths, row_params, sparse)
            return function, arguments, (1,)
        if kind == "copy_pages":
            return step.copy_pages, (cache, ints(bucket), ints(bucket)), (0,)
        assert kind == "install_sparse", kind
        row = [jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for x in sparse]
        return step.install_sparse, (sparse, ints(), *row), (0,)

    # -- steps ------------------------------------------------------------------------------------

    def prepare(self, batch: Batch) -> Prepared:
        """Everything the host does for a batch before the device is involved."""
        padding = self.config.max_rows
        if isinstance(batch, DecodeBatch):
            rows = pack.pack_rows(batch, padding)
            pages = (pack.pack_new_pages(batch),) if batch.new_pages else ()
            return Prepared(batch, (rows, *pages))
        packed = pack.pack_extend(batch, self._layout(batch.tokens), padding)
        lists = (
            (row.sequence.slot, self._pack_sparse(row.sequence.request))
            for row in batch.rows
            if row.fresh and not row.sequence.greedy
        )
        return Prepared(batch, (packed,), tuple((slot, x) for slot, x in lists if x is not None))

    def dispatch(self, prepared: Prepared) -> StepResult:
        """Queue the step and its sampling on the device, and start copying the results back."""
        if isinstance(prepared.batch, DecodeBatch):
            rows, logits = self._decode(prepared.batch, *prepared.arrays)
            input_logprobs = None
        else:
            for slot, lists in prepared.sparse:
                sparse = self.programs(
                    ("install_sparse", 0), self.state.sparse, np.int32(slot), *lists
                )
                self.state = self.state._replace(sparse=sparse)
            rows, logits, input_logprobs = self._extend(prepared.batch, *prepared.arrays)
        result = self._sample(prepared.batch, rows, logits, input_logprobs)
        for array in jax.tree.leaves(result[1:]):
            array.copy_to_host_async()
        return result

    def _decode(
        self, batch: DecodeBatch, rows: np.ndarray, new_pages: np.ndarray | None = None
    ) -> tuple[jax.Array, jax.Array]:
        bucket = batch.row_bucket
        if self._rows is None or not np.array_equal(self._rows[0], rows):
            self._rows = (rows, jax.device_put(rows, self._device))
        if new_pages is None:
            if bucket not in self._no_pages:
                self._no_pages[bucket] = jax.device_put(np.full(bucket, -1, np.int32), self._device)
            pages = self._no_pages[bucket]
        else:
            pages = jax.device_put(new_pages, self._device)
        device_rows = self._rows[1]
        self.cache, progress, logits = self.programs(
            ("decode", bucket), self.params, self.cache, self.state.progress,
            self.state.sampled.last_tokens, device_rows, pages,
        )  # fmt: skip
        self.state = self.state._replace(progress=progress)
        return device_rows, logits

    def _extend(
        self, batch: ExtendBatch, packed: np.ndarray
    ) -> tuple[jax.Array, jax.Array, TokenLogprobs | None]:
        state, vector = self.state, jax.device_put(packed, self._device)
        self.cache, progress, counts, row_params, output = self.programs(
            ("extend", batch.tokens), self.params, self.cache, state.progress,
            state.sampled.counts, state.row_params, vector,
        )  # fmt: skip
        self.state = DeviceState(
            progress, state.sampled._replace(counts=counts), row_params, state.sparse
        )
        for start in range(0, len(batch.page_copies), COPY_WIDTH):
            self._copy_pages(batch.page_copies[start : start + COPY_WIDTH])
        logprobs = None
        if any(pack.wants_input_logprobs(r.sequence.request, r.start, r.stop) for r in batch.rows):
            logprobs = self.programs(
                ("input_logprobs", batch.tokens), self.params, row_params, state.sparse, vector,
                output.hidden,
            )  # fmt: skip
        return output.rows, output.logits, logprobs

    def _copy_pages(self, copies: tuple[tuple[int, int], ...]) -> None:
        sources = np.zeros(COPY_WIDTH, np.int32)
        targets = np.full(COPY_WIDTH, self.num_pages, np.int32)
        sources[: len(copies)], targets[: len(copies)] = zip(*copies, strict=True)
        self.cache = self.programs(("copy_pages", COPY_WIDTH), self.cache, sources, targets)

    def _sample(
        self, batch: Batch, rows: jax.Array, logits: jax.Array, input_logprobs: Any
    ) -> StepResult:
        state, bucket = self.state, batch.row_bucket
        if all(sequence.greedy for sequence in batch.sequences):
            sampled, tokens = self.programs(("greedy", bucket), logits, state.sampled, rows)
            self.state = state._replace(sampled=sampled)
            return StepResult(batch, tokens, None, input_logprobs)
        sampled, tokens, logprobs = self.programs(
            ("sample", bucket), logits, state.sampled, rows, state.progress.lengths,
            state.row_params, state.sparse,
        )  # fmt: skip
        self.state = state._replace(sampled=sampled)
        wanted = any(sequence.request.logprobs for sequence in batch.sequences)
        return StepResult(batch, tokens, logprobs if wanted else None, input_logprobs)

    def _pack_sparse(self, request: Any) -> pack.SparseArrays | None:
        return pack.pack_sparse(request, self.config.bias_capacity, self.config.max_logprob_ids)

    def close(self) -> None:
        """Free the device arrays."""
        self.programs.close()
        self._free()
        self.params = ()

    def _free(self) -> None:
        """Give the cache back before a new one is made: the device may not hold two."""
        for array in jax.tree.leaves((self.cache, getattr(self, "state", None))):
            array.delete()
