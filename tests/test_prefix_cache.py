"""The prefix cache and the scheduling policies in a whole engine: with them or without, a request
gets the same tokens."""

from __future__ import annotations

import contextlib
import random
import threading

import pytest

import jaxserve
from tests import inside
from tests.marks import long
from tests.prompts import GREEDY, SMALL, ids, text

pytestmark = pytest.mark.usefixtures("exact_products", "kept_programs")
OPTIONS = {**SMALL, "max_total_tokens": 4096}
TIGHT = {"max_total_tokens": 400}
SEEDED = {
    "temperature": 0.9, "top_p": 0.9, "sampling_seed": 5, "max_new_tokens": 24, "ignore_eos": True
}  # fmt: skip
COUNTED = {**SEEDED, "frequency_penalty": 0.4, "repetition_penalty": 1.1}


def cached(results):
    return [result["meta_info"]["cached_tokens"] for result in results]


@pytest.fixture(scope="module")
def uncached(tiny_models):
    options = {**OPTIONS, "disable_radix_cache": True}
    with jaxserve.Engine(model_path=tiny_models("llama"), **options) as engine:
        yield engine
        info = engine.get_server_info()
        assert info["cached_tokens"] == info["cached_prefix_tokens"] == 0


@pytest.fixture(scope="module")
def engine(tiny_models):
    with jaxserve.Engine(model_path=tiny_models("llama"), **OPTIONS) as engine:
        yield engine
        info = engine.get_server_info()
        assert info["available_tokens"] == info["max_total_num_tokens"]


@pytest.fixture(autouse=True)
def empty(request):
    if "engine" in request.fixturenames:
        assert request.getfixturevalue("engine").flush_cache().success


PARAMS = pytest.mark.parametrize(
    "params", [long(GREEDY), long(SEEDED), COUNTED], ids=["greedy", "seed", "pen"]
)


@PARAMS
def test_a_conversation_reads_what_it_said(engine, uncached, params):
    """Five turns, each behind the last one's prompt and answer; chunks from the second on."""
    prompt = text(1, 70)
    for turn in range(5):
        ask = {"input_ids": prompt, "sampling_params": params}
        result, plain = engine.generate(**ask), uncached.generate(**ask)
        assert result["output_ids"] == plain["output_ids"]
        # the last output's KV was never computed
        known = (len(prompt) - 21) // 16 * 16 if turn else 0
        assert cached([result, plain]) == [known, 0]
        prompt = prompt + result["output_ids"] + text(turn, 20)[: 20 if turn < 4 else 0]
    assert engine.get_server_info()["cached_prefix_tokens"] > 0


