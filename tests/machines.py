"""The machines that tests configure engines for, by platform."""

from __future__ import annotations

from jaxserve.machine import machine_of

MACHINES = {
    "cpu": machine_of("cpu", "cpu"),
    "gpu": machine_of("gpu", "NVIDIA H100 80GB HBM3"),
}
CPU, GPU = MACHINES["cpu"], MACHINES["gpu"]
