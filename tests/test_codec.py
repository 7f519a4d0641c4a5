"""The engine's own encoder and decoder: transformers' ids, whatever users do to theirs."""

from __future__ import annotations

import gc
import json
import signal
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)
from transformers import PreTrainedTokenizerFast

from jaxserve.errors import InvalidRequestError, RequestFailedError
from jaxserve.text.codec import Codec
from tests.api_fakes import (
    Fakes,
    byte_level_tokenizer,
    loop_of,
    metaspace_tokenizer,
)
from tests.marks import long

pytestmark = pytest.mark.usefixtures("kept_programs")

BYTES = byte_level_tokenizer()
texts = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=60)


def with_ends() -> PreTrainedTokenizerFast:
    """Puts tokens around a prompt, and was saved with truncation and padding."""
    tokenizer = byte_level_tokenizer()
    backend = tokenizer.backend_tokenizer
    backend.post_processor = processors.TemplateProcessing(
        single=["<|im_start|>", "$A", "<|im_end|>"],
        special_tokens=[
            (name, backend.token_to_id(name)) for name in ("<|im_start|>", "<|im_end|>")
        ],
    )
    backend.enable_padding(length=30)
    backend.enable_truncation(max_length=5)
    tokenizer.add_tokens([AddedToken("ab", lstrip=True), "日本"])
    return tokenizer


def slow():
    """A tokenizer without a Rust backend."""
    from transformers.tokenization_python import PreTrainedTokenizer

    class Letters(PreTrainedTokenizer):
        def __init__(self, **options):
            self.letters = {chr(code): code - 32 for code in range(32, 127)}
            super().__init__(unk_token="?", eos_token="~", **options)

        vocab_size = 95

        def get_vocab(self):
            return dict(self.letters)

        def _tokenize(self, text, **options):
            return list(text)

        def _convert_token_to_id(self, token):
            return self.letters.get(token, 31)

        def _convert_id_to_token(self, index):
            return chr(index + 32)

    return Letters()


def demo():
    from converters import load_tokenizer
    from examples.demo_model import fetch

    return load_tokenizer(str(fetch()))


MADE = {f.__name__: f() for f in (byte_level_tokenizer, metaspace_tokenizer, with_ends, slow, demo)}
CODECS = {name: Codec(tokenizer) for name, tokenizer in MADE.items()}


@pytest.mark.parametrize("name", MADE)
@settings(max_examples=40, deadline=None)
@given(st.lists(texts, min_size=1, max_size=4))
def test_ids_and_texts_are_those_of_the_tokenizer(name, prompts):
    tokenizer, codec = MADE[name], CODECS[name]
    expected = tokenizer(prompts)["input_ids"]
    assert codec.encode("prompt", prompts) == expected
    bare = tokenizer(prompts, add_special_tokens=False)["input_ids"]
    assert codec.encode("prompt", prompts, add_special_tokens=False) == bare
    for ids in expected:
        for skip in (True, False):
            assert codec.decode(ids, skip_special_tokens=skip) == tokenizer.decode(
                ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False
            )


@pytest.mark.parametrize("name", ["byte_level_tokenizer", "metaspace_tokenizer", "demo"])
@settings(max_examples=60, deadline=None)
@given(texts)
def test_no_text_has_fewer_tokens_than_its_bytes_say(name, text):
    codec = CODECS[name]
    assert len(codec.encode("prompt", [text])[0]) >= codec.least_tokens(text)
    assert codec.least_tokens("The capital" * 1000) > 50


def test_no_bound_is_claimed_where_text_gets_lost():
    def bound(change):
        tokenizer = byte_level_tokenizer()
        change(tokenizer.backend_tokenizer)
        return Codec(tokenizer).least_tokens("a" * 10_000)

    assert bound(lambda backend: None) > 0
    for change in (
        lambda b: setattr(b, "normalizer", normalizers.Replace("aaaa", "a")),
        lambda b: setattr(b, "normalizer", normalizers.Strip()),
        lambda b: setattr(b, "normalizer", normalizers.NFC()),
        lambda b: setattr(b, "pre_tokenizer", pre_tokenizers.Whitespace()),
        lambda b: setattr(b, "pre_tokenizer", pre_tokenizers.Split(" ", "removed")),
        lambda b: b.add_tokens([AddedToken("x", rstrip=True)]),
    ):
        assert bound(change) == 0
    words = Tokenizer(models.WordLevel({"a": 0, "?": 1}, unk_token="?"))
    assert Codec(PreTrainedTokenizerFast(tokenizer_object=words)).least_tokens("a" * 10_000) == 0


# -- with an engine -------------------------------------------------------------------------------


@pytest.fixture
def fakes(monkeypatch):
    fakes = Fakes(byte_level_tokenizer(), monkeypatch)
    yield fakes
    fakes.close()


ONE = {"max_new_tokens": 1}