@PARAMS
@pytest.mark.parametrize("length", [64, 65, 79, 200])
def test_a_whole_prompt_that_is_cached_runs_its_last_token(engine, uncached, params, length):
    ask = {"input_ids": text(2, length), "sampling_params": params}
    plain = uncached.generate(**ask)
    results = [engine.generate(**ask) for _ in range(3)]
    assert ids(results) == [plain["output_ids"]] * 3
    assert cached(results) == [0] + [(length - 1) // 16 * 16] * 2


@PARAMS
def test_duplicates_in_one_batch_hit(engine, uncached, params):
    prompts = [text(3, 100) + text(i, 10 * (i % 3)) for i in range(20)]
    ask = {"input_ids": prompts, "sampling_params": params}
    results = engine.generate(**ask)
    assert ids(results) == ids(uncached.generate(**ask))
    assert cached(results)[0] == 0
    assert all(count >= 96 for count in cached(results)[1:])


@PARAMS
def test_samples_share_a_cached_prompt(engine, uncached, params):
    prompt = text(4, 90)
    engine.generate(input_ids=prompt[:70], sampling_params=GREEDY)
    ask = {"input_ids": [prompt, text(5, 33)], "sampling_params": {**params, "n": 5}}
    results = engine.generate(**ask)
    assert ids(results) == ids(uncached.generate(**ask))
    assert cached(results) == [64] + [80] * 4 + [0] + [32] * 4
    again = engine.generate(**ask)
    assert ids(again) == ids(results)
    assert cached(again) == [80] * 5 + [32] * 5


@PARAMS
@pytest.mark.parametrize("start", [0, 37, 149, 150, -1])
def test_logprobs_are_those_without_a_cache(engine, uncached, params, start):
    """And positions whose input logprobs are wanted run."""
    ask = {
        "input_ids": text(6, 150), "sampling_params": params, "return_logprob": True,
        "logprob_start_len": start, "top_logprobs_num": 3,
    }  # fmt: skip
    plain = uncached.generate(**ask)
    engine.generate(input_ids=text(6, 160), sampling_params=GREEDY)
    for _ in range(2):
        result = engine.generate(**ask)
        assert result["output_ids"] == plain["output_ids"]
        assert cached([result]) == [(149 if start < 0 else min(start, 149)) // 16 * 16]
        for name in ("input_token_logprobs", "output_token_logprobs"):
            pairs = zip(result["meta_info"][name], plain["meta_info"][name], strict=True)
            for ours, theirs in pairs:
                assert ours[1] == theirs[1]
                assert ours[0] == theirs[0] or ours[0] == pytest.approx(theirs[0], abs=1e-4)


@PARAMS
def test_samples_of_a_cached_prompt_whose_logprobs_are_wanted(tiny_models, uncached, params):
    """It runs again beside the cached one, and in the end one copy stays, in a tight pool."""
    prompt = text(6, 120)
    ask = {
        "input_ids": prompt, "sampling_params": {**params, "n": 3, "max_new_tokens": 50},
        "return_logprob": True, "logprob_start_len": 0,
    }  # fmt: skip
    plain = uncached.generate(**ask)
    options = {**OPTIONS, **TIGHT}
    with jaxserve.Engine(model_path=tiny_models("llama"), **options) as engine:
        engine.generate(input_ids=prompt, sampling_params=GREEDY)
        for _ in range(2):
            results = engine.generate(**ask)
            assert ids(results) == ids(plain)
            assert cached(results)[0] == 0
            for ours, theirs in zip(results, plain, strict=True):
                ours = ours["meta_info"]["input_token_logprobs"]
                theirs = theirs["meta_info"]["input_token_logprobs"]
                assert [x[0] for x in ours[1:]] == pytest.approx(
                    [x[0] for x in theirs[1:]], abs=1e-4
                )
        info = engine.get_server_info()
    assert info["available_tokens"] == info["max_total_num_tokens"]


@PARAMS
def test_an_abort_leaves_what_has_run(engine, uncached, params):
    prompt = text(7, 300)
    stream = engine.generate(
        input_ids=prompt, sampling_params={**params, "max_new_tokens": 200}, stream=True
    )
    chunks = [next(stream) for _ in range(20)]
    stream.close()
    said = chunks[-1]["output_ids"]
    ask = {"input_ids": prompt + said[:18] + [9], "sampling_params": params}
    result = engine.generate(**ask)
    assert result["output_ids"] == uncached.generate(**ask)["output_ids"]
    assert cached([result])[0] >= 304
    info = engine.get_server_info()
    assert info["available_tokens"] == info["max_total_num_tokens"]


@PARAMS
def test_a_stop_in_the_middle_keeps_only_what_was_said(engine, uncached, params):
    """The tokens behind a stop, which were in flight, are in nobody's prefix."""
    prompt = text(8, 60)
    free = uncached.generate(input_ids=prompt, sampling_params=params)["output_ids"]
    stop = next(t for i, t in enumerate(free) if i >= 6 and t not in free[:i])
    stopped = {**params, "stop_token_ids": [stop]}
    result = engine.generate(input_ids=prompt, sampling_params=stopped)
    assert result["output_ids"] == free[: free.index(stop) + 1]
    for tail in (free, result["output_ids"] + text(9, 20)):
        ask = {"input_ids": prompt + tail, "sampling_params": params}
        assert engine.generate(**ask)["output_ids"] == uncached.generate(**ask)["output_ids"]


@pytest.mark.parametrize(
    ("params", "overlap"),
    [(COUNTED, True), long(GREEDY, False), long(SEEDED, False)],
    ids=["pen", "greedy", "seed"],
)
def test_pressure_evicts_and_retracts_to_the_same_tokens(tiny_models, uncached, params, overlap):
    """A tree of prompts in a pool for a fraction of them, one batch after another."""
    heads = [text(10 + i, 48) for i in range(3)]
    prompts = [heads[i % 3] + text(20 + i, 5 + i) for i in range(18)]
    ask = {"input_ids": prompts, "sampling_params": {**params, "max_new_tokens": 60}}
    plain = ids(uncached.generate(**ask))
    options = {**OPTIONS, **TIGHT, "disable_overlap_schedule": not overlap}
    with jaxserve.Engine(model_path=tiny_models("llama"), **options) as engine:
        results = [engine.generate(**ask) for _ in range(2)]
        info = engine.get_server_info()
    assert [ids(each) for each in results] == [plain] * 2
    assert sum(r["meta_info"]["num_retractions"] for each in results for r in each) > 0
    assert info["cached_tokens"] > 0
    assert info["cache_hit_rate"] == info["cached_tokens"] / info["prompt_tokens"]
    assert info["prompt_tokens"] == 2 * sum(map(len, prompts))
    assert info["available_tokens"] == info["max_total_num_tokens"]


def test_a_salt_keeps_prefixes_apart(engine):
    ask = {"input_ids": text(11, 50), "sampling_params": GREEDY}
    salts = [None, "a", "b", "a", "", "b"]
    results = [engine.generate(**ask, cache_salt=salt) for salt in salts]
    assert cached(results) == [0, 0, 0, 48, 48, 48]
    assert len({tuple(output) for output in ids(results)}) == 1
    both = engine.generate(
        input_ids=[text(12, 50)] * 2, sampling_params=GREEDY, cache_salt=["a", "c"]
    )
    assert cached(both) == [0, 0]


def test_flushing_forgets_unless_something_runs(engine):
    ask = {"input_ids": text(13, 50), "sampling_params": GREEDY}
    assert cached([engine.generate(**ask), engine.generate(**ask)]) == [0, 48]
    stream = engine.generate(**{**ask, "sampling_params": {**GREEDY, "max_new_tokens": 300}},
                             stream=True)  # fmt: skip
    next(stream)
    assert engine.flush_cache().success is False
    stream.close()
    assert cached([engine.generate(**ask)]) == [48]
    assert engine.flush_cache().success is True
    assert engine.get_server_info()["cached_prefix_tokens"] == 0
    assert cached([engine.generate(**ask)]) == [0]


@pytest.mark.parametrize("phase", ["prepare", "dispatch"])
def test_a_failed_step_leaves_no_prefix_behind(engine, uncached, monkeypatch, phase):
    """Its pages were in the tree from when it was scheduled, and hold nothing."""
    ask = {"input_ids": text(14, 100), "sampling_params": GREEDY}
    runner = inside.runner(engine)
    real, failures = getattr(runner, phase), [RuntimeError("injected")]

    def broken(argument):
        if failures:
            raise failures.pop()
        return real(argument)

    monkeypatch.setattr(runner, phase, broken)
    if phase == "prepare":
        with pytest.raises(RuntimeError, match="injected"):
            engine.generate(**ask)
    else:
        assert engine.generate(**ask)["meta_info"]["num_retractions"] == 1
    assert engine.get_server_info()["cached_prefix_tokens"] == (0 if phase == "prepare" else 112)
    result = engine.generate(**ask)
    assert result["output_ids"] == uncached.generate(**ask)["output_ids"]


def test_cached_tokens_of_growing_ranges(tiny_models):
    """The arithmetic that users of SGLang know, in whole pages."""
    folder = tiny_models(
        "llama", num_hidden_layers=1, hidden_size=32, num_attention_heads=1, intermediate_size=32,
        num_key_value_heads=1, vocab_size=4096, max_position_embeddings=4096, tokenizer=False,
    )  # fmt: skip
    options = {**OPTIONS, "context_length": 3072, "max_running_requests": 2}
    params = {"temperature": 0, "max_new_tokens": 1}
    with jaxserve.Engine(model_path=folder, **options) as engine:
        results = [
            engine.generate(input_ids=list(range(n)), sampling_params=params)
            for n in (50, 2_500, 2_500, 1_000, 2_750)
        ]
    assert cached(results) == [n // 16 * 16 for n in (0, 50, 2_499, 999, 2_500)]


@pytest.mark.parametrize("policy", [long("fcfs"), "lpm"])
def test_a_tree_of_200_prompts_in_one_batch(tiny_models, policy):
    """Each node's prompt is its parent's and a few tokens more; the pool holds a part of them."""
    random_ = random.Random(0)
    nodes = [text(0, 40)]
    for number in range(1, 200):
        parent = random_.choice(nodes[-60:])
        nodes.append(parent[-400:] + text(number, random_.randint(1, 40)))
    random_.shuffle(nodes)
    options = {**OPTIONS, "schedule_policy": policy}
    with jaxserve.Engine(model_path=tiny_models("llama"), **options) as engine:
        results = engine.generate(input_ids=nodes, sampling_params={**GREEDY, "max_new_tokens": 4})
        info = engine.get_server_info()
    assert all(len(output) == 4 for output in ids(results))
    assert info["cached_tokens"] == sum(cached(results)) > 0
    assert info["available_tokens"] == info["max_total_num_tokens"]


def test_four_unbounded_outputs_run_together(tiny_models):
    """Nothing is reserved for outputs that may never come."""
    options = {**OPTIONS, **TIGHT}
    params = {"temperature": 0, "max_new_tokens": None, "ignore_eos": True}
    with jaxserve.Engine(model_path=tiny_models("llama"), **options) as engine:
        streams = [
            engine.generate(input_ids=text(i, 20), sampling_params=params, stream=True)
            for i in range(4)
        ]
        for stream in streams:
            next(stream)
        info = engine.get_server_info()
        assert (info["num_running"], info["num_waiting"]) == (4, 0)
        for stream in streams:
            stream.close()


@contextlib.contextmanager
def held(engine):
    """The engine takes requests and runs none of them inside the block."""
    begun, go_on = threading.Event(), threading.Event()

    def wait():
        begun.set()
        go_on.wait()

    thread = threading.Thread(target=inside.call, args=[engine, wait])
    thread.start()
    begun.wait()
    yield
    go_on.set()
    thread.join()


ONE = {**OPTIONS, "max_running_requests": 1, "context_length": 1024}
PRIORITIES = {**ONE, "enable_priority_scheduling": True}
LONG = {"temperature": 0, "max_new_tokens": 400, "ignore_eos": True}


def test_priorities_order_the_queue_and_preempt(tiny_models, uncached):
    prompts = [text(i, 20) for i in range(5)]
    plain = ids(uncached.generate(input_ids=prompts, sampling_params=GREEDY))
    with jaxserve.Engine(model_path=tiny_models("llama"), **PRIORITIES) as engine:
        long = engine.generate(input_ids=prompts[0], sampling_params=LONG, stream=True, priority=0)
        next(long)
        with held(engine):
            streams = [
                engine.generate(
                    input_ids=prompts[i], sampling_params=GREEDY, stream=True, priority=p
                )
                for i, p in ((1, None), (2, 5), (3, 10), (4, 11))
            ]  # 10 more are not enough to preempt, 11 are
        rest = [list(stream)[-1] for stream in streams]
        first = list(long)[-1]
    assert first["output_ids"][:24] == plain[0] and ids(rest) == plain[1:]
    assert [r["meta_info"]["num_retractions"] for r in (first, *rest)] == [1, 0, 0, 0, 0]
    assert first["meta_info"]["e2e_latency"] > max(r["meta_info"]["e2e_latency"] for r in rest[1:])


def test_a_full_queue_keeps_the_best(tiny_models):
    options = {**PRIORITIES, "max_queued_requests": 2}
    with jaxserve.Engine(model_path=tiny_models("llama"), **options) as engine:
        first = engine.generate(input_ids=[5], sampling_params=LONG, stream=True, priority=9)
        next(first)
        with held(engine):
            queued = [
                engine.generate(
                    input_ids=[5], sampling_params=GREEDY, stream=True, priority=p, rid=f"p{p}"
                )
                for p in (1, 2, 3, 0)
            ]
        for refused, name in ((queued[0], "'p1' of priority 1"), (queued[3], "'p0' of priority 0")):
            with pytest.raises(ValueError, match=f"queue is full: max_queued_requests=2.*{name}"):
                next(refused)
        first.close()
        assert all(len(list(stream)[-1]["output_ids"]) == 24 for stream in queued[1:3])


def test_the_longest_cached_prefix_goes_first(tiny_models):
    options = {**ONE, "schedule_policy": "lpm"}
    heads = [text(0, 40), text(1, 80)]
    with jaxserve.Engine(model_path=tiny_models("llama"), **options) as engine:
        engine.generate(input_ids=heads, sampling_params=GREEDY)
        prompts = [text(2, 30), heads[0] + [7], heads[1] + [7], heads[0] + [8]]
        results = engine.generate(input_ids=prompts, sampling_params=GREEDY)
    waited = [r["meta_info"]["e2e_latency"] for r in results]
    assert waited[2] < waited[1] < waited[3] < waited[0]
    assert cached(results) == [0, 32, 80, 32]
