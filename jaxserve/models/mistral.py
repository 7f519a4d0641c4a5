"""Mistral: a sliding window in every layer (Jiang et al. 2023; HF modeling_mistral)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from jaxserve.models.config import window_of
from jaxserve.models.decoder import Decoder


class Mistral(Decoder):
    """Differs from `Decoder` in its config only: `windows` reach `attend`."""

    hf_defaults: ClassVar[Mapping[str, Any]] = {
        "num_key_value_heads": 8,
        "max_position_embeddings": 4096 * 32,
        "sliding_window": 4096,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }

    @staticmethod
    def config_fields(hf: dict[str, Any]) -> dict[str, Any]:
        return {"windows": (window_of(hf),) * hf["num_hidden_layers"]}
