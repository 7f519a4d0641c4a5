"""Mistakes of users, through the public Engine: each is a clear exception at the call that names
what is wrong, nothing of the call runs, and the engine goes on working."""

from __future__ import annotations

import asyncio
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import jaxserve
from jaxserve.errors import (
    InvalidRequestError,
    ModelLoadError,
    NotSupportedError,
    UnknownOptionError,
)
from tests.checkpoints import VOCAB
from tests.gguf_files import write_model
from tests.processes import environment

pytestmark = pytest.mark.usefixtures("kept_programs")

CONTEXT = 64
OPTIONS = {
    "context_length": CONTEXT, "max_running_requests": 8, "chunked_prefill_size": 128,
    "cuda_graph_bs": [1, 8], "max_total_tokens": 1024,
}  # fmt: skip
PROMPT = "The capital of France is"
SHORT = {"temperature": 0, "max_new_tokens": 4, "ignore_eos": True}
IDS = [5, 6, 7]


class Watched:
    """An engine, and proof that a refused call left no trace in it."""

    def __init__(self, engine):
        self.engine = engine
        self.expected = engine.generate(input_ids=IDS, sampling_params=SHORT)["output_ids"]

    def counters(self):
        info = self.engine.get_server_info()
        names = ("extend_steps", "decode_steps", "generated_tokens", "available_tokens")
        return [info[name] for name in (*names, "num_running", "num_waiting")]

    def refuses(self, kind, *fragments, **arguments):
        """`generate(**arguments)` raises exactly `kind` with all `fragments` in the message; so do
        the stream, before its first chunk, and the coroutine."""
        before = self.counters()
        with pytest.raises(kind) as caught:
            self.engine.generate(**arguments)
        assert type(caught.value) is kind
        for fragment in fragments:
            assert fragment in str(caught.value)
        if "stream" not in arguments:
            with pytest.raises(kind):
                self.engine.generate(**arguments, stream=True)
        with pytest.raises(kind):
            asyncio.run(self.engine.async_generate(**arguments))
        assert self.counters() == before
        self.assert_works()

    def assert_works(self):
        result = self.engine.generate(input_ids=IDS, sampling_params=SHORT)
        assert result["output_ids"] == self.expected


@pytest.fixture(scope="module")
def model(tiny_models):
    return tiny_models("llama")


@pytest.fixture(scope="module")
def watched(model):
    with jaxserve.Engine(model_path=model, **OPTIONS) as engine:
        yield Watched(engine)
        info = engine.get_server_info()
        assert info["available_tokens"] == info["max_total_num_tokens"]


# -- sampling parameters: docs/api/sampling_params.md ----------------------------------------------

