"""Shapes, keys and texts of results, as facts of SGLang's contract."""

from __future__ import annotations

import contextlib
import gc
import itertools
import json
import time

import pytest

from jaxserve.errors import EngineDeadError, EngineShutdownError, NotSupportedError
from jaxserve.mailbox import Mailbox
from jaxserve.output.result import Output, ResultOptions
from jaxserve.request import Request, Update
from jaxserve.sampling_params import SamplingParams
from tests.api_fakes import ABORTED, Fakes, byte_level_tokenizer, loop_of, text_script

TOKENIZER = byte_level_tokenizer()
EOS = TOKENIZER.eos_token_id
META = {
    "id",
    "finish_reason",
    "prompt_tokens",
    "completion_tokens",
    "cached_tokens",
    "cached_tokens_details",
    "reasoning_tokens",
    "weight_version",
    "num_retractions",
    "total_retractions",
    "response_sent_to_client_ts",
}
LOGPROBS = {"input_token_logprobs", "output_token_logprobs", "output_token_logprobs_length"}
STORY = "Hello, my name is Jax! ha ha ha END of the story"


@pytest.fixture
def fakes(monkeypatch):
    fakes = Fakes(TOKENIZER, monkeypatch)
    yield fakes
    fakes.close()


@pytest.fixture
def story(fakes):
    """An engine that tells STORY, then the end of text."""
    return fakes.engine(text_script(TOKENIZER, STORY))


def test_one_prompt_gives_one_dict(story):
    result = story.generate("Tell me", rid="r")
    assert list(result) == ["text", "output_ids", "meta_info"]
    assert result["text"] == STORY
    assert result["output_ids"] == [*TOKENIZER(STORY)["input_ids"], EOS]
    meta = result["meta_info"]
    assert set(meta) == META | {"e2e_latency"}
    assert meta["id"] == "r" and meta["weight_version"] == "default"
    assert meta["finish_reason"] == {"type": "stop", "matched": EOS}
    assert meta["prompt_tokens"] == len(TOKENIZER("Tell me")["input_ids"])
    assert meta["completion_tokens"] == len(result["output_ids"])
    assert (meta["cached_tokens"], meta["cached_tokens_details"]) == (0, None)
    assert 0 <= meta["e2e_latency"] < 10 and meta["response_sent_to_client_ts"] <= time.time()
    json.dumps(result)


def test_lists_and_samples(fakes):
    engine = fakes.engine()
    ids = [[1, 2], [3], [4, 5, 6]]
    params = {"max_new_tokens": 3, "ignore_eos": True}
    results = engine.generate(input_ids=ids, sampling_params=params)
    assert [r["output_ids"] for r in results] == [[1, 2, 1], [3, 3, 3], [4, 5, 6]]
    assert isinstance(engine.generate(input_ids=[[1]], sampling_params=params), list)
    assert isinstance(engine.generate(input_ids=[1], sampling_params=params), dict)
    samples = engine.generate(input_ids=[[7], [8]], sampling_params={**params, "n": 2})
    assert [r["output_ids"][0] for r in samples] == [7, 7, 8, 8]
    assert len(engine.generate(input_ids=[7], sampling_params={**params, "n": 4})) == 4
    assert all("index" not in result for result in samples)


def test_without_a_tokenizer_there_is_no_text(fakes):
    engine = fakes.engine(skip_tokenizer_init=True)
    assert engine.tokenizer is None and engine.tokenizer_manager.tokenizer is None
    result = engine.generate(input_ids=[1, 2], sampling_params={"max_new_tokens": 2})
    assert list(result) == ["output_ids", "meta_info"]


def test_prompt_token_ids(story):
    result = story.generate("Tell me", return_prompt_token_ids=True)
    assert result["prompt_token_ids"] == TOKENIZER("Tell me")["input_ids"]


