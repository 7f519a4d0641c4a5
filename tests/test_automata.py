"""Automata on the device. Oracles: llguidance's masks, Python's regular expressions, and the
sampling parameter `regex`."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
import time

import jax.numpy as jnp
import numpy as np
import pytest
from llguidance import LLMatcher, LLTokenizer
from transformers import AutoTokenizer

import jaxserve
from jaxserve import InvalidRequestError, NotSupportedError, transforms
from jaxserve.automata import states, tokens
from jaxserve.automata.budget import Budget
from jaxserve.automata.characters import LAST, digits, others, ranges, spelling
from jaxserve.automata.pattern import parse
from jaxserve.automata.states import automaton
from jaxserve.automata.tokens import token_table
from jaxserve.text.vocabulary import token_bytes
from tests.api_fakes import metaspace_tokenizer
from tests.checkpoints import END_OF_TEXT, IM_END
from tests.prompts import ids
from tests.test_chains import OPTIONS, text
from tests.transform_context import buffer, context_at

PHONE = r"\([0-9]{3}\) [0-9]{3}-[0-9]{4}"
REGEXES = (
    PHONE,
    r"((25[0-5]|2[0-4][0-9]|1?[0-9]?[0-9])\.){3}(25[0-5]|2[0-4][0-9]|1?[0-9]?[0-9])",
    r'\{"name": "[^"\\\n]{1,12}", "age": (0|[1-9][0-9]{0,2})\}',
    r"(yes|no|maybe)( (yes|no|maybe))*",
    r"[A-Z][a-z ,]{3,40}\.",
    r"(?:a|b)*?c{2,4}|",
    r"\d+\s\w{1,5}",
    r"[^a-zA-Z\x00-\x20]{2,}",
    r"(?P<first>.)\n?.*",
    "[ü日🙂-🙏]{1,3}é?",
)


def tiny(tiny_models):
    return AutoTokenizer.from_pretrained(tiny_models("llama"))


@pytest.fixture(scope="module", params=["bytes", "pieces"])
def tokenizer(request, tiny_models):
    return tiny(tiny_models) if request.param == "bytes" else metaspace_tokenizer()


@pytest.mark.parametrize("regex", REGEXES)
def test_llguidance_allows_the_same_tokens(tokenizer, regex):
    """Behind every prefix of random texts. (Its masks leave out all but one token where the text
    can only go on in one way; asked about a token, it says what the expression does.)"""
    end, size = tokenizer.eos_token_id, len(tokenizer)
    written = token_bytes(tokenizer)
    plain = [text is not None and text.isascii() for text in written]
    table = token_table(regex, written, [end], 10)
    known = LLTokenizer(tokenizer.backend_tokenizer.to_str(), n_vocab=size, eos_token=[end])
    start = LLMatcher(known, LLMatcher.grammar_from_regex(regex), log_level=0)
    rng, seen = np.random.default_rng(0), 0
    for _ in range(6):
        matcher, state = start.deep_copy(), 0
        for _ in range(25):
            found = table.next[state, table.classes] >= 0
            expected = [bool(matcher.validate_tokens([token])) for token in range(size)]
            expected[end] = matcher.is_accepting()
            np.testing.assert_array_equal(found, expected)
            seen += 1
            # elsewhere llguidance may know letters of a newer Unicode
            choices = np.flatnonzero(found)
            if r"\w" in regex:
                choices = [each for each in choices if each == end or plain[each]]
            token = int(rng.choice(choices))
            state = table.next[state, table.classes[token]]
            if token == end:
                break
            assert matcher.consume_tokens([token])
    assert seen > 12


def matches(found, written):
    state = 0
    for byte in written.encode():
        state = found.next[state, found.classes[byte]]
    return state < len(found.accepts) and bool(found.accepts[state])


@pytest.mark.parametrize(
    ("regex", "letters"),
    [
        (r"(a|ab)(c|bcd)*(d*)", "abcd"),
        (r"(?:a{2,3}b?){2}|c{,2}|d{3,}", "abcd"),
        (r"a?b+?(?:c|(?P<n>d))*", "abcd"),
        (r"[^ab]\.?", "abé.\n"),
        (r".{2}", "a\n🙂é"),
        (r"[]a-c\-]+[^]]", "]a-b"),
        (r"\x41\u00e9|\t\\|[\d_]+", "Aé\t\\7_"),
        (r"", "a"),
        (r"a||b", "ab"),
    ],
)
def test_python_matches_the_same_texts(regex, letters):
    found = automaton(parse(regex), Budget(regex, 10))
    counts = set()
    for length in range(6):
        for written in map("".join, itertools.product(letters, repeat=length)):
            assert matches(found, written) == bool(re.fullmatch(regex, written)), written
            counts.add(matches(found, written))
    assert counts == {True, False}


@pytest.mark.long
def test_python_knows_the_same_digits_and_spaces():
    everything = "".join(map(chr, others(()) and [*range(0xD800), *range(0xE000, LAST + 1)]))
    for name in "dDsS":
        (set_,) = parse(f"\\{name}")
        expected = ranges((ord(x), ord(x)) for x in re.findall(f"\\{name}", everything))
        control = ranges([(0x1C, 0x1F)])  # spaces for Python, and not for Unicode
        if name == "s":
            assert ranges([*set_, *control]) == expected
        elif name == "S":
            assert set_ == ranges([*expected, *control])
        else:
            assert set_ == expected
    assert others(others(digits())) == digits()


def test_utf8_is_spelled_as_python_writes_it():
    rng = np.random.default_rng(0)
    for _ in range(20):
        edges = np.sort(rng.choice(3000, 8, replace=False)) + int(
            rng.choice([0, 2**11, 2**16 - 2000])
        )
        wanted = ranges(edges.reshape(-1, 2).tolist())
        found = set()

        def follow(part, before, found=found):
            for low, high, rest in part:
                for byte in range(low, high + 1):
                    if rest is None:
                        found.add(bytes([*before, byte]))
                    else:
                        follow(rest, (*before, byte))

        follow(spelling(wanted), ())
        codes = [code for low, high in wanted for code in range(low, high + 1)]
        assert found == {chr(code).encode() for code in codes}


def test_states_are_the_fewest():
    """(foo|bar|far)* and the like, counted by hand."""
    for regex, count in ((r"abc", 4), (r"(ab|cb)", 3), (r"a*", 1), (r"a{2,4}", 5), (r"[^x]", 9)):
        assert len(automaton(parse(regex), Budget(regex, 10)).accepts) == count, regex


def test_tokens_that_lead_nowhere_may_not_come():
    """Without a token for x there is no way behind "ab"."""
    known = [b"a", b"b", b"ab", b"c", None, b""]
    table = token_table(r"abx|ac|b?c", known, [4], 10)
    allowed = [table.next[0, kind] >= 0 for kind in table.classes]
    assert allowed == [True, True, False, True, False, False]
    behind = table.next[0, table.classes[0]]
    assert [table.next[behind, kind] >= 0 for kind in table.classes] == [0, 0, 0, 1, 0, 0]
    with pytest.raises(InvalidRequestError, match=r"regex='x': no text of these tokens matches"):
        token_table("x", known, [4], 10)


WRONG = [
    ("a(b", "character 3: a group is not closed"),
    ("a)b", "character 1: there is no '[(]' for this"),
    ("*a", "character 0: '[*]' repeats nothing"),
    ("a**", "what is repeated already must be in a group"),
    ("a{3,2}", "repeats at most 2 times and at least 3"),
    ("a{x}", r"expected \{m\}"),
    ("^a", r"all of the output matches: leave '\^' out"),
    (r"a\b", r"\\b is not supported"),
    (r"(a)\1", r"\\1 is not supported"),
    ("(?=a)", "look-around"),
    ("(?<!a)b", "look-around"),
    ("(?i)a", "flags and conditions"),
    ("(?P<1>a)", "'1' is no name of a group"),
    ("a*+", "possessive"),
    ("[a", "a class is not closed"),
    ("[[:alpha:]]", "classes inside classes"),
    ("[a&&b]", "operations such as &&"),
    ("[b-a]", "ends before it begins: b-a"),
    (r"[\d-z]", "from one character to another"),
    (r"\x4", "needs 2 hexadecimal digits"),
    (r"\p{L}", r"\\p is not supported"),
    ("(" * 70 + ")" * 70, "more than 64 groups"),
    ("[a-z]{100000}", "too large for an automaton: it needs more than 16,384 states"),
    ("((a{200}){200}){200}", "it needs more than 262,144 places"),
    (".*a.{16}", "more than 16,384 states"),
    ("[^\\x00-\\U0010ffff]", "no text of these tokens matches"),
]


@pytest.mark.parametrize(("regex", "message"), WRONG, ids=[regex[:12] for regex, _ in WRONG])
def test_what_is_no_automaton(regex, message):
    started = time.monotonic()
    with pytest.raises(InvalidRequestError, match=message) as caught:
        token_table(regex, [bytes([byte]) for byte in range(256)], [], 10)
    assert str(caught.value).startswith("regex=")
    assert time.monotonic() - started < 12


def test_bounds(monkeypatch):
    known = [bytes([byte]) for byte in range(256)]
    with pytest.raises(InvalidRequestError, match="takes more than 1e-09 seconds"):
        token_table("a", known, [], 1e-9)
    monkeypatch.setattr(tokens, "MOST_ENTRIES", 100)
    with pytest.raises(InvalidRequestError, match=r"more than 100 entries \(26 states"):
        token_table("a{25}", [b"a", b"aa", b"aaa", b"aaaa"], [], 10)
    assert states.MOST_STATES == 16_384


def test_tokenizers():
    with pytest.raises(NotSupportedError, match="fast tokenizers only, got 3"):
        transforms.automaton("a", 3)
    pieces = metaspace_tokenizer()
    with pytest.raises(InvalidRequestError, match=r"end_tokens must be .* got 99999"):
        transforms.automaton("a", pieces, [99999])
    with pytest.raises(InvalidRequestError, match="regex must be a string, got 3"):
        transforms.automaton(3, pieces)
    bare = metaspace_tokenizer()
    bare.eos_token = None
    with pytest.raises(InvalidRequestError, match="the tokenizer names none"):
        transforms.automaton("a", bare)


# -- the transform -------------------------------------------------------------------------------


def test_what_is_in_front_of_it(tiny_models):
    """Of what a filter has left it takes what it lets come; where that is nothing, the model's own
    logits count. A token that it has not let come is the end."""
    tokenizer = tiny(tiny_models)
    a, b, c, end = (*tokenizer.convert_tokens_to_ids(list("abc")), tokenizer.eos_token_id)
    vocab = len(tokenizer) + 5
    transform = transforms.automaton("[ab]+", tokenizer)
    raw = jnp.arange(vocab, dtype=jnp.float32)
    params = {name: jnp.asarray(table) for name, table in transform.tables.items()}
    context = context_at(buffer([]), 0, vocab=vocab, tables=params)
    context = dataclasses.replace(context, raw=raw)

    def left(logits, state):
        found = np.asarray(transform.apply(logits, state, params, context))
        return {int(token): float(found[token]) for token in np.flatnonzero(found > -np.inf)}

    start = transform.init(params)
    only = [
        token for token, text in enumerate(token_bytes(tokenizer)) if text and set(text) <= {97, 98}
    ]
    assert left(-raw, start) == {token: -token for token in only}
    assert left(jnp.where(raw == b, 2.5, -jnp.inf), start) == {b: 2.5}
    assert left(jnp.where(raw == c, 2.5, -jnp.inf), start) == {token: token for token in only}
    after = transform.observe(start, params, jnp.int32(a), jnp.float32(0))
    assert left(raw, after) == {token: token for token in [*only, end]}
    for wrong in (c, vocab - 1):
        ended = transform.observe(after, params, jnp.int32(wrong), jnp.float32(0))
        assert left(raw, ended) == {end: end}
    assert transform.observe(ended, params, jnp.int32(end), jnp.float32(0)) == ended


def test_tables_of_chains(tiny_models):
    tokenizer = tiny(tiny_models)
    one, other = (transforms.automaton(regex, tokenizer) for regex in ("a", "b"))
    assert transforms.chain(one, one).tables.keys() == one.tables.keys()
    assert transforms.joint(one, other).tables.keys() == {*one.tables, *other.tables}
    key = next(iter(one.tables))
    with pytest.raises(ValueError, match=r"have a table '.*', and these differ"):
        transforms.chain(one, other._replace(tables={key: np.zeros(3)}))


def test_two_in_a_chain_let_come_what_both_do(tiny_models):
    tokenizer = tiny(tiny_models)
    made = [transforms.automaton(regex, tokenizer) for regex in ("[ab]{6}", "(aa|bb|cc)*")]
    transform, written = transforms.chain(*made), token_bytes(tokenizer)
    params = {name: jnp.asarray(table) for name, table in transform.tables.items()}
    context = context_at(buffer([]), 0, vocab=len(tokenizer), tables=params)
    rng = np.random.default_rng(0)
    for _ in range(3):
        state, found = transform.init(params), b""
        while True:
            logits = transform.apply(jnp.zeros(len(tokenizer)), state, params, context)
            token = int(rng.choice(np.flatnonzero(np.asarray(logits) > -np.inf)))
            if token == tokenizer.eos_token_id:
                break
            found += written[token]
            state = transform.observe(state, params, jnp.int32(token), jnp.float32(0))
        assert re.fullmatch(b"(aa|bb){3}", found)


PROSE, CODES = r"[A-Z][a-z ,]{3,40}\.", r"([0-9]{3}-[a-f]{2} )*"
CODE = "000-aa "
SEEDED = {"max_new_tokens": 60, "sampling_seed": 3, "temperature": 1.5}


@pytest.fixture(scope="module")
def engine(tiny_models):
    """With few pages."""
    options = {**OPTIONS, "skip_tokenizer_init": False, "max_total_tokens": 160}
    with jaxserve.Engine(tiny_models("llama"), **options) as engine:
        make = functools.partial(transforms.automaton, tokenizer=engine.tokenizer)
        engine.register("prose", make(PROSE, end_tokens=[END_OF_TEXT, IM_END]))
        engine.register("codes", make(CODES))
        yield engine
        assert engine.get_server_info()["late_compiles"] == 0


@pytest.mark.slow
def test_tokens_are_those_of_the_sampling_parameter(engine):
    """In a batch with a plain row."""
    prompts = [text(seed, 20) for seed in range(4)]
    ways = [{**SEEDED, "sampling_seed": 5}, SEEDED, {**SEEDED, "temperature": 3.0}, SEEDED]
    asked = [{**ways[0], "regex": PROSE}, ways[1], *({**each, "regex": PROSE} for each in ways[2:])]
    rows = [{**each, "transform": "prose"} for each in ways]
    rows[1] = asked[1]
    found = engine.generate(input_ids=prompts, sampling_params=rows)
    assert ids(found) == ids(engine.generate(input_ids=prompts, sampling_params=asked))
    del found[1]
    ended = [r for r in found if r["meta_info"]["finish_reason"]["type"] == "stop"]
    assert ended and all(re.fullmatch(PROSE, result["text"]) for result in ended)


@pytest.mark.slow
def test_long_texts_and_samples(engine):
    """Retracted on the way; behind the end come ends alone."""
    params = {**SEEDED, "transform": "codes", "ignore_eos": True, "logit_bias": {"0": -3.0}}
    prompts = [text(200 + seed, 20) for seed in range(4)]
    results = engine.generate(input_ids=prompts, sampling_params=params)
    assert any(result["meta_info"]["num_retractions"] for result in results)
    results += engine.generate(input_ids=[3, 4], sampling_params={**params, "n": 3})
    end, lengths = engine.tokenizer.eos_token, set()
    for result in results:
        kept, *ends = engine.tokenizer.decode(result["output_ids"]).split(end)
        missing = CODE[len(kept) % len(CODE) :] if len(kept) % len(CODE) else ""
        assert re.fullmatch(CODES, kept + missing) and not any(ends)
        assert not (missing and ends)
        lengths.add(len(kept))
    assert len(lengths) > 1 and max(lengths) > 50
