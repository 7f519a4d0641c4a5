"""What of a model's inside an engine reports; chosen at its start, as programs depend on it."""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING

from jaxserve.errors import InvalidRequestError

if TYPE_CHECKING:
    from jaxserve.options import Options

HIDDEN, LAYERS, LOGITS = "hidden_states", "layer_hidden_states", "logits"
"""Names of the payloads, and their keys in meta_info."""
STATE_NAMES = frozenset((HIDDEN, LAYERS, LOGITS))


@dataclasses.dataclass(frozen=True)
class States:
    """What requests may ask for. One set of programs reports all of it, beside the usual set."""

    hidden: str | None = None
    """Hidden states: of the "last" position only, "full": of any; None: not at all."""
    layers: tuple[int, ...] = ()
    """Inner layers whose hidden states come with them, ascending: 0 the embeddings, L the final
    norm's output."""
    logits: bool = False
    """The model's logits of output tokens."""

    @classmethod
    def of(cls, options: Options, num_layers: int) -> States:
        """Of a model of L = `num_layers` layers. InvalidRequestError: it has no such layer."""
        given = options.hidden_state_layers or ()
        for index in given:
            if not -num_layers - 1 <= index <= num_layers:
                raise InvalidRequestError(
                    f"hidden_state_layers has {index}; the model has {num_layers} layers, so "
                    f"that indices go from 0 (the embeddings) to {num_layers} (the final norm's "
                    f"output), or from -{num_layers + 1} to -1"
                )
        layers = {index % (num_layers + 1) for index in given}
        mode = "full" if options.enable_return_hidden_states else options.return_hidden_states_mode
        return cls(mode, tuple(sorted(layers)), options.enable_return_logits)

    @functools.cached_property
    def names(self) -> tuple[str, ...]:
        """Of the payloads that requests may read."""
        found = ((HIDDEN, self.hidden), (LAYERS, self.layers), (LOGITS, self.logits))
        return tuple(name for name, wanted in found if wanted)

    @functools.cached_property
    def ending(self) -> str:
        """What tells the kinds of its programs from those of others."""
        layers = "".join([f"_{index}" for index in self.layers])
        hidden = f"_hidden{layers}" if self.hidden else ""
        return hidden + ("_logits" if self.logits else "")


NO_STATES = States()
