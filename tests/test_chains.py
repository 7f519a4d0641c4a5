"""Chains of transforms in engines: what they see, remember and are told, against Python."""

from __future__ import annotations

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxserve
from jaxserve.transforms import Transform, chain
from tests import inside
from tests.marks import long
from tests.prompts import ids
from tests.settled import settled

pytestmark = pytest.mark.usefixtures("exact_products", "kept_programs")
OPTIONS = {
    "skip_tokenizer_init": True,
    "dtype": "float32",
    "context_length": 256,
    "max_running_requests": 4,
    "cuda_graph_bs": [1, 4],
    "max_total_tokens": 1024,
    "chunked_prefill_size": 64,
    "page_size": 8,
}
DETERMINISTIC = {
    "enable_deterministic_inference": True, "chunked_prefill_size": None, "cuda_graph_bs": None,
}  # fmt: skip
VOCAB = 512
KEPT, SEEN = 6, 5
"""Tokens that the oracle's history has, and steps that its state remembers."""


def oracle() -> Transform:
    """The next token follows from all that a transform may know."""

    def apply(logits, state, params, context):
        recent, there = context.history(KEPT)
        weights = jnp.arange(1, KEPT + 1)
        token = params["add"] + context.last_token + 3 * context.position + 5 * context.step
        token += 7 * context.prompt_len + jnp.sum(jnp.where(there, recent * weights, 0))
        token += jnp.sum(state["tokens"]) + 11 * state["count"] + params["list"].sum()
        token += context.tables["steps"][context.step % 8] + 13 * context.sample_index
        token = token % logits.shape[0]
        return jnp.where(jnp.arange(logits.shape[0]) == token, logits, -jnp.inf)

    def init(params):
        return {"tokens": jnp.full(SEEN, params["first"]), "count": params["first"]}

    def observe(state, params, token, logprob):
        tokens = jnp.roll(state["tokens"], 1).at[0].set(token)
        return {"tokens": tokens, "count": state["count"] + params["add"]}

    params = {"add": 1, "first": 2, "list": [0, 0, 0]}
    return Transform(apply, init, observe, params, {"list": (0, None)})


TABLE = np.arange(8) ** 2


def expected(prompt, count, add=1, first=2, numbers=(), sample=0):
    """What `oracle` makes, in plain Python."""
    text, made = list(prompt), []
    state, observed = [first] * SEEN, first
    for step in range(count):
        recent = ([0] * KEPT + text)[-KEPT:]
        token = add + text[-1] + 3 * len(text) + 5 * step + 7 * len(prompt)
        token += sum(weight * each for weight, each in enumerate(recent, 1))
        token += sum(state) + 11 * observed + sum(numbers) + int(TABLE[step % 8]) + 13 * sample
        token %= VOCAB
        state, observed = [token, *state[:-1]], observed + add
        text.append(token)
        made.append(token)
    return made


def text(seed, length):
    return np.random.default_rng(seed).integers(3, VOCAB, length).tolist()


def asks(tokens, name="oracle", **params):
    return {
        "max_new_tokens": tokens,
        "ignore_eos": True,
        "transform": name,
        "transform_params": params,
    }


def register(engine, **options):
    engine.register("oracle", oracle(), tables={"steps": TABLE}, **options)
    engine.register("same", Transform(lambda logits, state, params, context: logits), **options)


@pytest.fixture(scope="module")
def folder(tiny_models):
    return tiny_models("llama")


@pytest.fixture(scope="module")
def engine(folder):
    with settled(folder, **OPTIONS) as engine:
        register(engine)
        yield engine


