"""Llama 2, 3, 3.1-3.3, SmolLM (Touvron et al. 2023; HF modeling_llama)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from jaxserve.models import values
from jaxserve.models.decoder import Decoder


class Llama(Decoder):
    """The decoder as it is, with biases where the config says so."""

    hf_defaults: ClassVar[Mapping[str, Any]] = {
        "max_position_embeddings": 2048,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }

    @staticmethod
    def config_fields(hf: dict[str, Any]) -> dict[str, Any]:
        bias = values.flag(hf, "attention_bias")
        return {
            "attention_bias": bias,
            "attention_out_bias": bias,
            "mlp_bias": values.flag(hf, "mlp_bias"),
        }
