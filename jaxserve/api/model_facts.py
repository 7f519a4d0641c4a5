"""What is known of the loaded model, as `engine.tokenizer_manager.model_config`."""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from converters import LoadedModel


@dataclasses.dataclass(frozen=True)
class ModelFacts:
    """A model's sizes under the names of SGLang's ModelConfig."""

    model_path: str
    """As it was given."""
    context_len: int
    """Most tokens of prompt and output: the option context_length, or the model's."""
    vocab_size: int
    """V."""
    hidden_size: int
    """D."""
    num_hidden_layers: int
    """L."""
    num_attention_heads: int
    """N."""
    num_key_value_heads: int
    """K."""
    head_dim: int
    """H."""
    dtype: str
    """Of the parameters as they run: "float32", "bfloat16" or "float16"."""
    quantization: str | None
    """Of the weights: "fp8", "w8a16_int8" or None."""
    hf_eos_token_id: frozenset[int]
    """All tokens that end a text."""
    raw_config: dict[str, Any] = dataclasses.field(repr=False)
    """config.json (or what a GGUF file says instead), with the caller's overrides."""
    is_generation: bool = True
    """Always: it generates text,"""
    is_multimodal: bool = False
    """of text alone,"""
    is_embedding: bool = False
    """and no embeddings."""

    @classmethod
    def of(
        cls, model_path: str, loaded: LoadedModel, context_len: int, eos_ids: frozenset[int]
    ) -> ModelFacts:
        config = loaded.config
        return cls(
            model_path=model_path,
            context_len=context_len,
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            dtype=str(loaded.declaration.dtype),
            quantization=loaded.declaration.quantization,
            hf_eos_token_id=eos_ids,
            raw_config=loaded.hf_config,
        )

    @functools.cached_property
    def hf_config(self) -> Any:
        """`raw_config` as the configuration object of transformers for its model type."""
        from transformers import CONFIG_MAPPING, PreTrainedConfig  # seconds to import

        kind = str(self.raw_config.get("model_type"))
        if kind in CONFIG_MAPPING:
            return CONFIG_MAPPING[kind].from_dict(self.raw_config)
        return PreTrainedConfig.from_dict(self.raw_config)

    @property
    def hf_text_config(self) -> Any:
        """The same: there are no models of other media."""
        return self.hf_config
