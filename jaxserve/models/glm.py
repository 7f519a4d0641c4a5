"""GLM-4-9B and GLM-4-0414: half of each head is rotated; the latter has norms behind products, too
(GLM team 2024; HF modeling_glm, modeling_glm4)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from jaxserve.models import values
from jaxserve.models.decoder import Attention, Decoder, Layer
from jaxserve.models.layers import MLP, RMSNorm


class Glm(Decoder):
    """Differs from `Decoder` in its config only: a bias on q, k and v, a part of a head rotated."""

    rotates_part = True
    hf_defaults: ClassVar[Mapping[str, Any]] = {
        "num_key_value_heads": 2,
        "head_dim": 128,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1.5625e-7,
        "partial_rotary_factor": 0.5,
        "attention_bias": True,
        "eos_token_id": [151329, 151336, 151338],
    }

    @staticmethod
    def config_fields(hf: dict[str, Any]) -> dict[str, Any]:
        return {"attention_bias": values.flag(hf, "attention_bias")}


class Glm4Attention(Attention):
    """A norm behind the output projection."""

    out_norm_class = RMSNorm


class Glm4MLP(MLP):
    """A norm behind the last product."""

    out_norm_class = RMSNorm


class Glm4Layer(Layer):
    """See the parts."""

    attention = Glm4Attention
    feed_forward = Glm4MLP


class Glm4(Glm):
    """See `Glm4Layer`."""

    layer = Glm4Layer
