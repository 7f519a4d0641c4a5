"""Runs batches: host arrays in, device results out. Owns all that the device keeps."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from jaxserve.cache.pool import cache_dtype
from jaxserve.config import EngineConfig
from jaxserve.config.states import HIDDEN, LAYERS, STATE_NAMES
from jaxserve.folders import PrivateFolder
from jaxserve.output.picked import Picked, Places
from jaxserve.packing import pack
from jaxserve.packing.batch import Batch, DecodeBatch, ExtendBatch
from jaxserve.packing.buckets import Ready
from jaxserve.parallel.mesh import abstract, bytes_on_each, first_device, replicated
from jaxserve.parallel.peers import PeersError, connect
from jaxserve.step import step
from jaxserve.step.catalogue import ProgramKey
from jaxserve.step.chain_steps import ChainSteps, DrawnParts
from jaxserve.step.compile import Programs
from jaxserve.step.first_runs import FirstRuns
from jaxserve.step.memory import Memory
from jaxserve.step.page_steps import PageSteps
from jaxserve.step.payloads import Variant
from jaxserve.step.picking import Picker
from jaxserve.step.picture_programs import tower_facts
from jaxserve.step.picture_steps import PictureSteps
from jaxserve.step.precompile import Precompilation
from jaxserve.step.programs import Facts, engine_programs
from jaxserve.step.result import Part, Prepared, StepResult
from jaxserve.step.shared import Shared
from jaxserve.step.state_programs import largest
from jaxserve.step.stored import StoredPrograms
from jaxserve.step.wide import WideIds
from jaxserve.step.xla_options import chooses_by_timing, xla_options
from jaxserve.weights import arrange, cut_over

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from converters import LoadedModel

phase = jax.profiler.TraceAnnotation
"""Names a phase of the loop in a profiler's trace; costs next to nothing without one."""

