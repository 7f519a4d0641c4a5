"""Tokens and logprobs of this checkout beside another one's: has a change of structure kept them?

    python -m benchmarks.outputs                                       # the digest of each part
    python -m benchmarks.outputs --base .base                          # against another checkout
    python -m benchmarks.outputs --base .base --mode deterministic     # where all must be equal

A small checkpoint of each family, with random weights that this checkout makes for both, because
they may keep their parameters in different orders: greedy and sampled requests with every penalty,
biases, several samples of a prompt, prompts in chunks, cached prefixes, logprobs of outputs and
prompts, and a batch of all lengths. The other checkout runs this very file, so it needs no copy of
it. Prints for each part whether it is the same bit for bit, and else how many tokens come before
the first difference, and how far apart logprobs are.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

FAMILIES = {
    "llama": {"architectures": ["LlamaForCausalLM"], "model_type": "llama"},
    "mistral": {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "sliding_window": 128,
    },
    "qwen2": {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"},
}
SIZES = {
    "vocab_size": 4096,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e4,
    "max_position_embeddings": 2048,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MODES: dict[str, dict[str, Any]] = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "deterministic": {"dtype": "bfloat16", "enable_deterministic_inference": True},
}
PENALTIES = {"frequency_penalty": 0.4, "presence_penalty": 0.3, "repetition_penalty": 1.1}


def prompt(draw: random.Random, length: int) -> list[int]:
    return [draw.randrange(10, SIZES["vocab_size"]) for _ in range(length)]


def parts(engine: Any) -> dict[str, list[dict[str, Any]]]:
    """Results of each part, in an order of their own: caches are warm for the later ones."""
    draw = random.Random(0)
    greedy = {"temperature": 0, "max_new_tokens": 48, "ignore_eos": True}
    sampled = {**greedy, "temperature": 0.9, "top_p": 0.9, "top_k": 200, "min_p": 0.01}
    prompts = [prompt(draw, length) for length in (1, 7, 33, 130, 600)]
    shared = prompt(draw, 300)
    many = [prompt(draw, draw.randrange(1, 400)) for _ in range(24)]
    lengths = [
        {**sampled, "max_new_tokens": draw.randrange(1, 60), "sampling_seed": row}
        for row in range(24)
    ]

    def run(ids: list[list[int]], params: Any, **options: Any) -> list[dict[str, Any]]:
        found = engine.generate(input_ids=ids, sampling_params=params, **options)
        keys = ("input_token_logprobs", "output_token_logprobs", "output_top_logprobs")
        return [
            {
                "tokens": row["output_ids"],
                "logprobs": [row["meta_info"][key] for key in keys if key in row["meta_info"]],
            }
            for row in found
        ]

    wanted = {"return_logprob": True, "logprob_start_len": 0, "top_logprobs_num": 5}
    return {
        "greedy": run(prompts, greedy),
        "sampled": run(prompts, [{**sampled, "sampling_seed": 7 * i} for i in range(5)]),
        "penalties": run(prompts, {**sampled, **PENALTIES, "sampling_seed": 3}),
        "biases": run(prompts, {**greedy, "logit_bias": {"17": 0.2, "99": -0.2}}),
        "samples": run(prompts[2:4], {**sampled, "n": 3, "sampling_seed": 5}),
        "logprobs": run(prompts, greedy, **wanted),
        "cached": run([shared + x for x in prompts[:3]] * 2, greedy, return_logprob=True),
        "batch": run(many, lengths, return_logprob=[row % 3 == 0 for row in range(24)]),
    }


def make(models: Path) -> None:
    """A checkpoint of each family, in a folder of its name in `models`."""
    import converters

    for family, names in FAMILIES.items():
        with tempfile.TemporaryDirectory() as folder:
            config = {**SIZES, **names, "dtype": "bfloat16"}
            (Path(folder) / "config.json").write_text(json.dumps(config), encoding="utf-8")
            loaded = converters.load(folder, load_format="dummy", seed=0)
            converters.save(loaded, models / family, "safetensors")


def write(mode: str, models: Path, file: Path) -> None:
    """All parts of all families, whose checkpoints are in `models`, into `file`."""
    import jaxserve

    assert Path(jaxserve.__file__).is_relative_to(os.environ["PYTHONPATH"]), jaxserve.__file__
    found = {}
    for family in FAMILIES:
        with jaxserve.Engine(
            model_path=str(models / family),
            skip_tokenizer_init=True,
            random_seed=0,
            context_length=1024,
            max_running_requests=16,
            chunked_prefill_size=256,
            max_total_tokens=16384,
            precompile=False,
            log_level="error",
            **MODES[mode],
        ) as engine:
            found[family] = parts(engine)
    file.write_text(json.dumps(found), encoding="utf-8")


def numbers(value: Any) -> list[float]:
    """All floats in nested lists."""
    if isinstance(value, list):
        return [number for each in value for number in numbers(each)]
    return [value] if isinstance(value, float) else []


def compared(base: list[dict[str, Any]], here: list[dict[str, Any]]) -> str:
    """What is to be said of one part."""
    if base == here:
        return "the same"
    same, total, farthest = 0, 0, 0.0
    for left, right in zip(base, here, strict=True):
        pairs = list(zip(left["tokens"], right["tokens"], strict=True))
        first = next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))
        same, total = same + first, total + len(pairs)
        if first == len(pairs):
            both = zip(numbers(left["logprobs"]), numbers(right["logprobs"]), strict=True)
            farthest = max([farthest, *(abs(a - b) for a, b in both)])
    return f"{same} of {total} tokens before a difference, logprobs within {farthest:.1e}"


def run(checkout: Path, folder: Path, *arguments: str, **environment: str) -> None:
    """This file with `arguments`, over the packages in `checkout`, in a process of its own."""
    command = [sys.executable, __file__, "--models", str(folder), *arguments]
    environment = {**os.environ, **environment, "PYTHONPATH": str(checkout.resolve())}
    subprocess.run(command, check=True, env=environment, cwd=folder)


def results(checkout: Path, models: Path, mode: str) -> dict[str, dict[str, Any]]:
    """Of the packages in `checkout`."""
    file = models / "outputs.json"
    run(checkout, models, "--mode", mode, "--write", str(file))
    return json.loads(file.read_text(encoding="utf-8"))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", type=Path, help="the other checkout")
    parser.add_argument("--mode", choices=MODES, default="float32")
    parser.add_argument("--models", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--write", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.write is not None:
        write(given.mode, given.models, given.write)
        return
    if given.models is not None:
        make(given.models)
        return
    checkout = Path(__file__).parent.parent
    with tempfile.TemporaryDirectory() as folder:
        models = Path(folder)
        run(checkout, models, JAX_PLATFORMS="cpu")
        here = results(checkout, models, given.mode)
        base = here if given.base is None else results(given.base, models, given.mode)
    for family, found in here.items():
        for name, rows in found.items():
            digest = hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:12]
            said = "" if given.base is None else compared(base[family][name], rows)
            print(f"{given.mode} {family:8} {name:10} {digest}  {said}")


if __name__ == "__main__":
    main()
