"""Granite 3: Llama with four multipliers (IBM 2024; HF modeling_granite)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from jaxserve.models import values
from jaxserve.models.decoder import Decoder
from jaxserve.models.llama import Llama


class Granite(Decoder):
    """Differs from `Decoder` in its config only: the scales of embeddings, scores, what is added to
    the stream, and logits."""

    hf_defaults: ClassVar[Mapping[str, Any]] = {
        "max_position_embeddings": 2048,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }

    @staticmethod
    def config_fields(hf: dict[str, Any]) -> dict[str, Any]:
        return Llama.config_fields(hf) | {
            "query_scale": values.number(hf, "attention_multiplier", 1.0, above=0),
            "embed_scale": values.number(hf, "embedding_multiplier", 1.0, above=0),
            "residual_scale": values.number(hf, "residual_multiplier", 1.0, above=0),
            "logit_scale": 1 / values.number(hf, "logits_scaling", 1.0, above=0),
        }
