"""Stop strings and patterns that are, or reach over, special tokens."""

from __future__ import annotations

import contextlib
import threading
import time

import pytest

from jaxserve.errors import InvalidRequestError, RequestFailedError
from jaxserve.text import limits
from jaxserve.text.codec import Codec
from jaxserve.text.pattern import Patience, StopRegex
from jaxserve.text.stop import StopMatcher
from jaxserve.text.transcript import Transcript
from tests.api_fakes import EOS, IM_END, IM_START, Fakes, byte_level_tokenizer

pytestmark = pytest.mark.usefixtures("kept_programs")

TOKENIZER = byte_level_tokenizer()
CODEC = Codec(TOKENIZER)
TEXT = f"ab{IM_END}{IM_START}cd é{IM_END}ef"


def ids_of(text: str) -> list[int]:
    return TOKENIZER(text)["input_ids"]


@pytest.fixture
def engine(monkeypatch):
    """Repeats its prompt."""
    fakes = Fakes(TOKENIZER, monkeypatch)
    yield fakes.engine()
    fakes.close()


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("skip", [True, False], ids=["skipped", "shown"])
@pytest.mark.parametrize("keep", [False, True], ids=["trimmed", "kept"])
@pytest.mark.parametrize(
    ("stop", "before", "behind"),
    [
        (IM_START, f"ab{IM_END}", f"ab{IM_END}{IM_START}"),
        (IM_END, "ab", f"ab{IM_END}"),
        (f"{IM_END}{IM_START}", "ab", f"ab{IM_END}{IM_START}"),
        (f"b{IM_END}{IM_START}c", "a", f"ab{IM_END}{IM_START}c"),
        (f"end|>{IM_START}c", "ab<|im_", f"ab{IM_END}{IM_START}c"),
        (f"{IM_START}cd é", f"ab{IM_END}", f"ab{IM_END}{IM_START}cd é"),
        (f"é{IM_END}", f"ab{IM_END}{IM_START}cd ", f"ab{IM_END}{IM_START}cd é{IM_END}"),
    ],
)
def test_stop_strings_see_special_tokens(engine, stop, before, behind, skip, keep, stream):
    params = {"stop": [stop], "skip_special_tokens": skip, "no_stop_trim": keep,
              "max_new_tokens": 40}  # fmt: skip
    result = engine.generate(input_ids=ids_of(TEXT), sampling_params=params, stream=stream)
    chunks = [chunk["text"] for chunk in result] if stream else [result["text"]]
    result = engine.generate(input_ids=ids_of(TEXT), sampling_params=params)
    assert result["meta_info"]["finish_reason"] == {"type": "stop", "matched": stop}
    expected = behind if keep else before
    if skip:
        expected = expected.replace(IM_START, "").replace(IM_END, "").replace("<|im_", "")
    assert chunks[-1] == expected
    assert all(chunks[-1].startswith(chunk) for chunk in chunks)  # nothing is taken back


def test_what_is_shown_is_searched_too(engine):
    """Skipped tokens do not part a stop string that the caller would read."""
    params = {"stop": ["bcd"], "max_new_tokens": 40}
    result = engine.generate(input_ids=ids_of(TEXT), sampling_params=params)
    assert result["text"] == "a" and result["meta_info"]["finish_reason"]["matched"] == "bcd"


def test_the_string_wins_over_the_end_token(engine):
    prompt = ids_of(f"ab{EOS}cd")
    for params in ({}, {"ignore_eos": True}, {"stop_token_ids": [ids_of(EOS)[0]]}):
        result = engine.generate(input_ids=prompt, sampling_params={**params, "stop": EOS})
        assert result["meta_info"]["finish_reason"] == {"type": "stop", "matched": EOS}
        assert result["text"] == "ab"


@pytest.mark.parametrize("skip", [True, False])
def test_patterns_see_special_tokens(engine, skip):
    pattern = r"<\|im_\w+\|>.d"
    params = {"stop_regex": pattern, "skip_special_tokens": skip, "max_new_tokens": 40}
    result = engine.generate(input_ids=ids_of(TEXT), sampling_params=params)
    assert result["meta_info"]["finish_reason"]["matched"] == pattern
    assert result["text"] == ("ab" if skip else f"ab{IM_END}")


def test_places_are_right_far_behind():
    """Positions count what was forgotten, in both texts."""
    matcher = StopMatcher(["END"], [], Transcript(CODEC))
    found = [matcher.append(token) for token in ids_of(f"xy{IM_END}" * 3000 + "zEND")]
    assert found[-1] == "END" and matcher.start == 6001


