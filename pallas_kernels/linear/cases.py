"""Named shapes for linear: the products of real models, and the edges where kernels break."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Case:
    """rows M, size_in K, size_out N' (the columns of the result: w has twice as many with `act`).
    weights: "int8" or "float8_e4m3fn", None for x's dtype."""

    name: str
    rows: int
    size_in: int
    size_out: int
    norm: bool = False
    bias: bool = False
    act: str | None = None
    residual: bool = False
    weights: str | None = None
    transposed: bool = False
    eps: float = 1e-6

    @property
    def columns(self) -> int:
        return self.size_out * (1 if self.act is None else 2)

    @property
    def options(self) -> dict[str, Any]:
        """Keywords of every implementation."""
        return {"eps": self.eps, "act": self.act, "transposed": self.transposed}

    def inputs(self, seed: int, dtype: Any) -> tuple[np.ndarray | None, ...]:
        """(x, w, bias, norm, residual, scale), random, None where the case has none. Rows of x
        grow, so that a norm of the wrong row shows."""
        rng = np.random.default_rng(seed)

        def normal(*shape: int) -> np.ndarray:
            return rng.standard_normal(shape, dtype=np.float32)

        x = normal(self.rows, self.size_in) * (1 + np.arange(self.rows, dtype=np.float32))[:, None]
        w, scale = normal(self.size_in, self.columns), None
        if self.weights is None:
            w = (w / np.sqrt(self.size_in)).astype(dtype)
        else:
            scale = (0.5 + rng.random(self.columns, dtype=np.float32)) / np.sqrt(self.size_in)
            narrow = jnp.dtype(self.weights)
            w = np.clip(np.rint(32 * w), -127, 127) if narrow == np.int8 else w
            w, scale = w.astype(narrow), scale / (32 if narrow == np.int8 else 1)
        arrays = {
            "bias": normal(self.columns) if self.bias else None,
            "norm": 1 + 0.2 * normal(self.size_in) if self.norm else None,
            "residual": normal(self.rows, self.size_out) if self.residual else None,
        }
        after = (None if a is None else a.astype(dtype) for a in arrays.values())
        return (x.astype(dtype), np.ascontiguousarray(w.T) if self.transposed else w, *after, scale)


def layouts(cases: tuple[Case, ...]) -> tuple[Case, ...]:
    """Each case, then with w the other way round."""
    return cases + tuple(
        dataclasses.replace(case, name=f"{case.name} transposed", transposed=True) for case in cases
    )


def products(model: str, rows: int, weights: str | None = None) -> tuple[Case, ...]:
    """qkv, o, gate_up and down of one layer."""
    dim, mlp_dim, qkv, heads, bias = MODELS[model]
    name = f"{model} {{}} M={rows}" + (f" {weights}" if weights else "")
    common: dict[str, Any] = {"rows": rows, "weights": weights}
    return (
        Case(name.format("qkv"), size_in=dim, size_out=qkv, norm=True, bias=bias, **common),
        Case(name.format("o"), size_in=heads, size_out=dim, residual=True, **common),
        Case(
            name.format("gate_up"), size_in=dim, size_out=mlp_dim, norm=True, act="silu", **common
        ),
        Case(name.format("down"), size_in=mlp_dim, size_out=dim, residual=True, **common),
    )


# model: D, F, columns of qkv, N * H, bias of qkv
MODELS = {"llama-8b": (4096, 14336, 6144, 4096, False), "qwen-0.5b": (896, 4864, 1152, 896, True)}

EDGES = layouts(
    (
        Case("plain", 2, 128, 64),
        Case("one row", 1, 256, 96),
        Case("qkv", 3, 256, 160, norm=True, bias=True),
        Case("qkv one row", 1, 256, 160, norm=True, bias=True, eps=1e-2),
        Case("o", 8, 192, 128, residual=True),
        Case("gate_up", 5, 128, 144, norm=True, act="silu"),
        Case("gate_up one row", 1, 128, 144, norm=True, act="silu"),
        Case("down one row", 1, 320, 48, residual=True),
        Case("gelu", 2, 64, 40, act="gelu", bias=True),
        Case("tanh gelu", 4, 64, 40, act="gelu_pytorch_tanh", residual=True),
        Case("relu", 16, 64, 40, act="relu", bias=True, residual=True),
        Case("odd sizes", 7, 77, 51, norm=True, bias=True, act="silu", residual=True),
        Case("odd sizes one row", 1, 77, 51, norm=True, bias=True, act="silu", residual=True),
        Case("less than a block", 2, 5, 3, norm=True, residual=True),
        Case("int8", 2, 200, 72, weights="int8", norm=True, bias=True),
        Case("int8 one row", 1, 200, 72, weights="int8", act="silu", residual=True),
        Case("fp8", 9, 136, 80, weights="float8_e4m3fn", norm=True, act="silu"),
        Case("fp8 one row", 1, 136, 80, weights="float8_e4m3fn", norm=True, residual=True),
    )
)

LARGE = layouts(
    tuple(
        case
        for model, rows in (("llama-8b", 1), ("llama-8b", 16), ("qwen-0.5b", 1), ("qwen-0.5b", 8))
        for case in products(model, rows)
    )
    + products("llama-8b", 1, "int8")[:2]
    + products("llama-8b", 1, "float8_e4m3fn")[:2]
    + products("qwen-0.5b", 3, "int8")
    + products("qwen-0.5b", 16, "float8_e4m3fn")
)
"""Only on a device: interpreting them would take minutes."""