NAN, INF = math.nan, math.inf
OUT_OF_RANGE = {  # for each key: what the message shows -> the value given
    "max_new_tokens": {"-1": -1, "1.5": 1.5, "'8' (str)": "8", "True": True},
    "min_new_tokens": {"-1": -1, "2.0": 2.0, "'1'": "1"},
    "stop": {"5 (int)": 5, "[1]": [1], "{'a': 1}": {"a": 1}},
    "stop_token_ids": {
        "7": 7, "'12'": "12", "'x'": ["x"], "-1": [3, -1], "1.5": [1.5], "{3: 1}": {3: 1},
    },
    "stop_regex": {"5 (int)": 5, "['a', 5]": ["a", 5], "'('": "(", "'['": ["a", "["], "'a*'": "a*"},
    "temperature": {
        "-0.1": -0.1, "nan": NAN, "got inf": INF, "-inf": -INF, "'0.5'": "0.5", "True": True,
    },
    "top_p": {"got 0": 0, "-0.1": -0.1, "1.01": 1.01, "nan": NAN, "'1'": "1"},
    "top_k": {"got 0": 0, "-2": -2, "1.5": 1.5, "'5'": "5", "True": True},
    "min_p": {"-0.01": -0.01, "1.01": 1.01, "nan": NAN},
    "frequency_penalty": {"-2.01": -2.01, "2.01": 2.01, "nan": NAN, "'0'": "0"},
    "presence_penalty": {"-2.01": -2.01, "2.01": 2.01, "nan": NAN, "got inf": INF},
    "repetition_penalty": {"got 0": 0, "-1": -1, "2.01": 2.01, "nan": NAN},
    "n": {"got 0": 0, "-1": -1, "1.5": 1.5, "'2'": "2"},
    "json_schema": {"[1]": [1], "5": 5, "'{]'": "{]", "nan": {"const": NAN}},
    "regex": {"5": 5, "['a']": ["a"], "'('": "("},
    "ebnf": {"5": 5, "'root'": "root"},
    "structural_tag": {"{}": {}, "'[]'": "[]"},
    "ignore_eos": {"1 (int)": 1, "'yes'": "yes"},
    "skip_special_tokens": {"0 (int)": 0},
    "spaces_between_special_tokens": {"'no'": "no"},
    "no_stop_trim": {"1 (int)": 1},
    "stream_interval": {"got 0": 0, "-1": -1, "1.5": 1.5},
    "logit_bias": {
        "5 (int)": 5, "[1]": [1], "'x'": {"x": 1.0}, "-1": {-1: 1.0}, "'-1'": {"-1": 1.0},
        "'a'": {5: "a"}, "nan": {5: NAN}, "got inf": {5: INF},
    },
    "sampling_seed": {"1.5": 1.5, "'7'": "7", "True": True},
    "custom_params": {"5": 5, "'x'": "x"},
}  # fmt: skip


@pytest.mark.parametrize("key", OUT_OF_RANGE)
def test_values_out_of_range_name_key_and_value(watched, key):
    for shown, value in OUT_OF_RANGE[key].items():
        params = {"max_new_tokens": 4, key: value}
        watched.refuses(InvalidRequestError, key, shown, prompt=PROMPT, sampling_params=params)


@pytest.mark.parametrize(
    ("params", "fragments"),
    [
        ({"min_new_tokens": 5, "max_new_tokens": 4}, ["min_new_tokens", "max_new_tokens=4", "5"]),
        ({"max_new_tokens": CONTEXT}, [f"max_new_tokens={CONTEXT}", f"of {CONTEXT} tokens"]),
        ({"logit_bias": {VOCAB: 1.0}}, ["logit_bias", str(VOCAB), "outside the vocabulary"]),
        ({"logit_bias": {"99999": 1.0}}, ["logit_bias", "99999"]),
        ({"stop": ["."] * 2 + [""]}, ["stop", "empty string"]),
        ({"regex": "a+", "ebnf": 'root ::= "a"'}, ["Only one of", "regex and ebnf"]),
        ({"json_schema": "{}", "structural_tag": "{}"}, ["Only one of", "json_schema"]),
    ],
)
def test_values_that_do_not_fit_together(watched, params, fragments):
    watched.refuses(InvalidRequestError, *fragments, prompt=PROMPT, sampling_params=params)


def test_custom_params_need_a_processor(watched):
    watched.refuses(
        InvalidRequestError,
        "no custom_logit_processor is given",
        prompt=PROMPT,
        sampling_params={"custom_params": {"a": 1}},
    )


@pytest.mark.parametrize(
    "key",
    ["seed", "best_of", "logprobs", "max_tokens", "use_beam_search", "typical_p", "bad_words"],
)
def test_unknown_sampling_keys(watched, key):
    watched.refuses(
        UnknownOptionError, f"unknown sampling parameter {key!r}",
        prompt=PROMPT, sampling_params={key: 1},
    )  # fmt: skip
    assert issubclass(UnknownOptionError, TypeError)


def test_the_unknown_key_gets_a_suggestion(watched):
    watched.refuses(
        UnknownOptionError, "did you mean 'temperature'",
        prompt=PROMPT, sampling_params={"temprature": 0},
    )  # fmt: skip