def test_all_that_a_transform_knows(engine):
    """Rows of one batch with parameters of their own, beside plain ones."""
    prompts = [text(seed, length) for seed, length in enumerate((1, 8, 23, 41))]
    plain = {"max_new_tokens": 20, "temperature": 0, "ignore_eos": True}
    params = [
        asks(20),
        asks(17, add=4),
        plain,
        asks(20, first=7, list=[5, 6]),
    ]
    found = ids(engine.generate(input_ids=prompts, sampling_params=params))
    assert found[0] == expected(prompts[0], 20)
    assert found[1] == expected(prompts[1], 17, add=4)
    assert found[2] == ids([engine.generate(input_ids=prompts[2], sampling_params=plain)])[0]
    assert found[3] == expected(prompts[3], 20, first=7, numbers=(5, 6))


def test_prompts_in_chunks_cached_prefixes_and_samples(engine):
    long = text(9, 150)
    cold = engine.generate(input_ids=long, sampling_params=asks(9))
    assert cold["output_ids"] == expected(long, 9)
    warm = engine.generate(input_ids=long, sampling_params=asks(9))
    assert warm["meta_info"]["cached_tokens"] > 0
    assert warm["output_ids"] == cold["output_ids"]
    samples = engine.generate(input_ids=long, sampling_params={**asks(5), "n": 3})
    assert ids(samples) == [expected(long, 5, sample=sample) for sample in range(3)]


def test_more_requests_than_slots_in_streams(engine):
    check_streams(engine)


def check_streams(engine):
    prompts = [text(100 + seed, 5 + 9 * seed) for seed in range(9)]
    chunks = engine.generate(input_ids=prompts, sampling_params=asks(12), stream=True)
    found = {chunk["index"]: chunk["output_ids"] for chunk in chunks}
    assert found == {number: expected(prompt, 12) for number, prompt in enumerate(prompts)}


NEUTRAL = [
    {"temperature": 0},
    {"temperature": 1.3, "top_p": 0.9, "sampling_seed": 5},
    {"top_k": 20, "min_p": 0.02, "sampling_seed": 6, "n": 2},
    {"temperature": 0, "frequency_penalty": 0.7, "presence_penalty": 0.4},
    {"sampling_seed": 3, "repetition_penalty": 1.3, "logit_bias": {"9": 4.0, "17": -3}},
]


@pytest.mark.parametrize("params", NEUTRAL, ids=str)
def test_a_transform_that_changes_nothing(engine, params):
    check_neutral(engine, {"max_new_tokens": 12, **params})


def check_neutral(engine, params):
    """The sampler's own tokens and logprobs, whatever the parameters."""
    params = {"min_new_tokens": 9, **params}
    options = {"input_ids": text(50, 33), "return_logprob": True, "top_logprobs_num": 3}
    plain = engine.generate(sampling_params=params, **options)
    ours = engine.generate(sampling_params={**params, "transform": "same"}, **options)
    for one, other in zip(*(x if isinstance(x, list) else [x] for x in (plain, ours)), strict=True):
        assert one["output_ids"] == other["output_ids"]
        for name in ("input_token_logprobs", "output_token_logprobs", "output_top_logprobs"):
            flat = [np.array(jax.tree.leaves(x["meta_info"][name])) for x in (one, other)]
            np.testing.assert_allclose(*flat, rtol=0, atol=2e-5)


