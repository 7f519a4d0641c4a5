"""Hidden states, those of inner layers and logits, against Hugging Face in float32: whatever is
cached, cut into chunks, retracted, streamed or asked for beside them; and what they cost others."""

from __future__ import annotations

import threading

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import jaxserve
from jaxserve.errors import InvalidRequestError
from jaxserve.output.extras import News, View
from jaxserve.output.picked import Picked
from jaxserve.output.states import HiddenStates, StateSpec, float32
from jaxserve.step.picking import SIZES, cover
from jaxserve.transforms import Transform
from tests import inside
from tests.checkpoints import VOCAB
from tests.marks import long_but
from tests.oracles.huggingface import Reference
from tests.prompts import GREEDY, text

pytestmark = pytest.mark.usefixtures("exact_products", "kept_programs")
D, L, ROWS = 64, 2, 16
OPTIONS = {
    "skip_tokenizer_init": True,
    "context_length": 256,
    "max_running_requests": ROWS,
    "chunked_prefill_size": 64,
    "cuda_graph_bs": [ROWS],
    "max_total_tokens": 1024,
    "page_size": 16,
    "dtype": "float32",
    "precompile": False,
    "num_continuous_decode_steps": 3,
    "random_seed": 0,
}
STATES = {
    "enable_return_hidden_states": True,
    "hidden_state_layers": [0, 1, -1],
    "enable_return_logits": True,
}
SAMPLED = {"temperature": 0.8, "max_new_tokens": 7, "ignore_eos": True}
PROMPTS = [text(seed, length) for seed, length in enumerate((5, 90, 33, 64))]
"""The second is run in chunks."""
TOLERANCE = 1e-4
"""Of a position's norm."""


@pytest.fixture(scope="module")
def model(tiny_models):
    return tiny_models("llama")


@pytest.fixture(scope="module")
def reference(model):
    return Reference(model)


@pytest.fixture(scope="module")
def engine(model):
    with jaxserve.Engine(model_path=model, stream_output=True, **OPTIONS, **STATES) as engine:
        yield engine
        assert engine.get_server_info()["late_compiles"] == 0


class Backwards(jaxserve.CustomLogitProcessor):
    def __call__(self, logits, custom_param_list=None):
        return -logits


def close(found, expected):
    assert found.dtype == np.float32 and found.shape == expected.shape
    errors = np.linalg.norm(found - expected, axis=-1)
    assert (errors <= TOLERANCE * np.linalg.norm(expected, axis=-1)).all(), errors.max()


def whole(entries, prompt):
    """The rows of all positions, of a list as results have it."""
    assert entries[0].shape[0] == len(prompt)
    assert all(entry.shape == entries[0].shape[1:] for entry in entries[1:])
    return np.concatenate([entries[0], *(entry[None] for entry in entries[1:])])


def check(reference, prompt, result, hidden=True, logits=True):
    """Every number that was asked for. hidden, logits: as the arguments of `generate`."""
    meta, drawn = result["meta_info"], len(result["output_ids"])
    ids = prompt + result["output_ids"][:-1]
    expected = reference.hidden_states(ids)
    found = {L: meta.get("hidden_states")} | {
        index: each for index, each in meta.get("layer_hidden_states", {}).items() if index < L
    }
    if not hidden:
        assert found == {L: None} and "hidden_states" not in meta
    for index, entries in found.items():
        if hidden == "last":
            close(entries, expected[index][-1])
        elif hidden:
            assert len(entries) == max(drawn, 1)
            close(whole(entries, prompt), expected[index])
    if hidden:
        assert sorted(meta["layer_hidden_states"]) == [0, 1, L]
        np.testing.assert_array_equal(
            np.concatenate([np.atleast_2d(x) for x in meta["layer_hidden_states"][L]]),
            np.concatenate([np.atleast_2d(x) for x in meta["hidden_states"]]),
        )
    rows = reference.logits(ids).numpy()
    if logits == "last":
        close(meta["logits"], rows[-1])
    elif logits:
        close(np.array(meta["logits"]), rows[-max(drawn, 1) :])
    else:
        assert "logits" not in meta