def test_boundaries_are_inside(watched):
    """The nearest valid neighbours of the values above do run."""
    for params in (
        {"max_new_tokens": 0}, {"min_new_tokens": 4}, {"temperature": 0.0}, {"top_p": 1e-9},
        {"top_p": 1}, {"top_k": 1}, {"top_k": -1}, {"min_p": 1.0}, {"frequency_penalty": -2},
        {"presence_penalty": 2}, {"repetition_penalty": 2}, {"repetition_penalty": 1e-9},
        {"stop_token_ids": [VOCAB, None]}, {"logit_bias": {str(VOCAB - 1): -100}}, {"stop": []},
        {"sampling_seed": -1}, {"stream_interval": 1}, {"regex": None, "n": None},
        {"max_new_tokens": None}, {"max_new_tokens": CONTEXT - len(IDS)},
    ):  # fmt: skip
        given = {"max_new_tokens": 4, **params}
        result = watched.engine.generate(input_ids=IDS, sampling_params=given)
        limit = given["max_new_tokens"]
        assert len(result["output_ids"]) <= (CONTEXT if limit is None else limit)
    watched.assert_works()


# -- prompts and the other arguments ---------------------------------------------------------------

BAD_PROMPTS = [
    ({}, ["prompt and input_ids are both None"]),
    ({"prompt": PROMPT, "input_ids": [IDS]}, ["prompt and input_ids differ in shape"]),
    ({"prompt": [PROMPT], "input_ids": IDS}, ["prompt and input_ids differ in shape"]),
    ({"prompt": ""}, ["prompt is empty", "''"]),
    ({"prompt": b"bytes"}, ["prompt", "bytes"]),
    ({"prompt": 5}, ["prompt", "5 (int)"]),
    ({"input_ids": []}, ["input_ids is empty", "[]"]),
    ({"input_ids": [IDS, []]}, ["input_ids[1] is empty"]),
    ({"input_ids": np.zeros(0, np.int32)}, ["input_ids is empty"]),
    ({"input_ids": [5, -1]}, ["input_ids", "-1", f"vocabulary of {VOCAB}"]),
    ({"input_ids": [5, VOCAB]}, ["input_ids", str(VOCAB), "outside the vocabulary"]),
    ({"input_ids": [IDS, [2**70]]}, ["input_ids[1]", str(2**70)]),
    ({"input_ids": [5, 6.5]}, ["input_ids", "6.5"]),
    ({"input_ids": ["5"]}, ["input_ids", "'5'"]),
    ({"input_ids": [True, False]}, ["input_ids", "True"]),
    ({"input_ids": [IDS, 5]}, ["input_ids[1]", "5 (int)"]),
    ({"input_ids": [[IDS]]}, ["input_ids[0]"]),
    ({"input_ids": "5 6"}, ["input_ids", "'5 6'"]),
    (
        {"input_ids": [5] * CONTEXT},
        [f"({CONTEXT} tokens) is longer than the model's context length", f"({CONTEXT} tokens)"],
    ),
    ({"prompt": "word " * 200}, ["is longer than the model's context length"]),
]


@pytest.mark.parametrize(("arguments", "fragments"), BAD_PROMPTS, ids=range(len(BAD_PROMPTS)))
def test_bad_prompts(watched, arguments, fragments):
    watched.refuses(InvalidRequestError, *fragments, **arguments)


