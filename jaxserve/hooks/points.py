"""Where in a model a hook can be."""

from __future__ import annotations

import re

from jaxserve import checks
from jaxserve.errors import InvalidRequestError

POINTS = (
    "embed",
    "layer.<i>.heads",
    "layer.<i>.attn_out",
    "layer.<i>.attn",
    "layer.<i>.mlp_out",
    "layer.<i>.mlp",
    "final_norm",
)
"""The embeddings; of layer i, counted from 0, the results of its heads, side by side, what its
attention adds to the residual stream, and the stream with it; the same of its MLP; and what the LM
head reads."""
_POINT = re.compile(r"embed|final_norm|layer\.(\d{1,6})\.(?:heads|(?:attn|mlp)(?:_out)?)")


def check_point(name: object, num_layers: int) -> str:
    """A point of a model with `num_layers` layers. InvalidRequestError: it is none."""
    found = _POINT.fullmatch(name) if isinstance(name, str) else None
    if found is None:
        raise InvalidRequestError(
            f"points has {checks.shown(name)}, which is none of {', '.join(POINTS)}"
        )
    if found[1] is not None and int(found[1]) >= num_layers:
        raise InvalidRequestError(
            f"points has {found[0]!r}; the model has {num_layers} layers, 0 to {num_layers - 1}"
        )
    return found[0]


def written(number: int) -> str:
    """The point behind write `number` to the residual stream: a layer's attention, then its MLP."""
    return f"layer.{number // 2}.{('attn', 'mlp')[number % 2]}"


def added(number: int) -> str:
    """The point before that, of what the write adds."""
    return f"{written(number)}_out"


def heads(layer: int) -> str:
    """The point behind the attention of layer `layer`, before its output projection."""
    return f"layer.{layer}.heads"
