"""Grammars: whatever a model of random weights says, all of it matches. Oracles: jsonschema,
Python's regular expressions, and a matcher that starts anew."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import json
import re
import threading
import time

import jsonschema
import numpy as np
import pytest
from llguidance import LLMatcher, LLTokenizer
from transformers import AutoTokenizer

import jaxserve
from jaxserve.errors import InvalidRequestError, NotSupportedError, RequestFailedError
from jaxserve.grammars.compiler import READERS, Compiled, Compiler
from jaxserve.grammars.grammars import Grammars
from jaxserve.grammars.library import MOST_KEPT, Library
from jaxserve.sampling_params import Grammar, SamplingParams
from jaxserve.server_args import ServerArgs
from jaxserve.text.codec import Codec
from jaxserve.transforms import Transform
from tests import inside
from tests.api_fakes import metaspace_tokenizer
from tests.checkpoints import END_OF_TEXT, IM_END, VOCAB
from tests.prompts import ids
from tests.schemas import REFUSED, SCHEMAS
from tests.settled import settled
from tests.test_chains import OPTIONS

pytestmark = pytest.mark.usefixtures("exact_products", "kept_programs")
TEXTS = {
    **OPTIONS,
    "skip_tokenizer_init": False,
    "constrained_json_disable_any_whitespace": True,
    "random_seed": 0,
}
ENDS = {END_OF_TEXT, IM_END}
LAYOUT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""What the engine's option says to llguidance."""


@pytest.fixture(scope="module")
def folder(tiny_models):
    return tiny_models("llama")


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def engine(folder):
    with settled(folder, **TEXTS) as engine:
        yield engine


@pytest.fixture(scope="module")
def closing(tokenizer):
    """Biases towards what ends strings, lists and objects, or a random model never would."""
    return {str(tokenizer.convert_tokens_to_ids(text)): 3.0 for text in ('"', "]", "}")} | {
        str(token): 3.0 for token in ENDS
    }


@pytest.fixture(scope="module")
def fresh(tokenizer):
    """A matcher of a grammar of llguidance, at its beginning."""
    serialized = tokenizer.backend_tokenizer.to_str()
    tokens = LLTokenizer(serialized, n_vocab=VOCAB, eos_token=sorted(ENDS))
    return lambda grammar: LLMatcher(tokens, grammar, log_level=0)


def written(result, matcher):
    """The text of a result, of which a matcher allows every token; None where the length ended it.
    What the end of text ended is whole."""
    tokens, reason = result["output_ids"], result["meta_info"]["finish_reason"]
    if reason["type"] == "length":
        assert matcher.try_consume_tokens(tokens) == len(tokens)
        return None
    assert reason == {"type": "stop", "matched": tokens[-1]} and tokens[-1] in ENDS
    assert matcher.try_consume_tokens(tokens[:-1]) == len(tokens) - 1
    assert matcher.is_accepting()
    return result["text"]


# -- JSON schemas ----------------------------------------------------------------------------------

FORMATS = jsonschema.FormatChecker(["date", "email", "ipv4", "ipv6", "uuid"])
PATTERNS = {
    "duration": r"P(?!$)(\d+W|(\d+Y)?(\d+M)?(\d+D)?(T(?=\d)(\d+H)?(\d+M)?(\d+S)?)?)",
    "hostname": r"[a-zA-Z0-9]([a-zA-Z0-9-]{0,61}[a-zA-Z0-9])?(\.[a-zA-Z0-9-]{1,63})*",
    "uri": r"[a-zA-Z][a-zA-Z0-9+.-]*:[!-~]*",
}
for _name, _pattern in PATTERNS.items():
    FORMATS.checks(_name)(re.compile(_pattern).fullmatch)


@FORMATS.checks("time", raises=ValueError)
def is_time(text):
    """Of RFC 3339, with leap seconds."""
    return datetime.time.fromisoformat(re.sub(r":60(?=[.zZ+-])|\.\d+", "", text).upper()).tzinfo


