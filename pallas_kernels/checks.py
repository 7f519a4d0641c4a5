"""Argument checks shared by the operations: a caller's mistake names the argument and its shape."""

from __future__ import annotations

from typing import Any

import numpy as np

DTYPES = ("bfloat16", "float16", "float32")
FP8 = "float8_e4m3fn"


def check_dtype(name: str, array: Any, like: Any = None) -> None:
    if np.dtype(array.dtype).name not in DTYPES:
        raise ValueError(f"{name} has dtype {array.dtype}: expected one of {', '.join(DTYPES)}")
    if like is not None and array.dtype != like.dtype:
        raise ValueError(f"{name} has dtype {array.dtype}: expected {like.dtype}, as the others")


def check_array(name: str, array: Any, shape: tuple[int, ...], dtype: Any) -> None:
    if array.dtype != dtype or array.shape != shape:
        raise ValueError(
            f"{name} is {array.dtype}{list(array.shape)}: expected {np.dtype(dtype)}{list(shape)}"
        )


def check_int32(name: str, array: Any, shape: tuple[int, ...]) -> None:
    check_array(name, array, shape, np.int32)


def check_pages(k_pages: Any, v_pages: Any) -> None:
    """K and V pages must both be [P, S, K, H] of one dtype; float8_e4m3fn is allowed."""
    if k_pages.ndim != 4 or k_pages.shape != v_pages.shape:
        raise ValueError(
            f"k_pages {list(k_pages.shape)} and v_pages {list(v_pages.shape)}: expected both to be "
            "[pages, page size, KV heads, head dim]"
        )
    if np.dtype(k_pages.dtype).name != FP8:
        check_dtype("k_pages", k_pages)
    if v_pages.dtype != k_pages.dtype:
        raise ValueError(
            f"v_pages has dtype {v_pages.dtype}: expected {k_pages.dtype}, as k_pages have"
        )


def check_queries(q: Any, k_pages: Any) -> None:
    """q must be [rows, N, H], with N a multiple of the pages' K and H as theirs."""
    heads, head_dim = k_pages.shape[2:]
    if q.ndim != 3 or q.shape[2] != head_dim or q.shape[1] % heads:
        raise ValueError(
            f"q {list(q.shape)}: expected [rows, a multiple of {heads} heads, {head_dim}] to fit "
            f"k_pages {list(k_pages.shape)}"
        )
    if np.dtype(k_pages.dtype).name != FP8:
        check_dtype("q", q, k_pages)
    else:
        check_dtype("q", q)


def check_window(window: int | None) -> None:
    if window is not None and window < 1:
        raise ValueError(f"window={window}: expected None or at least 1")


def check_soft_cap(soft_cap: float | None) -> None:
    if soft_cap is not None and not soft_cap > 0:
        raise ValueError(f"soft_cap={soft_cap}: expected None or a positive number")
