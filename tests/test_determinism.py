"""enable_deterministic_inference: a request's tokens and logprobs are bitwise the same whatever
runs beside it, is cached, was cut into chunks, or was retracted. The oracle is the request by
itself, in an engine whose cache is empty. Runs on a CPU and on a GPU as it is."""

from __future__ import annotations

import contextlib
import itertools
import random
import threading

import pytest

import jaxserve
from jaxserve.config import EngineConfig
from jaxserve.errors import InvalidRequestError
from jaxserve.models.registry import config_from_hf
from jaxserve.packing.buckets import Buckets
from tests import inside
from tests.checkpoints import make_config
from tests.faults import fail_at
from tests.kernels.support import ON_GPU
from tests.machines import MACHINES
from tests.marks import long
from tests.prompts import text

pytestmark = pytest.mark.usefixtures("optimized", "kept_programs")
PREFIXES = (1, 511, 2048, 4097)
OPTIONS = {
    "skip_tokenizer_init": True, "context_length": 4608, "max_running_requests": 16,
    "enable_deterministic_inference": True,
}  # fmt: skip
ROOMY, TIGHT = {"max_total_tokens": 32_000}, {"max_total_tokens": 1280}
MODELS = {
    # head dims of 64, so that 16-bit prefill is Mosaic's on a Hopper GPU; groups of 2 and 3
    "llama": {"hidden_size": 256},
    "mistral": {"hidden_size": 384, "num_attention_heads": 6, "sliding_window": 300},
}
DTYPES = ("auto", "float32") if ON_GPU else ("auto",)  # "auto" is float32 on a CPU
CASES = [(family, dtype) for family in MODELS for dtype in DTYPES]
SAMPLED = {"temperature": 0.8, "top_p": 0.9, "sampling_seed": 11}
PARAMS = [
    {"temperature": 0},
    {"temperature": 0, "frequency_penalty": 0.3, "repetition_penalty": 1.1},
    SAMPLED,
    {**SAMPLED, "top_k": 40, "presence_penalty": 0.5, "logit_bias": {"7": 2.0}},
]


LONG = text(1, max(PREFIXES))
PROMPTS = [LONG[:length] + text(length, 5) for length in PREFIXES]


def params(which, new=16, **more):
    return {**PARAMS[which % len(PARAMS)], "max_new_tokens": new, "ignore_eos": True, **more}


def numbers(result):
    """Everything that has to be bitwise equal."""
    meta = result["meta_info"]
    names = ("token_logprobs", "top_logprobs", "token_ids_logprobs")
    keys = [f"{side}_{name}" for side in ("input", "output") for name in names]
    return result["output_ids"], [meta[key] for key in keys]


def ask(engine, prompts, sampling, tail=6, **options):
    """Results as `numbers`, with logprobs of the outputs and of the last `tail` prompt tokens, or,
    where prompts are sampled more than once, from a token that they have all. Prompts may be cached
    up to there."""
    starts = [max(len(prompt) - tail, 0) for prompt in prompts]
    if "n" in sampling[0]:
        starts = min(starts)
    results = engine.generate(
        input_ids=prompts, sampling_params=sampling, return_logprob=True, top_logprobs_num=3,
        token_ids_logprob=[5, 300], logprob_start_len=starts, **options,
    )  # fmt: skip
    return [numbers(result) for result in results]


@contextlib.contextmanager
def company(engine, seed, longest=900):
    """Others come and go while the block runs: prompts that begin like PROMPTS and not, samples,
    aborts."""
    over, failures = threading.Event(), []

    def one_after_the_other(random_):
        number = 0
        while not over.is_set():
            number += 1
            head = LONG[: random_.choice([0, 40, 300, longest])]
            rid = f"company-{random_.random()}"
            late = threading.Timer(random_.random() * 0.2, engine.abort_request, (rid,))
            if random_.random() < 0.4:
                late.start()
            new, samples = random_.randint(1, 40), random_.choice([1, 3])
            sampling = params(random_.randrange(4), new, n=samples)
            prompt = head + text(random_.random(), random_.randint(1, 60))
            try:
                engine.generate(
                    input_ids=prompt, sampling_params=sampling, rid=rid,
                    return_logprob=random_.random() < 0.3,
                )  # fmt: skip
            except Exception as error:
                failures.append(error)
                return
            finally:
                late.cancel()

    threads = [
        threading.Thread(target=one_after_the_other, args=(random.Random(f"{seed}-{i}"),))
        for i in range(3)
    ]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        over.set()
        engine.abort_request("company")
        for thread in threads:
            thread.join()
    assert not failures


@pytest.fixture(
    scope="module",
    params=[case if "mistral" in case else long(case) for case in CASES],
    ids=["-".join(case) for case in CASES],
)
def case(request, tiny_models):
    family, dtype = request.param
    folder = tiny_models(family, max_position_embeddings=8192, **MODELS[family])
    return {"model_path": folder, "dtype": dtype, **OPTIONS}