@FORMATS.checks("date-time", raises=ValueError)
def is_date_time(text):
    day, time_of_day = re.split("[tT]", text)
    return datetime.date.fromisoformat(day) and is_time(time_of_day)


@pytest.fixture(scope="module")
def share():
    """How many completions of schemas there were, and how many of them were whole."""
    counts = [0, 0]
    yield counts
    assert counts[1] >= 0.6 * counts[0]


@pytest.mark.parametrize("name", SCHEMAS)
def test_schemas(engine, closing, fresh, share, name):
    schema = SCHEMAS[name]
    text = json.dumps(schema)
    params = {"max_new_tokens": 60, "logit_bias": closing, "json_schema": text}
    results = [engine.generate("Once", {**params, "temperature": 0, "ignore_eos": True})]
    results += engine.generate("A list:", {**params, "n": 4, "json_schema": schema})
    grammar = LLMatcher.grammar_from_json_schema(text, defaults=LAYOUT)
    for result in results:
        found = written(result, fresh(grammar))
        share[0] += 1
        if found is not None:
            share[1] += 1
            value = json.loads(found)
            jsonschema.Draft202012Validator(schema, format_checker=FORMATS).validate(value)


def test_there_are_sixty_schemas_and_a_checker_that_sees_mistakes():
    assert len(SCHEMAS) == 60
    for name, wrong in {
        "date-time": "2024-02-30T10:00:00Z", "time": "25:00:00Z", "duration": "P", "uri": "a b",
        "hostname": "-a", "uuid": "1", "email": "a",
    }.items():  # fmt: skip
        assert not jsonschema.Draft202012Validator(
            {"format": name}, format_checker=FORMATS
        ).is_valid(wrong)


@pytest.mark.parametrize("name", REFUSED)
def test_what_schemas_may_not_have_is_named(engine, name):
    schema, said = REFUSED[name]
    text = schema if isinstance(schema, str) else json.dumps(schema)
    with pytest.raises(
        InvalidRequestError, match=r"^Invalid grammar request: json_schema="
    ) as info:
        engine.generate("x", {"json_schema": text})
    assert said in str(info.value)


def test_any_json(engine, closing):
    for given in ("$$ANY$$", "true", {}):
        params = {"json_schema": given, "logit_bias": closing, "max_new_tokens": 40}
        for result in engine.generate("x", {**params, "n": 3, "sampling_seed": 3}):
            if result["meta_info"]["finish_reason"]["type"] == "stop":
                json.loads(result["text"])


@pytest.mark.parametrize(
    ("options", "allowed", "denied"),
    [
        ({}, '{ "a" :1,\n"b": [] }', '{"a":1 "b"'),
        ({"constrained_json_disable_any_whitespace": True}, '{"a": 1, "b": []}', '{"a":1'),
        ({"constrained_json_whitespace_pattern": "_?"}, '{_"a":1,"b":[]_}', '{ "'),
    ],
    ids=str,
)
def test_whitespace(tokenizer, options, allowed, denied):
    """Of the grammar, and of the JSON within a structural tag."""
    schema = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "array"}}}
    tag = {"structures": [{"begin": "<j>", "schema": schema, "end": ""}], "triggers": ["<j"]}
    compiler = Compiler(ServerArgs("m", **options), Codec(tokenizer), VOCAB, ENDS)
    for kind, value, begin in (("json_schema", schema, ""), ("structural_tag", tag, "hm <j>")):
        start = compiler.compile(Grammar(kind, json.dumps(value))).matcher
        for text, fits in ((begin + allowed, True), (begin + denied, False)):
            tokens = tokenizer.encode(text)
            assert (start.deep_copy().try_consume_tokens(tokens) == len(tokens)) == fits


# -- other grammars --------------------------------------------------------------------------------