@pytest.mark.parametrize(
    ("kind", "arguments", "fragments"),
    [
        (InvalidRequestError, {"sampling_params": "greedy"}, ["sampling_params", "'greedy'"]),
        (InvalidRequestError, {"sampling_params": [SHORT] * 2}, ["sampling_params has 2 entries"]),
        (InvalidRequestError, {"rid": 5}, ["rid", "5 (int)"]),
        (InvalidRequestError, {"rid": ""}, ["rid", "''"]),
        (InvalidRequestError, {"rid": ["a", "b"]}, ["rid has 2"]),
        (InvalidRequestError, {"return_logprob": 3}, ["return_logprob", "3 (int)"]),
        (InvalidRequestError, {"return_logprob": True, "logprob_start_len": 50},
         ["logprob_start_len", "50"]),
        (InvalidRequestError, {"logprob_start_len": -2}, ["logprob_start_len", "-2"]),
        (InvalidRequestError, {"top_logprobs_num": -1}, ["top_logprobs_num", "-1"]),
        (InvalidRequestError, {"top_logprobs_num": 1025}, ["top_logprobs_num", "1025", "1024"]),
        (InvalidRequestError, {"token_ids_logprob": 5}, ["token_ids_logprob", "flat list of int"]),
        (InvalidRequestError, {"token_ids_logprob": ["a"]}, ["token_ids_logprob", "'a'"]),
        (InvalidRequestError, {"token_ids_logprob": [VOCAB]}, ["out-of-vocabulary", str(VOCAB)]),
        (InvalidRequestError, {"token_ids_logprob": [1] * 4097}, ["token_ids_logprob", "4097"]),
        (InvalidRequestError, {"progress": 2}, ["progress", "2"]),
        (InvalidRequestError, {"routed_dp_rank": 1}, ["routed_dp_rank", "1"]),
        (NotSupportedError, {"image_data": "cat.png"},
         ["image_data needs a model that takes images", "cat.png"]),
        (NotSupportedError, {"lora_path": ["adapter"]}, ["lora_path", "adapter"]),
        (InvalidRequestError, {"return_hidden_states": True}, ["return_hidden_states=True"]),
        (InvalidRequestError, {"return_hidden_states": [3]}, ["return_hidden_states", "3 (int)"]),
        (InvalidRequestError, {"return_logits": "last"}, ["return_logits='last'"]),
        (InvalidRequestError, {"return_logits": "all"}, ["return_logits", "'all'"]),
        (UnknownOptionError, {"max_new_tokens": 5}, ["no argument 'max_new_tokens'"]),
        (UnknownOptionError, {"return_logprobs": True}, ["did you mean 'return_logprob'"]),
    ],
)  # fmt: skip
def test_bad_arguments(watched, kind, arguments, fragments):
    watched.refuses(kind, *fragments, prompt=PROMPT, **arguments)


def test_a_stream_has_no_progress_bar(watched):
    watched.refuses(InvalidRequestError, "progress", prompt=PROMPT, stream=True, progress=True)


GOOD = ["one", "two", "three", "four", "five", "six", "seven", "eight"]


def replaced(values, value, row=5):
    return [*values[:row], value, *values[row + 1 :]]


@pytest.mark.parametrize(
    ("kind", "arguments", "fragments"),
    [
        (InvalidRequestError, {"prompt": replaced(GOOD, "")}, ["prompt 5 of the batch is empty"]),
        (InvalidRequestError, {"prompt": replaced(GOOD, None)}, ["prompt 5", "None"]),
        (InvalidRequestError, {"prompt": replaced(GOOD, "word " * 200)}, ["row 5", "longer than"]),
        (InvalidRequestError, {"input_ids": replaced([IDS] * 8, [VOCAB])},
         ["input_ids[5]", str(VOCAB)]),
        (InvalidRequestError, {"input_ids": replaced([IDS] * 8, [5] * 100)}, ["row 5", "100"]),
        (InvalidRequestError,
         {"prompt": GOOD, "sampling_params": replaced([SHORT] * 8, {"top_p": 2})},
         ["row 5", "top_p", "2"]),
        (UnknownOptionError,
         {"prompt": GOOD, "sampling_params": replaced([SHORT] * 8, {"top_q": 2})},
         ["row 5", "top_q"]),
        (InvalidRequestError, {"prompt": GOOD, "sampling_params": replaced([SHORT] * 8, {"n": 2})},
         ["parallel_sample_num should be the same", "n=2 in row 5"]),
        (InvalidRequestError, {"prompt": GOOD, "sampling_params": [SHORT] * 7},
         ["sampling_params has 7 entries for 8 prompts"]),
        (InvalidRequestError, {"prompt": GOOD, "rid": replaced(GOOD, "one")},
         ["Duplicate request ID", "'one'"]),
        (InvalidRequestError, {"prompt": GOOD, "token_ids_logprob": replaced([IDS] * 8, [-1])},
         ["row 5", "out-of-vocabulary id -1"]),
        (InvalidRequestError, {"prompt": GOOD, "sampling_params": {**SHORT, "n": 2},
                               "return_logprob": [True] * 8}, ["return_logprob", "n > 1"]),
    ],
)  # fmt: skip
def test_one_bad_row_in_a_batch_of_eight(watched, kind, arguments, fragments):
    watched.refuses(kind, *fragments, **arguments)