# -- patterns that take long ----------------------------------------------------------------------


def test_the_classic_of_backtracking_ends():
    """Half a minute for `re`, and no thread runs meanwhile."""
    regex = StopRegex(r"((?:.|\n)+)+\x00$")
    began = time.process_time()
    with contextlib.suppress(RequestFailedError):
        assert regex.search("x" * 28, 0) is None
        assert regex.search("x" * 27 + "\x00x", 0) is None
    assert time.process_time() - began < 4 * limits.PATTERN_SECONDS


@pytest.mark.parametrize("pattern", ["(?:x|x|x)+[yz]", "((x|xx)(x|xx))+[yz]"])
def test_a_pattern_that_backtracks_is_stopped_and_others_run_meanwhile(pattern):
    regex = StopRegex(pattern)
    gaps, done = [0.0], threading.Event()

    def tick():
        last = time.perf_counter()
        while not done.is_set():
            time.sleep(0.001)
            now = time.perf_counter()
            gaps.append(now - last)
            last = now

    beside = threading.Thread(target=tick)
    beside.start()
    began = time.process_time()
    try:
        with pytest.raises(RequestFailedError, match=r"stop_regex .* takes more than"):
            regex.search("x" * 200, 0)
    finally:
        done.set()
        beside.join()
    assert time.process_time() - began < 4 * limits.PATTERN_SECONDS
    assert max(gaps) < limits.PATTERN_SECONDS  # the other thread ran meanwhile


def test_slow_searches_of_a_request_are_added_up(monkeypatch):
    monkeypatch.setattr(limits, "PATTERN_TOTAL_SECONDS", 0.02)
    monkeypatch.setattr(limits, "PATTERN_PATIENCE", -1.0)
    patience, regex = Patience(), StopRegex("a+b")
    with pytest.raises(RequestFailedError, match=r"searches for stop_regex 'a\+b' took more"):
        for _ in range(1_000_000):
            patience.search(regex, "a" * 1000, 0)


def test_only_the_request_of_the_pattern_fails(tiny_models):
    import jaxserve

    with jaxserve.Engine(model_path=tiny_models("llama"), precompile=False) as engine:
        letter = engine.tokenizer("x")["input_ids"][0]
        params = {"logit_bias": {letter: 1e4}, "max_new_tokens": 60}
        slow = {**params, "stop_regex": "(?:x|x|x)+[yz]"}
        beside: list = []
        thread = threading.Thread(
            target=lambda: beside.append(engine.generate("hello", sampling_params=params))
        )
        thread.start()
        with pytest.raises(RequestFailedError, match=r"stop_regex '\(\?:x.* more than"):
            engine.generate("hello", sampling_params=slow)
        thread.join(60)
        assert beside[0]["meta_info"]["completion_tokens"] == 60


@pytest.mark.parametrize(
    "pattern", ["(((a{1000}){1000}){1000})", "a{100}" * 700, "x" * 600,
                "(?:" * 400 + "a" + ")" * 400,
                "((a|b){500}){500}", "(a{0,4000}){0,4000}b"]
)  # fmt: skip
def test_patterns_that_take_long_to_compile_are_refused_at_once(pattern):
    began = time.process_time()
    with pytest.raises(InvalidRequestError, match="stop_regex") as caught:
        StopRegex(pattern)
    assert time.process_time() - began < 1 and len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    ("pattern", "text", "span"),
    [
        ("a{e}", "xa{e}", (1, 5)), ("foo{i<=1}", "foo{i<=1}", (0, 9)),
        ("[[:alpha:]]", "x:]", (1, 3)),
        (r"[]a]b", "x]b", (1, 3)), (r"[^]a]b", "x]bxb", (3, 5)), ("a{2}", "xaa", (1, 3)),
        ("a{,2}b", "aab", (0, 3)), (r"\{x\}", "{x}", (0, 3)), ("{", "a{", (1, 2)),
        ("[{]e}", "{e}", (0, 3)),
        (r"(?i)É", "é", (0, 1)), (r"(?<=a)b", "ab", (1, 2)), (r"(?x) a  b # c", "ab", (0, 2)),
        (r"[a&&b]c", "&c", (0, 2)), ("[a||b]", "|", (0, 1)), (r"\[[x]", "[x", (0, 2)),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:Possible")
def test_patterns_mean_what_they_mean_to_re(pattern, text, span):
    import re

    found = re.search(pattern, text)
    assert found is not None and found.span() == span == StopRegex(pattern).search(text, 0)