REGEXES = (
    r"\d{3}-\d{4}", r"(yes|no|may\s?be)!*", r"[A-Z][a-z ,]{10,40}\.", r"^(0x[0-9a-f]{1,4};){2}$",
    r"(?i)hello( w[a-z]*)?", r"[^Wd_]{2,6}", r"ä?(日本|🙂){1,3}", r"(a|aa)+b{1,50}",
    r"((x{1,9}){1,9}y?){1,9}", r"a[^b]?c", r'"(\\.|[^"\\])*"', r"[äöüß]{3}|\x41\u00e9",
)  # fmt: skip


@pytest.mark.parametrize("regex", REGEXES)
def test_regexes(engine, closing, fresh, regex):
    params = {"regex": regex, "max_new_tokens": 50, "n": 4, "logit_bias": closing}
    results = engine.generate("Say", params)
    for result in results:
        text = written(result, fresh(LLMatcher.grammar_from_regex(regex)))
        assert text is None or re.fullmatch(regex, text)


ARITHMETIC = """
root ::= sum
sum ::= product (("+" | "-") product)*
product ::= value ("*" value)?
value ::= [1-9] [0-9]? | "(" sum ")"
"""


def test_ebnf(engine, closing, tokenizer):
    """Recursive, in GBNF and in Lark."""
    lark = 'start: NAME ("=" NAME)*\nNAME: /[a-c]{1,3}/'
    params = {"max_new_tokens": 60, "n": 4, "logit_bias": closing}
    sums = engine.generate("1+1", {"ebnf": ARITHMETIC, **params})
    whole = [x["text"] for x in sums if x["meta_info"]["finish_reason"]["type"] == "stop"]
    assert whole and all(isinstance(eval(text), int) for text in whole)
    for result in engine.generate("a", {"ebnf": lark, **params}):
        assert re.fullmatch("[a-c]{1,3}(=[a-c]{1,3})*=?", result["text"])


def test_structural_tags(engine, closing, tokenizer):
    """Free text until a trigger, then one of the structures that begin with it."""
    point, flag = SCHEMAS["const in a record"], {"type": "boolean"}
    tag = {
        "structures": [
            {"begin": "<point>", "schema": point, "end": "</fn>"},
            {"begin": "<flag>", "schema": flag, "end": "</fn>"},
            {"begin": "##", "schema": flag, "end": "!"},
        ],
        "triggers": ["<", "#", "##"],
    }
    params = {"structural_tag": json.dumps(tag), "max_new_tokens": 40, "n": 4}
    for trigger, pattern in {
        "<": r"<(flag>(true|false)|point>\{.*\})</fn>",
        "#": r"##(true|false)!",
    }.items():
        often = {**closing, str(tokenizer.convert_tokens_to_ids(trigger)): 14.0}
        results = engine.generate("x", {**params, "logit_bias": often})
        for result in results:
            found = re.split("(?=<[pf]|##)", result["text"])[1:-1]
            assert all(re.match(pattern, text) for text in found), result["text"]
        assert any(re.search(pattern, result["text"]) for result in results)


def test_a_special_token_can_be_the_trigger(tokenizer):
    tag = {
        "structures": [{"begin": "<|im_start|>go ", "schema": {"type": "null"}, "end": "."}],
        "triggers": ["<|im_start|>"],
    }
    compiler = Compiler(ServerArgs("m"), Codec(tokenizer), VOCAB, ENDS)
    start = compiler.compile(Grammar("structural_tag", json.dumps(tag))).matcher
    for text in ("well <|im_start|>go null. <", "<|im_start|>go"):
        tokens = tokenizer.encode(text)
        assert start.deep_copy().try_consume_tokens(tokens) == len(tokens)
    assert start.deep_copy().try_consume_tokens(tokenizer.encode("<|im_start|>stop")) < 3


# -- beside everything else ------------------------------------------------------------------------

WORD = {"regex": "[XZQ]{6}", "max_new_tokens": 12}
"""Of letters that no token has two of."""