@pytest.mark.parametrize("family", long_but(["llama", "cohere2", "gemma3", "olmo2"], "llama"))
def test_every_layer_equals_hugging_face_cold_and_with_a_warm_cache(family, tiny_models):
    folder, layers = tiny_models(family, num_hidden_layers=3), [0, 1, 2, 3]
    reference = Reference(folder)
    options = {**OPTIONS, **STATES, "hidden_state_layers": layers}
    asked = {"input_ids": PROMPTS, "sampling_params": SAMPLED, "return_hidden_states": True}
    with jaxserve.Engine(model_path=folder, **options) as engine:
        for warm in (False, True):
            if warm:
                engine.generate(input_ids=PROMPTS, sampling_params=SAMPLED)
            for prompt, result in zip(PROMPTS, engine.generate(**asked), strict=True):
                meta = result["meta_info"]
                assert meta["cached_tokens"] == 0  # all of the prompt runs
                expected = reference.hidden_states(prompt + result["output_ids"][:-1])
                close(whole(meta["hidden_states"], prompt), expected[-1])
                assert list(meta["layer_hidden_states"]) == layers
                for index, entries in meta["layer_hidden_states"].items():
                    assert len(entries) == len(result["output_ids"]) == 7
                    close(whole(entries, prompt), expected[index])


MIXED = {
    "return_hidden_states": [True, False, "last", True],
    "return_logits": [False, "last", True, "last"],
}


def test_everybody_gets_what_they_asked_for(engine, reference):
    for warm in (False, True):
        results = engine.generate(input_ids=PROMPTS, sampling_params=SAMPLED, **MIXED)
        for prompt, result, *asked in zip(PROMPTS, results, *MIXED.values(), strict=True):
            check(reference, prompt, result, *asked)
            cached = result["meta_info"]["cached_tokens"] > 0
            assert cached == (warm and asked[0] is not True)


def test_rows_that_are_drawn_apart(engine, reference):
    """A chain, a logit processor and plain rows in one batch; logits are the model's own."""
    engine.register("shift", Transform(lambda x, s, p, c: jnp.roll(x, 1)))
    params = [
        {**SAMPLED, "transform": "shift"},
        SAMPLED,
        SAMPLED,
        {**SAMPLED, "transform": "shift"},
    ]
    processors = [None, Backwards, None, None]
    asked = {"return_hidden_states": [True, "last", True, "last"]}
    asked["return_logits"] = [True, True, "last", False]
    results = engine.generate(
        input_ids=PROMPTS, sampling_params=params, custom_logit_processor=processors, **asked
    )
    for prompt, result, *values in zip(PROMPTS, results, *asked.values(), strict=True):
        check(reference, prompt, result, *values)


def test_prompts_alone(engine, reference):
    """The last position is that from which the first token would be drawn."""
    params = {**SAMPLED, "max_new_tokens": 0}
    for value in (True, "last"):
        results = engine.generate(
            input_ids=PROMPTS,
            sampling_params=params,
            return_hidden_states=value,
            return_logits=value,
        )
        for prompt, result in zip(PROMPTS, results, strict=True):
            assert result["output_ids"] == []
            expected, logits = reference.hidden_states(prompt)[-1], reference.logits(prompt)
            meta = result["meta_info"]
            hidden, drawn = meta["hidden_states"], meta["logits"]
            if value is True:
                [hidden], [drawn] = hidden, drawn
            close(hidden, expected if value is True else expected[-1])
            close(drawn, logits[-1].numpy())