def test_what_users_do_to_their_tokenizer_reaches_no_request(fakes):
    engine = fakes.engine()
    prompt = "The capital of France is Paris. " * 4
    expected = BYTES(prompt)["input_ids"]
    stop = threading.Event()

    def meddle():
        while not stop.is_set():
            engine.tokenizer("short", truncation=True, max_length=5)

    thread = threading.Thread(target=meddle)
    thread.start()
    try:
        for _ in range(200):
            result = engine.generate(prompt, ONE, return_prompt_token_ids=True)
            assert result["prompt_token_ids"] == expected
    finally:
        stop.set()
        thread.join()


def test_changes_to_the_tokenizer_reach_no_request(fakes):
    """The second of the kind: its parts, its words, its template."""
    engine = fakes.engine()
    text, chat = "The capital of Rome", [{"role": "user", "content": "hi"}]
    params = {"max_new_tokens": 6, "stop": "capital"}

    def seen():
        result = engine.generate(text, params, return_prompt_token_ids=True)
        rendered = engine.chat(chat, ONE, return_prompt_token_ids=True)
        return result["prompt_token_ids"], result["text"], rendered["prompt_token_ids"]

    before = seen()
    tokenizer = engine.tokenizer
    assert isinstance(tokenizer, PreTrainedTokenizerFast)  # it stays the user's
    tokenizer.add_tokens(["capital", "Rome"])
    tokenizer.chat_template = "other"
    tokenizer.backend_tokenizer.pre_tokenizer.add_prefix_space = True
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.backend_tokenizer.decoder = decoders.Fuse()
    tokenizer.backend_tokenizer.post_processor = None
    tokenizer.split_special_tokens = True
    assert seen() == before


@pytest.mark.parametrize("prompts", [["fine", "bad \ud800"], ["fine", "\udfff"]])
def test_text_that_is_no_unicode_is_refused_by_row(fakes, prompts):
    engine = fakes.engine()
    with pytest.raises(InvalidRequestError, match="prompt 1 of the batch has half of a"):
        engine.generate(prompts)
    with pytest.raises(InvalidRequestError, match="prompt has half of a surrogate"):
        engine.generate(prompts[1])
    with pytest.raises(InvalidRequestError, match="messages has half of a surrogate"):
        engine.chat([{"role": "user", "content": prompts[1]}])
    python = Codec(slow())
    with pytest.raises(InvalidRequestError, match="prompt 1 of the batch"):
        python.encode("prompt", prompts)


def test_no_warning_of_long_sequences(fakes, caplog, capfd):
    fakes.tokenizer.model_max_length = 8
    engine = fakes.engine()
    engine.generate("The capital of France is Paris. " * 4, ONE)
    Codec(slow()).encode("prompt", ["x" * 1000])
    assert "indexing errors" not in caplog.text + capfd.readouterr().err


def test_prompts_that_must_be_too_long_are_refused_before_they_are_encoded(fakes, monkeypatch):
    engine = fakes.engine(context_length=64)

    def fail(*args):
        raise AssertionError("was encoded")

    monkeypatch.setattr(engine._codec._backend, "encode", fail)
    began = time.thread_time()
    with pytest.raises(InvalidRequestError, match=r"in row 1 .*5242880 char.*longer than the"):
        engine.generate(["short", "a" * (5 << 20)])
    with pytest.raises(InvalidRequestError, match="longer than the model's context length"):
        engine.chat([{"role": "user", "content": "é" * (5 << 20)}])
    assert time.thread_time() - began < 1


def test_a_prompt_that_is_to_be_cut_is_encoded_whole(fakes):
    engine = fakes.engine(context_length=64, allow_auto_truncate=True)
    text = "The capital of France. " * 1000
    with pytest.warns(UserWarning, match="cut to 63"):
        result = engine.generate(text, ONE, return_prompt_token_ids=True)
    assert result["prompt_token_ids"] == BYTES(text)["input_ids"][:63]


LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