def test_free_rows_are_undisturbed_and_guided_ones_do_not_depend_on_them(engine, closing):
    free = {"max_new_tokens": 20, "temperature": 0.8, "sampling_seed": 4, "ignore_eos": True}
    schema = json.dumps(SCHEMAS["person"])
    guided = {"json_schema": schema, "max_new_tokens": 40, "sampling_seed": 5, "top_p": 0.9}
    prompts, params = ["One", "Two", "Three", "Four"], [free, guided, WORD | {"top_k": 3}, free]
    params[2]["sampling_seed"] = 6
    alone = [engine.generate(*each) for each in zip(prompts, params, strict=True)]
    assert ids(engine.generate(prompts, params)) == ids(alone)


def test_logprobs_are_those_of_the_allowed_tokens(engine, tokenizer):
    meta = engine.generate("x", WORD, return_logprob=True, top_logprobs_num=30)["meta_info"]
    allowed = [set(tokenizer.convert_tokens_to_ids(list("XZQ")))] * 6 + [ENDS]
    for chosen, best, tokens in zip(
        meta["output_token_logprobs"], meta["output_top_logprobs"], allowed, strict=True
    ):
        finite = [(logprob, token) for logprob, token, _ in best if logprob > -1e9]
        assert sum(np.exp(logprob) for logprob, _ in finite) == pytest.approx(1, abs=1e-4)
        assert {token for _, token in finite} == tokens and chosen[1] in tokens


def test_with_transforms_and_processors(engine, tokenizer):
    """They change the logits of what the grammar allows: a processor before the chain."""
    x, z, q = (tokenizer.convert_tokens_to_ids(letter) for letter in "XZQ")

    class NeverX:
        def __call__(self, logits, params):
            assert np.isneginf(logits[:, x + 1 :]).sum() > 300
            logits[:, x] = -np.inf
            return logits

    def apply(logits, state, params, context):
        return logits.at[z].add(params["more"])

    engine.register("more", Transform(apply, params={"more": 0.0}))
    params = {**WORD, "transform": "more", "transform_params": {"more": 60.0}}
    assert engine.generate("x", params)["output_ids"][:6] == [z] * 6
    params["transform_params"] = {"more": -60.0}
    result = engine.generate("x", params, custom_logit_processor=NeverX())
    assert result["output_ids"][:6] == [q] * 6


def test_streams_and_stop_strings(engine):
    regex = "(ab|cd){20}"
    params = {"regex": regex, "max_new_tokens": 60, "n": 2, "sampling_seed": 1}
    whole = engine.generate("x", params)
    last = {}
    for chunk in engine.generate("x", params, stream=True):
        last[chunk["index"]] = chunk
    assert [last[index]["output_ids"] for index in (0, 1)] == ids(whole)
    assert all(re.fullmatch(regex, result["text"]) for result in whole)
    text = whole[0]["text"]
    stopped = engine.generate("x", {**params, "n": 1, "stop": "cd"})
    assert stopped["text"] == text[: text.index("cd")]
    assert stopped["meta_info"]["finish_reason"] == {"type": "stop", "matched": "cd"}


@pytest.mark.parametrize(
    ("params", "tokens"),
    [
        ({}, 6),
        ({"ignore_eos": True}, 6),
        ({"min_new_tokens": 3}, 6),
        ({"min_new_tokens": 10}, 6),  # nothing can follow
        ({"ignore_eos": True, "min_new_tokens": 10, "stop_token_ids": [5]}, 6),
        ({"max_new_tokens": 4}, 4),
        ({"max_new_tokens": 6}, 6),
    ],
    ids=str,
)
def test_the_end_of_a_grammar_ends_the_request(engine, params, tokens):
    result = engine.generate("x", {**WORD, **params})
    limit = params.get("max_new_tokens", 12)
    if limit <= tokens:
        assert result["meta_info"]["finish_reason"] == {"type": "length", "length": limit}
        assert re.fullmatch(f"[XZQ]{{{limit}}}", result["text"])
    else:
        assert result["output_ids"][-1] in ENDS and len(result["output_ids"]) == tokens + 1
        matched = {"type": "stop", "matched": result["output_ids"][-1]}
        assert result["meta_info"]["finish_reason"] == matched
        assert re.fullmatch("[XZQ]{6}", result["text"])


