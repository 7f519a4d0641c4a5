"""Which axis of each parameter is cut over the devices of a mesh row.

Megatron's cut (Shoeybi et al. 2019): products that read the residual stream by columns, those that
write to it by rows, so that a layer sums twice; the vocabulary by rows of its table.
"""

from __future__ import annotations

import re

from jax.sharding import PartitionSpec

from jaxserve.parallel.mesh import TENSOR

WHOLE = PartitionSpec()
"""Every device has all of it."""
_LAST_OF_TWO, _LAST_OF_THREE = PartitionSpec(None, TENSOR), PartitionSpec(None, None, TENSOR)
_FIRST = PartitionSpec(TENSOR)
_TABLES = ("embed.embedding", "lm_head.embedding")
"""Of a vocabulary. That of the input is left whole where the output has its own: it would cost a
sum more, and a step reads a few of its rows."""
_OF_LAYERS = {
    "attn.qkv.kernel": _LAST_OF_TWO,
    "attn.qkv.kernel_scale": _FIRST,
    "attn.qkv.bias": _FIRST,
    "attn.whole_norm.scale": _FIRST,
    "attn.o.kernel": _FIRST,
    "mlp.gate_up.kernel": _LAST_OF_THREE,
    "mlp.gate_up.kernel_scale": _LAST_OF_TWO,
    "mlp.gate_up.bias": _LAST_OF_TWO,
    "mlp.down.kernel": _FIRST,
}


def partition(path: str, tied: bool) -> PartitionSpec:
    """How the parameter of a dotted path is cut, as the model declares it; what no rule names is
    whole. tied: the input's table is the output's, too."""
    if path in _TABLES:
        return _FIRST if tied or path == _TABLES[1] else WHOLE
    layer = re.fullmatch(r"layers\.\d+\.(.*)", path)
    return _OF_LAYERS.get(layer[1], WHOLE) if layer else WHOLE


def turned(spec: PartitionSpec, axes: int) -> PartitionSpec:
    """That of a parameter of so many axes with its first axis last."""
    first, *others = (*spec, *(None,) * (axes - len(spec)))
    return PartitionSpec(*others, first)


def whole_shape(shape: tuple[int, ...], spec: PartitionSpec, parts: int) -> tuple[int, ...]:
    """Of an array that each of `parts` devices has a part of `shape` of."""
    cut = (*spec, *(None,) * (len(shape) - len(spec)))
    return tuple(n * parts if axis else n for n, axis in zip(shape, cut, strict=True))