@pytest.mark.parametrize(
    ("params", "text", "reason"),
    [
        ({"max_new_tokens": 1}, TOKENIZER.decode(TOKENIZER(STORY)["input_ids"][:1]), "length"),
        ({"stop": "END"}, STORY[: STORY.index("END")], "END"),
        ({"stop": "END", "no_stop_trim": True}, STORY[: STORY.index("END") + 3], "END"),
        ({"stop": ["nothing", " ha ha"]}, STORY[: STORY.index(" ha ha")], " ha ha"),
        ({"stop": "ame"}, "Hello, my n", "ame"),
        ({"stop_regex": "E[A-Z]D"}, STORY[: STORY.index("END")], "E[A-Z]D"),
        (
            {"stop_regex": "E[A-Z]D", "no_stop_trim": True},
            STORY[: STORY.index("END") + 3],
            "E[A-Z]D",
        ),
        ({"skip_special_tokens": False}, STORY, EOS),
        ({"no_stop_trim": True}, STORY, EOS),
        ({"no_stop_trim": True, "skip_special_tokens": False}, STORY + "<|eos|>", EOS),
    ],
)
def test_stops_and_trimming(story, params, text, reason):
    result = story.generate("Tell me", params)
    assert result["text"] == text
    expected = {"type": "stop", "matched": reason}
    if reason == "length":
        expected = {"type": "length", "length": 1}
    assert result["meta_info"]["finish_reason"] == expected
    assert TOKENIZER.decode(result["output_ids"]).startswith(text)


def test_the_callers_stop_tokens(story):
    ids = TOKENIZER(STORY)["input_ids"]
    for ignore in (False, True):
        result = story.generate("x", {"stop_token_ids": [ids[4]], "ignore_eos": ignore})
        assert result["output_ids"] == ids[:5] and result["text"] == TOKENIZER.decode(ids[:4])
        assert result["meta_info"]["finish_reason"] == {"type": "stop", "matched": ids[4]}


def test_a_stop_string_wins_over_the_end_of_text(fakes):
    engine = fakes.engine(lambda request, step: EOS)
    result = engine.generate("x", {"stop": "<|eos|>", "skip_special_tokens": False})
    assert result["meta_info"]["finish_reason"] == {"type": "stop", "matched": "<|eos|>"}
    assert result["text"] == ""


def test_half_characters_at_the_end(fakes):
    ids = TOKENIZER("a𓂀")["input_ids"]
    engine = fakes.engine(lambda request, step: ids[step])
    assert engine.generate("x", {"max_new_tokens": len(ids)})["text"] == "a𓂀"
    assert engine.generate("x", {"max_new_tokens": 3})["text"] == "a\ufffd"


def test_output_logprobs(story):
    ids = TOKENIZER(STORY)["input_ids"][:3]
    result = story.generate("Tell me", {"max_new_tokens": 3}, return_logprob=True)
    meta = result["meta_info"]
    assert set(meta) == META | LOGPROBS | {"e2e_latency"}
    assert meta["output_token_logprobs"] == [(-float(token), token, None) for token in ids]
    assert (meta["input_token_logprobs"], meta["output_token_logprobs_length"]) == ([], 3)


def test_all_logprobs(story):
    meta = story.generate(
        input_ids=[5, 6, 7],
        sampling_params={"max_new_tokens": 2},
        return_logprob=True,
        logprob_start_len=1,
        top_logprobs_num=2,
        token_ids_logprob=[9],
        return_text_in_logprobs=True,
    )["meta_info"]
    text = {token: TOKENIZER.decode([token]) for token in range(10)}
    top = [(-0.5, 0, text[0]), (-1.5, 1, text[1])]
    assert meta["input_token_logprobs"] == [(None, 6, text[6]), (-7.0, 7, text[7])]
    assert meta["input_top_logprobs"] == [None, top]
    assert meta["input_token_ids_logprobs"] == [None, [(-3.0, 9, text[9])]]
    assert meta["output_top_logprobs"] == [top, top]
    assert meta["output_token_ids_logprobs"] == [[(-3.0, 9, text[9])]] * 2
    assert [len(row) for row in meta["output_token_logprobs"]] == [3, 3]


def test_logprobs_of_no_tokens(story):
    result = story.generate("x", {"max_new_tokens": 0}, return_logprob=True, top_logprobs_num=1)
    meta = result["meta_info"]
    assert (result["text"], result["output_ids"], meta["completion_tokens"]) == ("", [], 0)
    assert meta["finish_reason"] == {"type": "length", "length": 0}
    assert len(meta["output_token_logprobs"]) == meta["output_token_logprobs_length"] == 1
    assert meta["output_token_logprobs"][0][1] is not None
    assert meta["output_top_logprobs"] == [[(-0.5, 0, None)]]