def test_an_id_in_flight_is_refused_and_its_owner_undisturbed(watched):
    stream = watched.engine.generate(PROMPT, SHORT, stream=True, rid="mine")
    with pytest.raises(InvalidRequestError, match="Duplicate request ID: 'mine'"):
        watched.engine.generate(PROMPT, SHORT, rid="mine")
    assert len(list(stream)[-1]["output_ids"]) == 4
    assert watched.engine.generate(PROMPT, SHORT, rid="mine")["meta_info"]["id"] == "mine"
    watched.assert_works()


def test_an_engine_without_a_tokenizer(model):
    with jaxserve.Engine(model_path=model, skip_tokenizer_init=True, **OPTIONS) as engine:
        plain = Watched(engine)
        plain.refuses(InvalidRequestError, "prompt needs a tokenizer", prompt=PROMPT)
        for key in ("stop", "stop_regex"):
            plain.refuses(
                InvalidRequestError, f"{key}=['a'] needs a tokenizer",
                input_ids=IDS, sampling_params={key: "a"},
            )  # fmt: skip
        with pytest.raises(InvalidRequestError, match="tokenizer"):
            engine.chat([{"role": "user", "content": "hello"}])
        plain.assert_works()


def test_bad_conversations(watched):
    for messages in ("hello", [], [{"role": "user"}], [{"content": "hello"}], [5], None):
        before = watched.counters()
        with pytest.raises(InvalidRequestError, match="messages"):
            watched.engine.chat(messages)
        assert watched.counters() == before
        watched.assert_works()


# -- the constructor -------------------------------------------------------------------------------


@pytest.fixture
def refuses_to_load(watched):
    """`refuses_to_load(kind, *fragments, **options)`: so does Engine(**options), and leaves neither
    a thread behind nor a mark on an engine that runs beside it."""

    def check(kind, *fragments, **options):
        threads = threading.active_count()
        with pytest.raises(kind) as caught:
            jaxserve.Engine(**options)
        assert type(caught.value) is kind
        for fragment in fragments:
            assert fragment in str(caught.value)
        assert threading.active_count() <= threads
        watched.assert_works()

    return check