def test_no_end_comes_before_min_new_tokens(engine):
    often = {str(token): 60.0 for token in ENDS}
    params = {"regex": "[XZQ]{2,9}", "max_new_tokens": 12, "logit_bias": often}
    for least in (0, 5):
        result = engine.generate("x", {**params, "min_new_tokens": least})
        assert len(result["output_ids"]) == max(least, 2) + 1


@pytest.mark.parametrize(
    ("options", "retracts"),
    [
        ({"max_total_tokens": 160, "num_continuous_decode_steps": 4}, True),
        ({"max_total_tokens": 160, "disable_overlap_schedule": True}, True),
        (
            {
                "max_total_tokens": 192,
                "enable_deterministic_inference": True,
                "cuda_graph_bs": None,
                "chunked_prefill_size": None,
            },
            True,
        ),
    ],
    ids=str,
)
def test_retraction(folder, engine, fresh, options, retracts):
    """The matcher follows tokens that are decoded again, and those that the host kept."""
    regex = "(?:[a-f]{3}-){12}[0-9]{4}"
    params = {"regex": regex, "max_new_tokens": 70, "ignore_eos": True, "sampling_seed": 8}
    prompts = [f"Number {row} of them, with a longer prompt" for row in range(4)]
    with jaxserve.Engine(folder, **{**TEXTS, **options}) as small:
        results = small.generate(prompts, params)
        repeated = small.generate(prompts, params)
    for result in results:
        assert re.fullmatch(regex, written(result, fresh(LLMatcher.grammar_from_regex(regex))))
    assert retracts == any(result["meta_info"]["num_retractions"] for result in results)
    assert ids(repeated) == ids(results)


def test_prefixes_are_shared(engine):
    prompt = "A prompt that is long enough to have some pages of its own, twice or more. " * 2
    engine.generate(prompt, {"max_new_tokens": 1})
    result = engine.generate(prompt, WORD)
    assert result["meta_info"]["cached_tokens"] > 0 and re.fullmatch("[XZQ]{6}", result["text"])


# -- mistakes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("params", "said"),
    [
        ({"regex": "("}, "unclosed group"),
        ({"regex": "a(?=b)"}, "look-around"),
        ({"regex": r"(a)\1"}, "backreferences"),
        ({"ebnf": "root := 'a'"}, "GBNF"),
        ({"ebnf": "root ::= root"}, "never come to an end"),
        ({"ebnf": "root ::= " + "(" * 5000}, "recursion"),
        ({"structural_tag": "["}, "not valid JSON"),
        ({"structural_tag": "[]"}, "must be a JSON object"),
        ({"structural_tag": '{"type": "structural_tag", "format": {}}'}, "'format'"),
        ({"structural_tag": '{"structures": [], "triggers": ["<"]}'}, "'structures'"),
        ({"structural_tag": '{"structures": [1], "triggers": ["<"]}'}, "a structure must"),
        (
            {
                "structural_tag": '{"structures": [{"begin": "<", "schema": 1, "end": ""}], '
                '"triggers": ["<"]}'
            },
            "'schema', an object",
        ),
        (
            {
                "structural_tag": '{"structures": [{"begin": "<", "schema": {}, "end": ""}], '
                '"triggers": ["<a"]}'
            },
            "begin='<' starts with none",
        ),
    ],
    ids=lambda value: str(value)[:40],
)
def test_no_grammar(engine, params, said):
    """Is an error of the call, that names the row; a call beside it goes on."""
    (kind,) = params
    expected = rf"^in row 1 of the batch: Invalid grammar request: {kind}="
    for _ in range(2):  # the second time it is known
        with pytest.raises(InvalidRequestError, match=expected) as info:
            engine.generate(["x", "y"], [{}, {**params, "max_new_tokens": 4}])
        assert said in str(info.value) and "backtrace" not in str(info.value)