def test_rows_of_a_batch_have_their_own_logprob_keys(story):
    first, second = story.generate(["a", "b"], {"max_new_tokens": 1}, return_logprob=[True, False])
    assert "output_token_logprobs" in first["meta_info"]
    assert "output_token_logprobs" not in second["meta_info"]


def test_metrics(fakes):
    engine = fakes.engine(enable_metrics=True, pause=0.002)
    meta = engine.generate("ab", {"max_new_tokens": 5})["meta_info"]
    assert meta["request_received_ts"] <= meta["prefill_finished_time"]
    assert meta["prefill_finished_time"] <= meta["request_finished_ts"] <= time.time()
    assert meta["decode_throughput"] > 0
    once = engine.generate("ab", {"max_new_tokens": 1})["meta_info"]
    assert once["decode_throughput"] is None


def test_chat(fakes):
    engine = fakes.engine()
    messages = [{"role": "user", "content": "hi"}]
    prompt = TOKENIZER.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = TOKENIZER(prompt)["input_ids"]
    params = {"max_new_tokens": 4, "ignore_eos": True}
    result = engine.chat(messages, params, return_prompt_token_ids=True)
    assert result["prompt_token_ids"] == ids and result["output_ids"] == ids[:4]
    both = engine.chat([messages, messages], params, rid=["a", "b"])
    assert [r["meta_info"]["id"] for r in both] == ["a", "b"]
    assert list(engine.chat(messages, params, stream=True))[-1]["output_ids"] == ids[:4]
    with pytest.raises(ValueError, match="messages"):
        engine.chat("hi")


def test_abort_returns_what_there_is(fakes):
    engine = fakes.engine(lambda request, step: 40, pause=0.001, context_length=2000)
    stream = engine.generate(["a", "b"], {"max_new_tokens": 500}, rid=["one", "two"], stream=True)
    next(stream)
    engine.abort_request("")
    engine.abort_request("unknown")
    assert len(loop_of(engine).live) == 2
    engine.abort_request("on")
    engine.tokenizer_manager.abort_request(abort_all=True)
    last = {chunk["index"]: chunk for chunk in stream}
    for chunk in last.values():
        assert chunk["meta_info"]["finish_reason"] == ABORTED
        assert chunk["meta_info"]["completion_tokens"] == len(chunk["output_ids"]) < 500
        assert chunk["text"] == TOKENIZER.decode(chunk["output_ids"])


def test_info_and_control(fakes):
    engine = fakes.engine(page_size=16, stream_output=True)
    info = engine.get_server_info()
    for key, value in {
        "model_path": "fake",
        "tokenizer_path": "fake",
        "served_model_name": "fake",
        "status": "ready",
        "max_total_num_tokens": 4096,
        "max_req_input_len": 511,
        "page_size": 16,
        "available_tokens": 4096,
        "late_compiles": 0,
        "startup_time": 0.5,
        "stream_output": True,
        "incremental_streaming_output": True,
        "log_level": "error",
        "disable_cuda_graph": False,
        "quantization": None,
        "tp_size": 1,
    }.items():
        assert info[key] == value, key
    (state,) = info["internal_states"]
    assert state["last_gen_throughput"] == 3.0
    assert {"weight", "kvcache", "graph", "token_capacity"} <= set(state["memory_usage"])
    assert state["effective_max_running_requests_per_dp"] == 8
    assert engine.get_model_info()["model_path"] == "fake"
    assert engine.get_model_info()["is_generation"] is True
    flushed = engine.flush_cache()
    assert flushed.success is True and flushed.message
    assert engine.get_all_child_pids() == []


def test_flushing_a_busy_engine_fails(fakes):
    engine = fakes.engine(pause=0.001)
    with contextlib.closing(engine.generate("ab", {"max_new_tokens": 400}, stream=True)) as stream:
        next(stream)
        assert engine.flush_cache().success is False


