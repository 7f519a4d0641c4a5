"""lighteval: its SGLang model beside its transformers model, on the same weights.

The models' own methods are called: lighteval's command line imports all its benchmarks, one of
which (tiny_benchmarks) downloads a file from GitHub when it is imported.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import questions
from lighteval.metrics.metrics_sample import LoglikelihoodAcc
from lighteval.models.model_output import ModelResponse
from lighteval.models.sglang.sglang_model import SGLangModel, SGLangModelConfig
from lighteval.models.transformers.transformers_model import (
    TransformersModel,
    TransformersModelConfig,
)
from lighteval.tasks.requests import Doc, SamplingMethod

TOLERANCE = 2e-4
"""Nats, of a choice's log-likelihood. lighteval's transformers model has no float64."""
STOP = ["\n\n"]


def documents() -> tuple[list[Doc], list[Doc]]:
    choices = [
        Doc(
            query=question,
            choices=[" " + choice for choice in choices],
            gold_index=answer,
            id=str(number),
            task_name="choices",
            sampling_methods=[SamplingMethod.LOGPROBS],
        )
        for number, (question, choices, answer) in enumerate(questions.CHOICES)
    ]
    texts = [
        Doc(
            query=text,
            choices=[""],
            gold_index=0,
            id=str(number),
            task_name="texts",
            generation_size=32,
            stop_sequences=STOP,
            sampling_methods=[SamplingMethod.GENERATIVE],
        )
        for number, text in enumerate(questions.CONTINUATIONS)
    ]
    return choices, texts


def answers(model: Any) -> tuple[list[ModelResponse], list[str]]:
    """Without lighteval's cache of answers, which returns none of the texts that have logprobs, and
    all those of its SGLang model have. A question a call, because that model gives every question
    of a call the log-likelihoods of the longest one (its `flat_index` stays 0)."""
    choices, texts = documents()
    model._cache = None
    generated = [response.text[0] for response in model.greedy_until(texts)]
    scored = [response for doc in choices for response in model.loglikelihood([doc])]
    model.cleanup()
    return scored, generated


def summed(responses: list[ModelResponse]) -> tuple[list[ModelResponse], bool]:
    """With a choice's log-likelihood as a number, and whether it was not: lighteval's SGLang model
    hands the list of its tokens' on, which no metric of lighteval takes."""
    lists = any(isinstance(each, list) for response in responses for each in response.logprobs)
    for response in responses:
        response.logprobs = [float(np.sum(each)) for each in response.logprobs]
    return responses, lists


def accuracy(responses: list[ModelResponse]) -> float:
    scores = [
        LoglikelihoodAcc().compute(doc, response)
        for doc, response in zip(documents()[0], responses, strict=True)
    ]
    return sum(scores) / len(scores)


def main(model: str, scratch: str) -> int:
    del scratch
    common = {"model_name": model, "dtype": "float32", "override_chat_template": False}
    hf = TransformersModelConfig(**common, device="cpu", batch_size=1, max_length=4096)
    theirs, their_texts = answers(TransformersModel(hf))
    ours = SGLangModelConfig(**common, context_length=4096)
    mine, my_texts = answers(SGLangModel(ours))
    theirs, _ = summed(theirs)
    mine, defect = summed(mine)
    apart = np.abs([np.subtract(a.logprobs, b.logprobs) for a, b in zip(theirs, mine, strict=True)])
    greedy = [[response.argmax_logits_eq_gold for response in each] for each in (theirs, mine)]
    argmax = [a == b for a, b in zip(*greedy, strict=True)]
    same = [a == b for a, b in zip(their_texts, my_texts, strict=True)]
    print(f"\n{'lighteval':<28}{'transformers':>14}{'sglang: ours':>14}")
    print(f"{'accuracy, choices':<28}{accuracy(theirs):>14.4f}{accuracy(mine):>14.4f}")
    print(f"{apart.size:>4} log-likelihoods            at most {apart.max():.1e} apart")
    print(f"{sum(argmax):>4} of {len(argmax)} questions agree on which choices are greedy")
    print(f"{sum(same):>4} of {len(same)} texts identical")
    for a, b in zip(their_texts, my_texts, strict=True):
        if a != b:
            print(f"     transformers: {a!r}\n             ours: {b!r}")
    if defect:
        print("lighteval's own faults, gone round: token lists where its metrics want sums;")
        print("one question's numbers for all of a call; a cache that drops texts with logprobs")
    passed = (
        accuracy(theirs) == accuracy(mine)
        and apart.max() <= TOLERANCE
        and all(argmax)
        and all(same)
    )
    print("passed" if passed else "FAILED")
    return not passed


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