@contextlib.contextmanager
def started(case, **options):
    with jaxserve.Engine(**{**case, **options}) as engine:
        yield engine
        info = engine.get_server_info()
        assert info["late_compiles"] == 0
        assert info["available_tokens"] == info["max_total_num_tokens"]


@pytest.fixture(scope="module")
def engine(case):
    with started(case, **ROOMY) as engine:
        yield engine


@pytest.fixture(scope="module")
def tight(case):
    """A pool that holds a part of what it is asked for, in pages that outputs outgrow."""
    with started(case, precompile=True, page_size=16, **TIGHT) as engine:
        yield engine


@pytest.fixture(scope="module")
def alone(engine):
    """PROMPTS one by one, nothing cached."""
    found = []
    for which, prompt in enumerate(PROMPTS):
        assert engine.flush_cache().success
        found += ask(engine, [prompt], [params(which)])
    return found


def check_batch(engine, alone, size, seed):
    random_ = random.Random(seed)
    which = [random_.randrange(len(PROMPTS)) for _ in range(size)]
    found = ask(engine, [PROMPTS[i] for i in which], [params(i) for i in which])
    for row, (i, got) in enumerate(zip(which, found, strict=True)):
        assert got == alone[i], f"row {row} of {size}, prompt {i}"


@pytest.mark.parametrize("size", [long(1), long(2), long(7), 32])
def test_any_batch(engine, alone, size):
    """Prefixes of 1, 511, 2048 and 4097 tokens mixed at random, beside others."""
    with company(engine, size):
        check_batch(engine, alone, size, seed=size)


@pytest.mark.long
@pytest.mark.parametrize("size", (3, 5, 8, 12, 16, 21, 27, 31))
def test_every_batch(engine, alone, size):
    """By itself, with what was cached before, or nothing."""
    if size % 3 == 0:
        assert engine.flush_cache().success
    check_batch(engine, alone, size, seed=100 + size)


def test_cached_or_not(engine, alone):
    """No, all, or a part of a prompt cached; logprobs of the whole prompt, for which all of it
    runs."""
    prompt, sampling = PROMPTS[2], [params(2)]
    cached = []
    for head in (0, 130, 700, len(prompt)):
        assert engine.flush_cache().success
        if head:
            engine.generate(input_ids=prompt[:head], sampling_params=params(0, 1))
        result = engine.generate(input_ids=prompt, sampling_params=params(2))
        cached.append(result["meta_info"]["cached_tokens"])
        assert result["output_ids"] == alone[2][0]
        assert ask(engine, [prompt], sampling) == [alone[2]]
    assert cached[0] == 0 and cached == sorted(set(cached)) and all(n % 128 == 0 for n in cached)
    [(ids, (inputs, *_, outputs, _, _))] = ask(engine, [prompt], sampling, tail=len(prompt))
    assert (ids, outputs) == (alone[2][0], alone[2][1][3])
    assert inputs[-5:] == alone[2][1][0][-5:]


def test_outputs_are_decoded_in_every_turn(engine):
    """What decode wrote is not what extend would write, so that an answer is not reused."""
    prompt = text(2, 200)
    for turn in range(3):
        result = engine.generate(input_ids=prompt, sampling_params=params(turn, 60))
        prompt = prompt + result["output_ids"] + text(turn, 20)
        [before] = ask(engine, [prompt], [params(turn)])
        assert engine.flush_cache().success
        assert ask(engine, [prompt], [params(turn)]) == [before]


def test_samples_of_a_prompt(engine):
    prompt = text(3, 300)
    sampling = [params(3, 12, n=4)]
    assert engine.flush_cache().success
    together = ask(engine, [prompt], sampling)
    assert len({tuple(ids) for ids, _ in together}) > 1
    assert ask(engine, [prompt], [params(3, 12)]) == together[:1]
    with company(engine, 1):
        for _ in range(3):
            assert ask(engine, [prompt], sampling) == together


@pytest.mark.long
def test_cached_on_the_host_or_not(case, engine):
    """Prompts come back from host memory, in whole units; a pool of 10."""
    prompts, sampling = [text(40 + i, 600) for i in range(3)], [params(1)] * 3
    assert engine.flush_cache().success
    expected = ask(engine, prompts, sampling)
    with started(case, enable_hierarchical_cache=True, hicache_ratio=4.0, **TIGHT) as tiered:
        for _ in range(3):
            assert [ask(tiered, [p], sampling[:1])[0] for p in prompts] == expected
        moved = tiered.get_server_info()["pages_moved_in"]
        assert ask(tiered, prompts, sampling) == expected
        unit, page = 128, tiered.get_server_info()["page_size"]
    assert moved > 0 and moved * page % unit == 0


def test_in_a_ring_or_not(case, engine, alone):
    """A pool with less pages than the prompt, and with more than the window and a chunk. A model
    that sees everything has no ring."""
    with started(case, **TIGHT) as small:
        if "mistral" not in case["model_path"]:
            with pytest.raises(InvalidRequestError, match=str(len(PROMPTS[3]))):
                ask(small, [PROMPTS[3]], [params(3)])
            return
        assert ask(small, [PROMPTS[3]], [params(3)]) == alone[3:]
        with company(small, 5, longest=300):
            assert ask(small, [PROMPTS[3]], [params(3)]) == alone[3:]
        assert ask(small, PROMPTS, [params(i) for i in range(4)]) == alone


