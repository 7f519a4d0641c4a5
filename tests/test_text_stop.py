"""Stop strings and regexes against searching the whole text after every token."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.errors import InvalidRequestError
from jaxserve.text.codec import Codec
from jaxserve.text.pattern import MAX_REGEX_WINDOW, StopRegex
from jaxserve.text.stop import MAX_REGEX_HOLD, TAIL_SLACK, StopMatcher, held_back
from jaxserve.text.transcript import Transcript
from tests.api_fakes import byte_level_tokenizer

TOKENIZER = byte_level_tokenizer()
CODEC = Codec(TOKENIZER)
PATTERNS = ["a+b", r"\d\d", "(?:ab)+a", r"b\b", "(?<=a)c", "a(?=bc)", "^ab", "[^ab]c", "é|日b"]

letters = st.text("abc é日1", max_size=40)
stops = st.lists(st.text("abcé日", min_size=1, max_size=4), max_size=3)
patterns = st.lists(st.sampled_from(PATTERNS), max_size=2)


def matcher_of(strings, regexes=()) -> StopMatcher:
    return StopMatcher(strings, [StopRegex(regex) for regex in regexes], Transcript(CODEC))


def brute_force(ids, strings, regexes):
    """(token number, matched, start, end) of the first match, searching all text every time."""
    for count in range(1, len(ids) + 1):
        text = TOKENIZER.decode(ids[:count])
        text = re.sub("\ufffd{1,3}$", "", text)
        for string in strings:
            if string in text:
                return count, string, text.find(string), text.find(string) + len(string)
        for regex in regexes:
            match = re.search(regex, text)
            if match:
                return count, regex, *match.span()
    return None


def by_matcher(ids, matcher):
    for count, token in enumerate(ids, 1):
        matched = matcher.append(token)
        if matched is not None:
            return count, matched, matcher.start, matcher.end
    return None


@settings(max_examples=300, deadline=None)
@given(letters, stops, patterns)
def test_matches_are_those_of_a_full_search(text, strings, regexes):
    ids = TOKENIZER(text)["input_ids"]
    expected = brute_force(ids, strings, regexes)
    assert by_matcher(ids, matcher_of(strings, regexes)) == expected


def test_list_order_decides_not_position():
    ids = TOKENIZER.convert_tokens_to_ids(TOKENIZER.tokenize("The capital"))
    joined = TOKENIZER.decode(ids[-1:])
    assert len(joined) >= 3
    second, first = joined[:2], joined[1:3]
    assert by_matcher(ids, matcher_of([first, second]))[1] == first
    assert by_matcher(ids, matcher_of([second, first]))[1] == second
    # Strings are tried before regexes.
    assert by_matcher(ids, matcher_of([first], [second]))[1] == first


def test_a_match_far_behind_is_found_and_placed():
    text = "a" * (2 * TAIL_SLACK + MAX_REGEX_WINDOW) + "END"
    ids = TOKENIZER(text)["input_ids"]
    for strings, regexes in ((["END"], []), ([], ["E.D"])):
        matcher = matcher_of(strings, regexes)
        assert by_matcher(ids, matcher)[2:] == (len(text) - 3, len(text))
    # A place inside the text is not its beginning, though the matcher has forgotten what was.
    assert by_matcher(ids, matcher_of([], ["^aE"])) is None


@pytest.mark.parametrize("pattern", ["(", "[a", "*", "a{2,1}", "(?P<x>a)(?P<x>b)", "x*", "", "a?"])
def test_unusable_patterns_are_value_errors(pattern):
    with pytest.raises(ValueError) as caught:
        StopRegex(pattern)
    assert isinstance(caught.value, InvalidRequestError)
    assert "stop_regex" in str(caught.value) and repr(pattern) in str(caught.value)


def test_widths():
    assert [StopRegex(p).width for p in ("abc", r"\d{2,5}", "a|bcd", "a+")] == [
        3,
        5,
        3,
        MAX_REGEX_WINDOW,
    ]


def brute_held(text, strings):
    return max(
        (
            size
            for size in range(len(text) + 1)
            if any(len(s) > size and s.startswith(text[len(text) - size :]) for s in strings)
        ),
        default=0,
    )


@settings(max_examples=300, deadline=None)
@given(st.text("abc", max_size=12), st.lists(st.text("abc", min_size=1, max_size=6), max_size=3))
def test_held_back_is_the_longest_possible_beginning(text, strings):
    assert held_back(text, strings) == brute_held(text, strings)


def test_regexes_hold_back_what_a_match_could_include():
    assert held_back("hello", [], [StopRegex(r"\n\n")]) == 1
    assert held_back("hello", ["xyz"], [StopRegex("a|b")]) == 0
    assert held_back("x" * 200, [], [StopRegex("a+b")]) == MAX_REGEX_HOLD
    assert held_back("", ["abc"], [StopRegex("a+b")]) == 0
