"""Calls whose results must not depend on the mesh, and what is compared of them."""

from __future__ import annotations

import numpy as np

from tests.prompts import GREEDY, SMALL, ids, text

OPTIONS = {
    **SMALL, "max_total_tokens": 2048, "max_running_requests": 4, "cuda_graph_bs": [4],
    "chunked_prefill_size": 64, "enable_metrics": True,
}  # fmt: skip
SEEDED = {"temperature": 0.8, "max_new_tokens": 20, "sampling_seed": 11, "ignore_eos": True}
LONG = {**GREEDY, "max_new_tokens": 300}
PROMPTS = [text(seed, 20 + 9 * seed) for seed in range(8)]
SHARED = [text(50, 96) + text(seed, 20) for seed in range(5)]
CASES = {
    "greedy": {"input_ids": PROMPTS, "sampling_params": GREEDY},
    "seeded": {"input_ids": PROMPTS, "sampling_params": SEEDED},
    "chunks": {"input_ids": [text(9, 300), text(10, 200), *PROMPTS[:2]], "sampling_params": GREEDY},
    "prefixes": {"input_ids": SHARED, "sampling_params": SEEDED},
    "samples": {"input_ids": PROMPTS[:3], "sampling_params": {**SEEDED, "n": 3}},
    "penalties": {
        "input_ids": PROMPTS[:4],
        "sampling_params": {**SEEDED, "frequency_penalty": 0.5, "repetition_penalty": 1.3},
    },
    "logprobs": {
        "input_ids": PROMPTS[:4],
        "sampling_params": SEEDED,
        "return_logprob": True,
        "logprob_start_len": 0,
        "top_logprobs_num": 2,
    },
    "biases": {
        "input_ids": PROMPTS[:4],
        "sampling_params": {**SEEDED, "logit_bias": {"7": 2.0}, "min_new_tokens": 3},
    },
}
# eight heads of two KV heads: on more than two devices some have the same ones
HEADS = {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 16}
FAMILIES = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "mistral": {"num_key_value_heads": 4},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {},
    "phi3": {},
    "glm": {},
    "glm4": {"tie_word_embeddings": True},
    "cohere2": {"attention_bias": True, "tie_word_embeddings": True},
}


def logprobs(result):
    """Of a prompt's tokens and an output's, those that have any."""
    meta = result["meta_info"]
    values = [*meta["input_token_logprobs"][1:], *meta["output_token_logprobs"]]
    return [value for value, _, _ in values]


def assert_same(results, expected):
    assert ids(results) == ids(expected)
    for mine, other in zip(results, expected, strict=True):
        if "output_token_logprobs" in other["meta_info"]:
            np.testing.assert_allclose(logprobs(mine), logprobs(other), atol=1e-4)
