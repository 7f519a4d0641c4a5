"""Gemma 3, the text model: five layers with a window to one without, each kind with its own RoPE,
and norms of q and k (Gemma team 2025; HF modeling_gemma3)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from jaxserve.models import values
from jaxserve.models.config import patterned_windows
from jaxserve.models.gemma2 import Gemma2, gemma_fields


class Gemma3(Gemma2):
    """Differs from Gemma 2 in its config only."""

    ropes_by_kind = True
    hf_defaults: ClassVar[Mapping[str, Any]] = {
        **Gemma2.hf_defaults,
        "max_position_embeddings": 131_072,
        "default_theta": 1e6,
        "rope_local_base_freq": 1e4,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
    }

    @staticmethod
    def config_fields(hf: dict[str, Any]) -> dict[str, Any]:
        # transformers writes the pattern with an underscore where `layer_types` says the same
        every = values.size(hf, "sliding_window_pattern", 6)
        return gemma_fields(hf) | {"windows": patterned_windows(hf, every), "qk_norm": True}
