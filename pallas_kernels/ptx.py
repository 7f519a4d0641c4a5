"""Inline PTX in Mosaic kernels: the text's pieces, and what an `inline_mgpu` body hands to it.

A text names its operands $0, $1, ... Every thread of the warpgroups that come to it runs it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np


def scope(lines: Iterable[str]) -> str:
    """The lines as a block with registers and labels of its own."""
    return "\n".join(["{", *lines, "}"])


def constant(x: float) -> str:
    """A float32 constant as PTX writes it."""
    return f"0f{int(np.float32(x).view(np.uint32)):08X}"


def asm(text: str, constraints: str = "", *values: Any) -> None:
    """The text here, in this order: it may read and write any memory. constraints: of the values,
    LLVM's letters ("r" 32 bits, "l" 64 bits, "f" float32)."""
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import llvm

    llvm.inline_asm(
        ir.Type.parse("!llvm.void"),
        list(values),
        text,
        ",".join(filter(None, [constraints, "~{memory}"])),
        has_side_effects=True,
    )


def shared_address(ref: Any) -> Any:
    """Of a reference to shared memory, 32 bits."""
    return _address(ref, 32)


def global_address(ref: Any) -> Any:
    """Of a reference to global memory, 64 bits."""
    return _address(ref, 64)


def _address(ref: Any, bits: int) -> Any:
    from jax.experimental.mosaic.gpu import utils
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import llvm

    return llvm.ptrtoint(ir.IntegerType.get_signless(bits), utils.memref_ptr(ref))