@pytest.fixture
def small_heap():
    """Python's collections see what the test makes, not what the tests before it left: walking
    that takes seconds late in a run, and everybody waits."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("small_heap")
@pytest.mark.parametrize("slow_call", [long("encode"), "render"])
def test_nobody_waits_for_anothers_prompt(fakes, slow_call):
    """Five megabytes encoded, or a template that takes its whole second."""
    if slow_call == "render":
        fakes.tokenizer.chat_template = LOOP
    engine = fakes.engine(context_length=10_000_000, max_total_tokens=20_000_000)
    began, ended, times = threading.Event(), threading.Event(), [time.perf_counter()]

    def call():
        began.set()
        try:
            if slow_call == "encode":
                engine.generate("hello wörld " * 450_000, ONE)
            else:
                with pytest.raises(InvalidRequestError):
                    engine.chat([{"role": "user", "content": "hi"}], ONE)
        finally:
            times.append(time.perf_counter())
            ended.set()

    thread = threading.Thread(target=call)
    thread.start()
    began.wait()
    waited = []
    while not ended.is_set():
        start = time.perf_counter()
        engine.generate(input_ids=[1, 2, 3], sampling_params=ONE)
        waited.append(time.perf_counter() - start)
    thread.join()
    # Where other programs keep the cores busy the call takes more than its two seconds, and
    # everybody waits longer.
    assert len(waited) > 3 and max(waited) < max(0.3, (times[1] - times[0]) / 8)


def test_a_signal_handler_may_generate_at_any_moment(tiny_models):
    import jaxserve

    prompt, inner = "The capital of France is", []
    with jaxserve.Engine(model_path=tiny_models("llama"), precompile=False) as engine:
        greedy = {"max_new_tokens": 1, "temperature": 0}

        def handler(number, frame):
            inner.append(engine.generate(prompt, greedy)["text"])
            if len(inner) < 15:
                signal.setitimer(signal.ITIMER_REAL, 0.003)

        expected = engine.generate(prompt, greedy)["text"]
        before = signal.signal(signal.SIGALRM, handler)
        try:
            signal.setitimer(signal.ITIMER_REAL, 0.003)
            while len(inner) < 15:
                engine.generate([prompt] * 20, ONE)
                engine.chat([{"role": "user", "content": "hi"}], ONE)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
    assert set(inner) == {expected}


def test_seeds_are_drawn_while_they_are_drawn(fakes):
    """The lock of the seeds is held by this very thread: a handler draws all the same."""
    engine = fakes.engine(random_seed=3)
    builder = engine._builder
    with builder._lock:
        engine.generate("x", ONE)
    seeds = [builder._draw_seed() for _ in range(1000)]
    assert len(set(seeds)) > 990
    engine.generate(["x"] * 3, ONE)
    again = fakes.engine(random_seed=3)
    again.generate("x", ONE)
    assert loop_of(again).submitted[0].seed == loop_of(engine).submitted[0].seed


# -- panics ---------------------------------------------------------------------------------------


def panicking(part: str) -> PreTrainedTokenizerFast:
    """A tokenizer whose regex backtracks past the limit of its matcher, which then panics."""
    tokenizer = byte_level_tokenizer()
    backend = tokenizer.backend_tokenizer
    if part == "encode":
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex("(a+)+$"), "isolated"), backend.pre_tokenizer]
        )
    else:
        backend.decoder = decoders.Sequence(
            [decoders.ByteLevel(), decoders.Replace(Regex("(a|a)+$"), "x")]
        )
    return tokenizer


def test_a_panic_while_encoding_is_that_calls_error(monkeypatch):
    fakes = Fakes(panicking("encode"), monkeypatch)
    engine = fakes.engine()
    with pytest.raises(RequestFailedError, match="failed to encode: PanicException"):
        engine.generate("a" * 60 + "b", ONE)
    assert engine.generate("The capital", ONE)["meta_info"]["completion_tokens"] == 1
    fakes.close()


def test_a_panic_while_decoding_is_that_requests_error(tiny_models, tmp_path):
    """On the caller's thread, and on the engine's for those with stop strings."""
    import shutil

    import jaxserve

    folder = shutil.copytree(tiny_models("llama"), tmp_path / "model")
    path = Path(folder) / "tokenizer.json"
    data = json.loads(path.read_text())
    pattern = {"type": "Replace", "pattern": {"Regex": "(a|a)+$"}, "content": "x"}
    data["decoder"] = {"type": "Sequence", "decoders": [data["decoder"], {"type": "Fuse"}, pattern]}
    path.write_text(json.dumps(data))
    with jaxserve.Engine(model_path=str(folder), precompile=False, log_level="critical") as engine:
        a, b = (engine._codec.encode("prompt", [letter])[0][0] for letter in "ab")
        stops = {"logit_bias": {a: 1e4}, "max_new_tokens": 80}
        assert engine.generate(input_ids=[b], sampling_params={"max_new_tokens": 3})["text"]
        # The newest tokens end in "b" behind many "a": nothing that the pattern could match.
        prompt = [a] * 5 + [b]
        for params in (stops, {**stops, "stop": "never"}):
            try:
                engine.generate(input_ids=prompt, sampling_params=params)
            except RequestFailedError as error:
                assert "PanicException" in str(error)
        long = [a] * 60 + [b]
        with pytest.raises(RequestFailedError, match="failed to decode: PanicException"):
            engine._codec.decode(long)
        assert engine.generate(input_ids=[b], sampling_params={"max_new_tokens": 3})["text"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_ctrl_c_is_no_failure_of_the_tokenizer(fakes, monkeypatch, error):
    engine = fakes.engine()

    def raising(*args):
        raise error

    monkeypatch.setattr(engine._codec._backend, "encode", raising)
    with pytest.raises(error):
        engine.generate("x", ONE)
