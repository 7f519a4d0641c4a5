"""EXAONE 4 against Hugging Face, in a source tree that docs/add_a_model.md has been applied to.

python -m tests.added_model TREE
"""

from __future__ import annotations

import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import torch
from transformers import Exaone4Config, Exaone4ForCausalLM

import converters
import jaxserve
from jaxserve.models.dense import DenseOps
from tests.checkpoints import END_OF_TEXT, IM_END, IM_START, VOCAB
from tests.oracles.huggingface import Reference

WINDOW = 8


def write_checkpoint(folder: Path) -> None:
    """Three layers, the middle one without window and positions; norms that are not 1."""
    torch.manual_seed(0)
    config = Exaone4Config(
        vocab_size=VOCAB, hidden_size=64, intermediate_size=128, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, sliding_window=WINDOW,
        sliding_window_pattern=2, max_position_embeddings=1024, bos_token_id=IM_START,
        eos_token_id=IM_END, pad_token_id=END_OF_TEXT,
    )  # fmt: skip
    model = Exaone4ForCausalLM(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.normal_(mean=1, std=0.3)
            else:
                weight.normal_(std=1.5 / weight.shape[-1] ** 0.5)
    model.save_pretrained(folder)


def main(tree: str) -> None:
    assert Path(jaxserve.__file__).is_relative_to(tree), jaxserve.__file__
    folder = Path(tree) / "exaone4"
    write_checkpoint(folder)
    reference = Reference(str(folder))
    reference.model.set_attn_implementation("eager")
    prompts = [np.random.default_rng(i).integers(3, VOCAB, 5 + 9 * i).tolist() for i in range(4)]

    loaded = converters.load(str(folder), dtype="float32")
    assert loaded.config.windows == (WINDOW, None, WINDOW)
    model = loaded.declaration.bind(loaded.params)
    ids = jnp.asarray(prompts[-1], jnp.int32)
    hidden, _ = model(ids, jnp.arange(len(ids)), None, None, DenseOps())
    want = reference.logits(prompts[-1]).numpy()
    np.testing.assert_allclose(np.asarray(model.logits(hidden)), want, rtol=0, atol=1e-4)

    params = {"temperature": 0, "max_new_tokens": 16, "ignore_eos": True}
    options = {
        "max_running_requests": 4, "context_length": 128, "max_total_tokens": 1024,
        "precompile": False, "skip_tokenizer_init": True,
    }  # fmt: skip
    with jaxserve.Engine(model_path=str(folder), dtype="float32", **options) as engine:
        results = engine.generate(input_ids=prompts, sampling_params=params, return_logprob=True)
    for prompt, result in zip(prompts, results, strict=True):
        output = result["output_ids"]
        reference.assert_greedy(prompt, output)
        table = reference.logprobs(prompt + output)
        for i, (logprob, token, _) in enumerate(result["meta_info"]["output_token_logprobs"]):
            assert abs(float(table[len(prompt) + i - 1, token]) - logprob) < 1e-4


if __name__ == "__main__":
    main(sys.argv[1])
