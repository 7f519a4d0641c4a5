"""Decodes that ride in a prompt's step give the tokens, logprobs and ends of steps of their own.

Every request streams and starts while the ones before it run, so that prompts come in chunks with
the others' next tokens in the same steps."""

from __future__ import annotations

import asyncio
import random

import pytest

import jaxserve
from tests.marks import long_but
from tests.test_engine_parity import OPTIONS, prompts

pytestmark = pytest.mark.usefixtures("exact_products", "kept_programs")
STREAMED = {
    **OPTIONS, "skip_tokenizer_init": False, "chunked_prefill_size": 512,
    "enable_mixed_chunk": True, "max_prefill_tokens": 512,
}  # fmt: skip
VARIANTS = {
    "overlap": {},
    "no-overlap": {"disable_overlap_schedule": True, "disable_radix_cache": True},
    "retraction": {
        "max_total_tokens": 512, "page_size": 8, "num_continuous_decode_steps": 4,
        "max_running_requests": 5,
    },
}  # fmt: skip


def jobs():
    """Arguments of `generate`, a feature each."""
    long = [prompt[:170] for prompt in prompts(14, seed=31, longest=300)]
    shared = prompts(1, seed=32)[0] * 3
    shared = shared[:140]
    greedy = {"temperature": 0, "max_new_tokens": 40, "ignore_eos": True}
    seeded = {**greedy, "temperature": 0.9, "top_p": 0.9, "sampling_seed": 5}
    logprobs = {"return_logprob": True, "top_logprobs_num": 2, "token_ids_logprob": [9, 11]}
    kinds = [
        ({}, {}),
        (seeded, {}),
        ({"frequency_penalty": 0.5, "presence_penalty": 0.2}, {}),
        ({}, {**logprobs, "logprob_start_len": 0}),
        ({**seeded, "n": 3}, {}),
        ({"repetition_penalty": 1.2, "logit_bias": {"17": 1.5}}, {}),
        ({"stop_token_ids": list(range(0, 500, 40)), "min_new_tokens": 3}, {}),
        ({**seeded, "frequency_penalty": 0.4}, {**logprobs, "logprob_start_len": 20}),
        ({"stop": ["e", " the", "qu"]}, {}),
        ({"max_new_tokens": 1}, {}),
        ({**seeded, "n": 2}, logprobs),
        ({}, {}),
    ]
    made = [
        {"input_ids": prompt, "sampling_params": {**greedy, **params}, **options}
        for prompt, (params, options) in zip(long, kinds, strict=False)
    ]
    tails = prompts(3, seed=33, longest=20)
    made += [{"input_ids": shared + tail, "sampling_params": greedy} for tail in tails]
    return made


def listed(result):
    return result if isinstance(result, list) else [result]


async def streamed(engine, asked, ahead=2):
    """Last chunks of each job's samples; a job starts when the one before has some tokens."""
    gates = [asyncio.Event() for _ in range(len(asked) + 1)]
    gates[0].set()

    async def one(number, job):
        await gates[number].wait()
        stream = await engine.async_generate(**job, stream=True)
        last, seen = {}, 0
        async for chunk in stream:
            last[chunk.get("index", 0)] = chunk
            seen += 1
            if seen == ahead:
                gates[number + 1].set()
        gates[number + 1].set()
        return [last[index] for index in sorted(last)]

    return await asyncio.gather(*(one(number, job) for number, job in enumerate(asked)))


def assert_same(found, expected):
    assert found["output_ids"] == expected["output_ids"]
    assert found["text"] == expected["text"]
    ours, theirs = found["meta_info"], expected["meta_info"]
    assert ours["finish_reason"] == theirs["finish_reason"]
    assert ours["completion_tokens"] == theirs["completion_tokens"]
    for name in ("input_token_logprobs", "output_token_logprobs"):
        assert (name in ours) == (name in theirs)
        assert [t[1] for t in ours.get(name, [])] == [t[1] for t in theirs.get(name, [])]
        values = [[t[0] for t in m.get(name, []) if t[0] is not None] for m in (ours, theirs)]
        assert values[0] == pytest.approx(values[1], abs=1e-4)
    for name in ("output_top_logprobs", "output_token_ids_logprobs"):
        for a, b in zip(ours.get(name, []), theirs.get(name, []), strict=True):
            assert [t[0] for t in a] == pytest.approx([t[0] for t in b], abs=1e-4)


