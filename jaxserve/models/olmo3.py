"""OLMo 3: OLMo 2 with a window in three of four layers (OLMo team 2025; HF modeling_olmo3)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from jaxserve.models.config import patterned_windows
from jaxserve.models.olmo2 import Olmo2


class Olmo3(Olmo2):
    """Differs from OLMo 2 in its config only: windows, and RoPE that is scaled, if at all, in the
    layers without one."""

    ropes_by_kind = True
    hf_defaults: ClassVar[Mapping[str, Any]] = {
        **Olmo2.hf_defaults,
        "default_theta": 5e5,
        "sliding_window": 4096,
    }

    @staticmethod
    def config_fields(hf: dict[str, Any]) -> dict[str, Any]:
        return Olmo2.config_fields(hf) | {"windows": patterned_windows(hf, 4)}