def test_what_takes_too_long(engine, monkeypatch):
    """Fails that call. Others go on meanwhile; it is compiled to its end, and with more patience
    there."""
    free, calls = threading.Event(), []

    def slow(text, dialect):
        calls.append(text)
        assert free.wait(60)
        return READERS["regex"](text, dialect)

    monkeypatch.setattr("jaxserve.grammars.compiler.READERS", {**READERS, "regex": slow})
    monkeypatch.setattr(inside.grammars(engine), "_args", ServerArgs("m", grammar_timeout=0.2))
    params = {"regex": "[xy]{5}!", "max_new_tokens": 9}
    started = time.monotonic()
    said = "^in row 1 of the batch: Grammar preprocessing timed out: regex=.*grammar_timeout=0.2"
    for _ in range(2):
        with pytest.raises(InvalidRequestError, match=said):
            engine.generate(["a", "b"], [{}, params])
    assert time.monotonic() - started < 30

    async def beside():
        """The event loop is not held up either."""
        call = asyncio.ensure_future(engine.async_generate("a", params))
        plain = await engine.async_generate("a", {"ebnf": 'root ::= "no"', "max_new_tokens": 9})
        assert plain["text"] == "no" and not call.done()
        free.set()
        return await call

    monkeypatch.setattr(inside.grammars(engine), "_args", ServerArgs("m", grammar_timeout=60))
    assert re.fullmatch("[xy]{5}!", asyncio.run(beside())["text"])
    monkeypatch.setattr(inside.grammars(engine), "_args", ServerArgs("m", grammar_timeout=0.01))
    with pytest.raises(InvalidRequestError, match=r"timed out: .*grammar_timeout=0.01"):
        engine.generate("a", params)
    assert calls == ["[xy]{5}!"]


HARD = {
    "rules": "start: r0\n" + "\n".join(f"r{i}: r{i + 1}" for i in range(4000)) + '\nr4000: "a"',
    "repetitions": "start: T0\n"
    + "\n".join(f'T{i}: (T{i + 1} "b"?)+' for i in range(1200))
    + '\nT1200: "a"',
    "choices": "start: " + '"a" | ' * 10_000 + '"b"',
    "ambiguous": 'root ::= root root | "a" | "aa" | ("a" "a"?)* root',
}


@pytest.mark.parametrize("name", HARD)
def test_hard_grammars_cost_at_most_their_request(engine, name):
    """None ends the process, which those whose rules follow each other deeply did."""
    started = time.monotonic()
    with contextlib.suppress(InvalidRequestError, RequestFailedError):
        assert engine.generate("x", {"ebnf": HARD[name], "max_new_tokens": 30})["text"][:1] in "ab"
    assert time.monotonic() - started < 30
    assert engine.generate("x", WORD)["meta_info"]["completion_tokens"] == 7


def test_forty_requests_with_mistakes_beside_them(engine, closing, fresh):
    """Every kind of mistake costs its call; all others are as they are alone."""
    names = [*SCHEMAS][:20]
    params = [
        {"max_new_tokens": 30, "sampling_seed": row, "logit_bias": closing} for row in range(40)
    ]
    for row, name in enumerate(names):
        params[2 * row]["json_schema"] = SCHEMAS[name]
    prompts = [f"Number {row}" for row in range(40)]
    alone = engine.generate(prompts, params)
    found = []
    thread = threading.Thread(target=lambda: found.extend(engine.generate(prompts, params)))
    thread.start()
    mistakes = [{"json_schema": REFUSED["endless"][0]}, {"json_schema": REFUSED["not"][0]}]
    mistakes += [{"regex": "("}, {"ebnf": HARD["choices"]}]
    mistakes += [{"ebnf": 'root ::= "ab" x\nx ::= x | x "a"'}]
    for mistake in mistakes * 2:
        with pytest.raises((InvalidRequestError, RequestFailedError), match=r"grammar"):
            engine.generate("y", mistake)
    thread.join(120)
    assert ids(found) == ids(alone)
    for result, name in zip(found[::2], names, strict=True):
        grammar = LLMatcher.grammar_from_json_schema(json.dumps(SCHEMAS[name]), defaults=LAYOUT)
        written(result, fresh(grammar))