@pytest.mark.slow
def test_logprobs_before_and_after(engine):
    """Of rows with transforms, penalties and temperatures, those of the model and those of the
    draw; of some prompts of a call, as a stream, and for no tokens."""
    prompts, more = [text(seed, 20) for seed in range(3)], {"return_logprob": True}
    few = {"max_new_tokens": 6, "temperature": 0.7, "sampling_seed": 4, "ignore_eos": True}
    rows = [{**few, "transform": "half"}, {**few, "frequency_penalty": 1.0, "n": 2}, few]

    def halved(logits, state, params, context):
        return jnp.where(jnp.arange(VOCAB) % 2 == 0, logits, -jnp.inf)

    engine.register("half", Transform(halved))
    for prompt, params in zip(prompts, rows, strict=True):
        results = engine.generate(
            input_ids=prompt, sampling_params=params, return_raw_logprob=True, **more
        )
        for result in results if "n" in params else [results]:
            tokens, meta = result["output_ids"], result["meta_info"]
            scored = engine.generate(
                input_ids=prompt + tokens,
                sampling_params={"max_new_tokens": 0},
                logprob_start_len=len(prompt) - 1,
                **more,
            )
            expected = [each[0] for each in scored["meta_info"]["input_token_logprobs"][1:]]
            found = meta["output_token_raw_logprobs"]
            assert [token for _, token, _ in found] == tokens
            np.testing.assert_allclose([each[0] for each in found], expected, atol=1e-4)
            after = [each[0] for each in meta["output_token_logprobs"]]
            assert np.abs(np.array(after) - expected).min() > 1e-3
    flags = [True, None, False]
    stream = engine.generate(
        input_ids=prompts, sampling_params=rows[2], return_raw_logprob=flags, stream=True
    )
    last = {chunk["index"]: chunk["meta_info"] for chunk in stream}
    assert [len(last[i].get("output_token_raw_logprobs", ())) for i in range(3)] == [6, 0, 0]
    result = engine.generate(
        input_ids=prompts[0], sampling_params={"max_new_tokens": 0}, return_raw_logprob=True
    )
    assert len(result["meta_info"]["output_token_raw_logprobs"]) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"return_raw_logprob": "yes"}, "return_raw_logprob must be True or False, got 'yes'"),
        ({"return_raw_logprob": [True]}, "has 1 entries for 2 prompts"),
        (
            {"return_raw_logprob": [False, True], "custom_logit_processor": print},
            "in row 1 .*return_raw_logprob=True is not possible with a custom_logit_processor",
        ),
    ],
    ids=range(3),
)
def test_raw_logprobs_that_cannot_be(engine, options, message):
    with pytest.raises(jaxserve.InvalidRequestError, match=message):
        engine.generate(input_ids=[[3], [4]], **options)


def test_observe_is_told_logprobs(engine):
    check_logprobs(engine)


def check_logprobs(engine, **options):
    """Each token is one of two, which follow from the logprobs of those before."""

    def apply(logits, state, params, context):
        first = jnp.floor(state * 1000).astype(jnp.int32) % (VOCAB - 1)
        place = jnp.arange(VOCAB)
        return jnp.where((place == first) | (place == first + 1), logits, -jnp.inf)

    def observe(state, params, token, logprob):
        return state - logprob

    engine.register(
        "sums", Transform(apply, lambda params: params["start"], observe, {"start": 1.0}), **options
    )
    params = {"max_new_tokens": 14, "transform": "sums", "ignore_eos": True, "sampling_seed": 4}
    result = engine.generate(input_ids=text(1, 12), sampling_params=params, return_logprob=True)
    total, distinct = np.float32(1.0), set()
    for logprob, token, _ in result["meta_info"]["output_token_logprobs"]:
        first = int(np.floor(total * np.float32(1000))) % (VOCAB - 1)
        assert token in (first, first + 1)
        distinct.add(token - first)
        total -= np.float32(logprob)
    assert distinct == {0, 1}


def test_coins_depend_on_the_request_alone(engine):
    """The same in any batch, and `jax.random`'s of seed, sample, position and tag."""

    def apply(logits, state, params, context):
        token = (context.uniform(3) * VOCAB).astype(jnp.int32)
        return jnp.where(jnp.arange(VOCAB) == token, logits, -jnp.inf)

    engine.register("coins", Transform(apply))
    prompt = text(2, 10)
    params = {**asks(6, "coins"), "sampling_seed": (1 << 32) - 7}
    alone = engine.generate(input_ids=prompt, sampling_params=params)["output_ids"]
    among = engine.generate(input_ids=[text(3, 30), prompt], sampling_params=params)
    assert among[1]["output_ids"] == alone

    def coin(position):
        key = jax.random.key(np.uint32(params["sampling_seed"]))
        for part in (0, position, 3):
            key = jax.random.fold_in(key, part)
        return int(jax.random.uniform(key) * VOCAB)

    assert alone == [coin(position) for position in range(10, 16)]


