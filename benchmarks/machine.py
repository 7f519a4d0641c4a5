"""What a figure was measured on, and the ceilings it is compared with."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from typing import Any

import jax
import jax.numpy as jnp
import jaxlib

import jaxserve


def describe() -> dict[str, Any]:
    """Device, versions and commit."""
    device = jax.devices()[0]
    return {
        "device": device.device_kind,
        "platform": device.platform,
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "jaxserve": jaxserve.__version__,
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
    }


def commit() -> str:
    """The checkout's commit, marked if the tree has changes. Where the code runs outside a checkout
    the variable JAXSERVE_COMMIT says it; otherwise "unknown"."""
    if "JAXSERVE_COMMIT" in os.environ:
        return os.environ["JAXSERVE_COMMIT"]
    try:
        run = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            capture_output=True,
            text=True,
        )
    except FileNotFoundError:
        return "unknown"
    return run.stdout.strip() or "unknown"


def median_seconds(run, repeats: int) -> float:
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return sorted(times)[len(times) // 2]


def copy_bandwidth() -> float:
    """Bytes/s, read and written, of a large device copy (measured, not the data sheet's)."""
    on_cpu = jax.default_backend() == "cpu"
    count, inner = (1 << 26, 2) if on_cpu else (1 << 30, 10)
    x = jnp.arange(count, dtype=jnp.float32)
    step = jax.jit(lambda a: a + 1, donate_argnums=())

    def run() -> None:
        y = x
        for _ in range(inner):
            y = step(y)
        y.block_until_ready()

    run()
    return 2 * x.nbytes * inner / median_seconds(run, 5)


def matmul_rate() -> float:
    """FLOP/s of a large matrix product in the engine's dtype on this device."""
    on_cpu = jax.default_backend() == "cpu"
    size, dtype, inner = (1024, jnp.float32, 2) if on_cpu else (8192, jnp.bfloat16, 10)
    keys = jax.random.split(jax.random.key(0))
    a, b = (jax.random.normal(key, (size, size), dtype) for key in keys)
    product = jax.jit(lambda x, y: x @ y)

    def run() -> None:
        for _ in range(inner):
            out = product(a, b)
        out.block_until_ready()

    run()
    return 2 * size**3 * inner / median_seconds(run, 5)


class Floor:
    """The least work a model shape needs: bytes of a decode step, FLOPs of a prefill."""

    def __init__(self, config: dict[str, Any], itemsize: int):
        hidden, layers = config["hidden_size"], config["num_hidden_layers"]
        heads, kv = config["num_attention_heads"], config["num_key_value_heads"]
        head_dim = config.get("head_dim") or hidden // heads
        attention = hidden * (heads + 2 * kv) * head_dim + heads * head_dim * hidden
        self.layer_weights = layers * (attention + 3 * hidden * config["intermediate_size"])
        self.head_weights = config["vocab_size"] * hidden
        self.kv_bytes = layers * 2 * kv * head_dim * itemsize
        self.score_flops = layers * 4 * heads * head_dim
        self.itemsize = itemsize

    def decode_bytes(self, cached_tokens: int) -> int:
        """Weights once, and the K and V of `cached_tokens` tokens in total."""
        return (
            self.layer_weights + self.head_weights
        ) * self.itemsize + self.kv_bytes * cached_tokens

    def prefill_flops(self, prompt: int) -> int:
        """One prompt, causal, the LM head on its last token only."""
        return 2 * (self.layer_weights * prompt + self.head_weights) + (
            self.score_flops * prompt * (prompt + 1) // 2
        )
