"""Runs batches: host arrays in, device results out. Owns all that the device keeps."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from jaxserve.cache.host import Copies, scatter_targets
from jaxserve.cache.host_pool import COPYING_BYTES
from jaxserve.cache.pool import cache_dtype
from jaxserve.config import EngineConfig
from jaxserve.folders import PrivateFolder
from jaxserve.packing import pack
from jaxserve.packing.batch import Batch, DecodeBatch, ExtendBatch
from jaxserve.packing.buckets import Ready
from jaxserve.parallel.mesh import bytes_on_each, first_device, replicated
from jaxserve.step import step
from jaxserve.step.catalogue import ProgramKey
from jaxserve.step.compile import Programs
from jaxserve.step.memory import Memory
from jaxserve.step.pages import COPY_WIDTH
from jaxserve.step.payloads import Variant
from jaxserve.step.precompile import Precompilation
from jaxserve.step.programs import Facts, engine_programs
from jaxserve.step.result import Prepared, StepResult
from jaxserve.step.shared import Shared
from jaxserve.step.stored import StoredPrograms
from jaxserve.step.wide import WideIds
from jaxserve.step.xla_options import xla_options
from jaxserve.weights import arrange, cut_over

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from converters import LoadedModel

phase = jax.profiler.TraceAnnotation
"""Names a phase of the loop in a profiler's trace; costs next to nothing without one."""


