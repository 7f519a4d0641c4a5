"""Qwen3: RMSNorm on each head of q and k (Qwen team 2025; HF modeling_qwen3)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from jaxserve.models import values
from jaxserve.models.config import layer_windows
from jaxserve.models.decoder import Decoder


class Qwen3(Decoder):
    """Differs from `Decoder` in its config only: `qk_norm`, and windows in the upper layers."""

    hf_defaults: ClassVar[Mapping[str, Any]] = {
        "head_dim": 128,
        "max_position_embeddings": 32768,
        "sliding_window": 4096,
        "max_window_layers": 28,
    }

    @staticmethod
    def config_fields(hf: dict[str, Any]) -> dict[str, Any]:
        bias = values.flag(hf, "attention_bias")
        return {
            "attention_bias": bias,
            "attention_out_bias": bias,
            "qk_norm": True,
            "windows": layer_windows(hf),
        }
