"""Phi-3, Phi-4 and Phi-4-mini: LongRoPE, the last with a part of each head rotated (Abdin et al.
2024; HF modeling_phi3)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from jaxserve.models.config import window_of
from jaxserve.models.decoder import Decoder


class Phi3(Decoder):
    """Differs from `Decoder` in its config and in how checkpoints fuse their products."""

    rotates_part = True
    hf_defaults: ClassVar[Mapping[str, Any]] = {
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "sliding_window": None,
        "bos_token_id": 1,
        "eos_token_id": 32000,
    }

    @staticmethod
    def config_fields(hf: dict[str, Any]) -> dict[str, Any]:
        return {"windows": (window_of(hf),) * hf["num_hidden_layers"]}
