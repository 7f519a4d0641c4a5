"""Named shapes for rope_kv_write: real models, and the edges where kernels break."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from pallas_kernels.rope_kv_write.pages import FP8


@dataclasses.dataclass(frozen=True)
class Case:
    """heads N, kv_heads K, head_dim H, page_size S, pages P, tokens T, dropped: how many of them
    are out of range. norm: with q_norm and k_norm. fp8: float8_e4m3fn pages. first_page: where the
    slots count from."""

    name: str
    heads: int
    kv_heads: int
    head_dim: int
    page_size: int
    pages: int
    tokens: int
    dropped: int = 0
    norm: bool = False
    fp8: bool = False
    eps: float = 1e-6
    first_page: int = 0

    def options(self) -> dict[str, Any]:
        """Keyword arguments of a call."""
        return {"num_heads": self.heads, "eps": self.eps}

    def inputs(self, seed: int, dtype: Any) -> tuple[np.ndarray, ...]:
        """(qkv, cos, sin, k_pages, v_pages, slots, first_page) and, with norm, (q_norm, k_norm):
        random. Slots of dropped tokens repeat. For fp8 pages some numbers of qkv are beyond their
        range."""
        rng = np.random.default_rng(seed)
        cache = (self.pages, self.page_size, self.kv_heads, self.head_dim)
        new = (self.tokens, (self.heads + 2 * self.kv_heads) * self.head_dim)
        qkv = rng.standard_normal(new, dtype=np.float32)
        if self.fp8:
            qkv *= np.where(rng.random(new) < 0.05, np.float32(2000), np.float32(1))
        pools = [
            rng.standard_normal(cache, dtype=np.float32).astype(FP8 if self.fp8 else dtype)
            for _ in range(2)
        ]
        positions = rng.integers(0, 8192, (self.tokens, 1)).astype(np.float32)
        half = np.arange(self.head_dim // 2, dtype=np.float32)
        angles = positions * np.float32(10_000.0) ** (-2 * half / self.head_dim)
        capacity = self.pages * self.page_size
        first = self.first_page * self.page_size
        slots = rng.permutation(capacity - first)[: self.tokens].astype(np.int32)
        out = rng.choice(self.tokens, self.dropped, replace=False)
        slots[out] = rng.choice(np.asarray([capacity, capacity + 7], np.int32), self.dropped)
        norms = [
            (1 + 0.3 * rng.standard_normal(self.head_dim, dtype=np.float32)).astype(dtype)
            for _ in range(2 if self.norm else 0)
        ]
        first_page = np.asarray([self.first_page], np.int32)
        return (
            qkv.astype(dtype),
            np.cos(angles),
            np.sin(angles),
            *pools,
            slots,
            first_page,
            *norms,
        )


EDGES = (
    Case("llama-8b", 32, 8, 128, 64, 2, 5),
    Case("qwen-0.5b", 14, 2, 64, 64, 1, 9, dropped=3),
    Case("qwen3-8b", 32, 8, 128, 16, 3, 3, dropped=1, norm=True),
    Case("smollm", 9, 3, 64, 16, 3, 16, dropped=7),
    Case("head dim 80", 4, 2, 80, 16, 2, 5, dropped=1),
    Case("head dim 96, norm", 6, 2, 96, 16, 2, 7, dropped=2, norm=True, eps=1e-5),
    Case("head dim 256", 2, 1, 256, 8, 2, 3, norm=True),
    Case("head dim 2", 2, 2, 2, 8, 2, 3),
    Case("odd page size", 4, 4, 64, 24, 2, 11),
    Case("one token", 4, 2, 64, 16, 2, 1, norm=True),
    Case("one token dropped", 4, 2, 64, 16, 2, 1, dropped=1),
    Case("second layer", 4, 2, 64, 16, 5, 9, dropped=2, first_page=3),
    Case("all dropped", 4, 2, 64, 16, 2, 8, dropped=8),
    Case("every slot", 2, 1, 64, 8, 2, 16),
    Case("fp8", 8, 4, 64, 16, 2, 9, dropped=2, fp8=True),
    Case("fp8, norm, head dim 80", 4, 2, 80, 16, 2, 5, norm=True, fp8=True),
)

LARGE = (
    Case("llama-8b T=8192", 32, 8, 128, 64, 256, 8192, dropped=100),
    Case("llama-8b T=256", 32, 8, 128, 64, 512, 256, dropped=3),
    Case("llama-8b T=1", 32, 8, 128, 64, 512, 1, first_page=500),
    Case("qwen-0.5b T=1000", 14, 2, 64, 64, 512, 1000, dropped=13),
    Case("qwen3-8b T=2048", 32, 8, 128, 64, 64, 2048, dropped=5, norm=True),
    Case("qwen3-8b B=64 fp8", 32, 8, 128, 64, 512, 64, dropped=1, norm=True, fp8=True),
    Case("smollm T=700", 9, 3, 64, 16, 512, 700, dropped=50),
    Case("llama-8b T=4096 fp8", 32, 8, 128, 64, 128, 4096, dropped=9, fp8=True),
)
"""Only on a device: interpreting them would take minutes."""