def test_registered_while_others_run(engine):
    """A name may be taken away, and given a new meaning; what runs keeps the old one."""

    def shifted(by):
        def apply(logits, state, params, context):
            token = (context.last_token + by) % VOCAB
            return jnp.where(jnp.arange(VOCAB) == token, logits, -jnp.inf)

        return Transform(apply)

    engine.register("shift", shifted(1))
    prompt, started = text(4, 6), threading.Event()
    found = []

    def run():
        for chunk in engine.generate(
            input_ids=prompt, sampling_params=asks(200, "shift"), stream=True
        ):
            found[:] = chunk["output_ids"]
            started.set()

    thread = threading.Thread(target=run)
    thread.start()
    assert started.wait(60)
    engine.unregister("shift")
    for wrong in ("shift", "oracel"):
        with pytest.raises(jaxserve.InvalidRequestError, match=f"name='{wrong}' is not registered"):
            engine.unregister(wrong)
    with pytest.raises(jaxserve.InvalidRequestError, match="transform='shift' is not registered"):
        engine.generate(input_ids=prompt, sampling_params=asks(5, "shift"))
    engine.register("shift", shifted(2))
    new = engine.generate(input_ids=prompt, sampling_params=asks(5, "shift"))
    thread.join(60)
    assert found == [(prompt[-1] + number) % VOCAB for number in range(1, 201)]
    assert new["output_ids"] == [(prompt[-1] + 2 * number) % VOCAB for number in range(1, 6)]


@pytest.mark.parametrize(
    ("options", "retracts"),
    [
        ({"max_total_tokens": 160, "disable_overlap_schedule": True}, True),
        ({"max_total_tokens": 160, "num_continuous_decode_steps": 4}, True),
        long(DETERMINISTIC, False),
    ],
    ids=str,
)
def test_retraction(folder, options, retracts):
    """State and history are made anew from the tokens."""
    prompts = [text(200 + seed, 20) for seed in range(4)]
    with jaxserve.Engine(folder, **{**OPTIONS, **options}) as engine:
        register(engine)
        results = engine.generate(input_ids=prompts, sampling_params=asks(60))
    assert ids(results) == [expected(prompt, 60) for prompt in prompts]
    assert retracts == any(result["meta_info"]["num_retractions"] for result in results)


def test_a_failed_step_loses_nothing(folder):
    with jaxserve.Engine(folder, **OPTIONS) as engine:
        register(engine)
        runner, prompt, steps = inside.runner(engine), text(7, 30), iter(range(1000))
        queue = runner._queue

        def fails_once(key, executable, given):
            if key[0] == "forward" and next(steps) == 5:
                raise RuntimeError("injected")
            return queue(key, executable, given)

        runner._queue = fails_once
        result = engine.generate(input_ids=prompt, sampling_params=asks(20))
        assert result["output_ids"] == expected(prompt, 20)
        assert next(steps) > 15


def test_chains_compose(engine):
    """`chain` shows each what those before it left; parameters of both are the request's."""

    def keep(name):
        def apply(logits, state, params, context):
            best = jnp.sort(logits)[-params[name]]
            return jnp.where(logits >= best, logits, -jnp.inf)

        return Transform(apply, params={name: 3})

    def add(logits, state, params, context):
        return logits + jnp.where(logits > -jnp.inf, -2 * logits, 0.0)

    engine.register("both", chain(keep("most"), Transform(add)))
    prompt, greedy = text(12, 10), {"max_new_tokens": 1, "temperature": 0}
    plain = engine.generate(
        input_ids=prompt, sampling_params=greedy, return_logprob=True, top_logprobs_num=4
    )
    ((*best, _),) = plain["meta_info"]["output_top_logprobs"]
    for most in (1, 2, 3):
        params = {**greedy, "transform": "both", "transform_params": {"most": most}}
        found = engine.generate(input_ids=prompt, sampling_params=params)
        assert found["output_ids"] == [best[most - 1][1]]