@pytest.fixture(scope="module")
def folder(tiny_models):
    return tiny_models("llama")


@pytest.fixture(scope="module")
def plain(folder):
    """Whole prompts, one request at a time, steps of their own: the plainest way."""
    options = {
        **OPTIONS, "skip_tokenizer_init": False, "chunked_prefill_size": -1,
        "enable_mixed_chunk": False, "disable_overlap_schedule": True, "max_prefill_tokens": 256,
    }  # fmt: skip
    with jaxserve.Engine(model_path=folder, **options) as engine:
        results = [listed(engine.generate(**job)) for job in jobs()]
        assert engine.get_server_info()["mixed_steps"] == 0
    return results


@pytest.mark.parametrize("name", long_but(VARIANTS, "overlap", "no-overlap"))
def test_riding_does_not_change_results(folder, plain, name):
    with jaxserve.Engine(model_path=folder, **{**STREAMED, **VARIANTS[name]}) as engine:
        results = asyncio.run(streamed(engine, jobs()))
        info = engine.get_server_info()
    for found, expected in zip(results, plain, strict=True):
        for ours, theirs in zip(found, expected, strict=True):
            assert_same(ours, theirs)
    assert info["mixed_steps"] > 5
    assert info["late_compiles"] == 0
    assert info["available_tokens"] == info["max_total_num_tokens"]
    # every token kept is counted, whatever step it came from
    samples = [result for found in results for result in found]
    assert info["generated_tokens"] == sum(len(result["output_ids"]) for result in samples)
    if name == "retraction":
        assert sum(result["meta_info"]["num_retractions"] for result in samples) > 0


def test_without_riding_decode_steps_come_between(folder, plain):
    options = {**STREAMED, "enable_mixed_chunk": False}
    with jaxserve.Engine(model_path=folder, **options) as engine:
        results = asyncio.run(streamed(engine, jobs()))
        info = engine.get_server_info()
    for found, expected in zip(results, plain, strict=True):
        for ours, theirs in zip(found, expected, strict=True):
            assert_same(ours, theirs)
    assert info["mixed_steps"] == 0
    assert info["extend_steps"] > len(results)  # 128 tokens at a time


@pytest.mark.long
def test_aborts_while_tokens_ride(folder):
    """A third of 80 streams are left early, on a pool that is too small for all of them."""
    random_ = random.Random(3)
    options = {**STREAMED, "max_total_tokens": 1024, "max_running_requests": 8}
    batch = prompts(80, seed=40, longest=180)
    with jaxserve.Engine(model_path=folder, **options) as engine:

        async def one(number, prompt):
            await asyncio.sleep(random_.random() * 1.5)
            params = {"temperature": 0, "max_new_tokens": random_.randint(1, 60)}
            ask = {"input_ids": prompt, "sampling_params": params, "rid": f"job-{number}-"}
            stream = await engine.async_generate(**ask, stream=True)
            left = random_.choice([2, 1000, 1000])
            reason = None
            async for chunk in stream:
                reason = chunk["meta_info"]["finish_reason"]
                left -= 1
                if left == 0 and number % 2:
                    engine.abort_request(f"job-{number}-")
                elif left == 0:
                    break
            await stream.aclose()
            return reason and reason["type"]

        async def all_of_them():
            return await asyncio.gather(*(one(i, p) for i, p in enumerate(batch)))

        reasons = asyncio.run(all_of_them())
        info = engine.get_server_info()
    assert set(reasons) == {None, "abort", "length", "stop"}
    assert info["mixed_steps"] > 0
    assert info["available_tokens"] == info["max_total_num_tokens"]
    assert info["num_running"] == info["num_waiting"] == 0
