"""Entropies against Hugging Face, in a source tree that docs/add_an_output.md has been applied to.

python -m tests.added_output TREE
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch

import jaxserve
from tests.checkpoints import VOCAB, make_checkpoint
from tests.oracles.huggingface import Reference

PROMPTS = [np.random.default_rng(i).integers(3, VOCAB, 5 + 85 * i).tolist() for i in range(2)]
"""The second is run in chunks."""
SAMPLED = {"temperature": 0.8, "max_new_tokens": 7, "ignore_eos": True}
ENTROPIES = ("input_token_entropy", "output_token_entropy")


def main(tree: str) -> None:
    assert Path(jaxserve.__file__).is_relative_to(tree), jaxserve.__file__
    folder = str(Path(tree) / "model")
    make_checkpoint(folder)
    reference = Reference(folder)

    def check(prompt: list[int], result: dict, output: list[int] | None = None) -> None:
        """output: the tokens that the entropies are about, if not the result's."""
        ids = prompt + (result["output_ids"] if output is None else output)
        wanted = torch.distributions.Categorical(logits=reference.logits(ids)).entropy().tolist()
        inputs, outputs = (result["meta_info"][name] for name in ENTROPIES)
        assert inputs[0] is None and len(inputs) == len(prompt)
        np.testing.assert_allclose(inputs[1:] + outputs, wanted[:-1], rtol=0, atol=1e-4)

    options = {
        "max_running_requests": 4, "context_length": 128, "max_total_tokens": 1024,
        "chunked_prefill_size": 64, "num_continuous_decode_steps": 3, "precompile": False,
        "skip_tokenizer_init": True, "stream_output": True, "random_seed": 0,
    }  # fmt: skip
    with jaxserve.Engine(model_path=folder, dtype="float32", **options) as engine:
        params = {**SAMPLED, "n": 2}
        for number, result in enumerate(
            engine.generate(input_ids=PROMPTS, sampling_params=params, return_entropy=True)
        ):
            check(PROMPTS[number // 2], result)

        # one that asks for nothing, and one that asks for logprobs too
        asked = {"return_entropy": [False, True], "return_logprob": [False, True]}
        plain, both = engine.generate(input_ids=PROMPTS, sampling_params=SAMPLED, **asked)
        assert not {*ENTROPIES, "output_token_logprobs"} & plain["meta_info"].keys()
        check(PROMPTS[1], both)
        logits = reference.logits(PROMPTS[1] + both["output_ids"])[len(PROMPTS[1]) - 1 : -1]
        logprobs = torch.log_softmax(logits / SAMPLED["temperature"], dim=-1).numpy()
        told = [logprob for logprob, *_ in both["meta_info"]["output_token_logprobs"]]
        wanted = logprobs[np.arange(len(told)), both["output_ids"]]
        np.testing.assert_allclose(told, wanted, rtol=0, atol=1e-4)

        deltas, ids = [], []
        for chunk in engine.generate(
            input_ids=PROMPTS[0], sampling_params=SAMPLED, return_entropy=True, stream=True
        ):
            deltas += chunk["meta_info"]["output_token_entropy"]
            ids += chunk["output_ids"]
        chunk["meta_info"]["output_token_entropy"] = deltas
        check(PROMPTS[0], chunk, ids)

        none = {"max_new_tokens": 0}
        for prompt in PROMPTS:
            result = engine.generate(input_ids=prompt, sampling_params=none, return_entropy=True)
            assert result["output_ids"] == []
            check(prompt, result, [0])


if __name__ == "__main__":
    main(sys.argv[1])
