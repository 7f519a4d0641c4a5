"""What the kernels need to know about the device they will run on."""

from __future__ import annotations

import dataclasses

import jax


@dataclasses.dataclass(frozen=True)
class Device:
    """platform: "cpu", "gpu" or "tpu". kind: the vendor's name. capability: CUDA compute capability
    as (major, minor), (0, 0) elsewhere. cores: streaming multiprocessors (0 when unknown)."""

    platform: str
    kind: str
    capability: tuple[int, int] = (0, 0)
    cores: int = 0

    @property
    def is_cuda(self) -> bool:
        return self.platform == "gpu" and self.capability != (0, 0)


def current_device() -> Device:
    """The device that the surrounding program will be compiled for: JAX's default one."""
    found = getattr(jax.config, "jax_default_device", None)
    if found is None or isinstance(found, str):
        found = jax.local_devices(backend=found)[0]
    version = str(getattr(found, "compute_capability", "0.0"))
    major, _, minor = version.partition(".")
    capability = (int(major), int(minor or 0)) if major.isdigit() else (0, 0)
    return Device(
        platform="gpu" if found.platform in ("gpu", "cuda") else found.platform,
        kind=found.device_kind,
        capability=capability,
        cores=int(getattr(found, "core_count", 0) or 0),
    )
