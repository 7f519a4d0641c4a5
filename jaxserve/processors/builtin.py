"""The logit processors that SGLang has, by its names. No jax."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from jaxserve.processors.processor import CustomLogitProcessor


class DisallowedTokensLogitsProcessor(CustomLogitProcessor):
    """`custom_params={"token_ids": [...]}` never come."""

    def __call__(
        self, logits: np.ndarray, custom_param_list: list[dict[str, Any]] | None = None
    ) -> np.ndarray:
        for row, params in zip(logits, custom_param_list or (), strict=True):
            row[params["token_ids"]] = -np.inf
        return logits


class ThinkingBudgetLogitProcessor(CustomLogitProcessor):
    """Ends a thought that has `custom_params={"thinking_budget": n}` tokens, by a new line and the
    token that ends thoughts. A subclass names its model's tokens."""

    THINKING_START_TOKEN_ID: ClassVar[int]
    THINKING_END_TOKEN_ID: ClassVar[int]
    NEW_LINE_TOKEN_ID: ClassVar[int]

    def __call__(
        self, logits: np.ndarray, custom_param_list: list[dict[str, Any]] | None = None
    ) -> np.ndarray:
        for row, params in zip(logits, custom_param_list or (), strict=True):
            budget, request = params.get("thinking_budget"), params["__req__"]
            if not isinstance(budget, int) or budget < 0:
                continue
            text = [*request.origin_input_ids, *request.output_ids]
            start, end = self.THINKING_START_TOKEN_ID, self.THINKING_END_TOKEN_ID
            if start not in text or end in text or len(text) - text.index(start) - 1 < budget:
                continue
            ended_line = request.output_ids and request.output_ids[-1] == self.NEW_LINE_TOKEN_ID
            row[:] = -np.inf
            row[end if ended_line else self.NEW_LINE_TOKEN_ID] = 0.0
        return logits


class Qwen3ThinkingBudgetLogitProcessor(ThinkingBudgetLogitProcessor):
    """For Qwen3's vocabulary."""

    THINKING_START_TOKEN_ID = 151667
    THINKING_END_TOKEN_ID = 151668
    NEW_LINE_TOKEN_ID = 198


class DeepSeekR1ThinkingBudgetLogitProcessor(ThinkingBudgetLogitProcessor):
    """For DeepSeek-R1's vocabulary."""

    THINKING_START_TOKEN_ID = 128798
    THINKING_END_TOKEN_ID = 128799
    NEW_LINE_TOKEN_ID = 201


class DeepseekOCRNoRepeatNGramLogitProcessor(CustomLogitProcessor):
    """No n tokens come twice within a window: `custom_params={"ngram_size": n, "window_size": w}`
    with, if wanted, `"whitelist_token_ids": [...]` that always may. Windows that are cut leave out
    n-grams that begin before them."""

    def __call__(
        self, logits: np.ndarray, custom_param_list: list[dict[str, Any]] | None = None
    ) -> np.ndarray:
        for row, params in zip(logits, custom_param_list or (), strict=True):
            size, window = params.get("ngram_size", 0), params.get("window_size", 0)
            request = params["__req__"]
            text = [*request.origin_input_ids, *request.output_ids]
            if size <= 0 or window <= 0:
                continue
            begun = text[len(text) - size + 1 :]
            first = max(len(text) - window, 0)
            places = range(first, len(text) - size + 1)
            banned = {text[i + size - 1] for i in places if text[i : i + size - 1] == begun}
            row[list(banned - set(params.get("whitelist_token_ids") or ()))] = -np.inf
        return logits
