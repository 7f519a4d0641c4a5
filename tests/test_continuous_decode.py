"""Several decode steps in one program give the tokens, logprobs and ends that single steps give."""

from __future__ import annotations

import asyncio
import random
import threading

import pytest

import jaxserve
from jaxserve.config.sizes import steps_to_stay_busy
from tests import inside
from tests.machines import GPU
from tests.prompts import ids
from tests.test_engine_parity import OPTIONS, TIGHT, mixed_workload, prompts, run_mixed

pytestmark = pytest.mark.usefixtures("exact_products", "kept_programs")
GREEDY = {"temperature": 0, "ignore_eos": True}
VARIANTS = {
    "4": {"num_continuous_decode_steps": 4},
    "4-no-overlap": {"num_continuous_decode_steps": 4, "disable_overlap_schedule": True},
    "3-small-pages": {"num_continuous_decode_steps": 3, "page_size": 8},
    "8-few-rows": {"num_continuous_decode_steps": 8, "page_size": 8, "max_running_requests": 5},
}


@pytest.fixture(scope="module")
def folder(tiny_models):
    return tiny_models("llama")


@pytest.fixture(scope="module")
def single(folder):
    """One step a program, read at once: the plainest way through the engine."""
    options = {**OPTIONS, "skip_tokenizer_init": False, "disable_overlap_schedule": True}
    with jaxserve.Engine(model_path=folder, num_continuous_decode_steps=1, **options) as engine:
        yield engine
        assert engine.get_server_info()["num_continuous_decode_steps"] == 1


def marked(names, *shortly):
    """The variants of `names`: those of `shortly` in every run, the others in long ones."""
    for name in names:
        marks = () if name in shortly else pytest.mark.long
        yield pytest.param(VARIANTS[name], marks=marks, id=name)


@pytest.fixture(
    scope="module",
    params=list(marked(("4", "4-no-overlap", "8-few-rows"), "4")),
)
def several(request, folder):
    options = {**OPTIONS, "skip_tokenizer_init": False, **request.param}
    with jaxserve.Engine(model_path=folder, **options) as engine:
        yield engine
        info = engine.get_server_info()
        assert info["available_tokens"] == info["max_total_num_tokens"]
        assert info["late_compiles"] == 0
        assert info["decode_steps"] > 0
        assert info["num_continuous_decode_steps"] == request.param["num_continuous_decode_steps"]


def alone(engine, batch, params, **options):
    return [
        engine.generate(input_ids=prompt, sampling_params=each, **options)
        for prompt, each in zip(batch, params, strict=True)
    ]


def test_greedy_seeded_and_penalized_tokens(single, several):
    batch, params = mixed_workload()
    for i, each in enumerate(params):
        each["max_new_tokens"] = 30 + i  # most do not divide by the steps
    together = several.generate(input_ids=batch, sampling_params=params)
    assert ids(together) == ids(alone(single, batch, params))
    assert ids(alone(several, batch[:4], params[:4])) == ids(together[:4])


def test_samples_of_one_prompt(single, several):
    prompt = prompts(1, seed=8)[0]
    params = {
        "temperature": 0.9, "top_p": 0.9, "max_new_tokens": 23, "ignore_eos": True,
        "sampling_seed": 7, "n": 4,
    }  # fmt: skip
    expected, found = (
        ids(engine.generate(input_ids=prompt, sampling_params=params))
        for engine in (single, several)
    )
    assert found == expected and len({tuple(sample) for sample in found}) == 4


def test_logprobs(single, several):
    batch = prompts(5, seed=3, longest=40)
    params = [{**GREEDY, "max_new_tokens": 10 + i} for i in range(5)]
    ask = {"return_logprob": True, "top_logprobs_num": 3, "token_ids_logprob": [9, 11]}
    together = several.generate(input_ids=batch, sampling_params=params, logprob_start_len=0, **ask)
    for found, expected in zip(
        together, alone(single, batch, params, logprob_start_len=0, **ask), strict=True
    ):
        assert found["output_ids"] == expected["output_ids"]
        meta, reference = found["meta_info"], expected["meta_info"]
        for name in ("input_token_logprobs", "output_token_logprobs"):
            ours, theirs = (
                [logprob for logprob, *_ in m[name] if logprob is not None]
                for m in (meta, reference)
            )
            assert ours == pytest.approx(theirs, abs=1e-4)
            assert [t[1] for t in meta[name]] == [t[1] for t in reference[name]]
        for name in ("output_top_logprobs", "output_token_ids_logprobs"):
            ours, theirs = ([[v for v, *_ in p] for p in m[name]] for m in (meta, reference))
            for a, b in zip(ours, theirs, strict=True):
                assert a == pytest.approx(b, abs=1e-4)