WRONG = [
    ({"transform": "oracel"}, "'oracel' is not registered.*did you mean 'oracle'"),
    ({"transform": 3}, "transform must be a string, got 3"),
    ({"transform_params": {"add": 1}}, "needs transform=..."),
    ({"transform": "oracle", "transform_params": [1]}, "transform_params must be a dict"),
    ({"transform": "oracle", "transform_params": {"ad": 1}}, "did you mean 'add'"),
    ({"transform": "oracle", "transform_params": {"add": 1.5}}, r"\['add'\] must be an integer"),
    ({"transform": "oracle", "transform_params": {"list": 3}}, r"\['list'\] must be a list of at"),
    ({"transform": "oracle", "transform_params": {"list": [1] * 4}}, "at most 3"),
    ({"transform": "oracle", "transform_params": {"list": [1, -9]}}, r"\[1\] must be in .*got -9"),
]


@pytest.mark.parametrize(("params", "message"), WRONG, ids=str)
def test_a_request_that_is_wrong(engine, params, message):
    with pytest.raises(jaxserve.InvalidRequestError, match=message):
        engine.generate(input_ids=[3, 4], sampling_params=params)


def fails(logits, state, params, context):
    raise KeyError("no such thing")


UNUSABLE = [
    (3, {}, "transform must be a jaxserve.transforms.Transform, got 3"),
    (Transform(fails), {}, "apply of the transform 'bad' cannot be traced: KeyError"),
    (Transform(lambda x, s, p, c: x[:5]), {}, r"returns logits as float32\[5\], expected"),
    (Transform(lambda x, s, p, c: x.astype(int)), {}, r"returns logits as int32"),
    (
        Transform(lambda x, s, p, c: x, lambda p: 0, lambda s, p, t, lp: 1.0),
        {},
        "observe of the transform 'bad' returns the state as float32",
    ),
    (Transform(lambda x, s, p, c: x, lambda p: jnp.zeros(20_000)), {}, "80000 bytes a request"),
    (Transform(lambda x, s, p, c: x, lambda p: jnp.zeros(0)), {}, "an array without elements"),
    (Transform(lambda x, s, p, c: x + np.arange(40_000.0)[:VOCAB].sum()), {}, None),
    (Transform(lambda x, s, p, c: x), {"params": {"a": "x"}}, r"params\['a'\] must be a number"),
    (Transform(lambda x, s, p, c: x), {"params": {"a": [0] * 5000}}, "5000 numbers; at most 4096"),
    (Transform(lambda x, s, p, c: x), {"tables": {"a": ["x"]}}, "must be an array of numbers"),
    (Transform(lambda x, s, p, c: x), {"tables": {"a": []}}, "must be an array of numbers"),
    (Transform(lambda x, s, p, c: x), {"tables": 3}, "tables must be a dict, got 3"),
]
CLOSED = jnp.asarray(np.random.default_rng(0).normal(size=40_000), jnp.float32)


@pytest.mark.parametrize(("transform", "options", "message"), UNUSABLE, ids=range(len(UNUSABLE)))
def test_what_cannot_be_registered(engine, transform, options, message):
    if message is None:
        transform, message = Transform(lambda x, s, p, c: x + CLOSED[x.argmax()]), "closes over"
    with pytest.raises(jaxserve.InvalidRequestError, match=message):
        engine.register("bad", transform, **options)
    with pytest.raises(jaxserve.InvalidRequestError, match="not registered"):
        engine.generate(input_ids=[3], sampling_params={"transform": "bad"})