FOR_GOOD = ("params", "tower", "comm")
"""Of the arrays that the device keeps, those that outlive a failed step."""


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
        self._tower, tower = tower_facts(loaded.tower, config.media)
        self._peers = connect(mesh, self.model_config.hidden_size, loaded.declaration.dtype)
        self._arrays: dict[str, Any] = {"params": params, "tower": tower, "comm": self._peers.comm}
        """What the device keeps, by the names that programs have for it."""
        self._first_runs = FirstRuns(self._peers, self._queue, self._drain, self._nobody)
        self.dtype = loaded.declaration.dtype
        self._mesh = mesh
        self._replicated = replicated(mesh)
        self._shared = shared
        self.memory = Memory(
            config,
            self.model_config,
            cache_dtype(config.program.kv_cache_dtype, self.dtype),
            mesh,
            bytes_on_each((*params, *tower)),
            None if shared is None else shared.devices,
        )
        self._picker = Picker(self.run)
        self._always = bool(config.states.names) and config.program.deterministic
        self._declare_programs()
        self._precompilation.first()
        if config.program.platform != "cpu":
            self._fit_pool()
        self.host = self.memory.make_host_pool()
        self.pages = PageSteps(self.memory, self.host, self.run, self._arrays)
        self.pictures = PictureSteps(self.facts, self.run, self._arrays, self.programs)
        self.chains = ChainSteps(self.facts, self._catalogue, self.programs, self.run, self._arrays)
        self.reset()
        if self._peers.comm is not None:
            self._run_once()
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
        comm = self._peers.comm
        way = None if comm is None else abstract(comm, comm.sharding)
        facts = Facts(self._declaration, self.memory, self._kept, self._mesh, way, self._tower)
        self.facts = facts
        quantized = self._declaration.quantization is not None
        self._layout = functools.cache(facts.layout)
        self._largest = largest(facts)
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
        needed = (self.programs.memory(key) + kept for key, kept in self._largest.items())
        if self.memory.make_room(max(needed)):
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
        chooses = chooses_by_timing(self.config.program)
        stored = StoredPrograms(folder, self._mesh, facts, chooses)
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
        self.chains.reset()
        self.pictures.reset()
        self._upload: tuple[np.ndarray, jax.Array] | None = None
        _, width = self.config.program.logprob_columns(wide=True)
        self._wide_ids = WideIds(self.config.program.max_rows, width, self._replicated)

    def memory_usage(self) -> dict[str, float]:
        """GiB by use, and the device's own count where it keeps one."""
        return self.memory.usage(self._arrays, self.host)

    def run(self, key: ProgramKey, **given: Any) -> Any:
        """Queue a program. Its arguments are `given` or among the arrays that the device keeps,
        whose new states replace the donated ones. Returns the rest of its results."""
        executable = self.programs.program(key)
        self._first_runs.before(key, executable, given)
        return self._queue(key, executable, given)

    def _queue(self, key: ProgramKey, executable: Any, given: Mapping[str, Any]) -> Any:
        program, arrays = self._catalogue[key[0]], self._arrays
        arguments = [given[x] if x in given else arrays[x] for x in program.arguments]
        updated, output = executable(*arguments)
        arrays.update(zip(program.donated, updated, strict=True))
        return output

    def _nobody(self, key: ProgramKey) -> Mapping[str, Any]:
        """See `Program.nobody`."""
        kind, bucket = key
        return self._catalogue[kind].nobody(bucket)

    def _drain(self) -> None:
        """Until the device has nothing to do: steps have the cache one after the other."""
        jax.block_until_ready(self._arrays["cache"])

    def _run_once(self) -> None:
        """The steps that are there, so that no request waits for a first run."""
        for key, executable in self.programs.present():
            if self._nobody(key):
                self._first_runs.before(key, executable, {})

    def check_peers(self) -> None:
        """Raises PeersError if a device has given up waiting for another one, after which no result
        is right. Waits for what is queued."""
        error = self._peers.error()
        if error is not None:
            raise PeersError(error)

    @property
    def all_reduce(self) -> str:
        """How the devices of the mesh sum, and why so."""
        return f"{self._peers.form}: {self._peers.reason}"

    # -- steps ------------------------------------------------------------------------------------

    def prepare(self, batch: Batch) -> Prepared:
        """Everything the host does for a batch before the device is involved."""
        program = self.config.program
        if isinstance(batch, DecodeBatch):
            batch = self.chains.resized(batch) if batch.parts else batch
            return Prepared(batch, pack.pack_decode(batch, program.max_rows))
        packed = pack.pack_extend(batch, self._layout(batch.tokens), program.max_rows)
        capacity = program.bias_capacity, program.max_logprob_ids
        fresh = (row.sequence for row in batch.rows if row.fresh)
        lists = ((s.slot, pack.pack_sparse(s.request, *capacity)) for s in fresh)
        sparse = tuple((slot, x) for slot, x in lists if x is not None)
        pictures = self.pictures.prepare(batch.encodings)
        return Prepared(batch, packed, sparse, self.chains.entries(batch), pictures)

    def dispatch(self, prepared: Prepared) -> StepResult:
        """Queue the step on the device, and start copying its results back."""
        batch = prepared.batch
        wanted, states = batch.wanted, self.config.states
        variant = Variant.of(wanted, states, self._always)
        if isinstance(batch, DecodeBatch):
            drawn, prompts = self._decode(batch, prepared.upload, variant), {}
        else:
            self.pictures.queue(prepared.pictures)
            for slot, lists in prepared.sparse:
                self.run(("install_sparse", 0), slot=np.int32(slot), **lists._asdict())
            if prepared.chained is not None:
                self.chains.begin(prepared.chained)
            drawn, prompts = self._extend(batch, prepared.upload, variant)
        names = wanted.names - STATE_NAMES
        parts = tuple(
            Part(rows, output.tokens, {name: output.payloads[name] for name in names})
            for rows, output in drawn.parts
        )
        kept = {name: drawn.inside[name] for name in wanted.names & STATE_NAMES}
        picked = self._picker.sampled(batch, kept)
        result = StepResult(batch, parts, prompts, picked=picked, kept=kept)
        for array in result.arrays:
            array.copy_to_host_async()
        return result

    def pick_ends(self, result: StepResult, places: Places) -> dict[str, Picked]:
        """Rows of what a result has kept, on their way to the host. See `output.ends`."""
        picked = self._picker.ends(result.batch, result.kept, places)
        for array in (piece for each in picked.values() for piece in each.pieces):
            array.copy_to_host_async()
        return picked

    def _decode(self, batch: DecodeBatch, upload: np.ndarray, variant: Variant) -> DrawnParts:
        if self._upload is None or not np.array_equal(self._upload[0], upload):
            self._upload = (upload, jax.device_put(upload, self._replicated))
        named = self._named(batch, variant)
        if batch.parts:
            return self.chains.decode(batch, self._upload[1], variant, named)
        key = (batch.kind + variant.ending, batch.row_bucket)
        return DrawnParts.of_all(self.run(key, rows=self._upload[1], **named))

    def _extend(
        self, batch: ExtendBatch, packed: np.ndarray, variant: Variant
    ) -> tuple[DrawnParts, dict[str, jax.Array | Picked]]:
        """The outputs, and what extras want of the prompts."""
        # The call itself takes a NumPy array to the device in a fifth of device_put's time.
        variant = self.chains.reporting(batch, variant)
        hooked = self.chains.hooks.of(batch, self._layout(batch.tokens).rows)
        kind, named = "extend" + variant.ending + hooked.ending, self._named(batch, variant)
        key = (kind, batch.tokens)
        output, hidden = self.run(key, packed=packed, **named, **hooked.given)
        drawn = DrawnParts.of_all(output)
        if batch.parts:
            drawn = drawn.and_then(self.chains.extend(batch, hidden, output.layers, variant, named))
        self.pages.fork(batch.page_copies)
        names = set().union(*(pack.read_of_prompt(row) for row in batch.rows))
        ending = Variant(wide=variant.wide).ending
        inside = {HIDDEN: hidden, LAYERS: output.layers}
        return drawn, {
            name: self._picker.prompts(batch, name, inside[name])
            if name in inside
            else self.run(
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

    def close(self) -> None:
        """Free the device arrays."""
        self.programs.close()
        self._free()
        if self.host is not None:
            self.host.close()
        self._arrays.clear()

    def _free(self) -> None:
        """Give the cache back before a new one is made: the device may not hold two."""
        kept = [value for name, value in self._arrays.items() if name not in FOR_GOOD]
        for array in jax.tree.leaves(kept):
            array.delete()