@pytest.mark.parametrize(
    ("kind", "options", "fragments"),
    [
        (UnknownOptionError, {"tensor_parallel_size": 1}, ["'tensor_parallel_size'", "tp_size"]),
        (UnknownOptionError, {"modelpath": "x"}, ["'modelpath'", "did you mean 'model_path'"]),
        (UnknownOptionError, {"gpu_memory": 0.5}, ["'gpu_memory'"]),
        (InvalidRequestError, {"tp_size": 2}, ["tp_size=2", "JAX has 1 cpu devices"]),
        (NotSupportedError, {"quantization": "awq"}, ["quantization", "awq"]),
        (InvalidRequestError, {"quantization": "int5"}, ["quantization", "int5"]),
        (InvalidRequestError, {"kv_cache_dtype": "bf16", "dtype": "float32", "device": "cpu"},
            ["kv_cache_dtype", "bf16", "float32"]),
        (InvalidRequestError, {"page_size": 12}, ["page_size", "12"]),
        (InvalidRequestError, {"page_size": 0}, ["page_size", "0"]),
        (InvalidRequestError, {"context_length": 0}, ["context_length", "0"]),
        (InvalidRequestError, {"mem_fraction_static": 1.5}, ["mem_fraction_static", "1.5"]),
        (InvalidRequestError, {"max_running_requests": -1}, ["max_running_requests", "-1"]),
        (InvalidRequestError, {"load_format": "zip"}, ["load_format", "'zip'"]),
        (NotSupportedError, {"load_format": "pt"}, ["load_format", "'pt'"]),
        (InvalidRequestError, {"dtype": "int8"}, ["dtype", "'int8'"]),
        (InvalidRequestError, {"device": "tpu"}, ["device", "'tpu'"]),
        (InvalidRequestError, {"attention_backend": "triton", "device": "cpu"},
         ["attention_backend", "triton"]),
        (InvalidRequestError, {"json_model_override_args": "{"}, ["json_model_override_args"]),
        (UnknownOptionError, {"preferred_sampling_params": {"seed": 1}}, ["'seed'"]),
        (InvalidRequestError, {"preferred_sampling_params": {"top_p": 2}}, ["top_p", "2"]),
    ],
)  # fmt: skip
def test_bad_options(refuses_to_load, model, kind, options, fragments):
    refuses_to_load(kind, *fragments, model_path=model, **options)


def test_no_model_path(refuses_to_load):
    refuses_to_load(UnknownOptionError, "model_path is required")


@pytest.mark.parametrize("path", ["/no/such/folder", "no_such_model", "./missing.gguf", "a/b/c"])
def test_missing_path(refuses_to_load, monkeypatch, path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    absolute = str(Path(path).absolute())
    refuses_to_load(ModelLoadError, f"model_path={path!r}", absolute, model_path=path)


def test_a_folder_without_a_model(refuses_to_load, tmp_path):
    refuses_to_load(ModelLoadError, str(tmp_path), model_path=str(tmp_path))


@pytest.fixture
def copied(model, tmp_path):
    """A checkpoint folder to damage, and its weights file."""
    folder = tmp_path / "damaged"
    shutil.copytree(model, folder)
    return folder, folder / "model.safetensors"


def cut(path, size):
    os.truncate(path, size)


def overwrite(path, begin, content):
    with open(path, "r+b") as file:
        file.seek(begin)
        file.write(content)


def test_corrupt_safetensors(refuses_to_load, copied):
    folder, weights = copied
    whole = weights.read_bytes()
    for damage in (
        lambda: cut(weights, len(whole) // 2),
        lambda: cut(weights, len(whole) - 1),
        lambda: cut(weights, 5),
        lambda: cut(weights, 0),
        lambda: overwrite(weights, 0, b"\xff" * 8),  # the header's size
        lambda: overwrite(weights, 8, b"no JSON!"),
    ):
        weights.write_bytes(whole)
        damage()
        refuses_to_load(ModelLoadError, "model.safetensors", model_path=str(folder))
    weights.write_bytes(whole)
    with jaxserve.Engine(model_path=str(folder), **OPTIONS) as engine:
        Watched(engine).assert_works()


def test_weights_that_do_not_fit_the_config(refuses_to_load, copied):
    folder, _ = copied
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    refuses_to_load(
        ModelLoadError, "num_hidden_layers=3", "tensors of 2 layers", model_path=str(folder),
    )  # fmt: skip
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 96}))
    refuses_to_load(
        ModelLoadError, "layers.1.mlp.gate_proj.weight is [128, 64], should be [96, 64]",
        "layers.0.mlp.down_proj.weight", "intermediate_size=96", model_path=str(folder),
    )  # fmt: skip
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["GPT2LMHead"]}))
    refuses_to_load(NotSupportedError, "GPT2LMHead", "LlamaForCausalLM", model_path=str(folder))
    (folder / "config.json").write_text("{")
    refuses_to_load(ModelLoadError, "config.json", model_path=str(folder))
    (folder / "config.json").unlink()
    refuses_to_load(ModelLoadError, "config.json", model_path=str(folder))