@pytest.mark.parametrize(
    ("method", "arguments"),
    [
        ("encode", ["x"]),
        ("rerank", [[["q", "d"]]]),
        ("score", []),
        ("open_session", [100]),
        ("close_session", ["s"]),
        ("start_expert_distribution_record", []),
        ("stop_expert_distribution_record", []),
        ("dump_expert_distribution_record", []),
        ("update_weights_from_disk", ["m"]),
        ("update_weights_from_tensor", [[("w", None)]]),
        ("update_weights_from_distributed", [["w"], ["bf16"], [[1]]]),
        ("update_weights_from_ipc", [{}]),
        ("init_weights_update_group", ["h", 1, 0, 1, "g"]),
        ("destroy_weights_update_group", ["g"]),
        ("get_weights_by_name", ["w"]),
        ("release_memory_occupation", []),
        ("resume_memory_occupation", []),
        ("load_lora_adapter", ["a", "p"]),
        ("load_lora_adapter_from_tensors", ["a", {}, {}]),
        ("unload_lora_adapter", ["a"]),
        ("pause_generation", []),
        ("continue_generation", []),
        ("freeze_gc", []),
        ("collective_rpc", ["m"]),
        ("save_remote_model", []),
        ("save_sharded_model", []),
    ],
)
def test_methods_that_do_not_exist_yet_say_so(story, method, arguments):
    with pytest.raises(NotSupportedError, match=f"Engine.{method} is not supported yet"):
        getattr(story, method)(*arguments)


def test_shutdown(fakes):
    engine = fakes.engine(pause=0.001)
    with engine as same:
        assert same is engine
        stream = engine.generate("ab", {"max_new_tokens": 400}, stream=True)
        next(stream)
    with pytest.raises(EngineShutdownError):
        list(stream)
    engine.shutdown()
    for call in (lambda: engine.generate("a"), engine.get_server_info):
        with pytest.raises(EngineShutdownError):
            call()


def test_a_dead_engine_fails_calls_with_the_cause(fakes):
    def script(request, step):
        if step == 3:
            raise ZeroDivisionError("boom")
        return 40

    engine = fakes.engine(script)
    for _ in range(2):
        with pytest.raises(EngineDeadError, match="boom") as caught:
            engine.generate(["a", "b"])
        assert isinstance(caught.value, RuntimeError)
        assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_a_dropped_engine_stops_its_thread(fakes):
    engine = fakes.engine()
    loop = loop_of(engine)
    fakes.engines.clear()
    del engine
    gc.collect()
    assert isinstance(loop.dead, EngineShutdownError)


def test_constructor_arguments(fakes):
    import jaxserve

    with pytest.raises(TypeError, match="model_path is required"):
        jaxserve.Engine()
    args = jaxserve.ServerArgs("m")
    with pytest.raises(TypeError, match="page_size"):
        jaxserve.Engine(server_args=args, page_size=16)
    with pytest.raises(ValueError, match="server_args"):
        jaxserve.Engine(server_args={"model_path": "m"})
    fakes.engine()
    engine = jaxserve.Engine(server_args=args)
    fakes.engines.append(engine)
    assert engine.server_args == args
    assert dir(jaxserve) and not hasattr(jaxserve, "Motor")


def test_progress(story, capsys):
    story.generate(["a", "b"], {"max_new_tokens": 1}, progress=True)
    assert "2/2" in capsys.readouterr().err
    story.generate(["a", "b"], {"max_new_tokens": 1})
    assert capsys.readouterr().err == ""


class Retracting(Request):
    """One that the engine thread retracts whenever somebody looks."""

    counts = itertools.count(1)

    @property
    def num_retractions(self):
        return next(self.counts)

    @num_retractions.setter
    def num_retractions(self, value):
        pass


def test_a_chunk_is_of_one_moment():
    """Both keys of a chunk say the same though the count grows while it is made."""
    request = Retracting(
        rid="r",
        index=0,
        prompt_ids=[1],
        params=SamplingParams(),
        max_new_tokens=4,
        stop_ids=frozenset(),
        masked_ids=(),
        seed=0,
        sample_index=0,
        mailbox=Mailbox(),
    )
    output = Output(request, ResultOptions())
    output.add(Update(request, (5,)))
    meta = output.chunk()["meta_info"]
    assert meta["num_retractions"] == meta["total_retractions"] > 0
