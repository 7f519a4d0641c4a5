"""Families whose blocks or rotations differ from Llama's, in the engine: against Hugging Face, and
against themselves in other circumstances."""

from __future__ import annotations

import pytest

import jaxserve
from tests.checkpoints import FAMILIES, LLAMA_LIKE
from tests.marks import long, long_but
from tests.oracles.huggingface import Reference
from tests.prompts import GREEDY, ids, text
from tests.test_engine_parity import assert_logprobs_equal

pytestmark = pytest.mark.usefixtures("exact_products", "kept_programs")
OTHERS = [family for family in FAMILIES if family not in LLAMA_LIKE]
OPTIONS = {
    "skip_tokenizer_init": True, "context_length": 256, "max_running_requests": 4,
    "cuda_graph_bs": [4], "chunked_prefill_size": 64, "dtype": "float32", "precompile": False,
    "page_size": 16, "max_total_tokens": 2048,
}  # fmt: skip
PROMPTS = [text(seed, length) for seed, length in enumerate((3, 150, 40, 17))]
PROMPTS.append(PROMPTS[1][:90] + text(9, 5))
"""The second is three chunks, beyond every window; the last begins as it does."""


@pytest.mark.parametrize("family", long_but(OTHERS, "cohere2", "gemma3"))
def test_ragged_prompts_in_chunks_and_again_from_the_cache(tiny_models, family):
    folder = tiny_models(family)
    with jaxserve.Engine(model_path=folder, **OPTIONS) as engine:
        first = engine.generate(input_ids=PROMPTS, sampling_params=GREEDY)
        again = engine.generate(input_ids=PROMPTS, sampling_params=GREEDY)
        alone = [engine.generate(input_ids=p, sampling_params=GREEDY) for p in PROMPTS[2:4]]
        reference = Reference(folder)
        assert_logprobs_equal(engine, reference)
        assert engine.get_server_info()["late_compiles"] == 0
    for prompt, output in zip(PROMPTS, ids(first), strict=True):
        assert len(output) == GREEDY["max_new_tokens"]
        reference.assert_greedy(prompt, output)
    assert ids(again) == ids(first) and ids(alone) == ids(first)[2:4]
    assert again[1]["meta_info"]["cached_tokens"] >= 144 > first[1]["meta_info"]["cached_tokens"]


MIXED = [
    {"max_new_tokens": 40, "ignore_eos": True, "sampling_seed": i, "temperature": 0.8 * (i % 2)}
    for i in range(12)
]


@pytest.mark.long
@pytest.mark.parametrize("family", OTHERS)
def test_circumstances_do_not_change_tokens(tiny_models, family):
    """Together, in smaller chunks and retracted, all at once; test_engine_parity.py has each apart,
    with Llama."""
    folder = tiny_models(family)
    batch = [text(seed, 5 + 5 * seed) for seed in range(12)]
    plain = {**OPTIONS, "disable_overlap_schedule": True}
    with jaxserve.Engine(model_path=folder, **plain) as engine:
        want = [
            engine.generate(input_ids=prompt, sampling_params=params)["output_ids"]
            for prompt, params in zip(batch, MIXED, strict=True)
        ]
    tight = {
        "max_total_tokens": 256, "chunked_prefill_size": 24, "max_running_requests": 12,
        "cuda_graph_bs": [12],
    }  # fmt: skip
    with jaxserve.Engine(model_path=folder, **{**OPTIONS, **tight}) as engine:
        results = engine.generate(input_ids=batch, sampling_params=MIXED)
        info = engine.get_server_info()
    assert ids(results) == want
    assert info["late_compiles"] == 0
    assert sum(result["meta_info"]["num_retractions"] for result in results) > 0


@pytest.mark.parametrize("context", [64, long(65)])
def test_longrope_goes_by_the_engines_context(tiny_models, context):
    """Hugging Face goes by the sequence: up to 64 tokens here, or more."""
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "original_max_position_embeddings": 64,
        "short_factor": [1.0 + 0.2 * i for i in range(8)],
        "long_factor": [2.0**i for i in range(8)],
    }
    folder = tiny_models("phi3", rope_parameters=rope)
    options = {**OPTIONS, "context_length": context if context == 64 else 256}
    prompts = [text(1, 30), text(2, 40)] if context == 64 else [text(1, 65), text(2, 150)]
    with jaxserve.Engine(model_path=folder, **options) as engine:
        outputs = ids(engine.generate(input_ids=prompts, sampling_params=GREEDY))
    reference = Reference(folder)
    for prompt, output in zip(prompts, outputs, strict=True):
        assert (len(prompt + output) <= 64) == (context == 64)
        reference.assert_greedy(prompt, output)