def test_samples_have_arrays_of_their_own(engine, reference):
    params = {**SAMPLED, "n": 3}
    results = engine.generate(
        input_ids=PROMPTS[:2], sampling_params=params, return_hidden_states=True, return_logits=True
    )
    assert len({tuple(result["output_ids"]) for result in results}) > 2
    for number, result in enumerate(results):
        check(reference, PROMPTS[number // 3], result)
    first, second = (result["meta_info"]["hidden_states"] for result in results[:2])
    np.testing.assert_array_equal(first[0], second[0])
    first[0][:] = 0
    assert second[0].any()


def streamed(engine, prompt, **asked):
    """Chunks of 60 tokens, each with what is new."""
    params = {**SAMPLED, "max_new_tokens": 60}
    return list(engine.generate(input_ids=prompt, sampling_params=params, stream=True, **asked))


def test_chunks_of_a_stream_have_what_is_new(engine, reference):
    for prompt in PROMPTS[:2]:
        hidden, logits, ids = [], [], []
        chunks = streamed(engine, prompt, return_hidden_states=True, return_logits=True)
        assert len(chunks) > 1
        for chunk in chunks:
            meta = chunk["meta_info"]
            assert len(meta["hidden_states"]) == len(chunk["output_ids"]) == len(meta["logits"])
            hidden += meta["hidden_states"]
            logits += meta["logits"]
            ids += chunk["output_ids"]
        assert len(ids) == 60
        close(whole(hidden, prompt), reference.hidden_states(prompt + ids[:-1])[-1])
        close(np.array(logits), reference.logits(prompt + ids[:-1]).numpy()[-60:])


def test_the_last_chunk_of_a_stream_has_the_last_position(engine, reference):
    *others, end = streamed(engine, PROMPTS[1], return_hidden_states="last", return_logits="last")
    assert others
    for chunk in others:
        meta = chunk["meta_info"]
        assert meta["hidden_states"] is None and meta["logits"] is None
        assert set(meta["layer_hidden_states"].values()) == {None}
    ids = [token for chunk in (*others, end) for token in chunk["output_ids"]]
    check(reference, PROMPTS[1], {**end, "output_ids": ids}, "last", "last")


def test_chunks_that_have_everything_so_far():
    """Where streams are not of deltas: new lists of the same arrays."""
    extra = StateSpec(HiddenStates, False, 2).extra(3)
    collected, prompt = extra.collect(), np.ones((3, 2), np.float32)
    shown = []
    for news in (News([], [prompt[:1], prompt[1:]]), News([prompt[:1]], None)):
        collected.add(news)
        shown.append(extra.as_meta(collected, 0, View([], [], None))["hidden_states"])
    assert [[entry.shape for entry in entries] for entries in shown] == [
        [(3, 2)],
        [(3, 2), (2,)],
    ]
    assert shown[0][0] is shown[1][0] and not np.shares_memory(shown[0][0], prompt)


def test_retracted_requests_miss_nothing(engine, reference):
    """Twelve of them need more pages than there are. Those that ask for everything hear of it every
    32 tokens."""
    prompts = [text(100 + number, 20 + 5 * number) for number in range(12)]
    params = {**SAMPLED, "max_new_tokens": 50}
    values = [(True, "last", False)[number % 3] for number in range(12)]
    results = engine.generate(
        input_ids=prompts, sampling_params=params, return_hidden_states=values, return_logits=values
    )
    retracted = [
        value
        for value, result in zip(values, results, strict=True)
        if result["meta_info"]["num_retractions"]
    ]
    assert True in retracted or "last" in retracted
    for prompt, result, value in zip(prompts, results, values, strict=True):
        check(reference, prompt, result, value, value)


def test_requests_that_end_with_a_stop_token(engine, reference):
    """Not known before: the row is read when the step has been read that drew it."""
    params = {"temperature": 0, "max_new_tokens": 20, "ignore_eos": True}
    free = engine.generate(input_ids=PROMPTS, sampling_params=params)
    stops = [result["output_ids"][5 + row] for row, result in enumerate(free)]
    results = engine.generate(
        input_ids=PROMPTS,
        sampling_params=[{**params, "stop_token_ids": [stop]} for stop in stops],
        return_hidden_states="last",
        return_logits="last",
    )
    for prompt, result in zip(PROMPTS, results, strict=True):
        assert result["meta_info"]["finish_reason"]["type"] == "stop"
        check(reference, prompt, result, "last", "last")


def test_an_aborted_request_has_what_had_come(engine, reference):
    params = {**SAMPLED, "max_new_tokens": 150}
    for value in (True, "last"):
        stream = engine.generate(
            input_ids=PROMPTS[0],
            sampling_params=params,
            stream=True,
            rid="gone",
            return_hidden_states=value,
        )
        chunks = [next(stream)]
        engine.abort_request("gone")
        chunks += stream
        assert chunks[-1]["meta_info"]["finish_reason"]["type"] == "abort"
        found = [chunk["meta_info"]["hidden_states"] for chunk in chunks]
        if value == "last":
            assert set(found) == {None}
            continue
        entries = [entry for each in found for entry in each]
        ids = [token for chunk in chunks for token in chunk["output_ids"]]
        assert 0 < len(entries) == len(ids) < 150
        close(whole(entries, PROMPTS[0]), reference.hidden_states(PROMPTS[0] + ids[:-1])[-1])


def test_steps_that_fail_are_made_up_for(engine, reference, monkeypatch):
    """Also where requests have ended and wait for their rows."""
    runner, calls = inside.runner(engine), []
    dispatch = runner.dispatch

    def failing(prepared):
        calls.append(prepared)
        if len(calls) == 3:
            raise RuntimeError("injected")
        return dispatch(prepared)

    monkeypatch.setattr(runner, "dispatch", failing)
    params = [{**SAMPLED, "max_new_tokens": new} for new in (1, 9, 1, 9)]
    results = engine.generate(
        input_ids=PROMPTS, sampling_params=params, return_hidden_states=["last", True] * 2
    )
    for prompt, result, value in zip(PROMPTS, results, ["last", True] * 2, strict=True):
        check(reference, prompt, result, value, logits=False)


def test_a_row_that_is_lost_costs_its_request(engine, monkeypatch):
    def lost(self):
        raise RuntimeError("the copy failed")

    with monkeypatch.context() as patch:
        patch.setattr(Picked, "on_host", lost)
        with pytest.raises(jaxserve.RequestFailedError, match="the copy failed"):
            engine.generate(
                input_ids=PROMPTS[0], sampling_params=SAMPLED, return_hidden_states="last"
            )
    assert engine.generate(input_ids=PROMPTS[0], sampling_params=SAMPLED)["output_ids"]


# -- what is copied --------------------------------------------------------------------------------


@pytest.fixture
def copied(engine, monkeypatch):
    """Bytes of states that steps and ends have sent to the host, by the kind of batch."""
    runner, found = inside.runner(engine), {"ExtendBatch": [], "DecodeBatch": [], "ends": []}
    picker, dispatch = runner._picker, runner.dispatch
    ends = picker.ends

    def counted(picked):
        return sum(piece.nbytes for each in picked for piece in each.pieces)

    def dispatching(prepared):
        result = dispatch(prepared)
        payloads = (*result.picked.values(), *result.prompt_payloads.values())
        found[type(prepared.batch).__name__].append(
            counted(each for each in payloads if isinstance(each, Picked))
        )
        return result

    def ending(*arguments):
        picked = ends(*arguments)
        found["ends"].append(counted(picked.values()))
        return picked

    monkeypatch.setattr(runner, "dispatch", dispatching)
    monkeypatch.setattr(picker, "ends", ending)
    return found


OF_POSITION = 4 * D * (1 + 3)
"""Bytes: the hidden state, and three layers'."""


def test_gathers_are_few_and_have_less_than_twice_the_rows():
    for rows in (1, 8, 9, 16, 100, 600, 8192):
        for count in range(1, rows + 1):
            sizes = cover(count, rows)
            smallest = min(SIZES[0], rows)
            assert set(sizes) <= {*SIZES, rows} and max(sizes) <= rows
            assert count <= sum(sizes) < 2 * count + smallest
            assert len(sizes) <= 20


def test_rows_are_found_in_the_pieces_that_have_them():
    """Of three steps with 40 rows, as gathered; and converted."""
    source = np.arange(3 * 40 * 5).reshape(3, 40, 5).astype(ml_dtypes.bfloat16)
    flat = source.reshape(-1, 5)
    rows = [*range(3, 20), 30, *range(45, 70), *range(80, 117)]
    pieces = tuple(flat[rows][start:stop] for start, stop in ((0, 8), (8, 72), (72, 80)))
    for picked in (Picked(pieces, rows, 40), Picked((source,), None, 40)):
        on_host = picked.on_host()
        for start, stop in ((3, 20), (30, 31), (45, 70), (80, 117), (50, 51)):
            step, first = divmod(start, 40)
            found = float32(on_host[step].blocks(first, stop - start))
            assert found.dtype == np.float32
            np.testing.assert_array_equal(found, flat[start:stop].astype(np.float32))


def test_nobody_asks_and_nothing_is_copied(engine, copied):
    engine.generate(input_ids=PROMPTS, sampling_params=SAMPLED)
    assert not sum(copied["ExtendBatch"] + copied["DecodeBatch"] + copied["ends"])


def test_the_last_position_is_copied_at_the_end_alone(engine, copied):
    engine.generate(
        input_ids=PROMPTS, sampling_params=SAMPLED, return_hidden_states=["last"] + [False] * 3
    )
    assert not sum(copied["ExtendBatch"] + copied["DecodeBatch"])
    assert copied["ends"] == [8 * OF_POSITION]  # the smallest gather, of 16 rows


def test_rows_that_did_not_ask_are_not_copied(engine, copied):
    """Of 16 rows one: the smallest gather. Of the prompts less than twice what they have."""
    prompts = [text(number, 40) for number in range(ROWS)]
    engine.generate(
        input_ids=prompts, sampling_params=SAMPLED, return_hidden_states=[True] + [False] * 15
    )
    steps = len(copied["DecodeBatch"])
    assert 0 < steps < 7
    assert max(copied["DecodeBatch"]) <= 3 * 8 * OF_POSITION
    assert 40 * OF_POSITION <= sum(copied["ExtendBatch"]) < 2 * 40 * OF_POSITION + 8 * OF_POSITION


# -- programs --------------------------------------------------------------------------------------

COMPILED = {**OPTIONS, "precompile": True, "wait_until_compiled": True, "max_running_requests": 12}
COMPILED |= {"cuda_graph_bs": [12], "context_length": 128}


@pytest.mark.long
def test_everything_is_compiled_beforehand(model):
    with jaxserve.Engine(model_path=model, **COMPILED, **STATES) as engine:
        before = engine.get_server_info()["programs"]
        for seed in range(4):
            count = (1, 4, 12, 14)[seed]
            values = [(True, False, "last")[(seed + row) % 3] for row in range(count)]
            engine.generate(
                input_ids=[text(row, 3 + 7 * row) for row in range(count)],
                sampling_params=[{**SAMPLED, "max_new_tokens": row % 5} for row in range(count)],
                return_hidden_states=values,
                return_logits=values[::-1],
                return_logprob=bool(seed % 2),
            )
        after = engine.get_server_info()
    assert after["late_compiles"] == 0 and after["programs"] == before


def test_an_engine_without_them_has_the_usual_programs(model):
    def kinds(**options):
        with jaxserve.Engine(model_path=model, **OPTIONS, **options) as engine:
            catalogue = inside.runner(engine)._catalogue
            return {kind for kind, _ in catalogue.beforehand()}

    usual = kinds()
    assert usual == {
        "extend",
        "decode",
        "decode_many",
        "prompt_logprobs",
        "copy_pages",
        "install_sparse",
    }
    more = kinds(**STATES) - usual
    assert {"extend_hidden_0_1_2_logits", "decode_hidden_0_1_2_logits"} < more
    last = kinds(return_hidden_states_mode="last") - usual
    assert last == {
        "extend_hidden",
        "decode_hidden",
        "decode_many_hidden",
        "pick_hidden_states_decode_8",
        "pick_hidden_states_decode_many_8",
    }


@pytest.mark.long
def test_neighbours_that_ask_are_bitwise_nothing_in_deterministic_mode(model):
    options = {**OPTIONS, **STATES, "enable_deterministic_inference": True}
    del options["cuda_graph_bs"], options["num_continuous_decode_steps"]
    asked = {"return_logprob": True, "logprob_start_len": 0}

    def numbers(result):
        meta = result["meta_info"]
        return result["output_ids"], meta["input_token_logprobs"], meta["output_token_logprobs"]

    with jaxserve.Engine(model_path=model, **options) as engine:
        params = [{**SAMPLED, "sampling_seed": 3}, SAMPLED]
        alone = engine.generate(input_ids=PROMPTS[:1], sampling_params=params[:1], **asked)
        for _ in range(2):
            both = engine.generate(
                input_ids=PROMPTS[:2],
                sampling_params=params,
                return_hidden_states=[False, True],
                **asked,
            )
            assert numbers(both[0]) == numbers(alone[0])
        first, second = (
            engine.generate(
                input_ids=PROMPTS[:count], sampling_params=params[:count], return_hidden_states=True
            )[0]["meta_info"]["hidden_states"]
            for count in (1, 2)
        )
        for one, other in zip(first, second, strict=True):
            np.testing.assert_array_equal(one, other)


# -- mistakes --------------------------------------------------------------------------------------


def test_what_the_engine_was_not_started_for(model):
    options = {**OPTIONS, "return_hidden_states_mode": "last"}
    with jaxserve.Engine(model_path=model, **options) as engine:
        with pytest.raises(InvalidRequestError, match=r"return_logits='last' needs Engine\(enable"):
            engine.generate(input_ids=[5], return_logits="last")
        with pytest.raises(InvalidRequestError, match=r"True needs .*mode='last' allows 'last'"):
            engine.generate(input_ids=[5], return_hidden_states=True)
        last = engine.generate(
            input_ids=[5], sampling_params=SAMPLED, return_hidden_states=["last"]
        )["meta_info"]["hidden_states"]
        assert last.shape == (D,)


@pytest.mark.parametrize("value", ["first", 2, [True], [True, "none"], {"a": 1}])
def test_bad_values(engine, value):
    for name in ("return_hidden_states", "return_logits"):
        with pytest.raises(InvalidRequestError, match=name):
            engine.generate(input_ids=PROMPTS[:2], sampling_params=SAMPLED, **{name: value})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_state_layers": [0]}, r"hidden_state_layers=\[0\] needs enable_return_hidden"),
        ({"enable_return_hidden_states": True, "hidden_state_layers": [3]}, "has 3; .* 2 layers"),
        ({"enable_return_hidden_states": True, "hidden_state_layers": [-4]}, "has -4; .* -3 to -1"),
        ({"enable_return_hidden_states": True, "hidden_state_layers": ["a"]}, "hidden_state_layer"),
        ({"enable_return_hidden_states": True, "return_hidden_states_mode": "last"}, "only one"),
        ({"return_hidden_states_mode": "all"}, "return_hidden_states_mode must be one of"),
    ],
)
def test_bad_options(model, options, message):
    with pytest.raises(InvalidRequestError, match=message):
        jaxserve.Engine(model_path=model, **OPTIONS, **options)


