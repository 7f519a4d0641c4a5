"""Prompts of the load test, the tokens that an undisturbed engine gives for them, and the check."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import jaxserve

SAMPLES = 3
"""References are made for this many samples of each prompt."""
TEXT = (
    "The capital of France is Paris and Rome was the best times once upon a small village between "
    "two great rivers naïve 日本語 🙂 (42) 3.14159 def add(a, b): return hello world you are"
)


@dataclasses.dataclass(frozen=True)
class Reference:
    """What one sample must come to."""

    ids: list[int]
    text: str
    finish_reason: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Case:
    """A prompt, its sampling parameters (greedy or seeded) and a Reference for each sample."""

    prompt: str | list[int]
    params: dict[str, Any]
    references: list[Reference]

    def mismatch(self, result: dict[str, Any], sample: int) -> str | None:
        """What is wrong with a result dict or the last chunk of a stream, if anything."""
        reference, meta = self.references[sample], result["meta_info"]
        ids, reason = result["output_ids"], meta["finish_reason"]
        if reason is None or reason["type"] == "abort":
            return self.no_prefix(ids, sample)
        if ids != reference.ids:
            return f"tokens {ids} instead of {reference.ids}"
        if result["text"] != reference.text:
            return f"text {result['text']!r} instead of {reference.text!r}"
        if reason != reference.finish_reason:
            return f"finish_reason {reason} instead of {reference.finish_reason}"
        logprobs = meta.get("output_token_logprobs")
        if logprobs is not None and len(logprobs) != max(len(ids), 1):
            return f"{len(logprobs)} logprobs for {len(ids)} tokens"
        return None

    def no_prefix(self, ids: list[int], sample: int) -> str | None:
        """What is wrong with the tokens of an unfinished result, if anything."""
        expected = self.references[sample].ids
        return None if ids == expected[: len(ids)] else f"tokens {ids} are not in {expected}"


def make_cases(engine: jaxserve.Engine, count: int, vocabulary: int, seed: int) -> list[Case]:
    """`count` random cases; `engine` computes their references."""
    rng = random.Random(seed)
    heads = [[rng.randrange(4, vocabulary) for _ in range(70)] for _ in range(4)]
    prompts = [_prompt(rng, heads, vocabulary) for _ in range(count)]
    params = [_params(rng, vocabulary) for _ in range(count)]
    cases = []
    for kind in (str, list):
        rows = [i for i, prompt in enumerate(prompts) if isinstance(prompt, kind)]
        chosen = [prompts[i] for i in rows]
        name = "prompt" if kind is str else "input_ids"
        given: dict[str, Any] = {name: chosen}
        results = engine.generate(
            sampling_params=[params[i] | {"n": SAMPLES} for i in rows], **given
        )
        for place, i in enumerate(rows):
            samples = results[place * SAMPLES : (place + 1) * SAMPLES]
            references = [
                Reference(r["output_ids"], r["text"], r["meta_info"]["finish_reason"])
                for r in samples
            ]
            cases.append(Case(prompts[i], params[i], references))
    return cases


def _prompt(rng: random.Random, heads: list[list[int]], vocabulary: int) -> str | list[int]:
    kind = rng.random()
    if kind < 0.4:
        return " ".join(rng.choices(TEXT.split(), k=rng.randint(1, 20)))
    ids = [rng.randrange(4, vocabulary) for _ in range(rng.choice((1, 5, 20, 60, 120)))]
    return ids if kind < 0.8 else rng.choice(heads) + ids[:60]


def _params(rng: random.Random, vocabulary: int) -> dict[str, Any]:
    params: dict[str, Any] = {"max_new_tokens": rng.choice((0, 1, 2, 8, 16, 30, 60))}
    if rng.random() < 0.5:
        params["temperature"] = 0
    else:
        params |= {"temperature": 0.8, "sampling_seed": rng.randrange(1 << 32)}
        params |= rng.choice(({}, {"top_p": 0.9}, {"top_k": 20}, {"min_p": 0.05}))
    params |= rng.choice(
        (
            {},
            {"ignore_eos": True},
            {"stop": ["e", " the"]},
            {"stop": ["never to be found"]},
            {"stop_regex": ["[0-9]s?", "a[nt]"]},
            {"stop_token_ids": [rng.randrange(4, vocabulary) for _ in range(40)]},
            {"frequency_penalty": 0.5, "repetition_penalty": 1.1},
            {"logit_bias": {str(rng.randrange(4, vocabulary)): 3.0}},
            {"min_new_tokens": params["max_new_tokens"] // 2},
        )
    )
    return params