def test_a_task_that_is_cancelled_while_its_grammar_is_compiled(engine, monkeypatch):
    """Leaves nothing behind: its id is free again."""
    free = threading.Event()

    def slow(text, dialect):
        assert free.wait(60)
        return READERS["regex"](text, dialect)

    monkeypatch.setattr("jaxserve.grammars.compiler.READERS", {**READERS, "regex": slow})
    params = {"regex": "[uv]*", "max_new_tokens": 200, "ignore_eos": True}

    async def cancelled():
        task = asyncio.ensure_future(engine.async_generate("a", params, rid="once"))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        free.set()

    asyncio.run(cancelled())
    deadline = time.monotonic() + 60
    while not engine.flush_cache().success:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert engine.generate("a", {**params, "max_new_tokens": 3}, rid="once")


def test_a_slow_mask_fails_its_request(tokenizer, monkeypatch):
    compiler = Compiler(ServerArgs("m"), Codec(tokenizer), VOCAB, ENDS)
    asked = Grammar("regex", "a+")
    ours = grammars({}, Codec(tokenizer))
    spec = ours.spec(asked, ours.ask(asked))
    monkeypatch.setattr("jaxserve.grammars.compiler.SLOWEST_MASK", 0.0)
    monkeypatch.setattr("jaxserve.grammars.guide.SLOWEST_MASK", 0.0)
    assert "too complex" in compiler.compile(asked).refusal
    request = type("Asks", (), {"params": SamplingParams(), "stop_ids": frozenset(ENDS)})
    with pytest.raises(RequestFailedError, match=r"grammar regex='a\+': it is too complex"):
        spec.guide(request).mask([], np.full(VOCAB // 32, -1, np.int32))


def test_a_grammar_that_fails_later_costs_its_request(engine, caplog):
    """Rules that never end, behind a beginning; the request beside it goes on."""
    started, found = threading.Event(), []

    def run():
        params = {"max_new_tokens": 150, "ignore_eos": True, "regex": "[ab]*"}
        for chunk in engine.generate("x", params, stream=True):
            found[:] = chunk["output_ids"]
            started.set()

    thread = threading.Thread(target=run)
    thread.start()
    assert started.wait(60)
    params = {"ebnf": 'root ::= "abcabc" x\nx ::= x', "max_new_tokens": 20}
    for _ in range(2):
        with pytest.raises(RequestFailedError, match=r"at its grammar ebnf=.*never come to"):
            engine.generate("y", params)
    thread.join(120)
    assert len(found) == 150 or found[-1] in ENDS
    assert "a guide of request" in caplog.text


def grammars(options, codec, vocab_size=VOCAB, ends=ENDS):
    return Grammars(ServerArgs("m", **options), codec, vocab_size, ends)


def test_where_there_are_no_grammars(tokenizer, monkeypatch):
    asked, codec = Grammar("regex", "a+"), Codec(tokenizer)
    with pytest.raises(NotSupportedError, match="not supported with grammar_backend='none'"):
        grammars({"grammar_backend": "none"}, codec).ask(asked)
    with pytest.raises(InvalidRequestError, match=r"^regex='a\+'.*skip_tokenizer_init"):
        grammars({}, None).ask(asked)
    with pytest.raises(InvalidRequestError, match="a token that ends a text"):
        grammars({}, codec, ends=[VOCAB]).ask(asked)
    monkeypatch.setattr(codec, "serialized", lambda: None)
    with pytest.raises(NotSupportedError, match="fast tokenizer"):
        grammars({}, codec).ask(asked)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(NotSupportedError, match=r"^regex='a\+': .*jaxserve\[grammar\]"):
        grammars({}, codec).ask(asked)
    with pytest.raises(NotSupportedError, match=r"pip install jaxserve\[grammar\]"):
        grammars({"grammar_backend": "llguidance"}, codec)
    with pytest.warns(UserWarning, match="grammar_backend='xgrammar'"):
        assert ServerArgs("m", grammar_backend="xgrammar").grammar_backend == "xgrammar"


def test_the_tokenizer_is_read_when_it_is_wanted(tokenizer):
    codec = Codec(tokenizer)
    lazy, eager = grammars({}, codec), grammars({"grammar_backend": "llguidance"}, codec)
    assert lazy._compiler is None and eager._compiler is not None
    lazy.ask(Grammar("regex", "a"))
    assert lazy._compiler is not None


def test_vocabularies_of_other_sizes(tokenizer):
    """Numbers of the model that no token has are forbidden, and so are tokens that it lacks."""
    for size in (VOCAB + 100, VOCAB - 30):
        ours = grammars({}, Codec(tokenizer), vocab_size=size)
        asked = Grammar("regex", ".*")
        spec = ours.spec(asked, ours.ask(asked))
        request = type("Asks", (), {"params": SamplingParams(), "stop_ids": frozenset(ENDS)})
        bits = np.full(-(-size // 32), -1, np.int32)
        spec.guide(request).mask([], bits)
        allowed = np.flatnonzero(np.unpackbits(bits.view(np.uint8), bitorder="little"))
        assert len(allowed) > 200 and allowed.max() < VOCAB


def test_tokenizers_with_byte_tokens():
    """SentencePiece's, where spaces are letters and rare characters bytes."""
    tokenizer = metaspace_tokenizer()
    end, text = tokenizer.eos_token_id, "Rome is, é"
    compiler = Compiler(ServerArgs("m"), Codec(tokenizer), len(tokenizer), [end])
    tokens = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(tokens) == text
    matcher = compiler.compile(Grammar("regex", "[A-Z][a-z, ]+é")).matcher.deep_copy()
    assert matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()


def test_a_guide_goes_back(tokenizer):
    """Outputs that are shorter than before: of a request that decodes again."""
    ours, asked = grammars({}, Codec(tokenizer)), Grammar("regex", "abcabc")
    spec = ours.spec(asked, ours.ask(asked))
    request = type("Asks", (), {"params": SamplingParams(), "stop_ids": frozenset(ENDS)})
    guide, text = spec.guide(request), [tokenizer.convert_tokens_to_ids(x) for x in "abcabc"]
    for length in (0, 1, 4, 2, 0, 6, 5):
        bits = np.full(VOCAB // 32, -1, np.int32)
        guide.mask(text[:length], bits)
        allowed = np.flatnonzero(np.unpackbits(bits.view(np.uint8), bitorder="little")).tolist()
        assert set(allowed) == ({text[length]} if length < 6 else ENDS)
    with pytest.raises(RequestFailedError, match="after 3 tokens, at its grammar regex='abcabc'"):
        guide.mask([text[0]] * 3, bits)
    assert spec.failed.args == (asked,)


def test_the_library_compiles_once_and_forgets_the_oldest():
    begun, free = [], threading.Event()

    def compile(grammar):
        begun.append(grammar)
        assert free.wait(60)
        if grammar.text == "fails":
            raise ZeroDivisionError("no")
        return Compiled(None, grammar.text, 0.0)

    library, stack = Library(compile), threading.stack_size()
    first = Grammar("regex", "first")
    futures = {library.ask(first) for _ in range(3)}
    free.set()
    assert threading.stack_size() == stack
    assert len(futures) == 1 and futures.pop().result(60).refusal == "first"
    with pytest.raises(ZeroDivisionError):
        library.ask(Grammar("regex", "fails")).result(60)
    with pytest.raises(ZeroDivisionError):
        library.ask(Grammar("regex", "fails")).result(60)
    for number in range(MOST_KEPT - 1):
        library.ask(Grammar("regex", str(number))).result(60)
        library.ask(first)
    assert begun.count(first) == 1
    for number in range(MOST_KEPT):
        library.ask(Grammar("ebnf", str(number))).result(60)
    library.ask(first).result(60)
    assert begun.count(first) == 2 and begun.count(Grammar("regex", "fails")) == 2