class Runner:
    """One model on one mesh. Not thread-safe: the engine thread calls it."""

    def __init__(
        self, config: EngineConfig, loaded: LoadedModel, mesh: Mesh, shared: Shared | None = None
    ):
        """loaded: with parameters that lie on `mesh`. shared: with the replicas beside it."""
        self.model_config = loaded.config
        self._declaration = cut_over(loaded.declaration, mesh)
        crossovers = config.program.crossovers
        params, self._kept = arrange(self._declaration, loaded.params, crossovers, mesh)
        self._arrays: dict[str, Any] = {"params": params}
        """What the device keeps, by the names that programs have for it."""
        self.dtype = loaded.declaration.dtype
        self._mesh = mesh
        self._replicated = replicated(mesh)
        self._shared = shared
        self.memory = Memory(
            config,
            self.model_config,
            cache_dtype(config.program.kv_cache_dtype, self.dtype),
            mesh,
            bytes_on_each(params),
            None if shared is None else shared.devices,
        )
        self._declare_programs()
        self._precompilation.first()
        if config.program.platform != "cpu":
            self._fit_pool()
        self.host = self.memory.make_host_pool()
        self.reset()
        self._precompilation.rest()

    @property
    def config(self) -> EngineConfig:
        return self.memory.config

    @property
    def num_pages(self) -> int:
        return self.memory.num_pages

    @property
    def cache(self) -> step.Cache:
        return self._arrays["cache"]

    # -- programs ---------------------------------------------------------------------------------

    def _declare_programs(self) -> None:
        """For a pool of the present size."""
        facts = Facts(self._declaration, self.memory, self._kept, self._mesh)
        quantized = self._declaration.quantization is not None
        self._layout = functools.cache(facts.layout)
        self._catalogue = engine_programs(facts)
        self.programs = Programs(
            self._catalogue.lowerable,
            self._mesh,
            functools.partial(xla_options, self.config.program, quantized=quantized),
            self._stored,
            None if self._shared is None else self._shared.turns,
        )
        self._precompilation = Precompilation(self.config, self._catalogue, self.programs)

    def _fit_pool(self) -> None:
        """Make sure that the largest programs' temporaries fit beside the pool."""
        buckets = self.config.buckets
        largest: list[ProgramKey] = [("extend", buckets.max_tokens), ("decode", buckets.decode[-1])]
        if self.config.program.steps_per_dispatch > 1:
            largest.append(("decode_many", buckets.decode[-1]))
        if self.memory.make_room(max(map(self.programs.memory, largest))):
            self.programs.close()
            self._declare_programs()
            self._precompilation.first()

    @property
    def ready(self) -> Ready:
        """What can run now."""
        return self._precompilation.ready

    @functools.cached_property
    def _stored(self) -> StoredPrograms | None:
        path, shared = self.config.program_folder, self._shared
        if shared is not None:
            folder = shared.folder(path)
        elif path is not None:
            folder = PrivateFolder(path)
        else:
            return None
        facts = (self.config.program, self.model_config)
        stored = StoredPrograms(folder, self._mesh, facts)
        stored.prune()
        return stored

    # -- arrays -----------------------------------------------------------------------------------

    def reset(self) -> None:
        """A fresh cache and state: at the start, and after a failure on the device."""
        self._free()
        if self.host is not None:
            self.host.reset()
        with jax.default_device(first_device(self._mesh)):
            self._arrays["cache"] = self.memory.make_cache()
            self._arrays.update(self.memory.make_state()._asdict())
        self._upload: tuple[np.ndarray, jax.Array] | None = None
        _, width = self.config.program.logprob_columns(wide=True)
        self._wide_ids = WideIds(self.config.program.max_rows, width, self._replicated)

    def memory_usage(self) -> dict[str, float]:
        """GiB by use, and the device's own count where it keeps one."""
        return self.memory.usage(self._arrays, self.host)

    def _run(self, key: ProgramKey, **given: Any) -> Any:
        """Queue a program. Its arguments are `given` or among the arrays that the device keeps,
        whose new states replace the donated ones. Returns the rest of its results."""
        program = self._catalogue[key[0]]
        arrays = self._arrays
        arguments = [given[x] if x in given else arrays[x] for x in program.arguments]
        updated, output = self.programs(key, *arguments)
        arrays.update(zip(program.donated, updated, strict=True))
        return output

    # -- steps ------------------------------------------------------------------------------------

    def prepare(self, batch: Batch) -> Prepared:
        """Everything the host does for a batch before the device is involved."""
        program = self.config.program
        if isinstance(batch, DecodeBatch):
            return Prepared(batch, pack.pack_decode(batch, program.max_rows))
        packed = pack.pack_extend(batch, self._layout(batch.tokens), program.max_rows)
        fresh = (row.sequence for row in batch.rows if row.fresh)
        lists = (
            (s.slot, pack.pack_sparse(s.request, program.bias_capacity, program.max_logprob_ids))
            for s in fresh
        )
        return Prepared(batch, packed, tuple((slot, x) for slot, x in lists if x is not None))

    def dispatch(self, prepared: Prepared) -> StepResult:
        """Queue the step on the device, and start copying its results back."""
        batch = prepared.batch
        wanted = batch.wanted
        variant = Variant.of(wanted)
        if isinstance(batch, DecodeBatch):
            output, prompts = self._decode(batch, prepared.upload, variant), {}
        else:
            for slot, lists in prepared.sparse:
                self._run(("install_sparse", 0), slot=np.int32(slot), **lists._asdict())
            output, prompts = self._extend(batch, prepared.upload, variant)
        payloads = {name: output.payloads[name] for name in wanted.names}
        result = StepResult(batch, output.tokens, payloads, prompts)
        for array in result.arrays:
            array.copy_to_host_async()
        return result

    def _decode(self, batch: DecodeBatch, upload: np.ndarray, variant: Variant) -> step.StepOutput:
        if self._upload is None or not np.array_equal(self._upload[0], upload):
            self._upload = (upload, jax.device_put(upload, self._replicated))
        kind = "decode" if batch.steps == 1 else "decode_many"
        key = (kind + variant.ending, batch.row_bucket)
        return self._run(key, rows=self._upload[1], **self._named(batch, variant))

    def _extend(
        self, batch: ExtendBatch, packed: np.ndarray, variant: Variant
    ) -> tuple[step.StepOutput, dict[str, jax.Array]]:
        """The output, and what extras want of the prompts."""
        # The call itself takes a NumPy array to the device in a fifth of device_put's time.
        named, key = self._named(batch, variant), ("extend" + variant.ending, batch.tokens)
        output, hidden = self._run(key, packed=packed, **named)
        for start in range(0, len(batch.page_copies), COPY_WIDTH):
            self._copy_pages(batch.page_copies[start : start + COPY_WIDTH])
        names = set().union(*(pack.read_of_prompt(row) for row in batch.rows))
        ending = Variant(wide=variant.wide).ending
        return output, {
            name: self._run(
                (f"prompt_{name}{ending}", batch.tokens), packed=packed, hidden=hidden, **named
            )
            for name in sorted(names)
        }

    def _named(self, batch: Batch, variant: Variant) -> dict[str, Any]:
        """The ids that wide programs are given with each step."""
        if not variant.wide:
            return {}
        ids = self._wide_ids.of(batch)
        return {"sparse": self._arrays["sparse"]._replace(logprob_ids=ids)}

    def _copy_pages(self, copies: tuple[tuple[int, int], ...]) -> None:
        sources = np.zeros(COPY_WIDTH, np.int32)
        targets = np.full(COPY_WIDTH, self.num_pages, np.int32)
        sources[: len(copies)], targets[: len(copies)] = zip(*copies, strict=True)
        self._run(("copy_pages", COPY_WIDTH), sources=sources, targets=targets)

    def copy(self, copies: Copies) -> None:
        """Queue copies of pages to the host and back, before the next step: the device reads what
        is evicted before anybody writes there. With a host tier only."""
        assert self.host is not None
        width = self.memory.block_pages
        for block, evicted in copies.out:
            pages = np.zeros(width, np.int32)
            pages[: len(evicted)] = evicted
            self.host.store(block, self._run(("gather_pages", width), pages=pages))
        at_once = max(COPYING_BYTES // self.host.block_bytes, 1)
        for number, (block, wanted) in enumerate(copies.into, 1):
            content = self.host.load(block)
            for pages in scatter_targets(wanted, width, self.num_pages):
                self._run(("scatter_pages", width), pages=pages, content=content)
            if number % at_once == 0:  # what was copied lies there twice until it is written
                self.cache.k.block_until_ready()

    def close(self) -> None:
        """Free the device arrays."""
        self.programs.close()
        self._free()
        if self.host is not None:
            self.host.close()
        self._arrays.clear()

    def _free(self) -> None:
        """Give the cache back before a new one is made: the device may not hold two."""
        kept = [value for name, value in self._arrays.items() if name != "params"]
        for array in jax.tree.leaves(kept):
            array.delete()
