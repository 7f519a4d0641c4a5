"""An operation is an ordered choice of implementations.

A call tries the implementations in order: one that cannot do the case raises NotImplementedError
with its reason, and the next is tried. When none is left the reasons are raised together.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.device import Device, current_device

T = TypeVar("T")
Order = Callable[[Device, np.dtype], tuple[str, ...]]


def everywhere(device: Device) -> str | None:
    del device
    return None


def cuda_only(device: Device) -> str | None:
    return None if device.is_cuda else f"needs a CUDA device, this is {device.kind!r}"


def sm90_only(device: Device) -> str | None:
    if device.is_cuda and device.capability[0] == 9:
        return None
    return f"needs compute capability 9.x, this is {device.kind!r} with {device.capability}"


@functools.cache
def traced_once(function: Callable[..., Any], options: tuple[str, ...]) -> Callable[..., Any]:
    """`function` such that the layers of one program share a single trace and a single lowered
    kernel. Without, a 32-layer program took 9 s to trace and lower a Mosaic kernel for each layer.
    options: names of the keyword arguments, which are Python values, not arrays."""
    return jax.jit(function, static_argnames=options)


@dataclasses.dataclass(frozen=True)
class Implementation:
    """name: what callers say. module: where a function with the operation's name lives; imported on
    first use, so that a backend that a JAX version lacks costs nothing. refusal: why a device
    cannot run it, or None."""

    name: str
    module: str
    refusal: Callable[[Device], str | None] = everywhere


@dataclasses.dataclass(frozen=True)
class Operation:
    """name: the function's name. order: names to try by default for a device and a dtype."""

    name: str
    implementations: tuple[Implementation, ...]
    order: Order

    def find(self, name: str) -> Implementation:
        for entry in self.implementations:
            if entry.name == name:
                return entry
        known = ", ".join(entry.name for entry in self.implementations)
        raise ValueError(f"implementation={name!r}: {self.name} has {known}")

    def function(self, name: str) -> Callable[..., Any]:
        """The implementation's own function, with its tuning keywords. Raises ValueError for an
        unknown name, NotImplementedError where this JAX lacks the backend."""
        return getattr(importlib.import_module(self.find(name).module), self.name)

    def candidates(
        self, implementation: str | Sequence[str] | None, dtype: np.dtype, device: Device
    ) -> tuple[str, ...]:
        if implementation is None:
            return self.order(device, dtype)
        names = (implementation,) if isinstance(implementation, str) else tuple(implementation)
        if not names:
            raise ValueError(f"implementation={implementation!r}: name at least one")
        return names

    def __call__(
        self,
        *args: Any,
        implementation: str | Sequence[str] | None,
        dtype: Any,
        **options: Any,
    ) -> Any:
        args = jax.tree.map(jnp.asarray, args)  # arguments may be tuples, or None

        def run(entry: Implementation) -> Any:
            return traced_once(self.function(entry.name), tuple(options))(*args, **options)

        return self._first(run, implementation, np.dtype(dtype))

    def chosen(self, *case: Any, implementation: str | Sequence[str] | None, dtype: Any) -> str:
        """Name of the implementation that a call would take, without tracing one. case: what the
        implementations' `plan` takes; one without such a function takes every case."""

        def check(entry: Implementation) -> str:
            plan = getattr(importlib.import_module(entry.module), "plan", None)
            if plan is not None:
                plan(*case)
            return entry.name

        return self._first(check, implementation, np.dtype(dtype))

    def _first(
        self,
        attempt: Callable[[Implementation], T],
        implementation: str | Sequence[str] | None,
        dtype: np.dtype,
    ) -> T:
        """What `attempt` returns for the first implementation that the device can run and that
        raises no NotImplementedError. Raises one with all reasons when there is none."""
        device = current_device()
        entries = [self.find(name) for name in self.candidates(implementation, dtype, device)]
        reasons: list[str] = []
        for entry in entries:
            refusal = entry.refusal(device)
            if refusal is None:
                try:
                    return attempt(entry)
                except NotImplementedError as error:
                    refusal = str(error)
            reasons.append(f"{entry.name}: {refusal}")
        raise NotImplementedError(f"no implementation of {self.name} fits; " + "; ".join(reasons))
