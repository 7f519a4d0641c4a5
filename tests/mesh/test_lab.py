"""The laboratory on several devices."""

from __future__ import annotations

import jax.numpy as jnp
import pytest

import jaxserve
from tests.marks import long_but
from tests.oracles.huggingface import Reference
from tests.test_lab import OPTIONS, close, text

pytestmark = pytest.mark.usefixtures("kept_programs")
MESHES = {"tp": {"tp_size": 2}, "dp": {"dp_size": 2}, "both": {"tp_size": 2, "dp_size": 2}}


@pytest.mark.parametrize("mesh", long_but(MESHES, "both"))
def test_the_logits_of_one_device(tiny_models, mesh):
    folder, sizes = tiny_models("llama"), MESHES[mesh]
    reference, prompts = Reference(folder), [text(seed, 7 + 20 * seed) for seed in range(3)]
    with (
        jaxserve.Engine(folder, **{**OPTIONS, "cuda_graph_bs": [8]}, **sizes) as engine,
        engine.lab(max_tokens=256, replica=sizes.get("dp_size", 1) - 1) as lab,
    ):
        out = lab.prefill(prompts)
        out = lab.step(out.handles, jnp.argmax(out.logits, axis=-1))
        out = lab.extend(out.handles, [[5, 6]] * 3)
        close(out.logits, [reference.logits(each.tokens)[-1].numpy() for each in out.handles])
        assert [
            each.tokens[: len(p)] for each, p in zip(out.handles, prompts, strict=True)
        ] == prompts
        # beside which requests run
        params = {"temperature": 0, "max_new_tokens": 8, "ignore_eos": True}
        results = engine.generate(input_ids=prompts, sampling_params=params)
        for result, prompt in zip(results, prompts, strict=True):
            reference.assert_greedy(prompt, result["output_ids"])
        out = lab.step(out.handles, [9, 8, 7])
        close(out.logits, [reference.logits(each.tokens)[-1].numpy() for each in out.handles])
