"""`sglang.srt.sampling.custom_logit_processor`."""

from jaxserve.processors.builtin import (
    DeepseekOCRNoRepeatNGramLogitProcessor,
    DeepSeekR1ThinkingBudgetLogitProcessor,
    DisallowedTokensLogitsProcessor,
    Qwen3ThinkingBudgetLogitProcessor,
    ThinkingBudgetLogitProcessor,
)
from jaxserve.processors.processor import CustomLogitProcessor

__all__ = [
    "CustomLogitProcessor",
    "DeepSeekR1ThinkingBudgetLogitProcessor",
    "DeepseekOCRNoRepeatNGramLogitProcessor",
    "DisallowedTokensLogitsProcessor",
    "Qwen3ThinkingBudgetLogitProcessor",
    "ThinkingBudgetLogitProcessor",
]