def under_pressure(count=9):
    prompts = [text(10 + i, 20 + 25 * i) for i in range(count)]
    return prompts, [params(i, 80) for i in range(count)]


def test_retracted_or_not(tight):
    """Streams go on where they were; logprobs are there once."""
    prompts, sampling = under_pressure()
    apart = [ask(tight, [p], [s])[0] for p, s in zip(prompts, sampling, strict=True)]
    before = tight.get_server_info()["retractions"]
    assert ask(tight, prompts, sampling) == apart
    middle = tight.get_server_info()["retractions"]
    assert middle > before
    # without logprobs: outputs stay in the slot's array
    results = tight.generate(input_ids=prompts, sampling_params=sampling)
    assert [result["output_ids"] for result in results] == [ids for ids, _ in apart]
    chunks = [[] for _ in prompts]
    for chunk in tight.generate(input_ids=prompts, sampling_params=sampling, stream=True):
        chunks[chunk["index"]].append(chunk["output_ids"])
    for seen, (ids, _) in zip(chunks, apart, strict=True):
        assert all(late[: len(soon)] == soon for soon, late in itertools.pairwise(seen))
        assert seen[-1] == ids
    assert tight.get_server_info()["retractions"] > middle


def test_samples_under_pressure(tight):
    prompts = [text(30 + i, 150 + i) for i in range(3)]
    sampling = [params(i, 80, n=8) for i in range(3)]
    apart = ask(tight, prompts[:1], sampling[:1], tail=150)
    before = tight.get_server_info()["retractions"]
    assert ask(tight, prompts, sampling, tail=150)[:8] == apart
    assert tight.get_server_info()["retractions"] > before


def test_a_failure_of_the_device(engine, monkeypatch):
    prompts, sampling = under_pressure(6)
    expected = ask(engine, prompts, sampling)
    fail_at(monkeypatch, inside.runner(engine), "dispatch", 59, RuntimeError)
    assert ask(engine, prompts, sampling) == expected


def test_one_program_of_each_kind(tight):
    info = tight.get_server_info()
    assert info["programs"] == 5  # extend, decode, input logprobs, two that copy
    assert info["num_continuous_decode_steps"] == 1


@pytest.mark.long
def test_the_mode_is_what_does_it(tiny_models):
    """The control: without it, other programs run in other company."""
    folder = tiny_models("llama", max_position_embeddings=8192, **MODELS["llama"])
    prompts, sampling = [text(20 + i, 10 + i) for i in range(12)], [params(0, 40)] * 12
    mode = {"enable_deterministic_inference": False, "cuda_graph_bs": [1], "precompile": False}
    with jaxserve.Engine(model_path=folder, **{**OPTIONS, **mode, **TIGHT}) as engine:
        apart = [ask(engine, [p], [s])[0] for p, s in zip(prompts, sampling, strict=True)]
        assert ask(engine, prompts, sampling) != apart


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_sizes(platform):
    """One bucket of each kind; chunks are cut where tiles end, and a step has room for one."""
    facts = {"num_hidden_layers": 2, "max_position_embeddings": 8192}
    model = config_from_hf(make_config("llama", **facts))
    for options, (rows, tokens, alignment) in (
        ({}, (64, 1024, 128) if platform == "gpu" else (32, 256, 128)),
        ({"max_running_requests": 5, "chunked_prefill_size": 300}, (5, 384, 128)),
        ({"chunked_prefill_size": 8, "max_prefill_tokens": 8, "max_running_requests": 1},
         (1, 128, 128)),
        ({"page_size": 24, "chunked_prefill_size": -1, "max_running_requests": 9},
         (9, 16512, 384)),
        ({"context_length": 40, "max_running_requests": 1}, (1, 128, 128)),
    ):  # fmt: skip
        args = jaxserve.ServerArgs("m", enable_deterministic_inference=True, **options)
        config = EngineConfig.resolve(args, model, MACHINES[platform], 1 << 20)
        assert config.buckets == Buckets((rows,), (tokens,))
        program = config.program
        assert (program.max_rows, config.chunk_alignment) == (rows, alignment)
        assert (program.steps_per_dispatch, program.deterministic) == (1, True)
        assert config.max_prefill_tokens >= alignment and alignment % program.page_size == 0


@pytest.mark.parametrize(
    ("name", "value"),
    [("cuda_graph_bs", [4, 8]), ("cuda_graph_max_bs", 8), ("num_continuous_decode_steps", 4)],
)
def test_options_that_contradict_it(name, value):
    with pytest.raises(InvalidRequestError, match=rf"enable_deterministic_inference.*{name}"):
        jaxserve.ServerArgs("m", enable_deterministic_inference=True, **{name: value})
