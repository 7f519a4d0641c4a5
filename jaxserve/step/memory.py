"""What lies on the device beside the parameters and the programs: KV pages and the slots' state."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from jaxserve.attention.paged import Cache
from jaxserve.cache.host_pool import BLOCK_BYTES, COPYING_BYTES, HostPool, pages_per_block
from jaxserve.cache.pool import count_pages, make_cache, page_bytes
from jaxserve.config import EngineConfig
from jaxserve.models.config import ModelConfig
from jaxserve.parallel.mesh import TENSOR, abstract, bytes_on_each, first_device, replicated
from jaxserve.step.state import DeviceState, initial_state

PAGES = PartitionSpec(None, None, TENSOR)
"""How the pages of K and of V are cut: each device has those of its KV heads."""


class Memory:
    """Sizes of one engine's pool, state and host tier on `mesh`, and the arrays of these sizes.

    config: with tables no wider than the pool, where a sequence cannot be longer. num_pages: of the
    pool.
    """

    def __init__(
        self,
        config: EngineConfig,
        model: ModelConfig,
        dtype: jnp.dtype,
        mesh: Mesh,
        weight_bytes: int,
        devices: list[Any] | None = None,
    ):
        """dtype: of the pages. weight_bytes: of the parameters on each device, where they are
        already.
        devices: all on which pools of the same size lie; None: those of `mesh`.
        InvalidRequestError: no page fits."""
        self.config = config
        self.cache_dtype = dtype
        self.weight_bytes = weight_bytes
        self._model = model
        parts = mesh.shape[TENSOR]
        heads = model.kv_heads(parts)
        self._whole = dataclasses.replace(model, num_kv_heads=heads)
        self._part = dataclasses.replace(model, num_kv_heads=heads // parts)
        self._mesh = mesh
        self._replicated = replicated(mesh)
        self._devices = devices or list(mesh.devices.flat)
        self.num_pages = 0
        self._size(0)

    def make_room(self, program_bytes: int) -> bool:
        """Keep `program_bytes` free for programs; whether the pool is smaller than it was, and
        programs for it of no use any more."""
        before = self.num_pages
        copies = 0 if self.config.host is None else 2 * (COPYING_BYTES + BLOCK_BYTES)
        self._size(program_bytes + copies, most=before)
        return self.num_pages < before

    def _size(self, program_bytes: int, most: int | None = None) -> None:
        state = jax.eval_shape(self.make_state)
        others = program_bytes + sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
        if self.config.media is not None:
            others += self.config.media.bytes
        pages = self.config.num_pages or min(
            count_pages(self.config, self._part, self.cache_dtype, each, self.weight_bytes, others)
            for each in self._devices
        )
        if self._model.window is None and pages < self.config.program.table_width:
            program = dataclasses.replace(self.config.program, table_width=pages)
            self.config = dataclasses.replace(self.config, program=program)
        self.num_pages = pages if most is None else min(pages, most)
        for name in ("cache_spec", "state_spec", "block_pages"):
            self.__dict__.pop(name, None)

    def make_cache(self) -> Cache:
        """Empty pages."""
        program = self.config.program
        return make_cache(
            self._whole,
            self.num_pages,
            program.page_size,
            program.max_rows,
            self.cache_dtype,
            self._cache_shardings,
        )

    @property
    def _cache_shardings(self) -> tuple[Sharding, Sharding, Sharding]:
        pages = NamedSharding(self._mesh, PAGES)
        return pages, pages, NamedSharding(self._mesh, PartitionSpec(TENSOR))

    def make_state(self) -> DeviceState:
        """Empty slots."""
        state = initial_state(self.config.program, self._model.vocab_size)
        return jax.device_put(state, self._replicated)

    @functools.cached_property
    def cache_spec(self) -> Cache:
        """Shapes and shardings of `make_cache`."""
        shapes = jax.eval_shape(self.make_cache)
        return Cache(*map(abstract, shapes, self._cache_shardings))

    @functools.cached_property
    def state_spec(self) -> DeviceState:
        """Shapes and shardings of `make_state`."""
        return abstract(jax.eval_shape(self.make_state), self._replicated)

    @functools.cached_property
    def block_pages(self) -> int:
        """Pages of one copy to the host."""
        return pages_per_block(self._page_bytes, self.num_pages)

    @property
    def block_shape(self) -> tuple[int, ...]:
        """Of such a copy, on all devices: [2, L, C, S, K, H]."""
        return 2, self._model.num_layers, self.block_pages, *self.cache_spec.k.shape[1:]

    @property
    def _page_bytes(self) -> int:
        """On all devices."""
        return page_bytes(self._whole, self.config.program.page_size, self.cache_dtype)

    def make_host_pool(self) -> HostPool | None:
        """Host memory for evicted pages, where the engine has it."""
        option = self.config.host
        if option is None:
            return None
        num_bytes = option.num_bytes(self.num_pages * self._page_bytes)
        return HostPool(self._mesh, self.block_shape, self.cache_dtype, num_bytes, option.name)

    def usage(self, arrays: dict[str, Any], host: HostPool | None) -> dict[str, float]:
        """GiB by use on each device, and the first one's own count where it keeps one. arrays: what
        the engine keeps there, by name."""
        gib = 2.0**30
        state = [arrays[name] for name in DeviceState._fields]
        usage = {
            "weight": self.weight_bytes / gib,
            "kvcache": bytes_on_each((arrays["cache"].k, arrays["cache"].v)) / gib,
            "state": bytes_on_each(jax.tree.leaves(state)) / gib,
            "token_capacity": self.num_pages * self.config.program.page_size,
        }
        if host is not None:
            usage["host_kvcache"] = host.nbytes / gib
        on_cpu = self.config.program.platform == "cpu"
        stats = None if on_cpu else first_device(self._mesh).memory_stats()
        if stats:
            usage["in_use"] = stats["bytes_in_use"] / gib
            usage["peak"] = stats["peak_bytes_in_use"] / gib
            usage["limit"] = stats["bytes_limit"] / gib
        return usage
