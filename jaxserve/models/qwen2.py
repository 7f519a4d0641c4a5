"""Qwen2 and Qwen2.5: a bias on q, k and v (Yang et al. 2024; HF modeling_qwen2)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from jaxserve.models.config import layer_windows
from jaxserve.models.decoder import Decoder


class Qwen2(Decoder):
    """Differs from `Decoder` in its config only: the biases, and windows in the upper layers."""

    hf_defaults: ClassVar[Mapping[str, Any]] = {
        "max_position_embeddings": 32768,
        "sliding_window": 4096,
        "max_window_layers": 28,
    }

    @staticmethod
    def config_fields(hf: dict[str, Any]) -> dict[str, Any]:
        return {"attention_bias": True, "windows": layer_windows(hf)}