def test_end_tokens_cut_at_every_place_in_a_dispatch(single, several):
    """Rows end at each of nine places while others go on; what was computed after is dropped."""
    batch = prompts(1, seed=5) * 9
    free = single.generate(input_ids=batch[0], sampling_params={**GREEDY, "max_new_tokens": 60})[
        "output_ids"
    ]
    params = [
        {**GREEDY, "max_new_tokens": 60, "stop_token_ids": [free[place]]} for place in range(9)
    ]
    for stop, result in zip(
        free, several.generate(input_ids=batch, sampling_params=params), strict=False
    ):
        assert result["output_ids"] == free[: free.index(stop) + 1]
        assert result["meta_info"]["finish_reason"] == {"type": "stop", "matched": stop}
        assert result["meta_info"]["completion_tokens"] == len(result["output_ids"])


def test_stop_strings_and_end_tokens_held_back(single, several):
    batch = prompts(6, seed=12, longest=30)
    free = alone(single, batch, [{**GREEDY, "max_new_tokens": 30}] * 6)
    params = []
    for place, result in enumerate(free, start=5):
        text, tokens = result["text"], result["output_ids"]
        middle = text[len(text) // 2 :][:3]
        params += [
            {**GREEDY, "max_new_tokens": 30, "stop": [middle]},
            {"temperature": 0, "max_new_tokens": 30, "min_new_tokens": place,
             "stop_token_ids": [tokens[0], tokens[3]]},
        ]  # fmt: skip
    doubled = [prompt for prompt in batch for _ in range(2)]
    found = several.generate(input_ids=doubled, sampling_params=params)
    for ours, theirs in zip(found, alone(single, doubled, params), strict=True):
        assert (ours["text"], ours["output_ids"]) == (theirs["text"], theirs["output_ids"])
        assert ours["meta_info"]["finish_reason"] == theirs["meta_info"]["finish_reason"]
    reasons = [result["meta_info"]["finish_reason"]["type"] for result in found]
    assert "stop" in reasons


@pytest.mark.parametrize("interval", [1, 3])
def test_streams_have_every_token_in_order(single, several, interval):
    prompt = prompts(1, seed=6)[0]
    params = {**GREEDY, "max_new_tokens": 21, "stream_interval": interval}
    expected = single.generate(input_ids=prompt, sampling_params=params)
    chunks = list(several.generate(input_ids=prompt, sampling_params=params, stream=True))
    lengths = [len(chunk["output_ids"]) for chunk in chunks]
    assert lengths == sorted(set(lengths))
    assert all(length % interval == 1 % interval for length in lengths[:-1])
    for chunk in chunks:
        assert chunk["output_ids"] == expected["output_ids"][: len(chunk["output_ids"])]
    assert chunks[-1]["text"] == expected["text"]
    finished = [chunk["meta_info"]["finish_reason"] is not None for chunk in chunks]
    assert finished == [False] * (len(chunks) - 1) + [True]


def test_dispatches_are_few_and_all_their_steps_counted(several, monkeypatch):
    """A row alone: the first token is prefill's, the rest come n at a time, then one by one."""
    runner, dispatched = inside.runner(several), []
    real = runner.dispatch

    def dispatch(prepared):
        dispatched.append(prepared.batch)
        return real(prepared)

    monkeypatch.setattr(runner, "dispatch", dispatch)
    info = several.get_server_info()
    several.generate(input_ids=[5, 6, 7], sampling_params={**GREEDY, "max_new_tokens": 40})
    after = several.get_server_info()
    steps = info["num_continuous_decode_steps"]
    many, one = divmod(39, steps)
    assert [batch.steps for batch in dispatched[1:]] == [steps] * many + [1] * one
    assert after["decode_steps"] - info["decode_steps"] == 39
    assert after["generated_tokens"] - info["generated_tokens"] == 40


@pytest.mark.parametrize("variant", list(marked(("4-no-overlap", "3-small-pages"), "4-no-overlap")))
def test_retraction_does_not_change_tokens(folder, single, variant):
    batch, params = mixed_workload()
    tokens, retractions = run_mixed(folder, **{**TIGHT, **variant})
    assert retractions > 0
    assert tokens == ids(alone(single, batch, params))


def test_an_abort_amid_the_steps_frees_the_pages(several):
    params = {**GREEDY, "max_new_tokens": 200}
    stream = several.generate(input_ids=[5, 6], sampling_params=params, stream=True, rid="victim")
    other = []
    thread = threading.Thread(
        target=lambda: other.append(
            several.generate(input_ids=[9, 8, 7], sampling_params={**params, "max_new_tokens": 90})
        )
    )
    thread.start()
    next(stream)
    several.abort_request("victim")
    *_, last = stream
    assert last["meta_info"]["finish_reason"]["type"] == "abort"
    assert 0 < len(last["output_ids"]) < 200
    thread.join()
    assert len(other[0]["output_ids"]) == 90
    info = several.get_server_info()
    assert info["available_tokens"] == info["max_total_num_tokens"]


@pytest.mark.long
@pytest.mark.parametrize("variant", list(marked(("4-no-overlap", "3-small-pages"))))
def test_soak_with_aborts_leaves_no_page_behind(folder, variant):
    """150 random requests, a third of them left early, on a pool that is too small for them."""
    options = {**OPTIONS, "max_total_tokens": 768, "max_running_requests": 8, **variant}
    random_ = random.Random(0)
    with jaxserve.Engine(model_path=folder, **options) as engine:

        async def one(number):
            prompt = [random_.randrange(4, 500) for _ in range(random_.randint(1, 120))]
            params = {
                "max_new_tokens": random_.randint(0, 60),
                "temperature": random_.choice([0, 0.8]),
                "n": random_.choice([1, 1, 1, 2]),
                "stop_token_ids": random_.sample(range(500), random_.choice([0, 9, 60])),
                "frequency_penalty": random_.choice([0, 0.3]),
            }
            fate = random_.random()
            await asyncio.sleep(random_.random() * 0.2)
            ask = {"input_ids": prompt, "sampling_params": params, "rid": f"soak-{number}-"}
            if fate < 0.2:
                stream = await engine.async_generate(**ask, stream=True)
                left = random_.randint(0, 3)
                async for _ in stream:
                    if left == 0:
                        break
                    left -= 1
                await stream.aclose()
                return
            task = asyncio.create_task(engine.async_generate(**ask, return_logprob=fate > 0.9))
            if fate < 0.35:
                await asyncio.sleep(random_.random() * 0.05)
                engine.abort_request(f"soak-{number}-")
            results = await task
            for result in results if isinstance(results, list) else [results]:
                assert len(result["output_ids"]) <= params["max_new_tokens"]

        async def all_of_them():
            await asyncio.gather(*map(one, range(150)))

        asyncio.run(all_of_them())
        info = engine.get_server_info()
        assert info["available_tokens"] == info["max_total_num_tokens"]
        assert info["num_running"] == info["num_waiting"] == 0
        assert info["late_compiles"] == 0


# -- how many ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gigabytes", "steps"),
    [(0.27, 4), (0.99, 4), (1.2, 3), (1.79, 3), (1.8, 2), (2.5, 2), (3.6, 1), (16.1, 1), (141, 1)],
)
def test_small_models_take_more_steps_than_large_ones(gigabytes, steps):
    assert GPU.dispatch is not None
    assert steps_to_stay_busy(round(gigabytes * 1e9), GPU.dispatch) == steps


def test_more_devices_take_the_host_longer():
    """16 GB on one device, its parts on two and four."""
    steps = [steps_to_stay_busy(round(16e9 / n), GPU.dispatch, n) for n in (1, 2, 4)]
    assert steps == [1, 1, 3]
