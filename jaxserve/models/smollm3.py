"""SmolLM3: Llama with layers that see no positions (Hugging Face TB 2025; HF modeling_smollm3)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from jaxserve.models import values
from jaxserve.models.config import layer_windows, ropes_where
from jaxserve.models.decoder import Decoder
from jaxserve.models.llama import Llama
from jaxserve.models.rope_config import FULL, SLIDING


class SmolLM3(Decoder):
    """Differs from `Decoder` in its config only: `layer_ropes`, and windows if it has any."""

    hf_defaults: ClassVar[Mapping[str, Any]] = {
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
        "default_theta": 2e6,
        "sliding_window": None,
        "no_rope_layer_interval": 4,
        "tie_word_embeddings": True,
        "bos_token_id": 128_000,
        "eos_token_id": 128_001,
    }

    @staticmethod
    def config_fields(hf: dict[str, Any]) -> dict[str, Any]:
        rotated = _rotated(hf, values.size(hf, "num_hidden_layers"))
        kinds = [FULL if turns or hf["sliding_window"] is None else SLIDING for turns in rotated]
        typed = hf if hf.get("layer_types") is not None else {**hf, "layer_types": kinds}
        return Llama.config_fields(hf) | {
            "windows": layer_windows(typed),
            "layer_ropes": ropes_where(hf, rotated),
        }


def _rotated(hf: Mapping[str, Any], layers: int) -> list[bool]:
    """Whether each layer rotates q and k: `no_rope_layers` has 1 where it does, and may be longer
    than there are layers."""
    given = hf.get("no_rope_layers")
    if given is None:
        every = values.size(hf, "no_rope_layer_interval")
        return [bool((i + 1) % every) for i in range(layers)]
    if not isinstance(given, list) or len(given) < layers or set(map(repr, given)) - {"0", "1"}:
        raise values.bad("no_rope_layers", f"a list of 0 and 1 for {layers} layers", given)
    return [number == 1 for number in given[:layers]]