def test_the_bound_is_of_a_call_and_names_itself(model):
    prompt, new = PROMPTS[1], 7
    of_one = 4 * D * (len(prompt) + new - 1) + 4 * VOCAB * new
    options = {**OPTIONS, "enable_return_hidden_states": True, "enable_return_logits": True}
    asked = {"sampling_params": SAMPLED, "return_hidden_states": True, "return_logits": True}
    with jaxserve.Engine(model_path=model, max_state_bytes=2 * of_one, **options) as engine:
        results = engine.generate(input_ids=[prompt] * 2, **asked)
        for result in results:
            meta = result["meta_info"]
            assert sum(x.nbytes for x in (*meta["hidden_states"], *meta["logits"])) == of_one
        with pytest.raises(InvalidRequestError) as error:
            engine.generate(input_ids=[prompt] * 3, **asked)
        for part in (f"{3 * of_one:,}", f"{2 * of_one:,}", "max_state_bytes", "3 requests"):
            assert part in str(error.value)
        with pytest.raises(InvalidRequestError, match="max_state_bytes"):
            engine.generate(input_ids=prompt, **{**asked, "sampling_params": {**SAMPLED, "n": 3}})
        last = {**asked, "return_hidden_states": "last", "return_logits": "last"}
        assert len(engine.generate(input_ids=[prompt] * 20, **last)) == 20


def test_calls_from_threads(engine, reference):
    """Requests come and go while others end."""
    failures, values = [], (True, "last", False)

    def call(number):
        try:
            prompt, value = text(number, 10 + 13 * (number % 5)), values[number % 3]
            result = engine.generate(
                input_ids=prompt,
                sampling_params={**GREEDY, "max_new_tokens": 1 + number % 6},
                return_hidden_states=value,
                return_logits=value,
            )
            check(reference, prompt, result, value, value)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=call, args=(number,)) for number in range(18)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures[0]