def test_truncated_gguf(refuses_to_load, tmp_path):
    path = tmp_path / "model.gguf"
    write_model(path, "llama")
    whole = path.read_bytes()
    for size in (0, 3, 20, len(whole) // 4, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        refuses_to_load(ModelLoadError, str(path), model_path=str(path))
    path.write_bytes(b"GGML" + whole[4:])
    refuses_to_load(ModelLoadError, str(path), model_path=str(path))
    path.write_bytes(whole)
    with jaxserve.Engine(model_path=str(path), **OPTIONS) as engine:
        Watched(engine).assert_works()


# -- Ctrl-C ----------------------------------------------------------------------------------------

INTERRUPTED = """
import asyncio, sys, time
import jaxserve

engine = jaxserve.Engine(
    model_path=sys.argv[1], skip_tokenizer_init=True, max_total_tokens=65536,
    json_model_override_args={"max_position_embeddings": 65536},
)
LONG = {"temperature": 0, "max_new_tokens": 60000, "ignore_eos": True}
SHORT = {"temperature": 0, "max_new_tokens": 4, "ignore_eos": True}

def generate(**options):
    return engine.generate(input_ids=[5, 6, 7], sampling_params=LONG, **options)

def stream():
    ready = False
    for chunk in generate(stream=True):
        if not ready and len(chunk["output_ids"]) >= 3:  # a busy machine's chunks have several more
            ready = True
            print("ready", flush=True)

def wait():
    print("ready", flush=True)
    generate()

async def wait_async():
    print("ready", flush=True)
    await engine.async_generate(input_ids=[5, 6, 7], sampling_params=LONG)

generate_short = lambda: engine.generate(input_ids=[5, 6, 7], sampling_params=SHORT)
expected = generate_short()["output_ids"]
for busy in (stream, wait, lambda: asyncio.run(wait_async())):
    try:
        busy()
        print("ended by itself", flush=True)
    except KeyboardInterrupt:
        info = engine.get_server_info()
        free = info["available_tokens"] == info["max_total_num_tokens"]
        again = generate_short()["output_ids"] == expected
        print("interrupted", free, info["num_running"], again, flush=True)
wait()
"""


def test_ctrl_c(model):
    """While streaming, while waiting and in asyncio.run, the engine stays usable; not caught, it
    ends the process, with the main thread's traceback only."""
    with subprocess.Popen(
        [sys.executable, "-W", "error", "-c", INTERRUPTED, model],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(),
        cwd=Path(__file__).resolve().parent.parent,
    ) as process:  # fmt: skip
        assert process.stdout is not None and process.stderr is not None
        try:
            for _ in range(3):
                assert process.stdout.readline() == "ready\n", process.stderr.read()
                time.sleep(0.2)
                started = time.monotonic()
                process.send_signal(signal.SIGINT)
                assert process.stdout.readline() == "interrupted True 0 True\n"
                assert time.monotonic() - started < 5
            assert process.stdout.readline() == "ready\n"
            time.sleep(0.2)
            process.send_signal(signal.SIGINT)
            rest, errors = process.communicate(timeout=20)
        finally:
            process.kill()
    assert rest == ""
    assert process.returncode == -signal.SIGINT
    assert len(re.findall("Traceback", errors)) == 1, errors
    assert errors.rstrip().endswith("KeyboardInterrupt"), errors
    assert "jaxserve-engine" not in errors and "_run" not in errors
