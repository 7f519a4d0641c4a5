"""What a figure was measured on, and the ceilings it is compared with."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import platform
import re
import subprocess
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

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
        "jaxlib": importlib.metadata.version("jaxlib"),
        "jaxserve": jaxserve.__version__,
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
    }


def short_name(description: dict[str, Any]) -> str:
    """What result files of a machine begin with, from `describe()`: h100, cpu2."""
    if description["platform"] == "cpu":
        return f"cpu{description['cpus']}"
    words = re.split(r"[^a-z0-9]+", description["device"].lower())
    return next((word for word in words if re.search(r"[0-9]", word)), words[-1])


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


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """bandwidth: bytes/s of a copy; rate: FLOP/s of a matrix product; both measured."""

    bandwidth: float
    rate: float

    @classmethod
    def measure(cls) -> Ceilings:
        """To be called while no engine holds the device. MemoryError: something still does."""
        stats = jax.devices()[0].memory_stats()
        needed = 3 * 4 * COPIED_FLOATS
        if stats and (free := stats["bytes_limit"] - stats["bytes_in_use"]) < needed:
            raise MemoryError(
                f"measuring the copy bandwidth takes {needed / 2**30:.0f} GiB of the device and "
                f"{free / 2**30:.1f} are free; shut the engine down first"
            )
        return cls(copy_bandwidth(), matmul_rate())


COPIED_FLOATS = 1 << 30
"""Of one array of the copy on a GPU; three are alive at once."""


def copy_bandwidth() -> float:
    """Bytes/s, read and written, of a large device copy (measured, not the data sheet's)."""
    on_cpu = jax.default_backend() == "cpu"
    count, inner = (1 << 26, 2) if on_cpu else (COPIED_FLOATS, 10)
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


@dataclasses.dataclass(frozen=True)
class Work:
    """The least that must be done: FLOPs of prefills, bytes of decode steps."""

    flops: float
    bytes: float

    def seconds(self, ceilings: Ceilings) -> float:
        return self.flops / ceilings.rate + self.bytes / ceilings.bandwidth


class Floor:
    """The least work a model shape needs: bytes of a decode step, FLOPs of a prefill."""

    def __init__(
        self,
        config: dict[str, Any],
        itemsize: int,
        layer_itemsize: int | None = None,
        kv_itemsize: int | None = None,
    ):
        """itemsize: bytes of a number, of the layers' kernels and of keys and values too unless
        given."""
        hidden, layers = config["hidden_size"], config["num_hidden_layers"]
        heads, kv = config["num_attention_heads"], config["num_key_value_heads"]
        head_dim = config.get("head_dim") or hidden // heads
        attention = hidden * (heads + 2 * kv) * head_dim + heads * head_dim * hidden
        self.itemsize, self.layer_itemsize = itemsize, layer_itemsize or itemsize
        self.layer_weights = layers * (attention + 3 * hidden * config["intermediate_size"])
        self.head_weights = config["vocab_size"] * hidden
        self.kv_bytes = layers * 2 * kv * head_dim * (kv_itemsize or itemsize)
        self.score_flops = layers * 4 * heads * head_dim

    @classmethod
    def of(cls, config: dict[str, Any], options: Mapping[str, Any]) -> Floor:
        """In the dtype the engine picks here, float32 on a CPU, else bfloat16, and as quantized by
        its `options`."""
        return cls(
            config,
            4 if jax.default_backend() == "cpu" else 2,
            layer_itemsize=1 if options.get("quantization") else None,
            kv_itemsize=1 if options.get("kv_cache_dtype") == "fp8_e4m3" else None,
        )

    def decode_bytes(self, cached_tokens: int) -> int:
        """Weights once, and the K and V of `cached_tokens` tokens in total."""
        weights = self.layer_weights * self.layer_itemsize + self.head_weights * self.itemsize
        return weights + self.kv_bytes * cached_tokens

    def prefill_flops(self, prompt: int, cached: int = 0) -> int:
        """One prompt whose first `cached` tokens are there already, causal, the LM head on its last
        token only."""
        pairs = prompt * (prompt + 1) // 2 - cached * (cached + 1) // 2
        return (
            2 * (self.layer_weights * (prompt - cached) + self.head_weights)
            + self.score_flops * pairs
        )

    def work(self, requests: list[tuple[list[int], int]], rows: int) -> Work:
        """Least work of `requests` (prompt ids, output length) with at most `rows` rows at once:
        what all prompts begin with is computed once and read once a step; the fewest steps that
        produce all tokens each read the weights once."""
        prompts, outputs = zip(*requests, strict=True)
        shared = common_prefix(prompts) if len(prompts) > 1 else 0
        flops = sum(self.prefill_flops(len(ids), shared) for ids in prompts)
        if shared:
            flops += self.prefill_flops(shared) - 2 * self.head_weights
        steps = max(-(-sum(out - 1 for out in outputs) // rows), max(outputs) - 1)
        cached = steps * shared + sum(
            (len(ids) - shared) * (out - 1) + out * (out - 1) // 2
            for ids, out in zip(prompts, outputs, strict=True)
        )
        return Work(flops, steps * self.decode_bytes(0) + self.kv_bytes * cached)


def common_prefix(lists: tuple[list[int], ...]) -> int:
    """How many elements all `lists` begin with."""
    low, high = min(lists), max(lists)
    pairs = zip(low, high, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(low), len(high)))
