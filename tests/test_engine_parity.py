"""The whole engine against Hugging Face, and against itself in other circumstances."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

import jaxserve
from jaxserve.attention import paged
from jaxserve.attention.paged import PagedOps
from tests.checkpoints import LLAMA_LIKE, make_checkpoint
from tests.marks import long, long_but
from tests.oracles.huggingface import Reference
from tests.prompts import SMALL, ids
from tests.whole_programs import keep_programs

pytestmark = pytest.mark.usefixtures("exact_products", "kept_programs")
OPTIONS = {**SMALL, "max_total_tokens": 4096, "cuda_graph_bs": [1, 8]}
TIGHT = {"max_total_tokens": 256, "cuda_graph_bs": [8]}
GREEDY = {"temperature": 0, "max_new_tokens": 64, "ignore_eos": True}


def prompts(count, seed=0, longest=100):
    random_ = random.Random(seed)
    return [
        [random_.randrange(4, 500) for _ in range(random_.randint(1, longest))]
        for _ in range(count)
    ]


# test_engine_families.py has the other families
@pytest.fixture(scope="module", params=long_but(LLAMA_LIKE, "llama"))
def family(request, tiny_models):
    folder = tiny_models(request.param)
    with jaxserve.Engine(model_path=folder, **OPTIONS) as engine:
        yield engine, folder
        assert engine.get_server_info()["late_compiles"] == 0
        info = engine.get_server_info()
        assert info["available_tokens"] == info["max_total_num_tokens"]


@pytest.fixture(scope="module")
def llama(tiny_models):
    folder = tiny_models("llama")
    with jaxserve.Engine(model_path=folder, **OPTIONS) as engine:
        yield engine, folder


def test_greedy_tokens_equal_hugging_face(family):
    engine, folder = family
    reference = Reference(folder)
    batch = prompts(16)
    together = ids(engine.generate(input_ids=batch, sampling_params=GREEDY))
    for prompt, output in zip(batch, together, strict=True):
        assert len(output) == 64
        reference.assert_greedy(prompt, output)
    exact = sum(
        reference.greedy(prompt, 64) == output
        for prompt, output in zip(batch[:6], together[:6], strict=True)
    )
    assert exact >= 5, "more than one prompt in six left the argmax loop: not ties"


def test_a_batch_gives_each_prompt_the_tokens_it_gets_alone(family):
    engine, _ = family
    batch = prompts(16)
    together = ids(engine.generate(input_ids=batch, sampling_params=GREEDY))
    alone = [
        engine.generate(input_ids=prompt, sampling_params=GREEDY)["output_ids"] for prompt in batch
    ]
    assert together == alone


def test_sums_left_to_the_next_norm_change_nothing(llama, tiny_models, monkeypatch):
    engine, folder = llama
    batch = prompts(8, seed=5)
    want = ids(engine.generate(input_ids=batch, sampling_params=GREEDY))
    keep_programs(monkeypatch, None)  # what is traced is not what a file's name tells
    monkeypatch.setattr(PagedOps, "_leaves_the_sum", lambda *_: True)
    monkeypatch.setattr(paged, "add_norm", counted := Counted(paged.add_norm))
    with jaxserve.Engine(model_path=folder, **OPTIONS) as other:
        assert ids(other.generate(input_ids=batch, sampling_params=GREEDY)) == want
    layers = json.loads((Path(folder) / "config.json").read_text())["num_hidden_layers"]
    assert counted.calls and counted.calls % (2 * layers) == 0


class Counted:
    def __init__(self, function):
        self.function, self.calls = function, 0

    def __call__(self, *args, **options):
        self.calls += 1
        return self.function(*args, **options)


def assert_logprobs_equal(engine, reference):
    """Those of inputs, outputs, the best and the named tokens."""
    prompt = prompts(1, seed=3)[0] + [5, 6, 7]
    result = engine.generate(
        input_ids=prompt, sampling_params={**GREEDY, "max_new_tokens": 12}, return_logprob=True,
        logprob_start_len=0, top_logprobs_num=4, token_ids_logprob=[9, 11],
    )  # fmt: skip
    meta, output = result["meta_info"], result["output_ids"]
    expected = reference.logprobs(prompt + output)
    assert meta["input_token_logprobs"][0][:2] == (None, prompt[0])
    assert len(meta["input_token_logprobs"]) == len(prompt)
    assert meta["input_top_logprobs"][0] is None
    chosen = meta["input_token_logprobs"][1:] + meta["output_token_logprobs"]
    tops = meta["input_top_logprobs"][1:] + meta["output_top_logprobs"]
    named = meta["input_token_ids_logprobs"][1:] + meta["output_token_ids_logprobs"]
    for position, token in enumerate((prompt + output)[1:]):
        row = expected[position]
        logprob, token_id, text = chosen[position]
        assert (token_id, text) == (token, None)
        assert logprob == pytest.approx(float(row[token]), abs=1e-4)
        best = row.topk(4)
        assert [v for v, *_ in tops[position]] == pytest.approx(best.values.tolist(), abs=1e-4)
        assert [i for _, i, _ in named[position]] == [9, 11]
        assert [v for v, *_ in named[position]] == pytest.approx(row[[9, 11]].tolist(), abs=1e-4)


def test_input_and_output_logprobs_equal_hugging_face(family):
    engine, folder = family
    assert_logprobs_equal(engine, Reference(folder))


SAMPLED = {"temperature": 0.9, "top_p": 0.9, "top_k": 50, "max_new_tokens": 24, "ignore_eos": True}


def test_samples_repeat_by_seed_and_differ_from_each_other(llama):
    engine, _ = llama
    batch = prompts(5, seed=8)
    seeds = [{**SAMPLED, "sampling_seed": 100 + i, "n": 4} for i in range(5)]
    together = ids(engine.generate(input_ids=batch, sampling_params=seeds))
    again = ids(engine.generate(input_ids=batch, sampling_params=seeds))
    alone = [
        ids(engine.generate(input_ids=p, sampling_params=s))
        for p, s in zip(batch, seeds, strict=True)
    ]
    assert together == again == [sample for samples in alone for sample in samples]
    for samples in alone:
        assert len({tuple(sample) for sample in samples}) == 4
    single = {**seeds[2], "n": 1}
    assert engine.generate(input_ids=batch[2], sampling_params=single)["output_ids"] == alone[2][0]


def mixed_workload():
    """Greedy and sampled rows, penalties, biases, several samples, one after another in a batch."""
    batch = prompts(12, seed=21, longest=60)
    params = []
    for i in range(12):
        kind = [
            {"temperature": 0},
            {"temperature": 1.0, "sampling_seed": i},
            {"temperature": 0.7, "top_k": 20, "sampling_seed": i, "frequency_penalty": 0.5},
            {"temperature": 0, "repetition_penalty": 1.2, "logit_bias": {"17": 1.5}},
        ][i % 4]
        params.append({"max_new_tokens": 40, "ignore_eos": True, **kind})
    return batch, params


def run_mixed(folder, **options):
    batch, params = mixed_workload()
    with jaxserve.Engine(model_path=folder, **{**OPTIONS, **options}) as engine:
        results = engine.generate(input_ids=batch, sampling_params=params)
        info = engine.get_server_info()
    assert info["late_compiles"] == 0
    assert info["available_tokens"] == info["max_total_num_tokens"]
    return ids(results), sum(r["meta_info"]["num_retractions"] for r in results)


@pytest.fixture(scope="module")
def plain_tokens(tiny_models):
    """Batches of one, no overlap: the plainest way through the engine."""
    folder = tiny_models("llama")
    batch, params = mixed_workload()
    options = {**OPTIONS, "disable_overlap_schedule": True}
    with jaxserve.Engine(model_path=folder, **options) as engine:
        return [
            engine.generate(input_ids=p, sampling_params=s)["output_ids"]
            for p, s in zip(batch, params, strict=True)
        ]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"disable_overlap_schedule": True},
        {"chunked_prefill_size": 24},
        long({"page_size": 64}),
        long({"page_size": 8, "max_running_requests": 5}),
    ],
    ids=["overlap", "no-overlap", "chunks", "large-pages", "few-rows"],
)
def test_circumstances_do_not_change_tokens(tiny_models, plain_tokens, options):
    tokens, retractions = run_mixed(tiny_models("llama"), **options)
    assert tokens == plain_tokens
    assert retractions == 0


@pytest.mark.parametrize("overlap", [True, long(False)])
def test_retraction_does_not_change_tokens(tiny_models, plain_tokens, overlap):
    tokens, retractions = run_mixed(
        tiny_models("llama"), **TIGHT, disable_overlap_schedule=not overlap
    )
    assert retractions > 0
    assert tokens == plain_tokens


def test_an_end_token_stops_one_step_late_at_no_cost(llama):
    """The token after the end that overlap computes is dropped."""
    engine, _ = llama
    prompt = prompts(1, seed=5)[0]
    free = engine.generate(input_ids=prompt, sampling_params=GREEDY)["output_ids"]
    stop = free[9]
    result = engine.generate(input_ids=prompt, sampling_params={**GREEDY, "stop_token_ids": [stop]})
    assert result["output_ids"] == free[: free.index(stop) + 1]
    assert result["meta_info"]["finish_reason"] == {"type": "stop", "matched": stop}


def test_min_new_tokens_holds_back_the_end(llama):
    engine, _ = llama
    prompt = prompts(1, seed=5)[0]
    free = engine.generate(input_ids=prompt, sampling_params=GREEDY)["output_ids"]
    stop = free[0]
    params = {"temperature": 0, "max_new_tokens": 20, "min_new_tokens": 7, "ignore_eos": True}
    held = engine.generate(input_ids=prompt, sampling_params={**params, "stop_token_ids": [stop]})
    assert stop not in held["output_ids"][:7]


def test_zero_new_tokens_gives_the_next_token_distribution(llama):
    engine, folder = llama
    prompt = prompts(1, seed=6)[0]
    result = engine.generate(
        input_ids=prompt, sampling_params={"max_new_tokens": 0, "temperature": 0},
        return_logprob=True, token_ids_logprob=[3, 4],
    )  # fmt: skip
    assert result["output_ids"] == []
    meta = result["meta_info"]
    assert meta["completion_tokens"] == 0
    expected = Reference(folder).logprobs(prompt)[-1]
    [(logprob, token, _)] = meta["output_token_logprobs"]
    assert token == int(expected.argmax())
    assert logprob == pytest.approx(float(expected[token]), abs=1e-4)
    [named] = meta["output_token_ids_logprobs"]
    assert [v for v, *_ in named] == pytest.approx(expected[[3, 4]].tolist(), abs=1e-4)


def test_input_logprobs_of_a_chunked_prompt_equal_those_of_a_whole_one(tiny_models, llama):
    engine, folder = llama
    prompt = prompts(1, seed=11)[0] * 3
    ask = {
        "input_ids": prompt[:60], "sampling_params": {**GREEDY, "max_new_tokens": 3},
        "return_logprob": True, "logprob_start_len": 5, "top_logprobs_num": 2,
    }  # fmt: skip
    whole = engine.generate(**ask)["meta_info"]
    with jaxserve.Engine(model_path=folder, **{**OPTIONS, "chunked_prefill_size": 24}) as small:
        chunked = small.generate(**ask)["meta_info"]
    assert len(whole["input_token_logprobs"]) == min(len(prompt), 60) - 5
    for a, b in zip(whole["input_token_logprobs"], chunked["input_token_logprobs"], strict=True):
        assert a[1] == b[1]
        assert a[0] == b[0] or a[0] == pytest.approx(b[0], abs=1e-4)


@pytest.mark.gpu
def test_pages_beyond_32_bit_offsets(tmp_path):
    """A pool whose arrays have more than 2**31 numbers gives the tokens that a small one gives."""
    overrides = {
        "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "hidden_size": 256,
        "max_position_embeddings": 65536,
    }  # fmt: skip
    folder = make_checkpoint(str(tmp_path), "llama", **overrides)
    options = {**OPTIONS, "dtype": "bfloat16", "page_size": 64, "max_running_requests": 64}
    batch = prompts(8)
    tokens = []
    for pool in (8192, 3 << 20):
        wide = {"max_total_tokens": pool, "context_length": 65536, "max_running_requests": 64}
        with jaxserve.Engine(model_path=folder, **{**options, **wide}) as engine:
            assert engine.get_server_info()["max_total_num_tokens"] == pool
            tokens.append(ids(engine.generate(input_ids=batch, sampling_params=GREEDY)))
    assert tokens[0] == tokens[1]
