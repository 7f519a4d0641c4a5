"""Random calls to an engine: an answer or a JaxserveError, quickly, and the engine is as before.

python -m tests.fuzz.calls --count 2000 --seed 1
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import dataclasses
import itertools
import random
import resource
import tempfile
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np

import jaxserve
from jaxserve.errors import JaxserveError
from tests.checkpoints import VOCAB, make_checkpoint

SECONDS = 10.0
"""A call may take, on a machine that does other things too."""
MEBIBYTES = 500
"""All calls together may take beyond what the engine had after its first answer."""
SHOWN = 20
"""Calls that broke a rule, after which no more are made."""
MESSAGE = 10_000
"""Characters of an error's message at most."""
OPTIONS = {
    "context_length": 192, "max_running_requests": 8, "max_queued_requests": 64,
    "max_total_tokens": 1024, "chunked_prefill_size": 64, "page_size": 16, "dtype": "float32",
    "cuda_graph_bs": [1, 8], "precompile": False,
}  # fmt: skip
CANARY = {"temperature": 0, "max_new_tokens": 6, "ignore_eos": True}
CANARY_IDS = [9, 30, 7, 200]

NUMBERS = (
    0, 1, 2, 3, 7, -1, -2, 0.5, 1.0, 1.5, -0.0, 1e-7, 1e-38, 1e-46, 1e38, 3.5e38, 1e300,
    float("inf"), float("nan"), 2**31, 2**32, 2**63, 2**64, -(2**63), 10**30, 10**400, 100, 1000,
    10**6, np.float32(0.25), np.int64(3), np.array(2), np.array([1]), True, False, np.bool_(True),
    "1", "0.5", "many", None, [], [1], {}, (), b"1", 1j,
)  # fmt: skip
WORDS = (
    "The capital of France is", "a", " ", "\n", "\x00", "é日本🙂", "\ud800", "a\udfffb", "",
    "<|im_end|>", "<|im_start|>user\nhi<|im_end|>", "x" * 5000, "\u202e\u0301" * 40, "{{ 7 * 7 }}",
    "{% for i in range(10**9) %}a{% endfor %}", "../../etc/passwd", "%s%n", "$$ANY$$",
)  # fmt: skip
PATTERNS = (
    "a", "[a-z]+ly", "(a+)+$", "((?:.|\n)+)+\x00$", "(", "[", "(?P<n>a)(?P<n>b)", "\\", "a{1000}",
    "(((a{50}){50}){50})", "", "^", ".*", "(?<=a)b", "\\d{3,}", "(x+x+)+y", "(?i)THE", "\ud800",
)  # fmt: skip


class Odd:
    """An object that no argument takes, and that resists being shown."""

    def __repr__(self) -> str:
        raise RuntimeError("no picture of me")


def deep(depth: int = 3000) -> list[Any]:
    nested: list[Any] = []
    for _ in range(depth):
        nested = [nested]
    return nested


GOOD: dict[str, tuple[Any, ...]] = {
    "temperature": (0, 0.7, 1.3), "top_p": (0.5, 0.95, 1), "top_k": (-1, 1, 20), "min_p": (0, 0.1),
    "frequency_penalty": (0.5, -1), "presence_penalty": (0.5, 1), "repetition_penalty": (0.9, 1.2),
    "max_new_tokens": (0, 1, 8), "min_new_tokens": (0,), "n": (1, 2), "sampling_seed": (3, -7),
    "stream_interval": (1, 4), "ignore_eos": (True, False), "skip_special_tokens": (False,),
    "no_stop_trim": (True,), "spaces_between_special_tokens": (True,), "custom_params": (None, {}),
    "json_schema": (None, "", {"type": "integer"}, "["), "regex": (None, "a{2,5}", "("),
    "ebnf": ("", 'root ::= "a" root?'), "structural_tag": (None, "{}"),
}  # fmt: skip
"""Sampling parameters, and values that they may have."""
STRANGE = (
    None, True, [], {}, (), set(), object(), Odd(), lambda: 1, b"bytes", bytearray(3), 3.5, 1j,
    range(5), range(10**9), np.zeros((2, 3)), np.zeros(0, np.int32), np.array(["a", "b"]),
    np.array("a"), Path("x"), [None], [[]], [[[]]], {"a": 1}, [{"a": 1}], Ellipsis, type, "text",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Call:
    """method: of Engine. how: what is done with what it gives (see `perform`)."""

    method: str
    how: str
    arguments: dict[str, Any]


class Calls:
    """Draws calls. Most have one or two things wrong, some nothing."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def draw(self) -> Call:
        pick = self.random
        method = pick.choices(
            ("generate", "async_generate", "chat", "abort_request", "get_server_info",
             "flush_cache"), (10, 4, 4, 1, 0.3, 0.3),
        )[0]  # fmt: skip
        if method == "chat":
            return Call(method, self._how(), self._chat())
        if method in ("generate", "async_generate"):
            return Call(method, self._how(), self._generate())
        arguments = {}
        if method == "abort_request":
            arguments = {
                "rid": self._maybe("r1", STRANGE),
                "abort_all": self._maybe(False, STRANGE),
            }
        return Call(method, "plain", arguments)

    def _how(self) -> str:
        return self.random.choices(("plain", "stream", "left", "thread"), (6, 2, 1, 1))[0]

    def _maybe(self, good: Any, bad: tuple[Any, ...], chance: float = 0.25) -> Any:
        return self.random.choice(bad) if self.random.random() < chance else good

    def _ids(self) -> Any:
        pick = self.random
        length = pick.choice((1, 2, 5, 20, 100, 191)) if pick.random() < 0.9 else 500
        ids: list[Any] = [pick.randrange(VOCAB) for _ in range(length)]
        if pick.random() < 0.2:
            ids[pick.randrange(length)] = pick.choice((-1, VOCAB, 2**40, 1.5, None, "3", [1], True))
        if pick.random() < 0.1:
            return np.array(ids, dtype=object if pick.random() < 0.5 else None) if all(
                type(i) is int for i in ids
            ) else ids  # fmt: skip
        return ids

    def _prompt(self) -> dict[str, Any]:
        pick = self.random
        kind = pick.random()
        if kind < 0.4:
            return {"prompt": self._maybe(self._maybe("Once upon", WORDS, 0.4), STRANGE, 0.1)}
        if kind < 0.55:
            rows = pick.randrange(5)
            return {"prompt": [self._maybe("She sells", WORDS + STRANGE, 0.1) for _ in range(rows)]}
        if kind < 0.8:
            return {"input_ids": self._ids()}
        if kind < 0.9:
            return {"input_ids": [self._ids() for _ in range(pick.randrange(4))]}
        if kind < 0.95:
            return {"prompt": pick.choice(WORDS), "input_ids": self._ids()}
        return {pick.choice(("prompt", "input_ids")): pick.choice((*STRANGE, deep()))}

    def _sampling(self) -> Any:
        pick = self.random
        if pick.random() < 0.05:
            return pick.choice((*STRANGE, deep()))
        params: dict[Any, Any] = {"max_new_tokens": pick.choice((0, 1, 3, 8))}
        for _ in range(pick.randrange(4)):
            name = pick.choice(tuple(GOOD))
            params[name] = self._maybe(pick.choice(GOOD[name]), NUMBERS)
        if pick.random() < 0.25:
            stops = [self._maybe(" the", WORDS) for _ in range(pick.randrange(4))]
            params["stop"] = self._maybe(stops, STRANGE)
        if pick.random() < 0.25:
            params["stop_regex"] = self._maybe(pick.choice(PATTERNS), STRANGE)
        if pick.random() < 0.2:
            params["stop_token_ids"] = pick.choice(
                ([1, 2], [-1], itertools.count(), (x for x in (1, 2)), range(10**8), *STRANGE)
            )
        if pick.random() < 0.2:
            params["logit_bias"] = pick.choice(
                ({3: 1.5}, {"5": -100}, {-1: 1}, {VOCAB: 1}, {"x": 1}, {3: float("nan")},
                 {i: 1.0 for i in range(VOCAB)}, {3: 1e39}, {3: 10**400}, *STRANGE)
            )  # fmt: skip
        if pick.random() < 0.05:
            params[pick.choice(("max_tokens", "seed", 3, None, "\ud800"))] = 1
        return params

    def _generate(self) -> dict[str, Any]:
        pick = self.random
        arguments = self._prompt()
        if pick.random() < 0.9:
            arguments["sampling_params"] = self._sampling()
            if pick.random() < 0.1:
                arguments["sampling_params"] = [self._sampling() for _ in range(pick.randrange(4))]
        for name, good in (
            ("return_logprob", True), ("logprob_start_len", 0), ("top_logprobs_num", 2),
            ("token_ids_logprob", [3, 4]), ("rid", "r1"), ("priority", 1), ("cache_salt", "s"),
            ("return_text_in_logprobs", True), ("return_prompt_token_ids", True),
            ("image_data", [[]]), ("lora_path", None), ("session_params", None),
            ("return_hidden_states", False), ("return_logits", "last"), ("routed_dp_rank", 0),
            ("external_trace_header", None),
            ("no_such_argument", 1),
        ):  # fmt: skip
            if pick.random() < 0.03:
                bad = NUMBERS if isinstance(good, int) else STRANGE
                arguments[name] = self._maybe(good, bad, 0.6)
        return arguments

    def _chat(self) -> dict[str, Any]:
        pick = self.random
        content: Any = self._maybe(
            pick.choice(WORDS),
            ([{"type": "text", "text": "hi"}], [{"type": "image_url", "image_url": {}}],
             [{"type": "text"}], [3], {"a": 1}, None, 3, b"x", deep(), Odd()),
        )  # fmt: skip
        message: Any = {"role": self._maybe("user", (None, 3, "", "tool", "\ud800")),
                        "content": content}  # fmt: skip
        if pick.random() < 0.2:
            message["tool_calls"] = pick.choice(
                ([{"function": {"name": "f", "arguments": "{\"a\": 1}"}}],
                 [{"function": {"name": "f", "arguments": "{"}}], [3], "x", deep(), None)
            )  # fmt: skip
        messages: Any = self._maybe([message], (*STRANGE, [[message], [message]], deep()), 0.15)
        arguments = {"messages": messages, "sampling_params": self._sampling()}
        if pick.random() < 0.2:
            arguments["chat_template_kwargs"] = pick.choice(
                ({"chat_template": "{{ 'a' * 10**10 }}"}, {"add_generation_prompt": False},
                 {"tokenize": True}, {"continue_final_message": True}, {3: 4}, *STRANGE)
            )  # fmt: skip
        if pick.random() < 0.15:
            arguments["tools"] = pick.choice(([{"type": "function"}], [lambda x: x], *STRANGE))
        return arguments


def perform(engine: jaxserve.Engine, call: Call) -> Any:
    """plain: waits for the results. stream: reads all chunks. left: one chunk, then closes.
    thread: plain, while another thread asks for the canary."""
    method = getattr(engine, call.method)
    arguments = dict(call.arguments)
    if call.how in ("stream", "left"):
        arguments["stream"] = True
    if call.method == "async_generate":
        return asyncio.run(_perform_async(method, call.how, arguments))
    if call.how == "thread":
        other = threading.Thread(target=canary, args=(engine,))
        other.start()
        try:
            return method(**arguments)
        finally:
            other.join(SECONDS)
    result = method(**arguments)
    if call.how == "stream":
        return collections.deque(result, maxlen=1)
    if call.how == "left":
        next(result, None)
        result.close()
    return result


async def _perform_async(method: Any, how: str, arguments: dict[str, Any]) -> Any:
    result = await method(**arguments)
    if how in ("stream", "left"):
        async for _ in result:
            if how == "left":
                break
        await result.aclose()
    return result


def canary(engine: jaxserve.Engine) -> list[int]:
    return engine.generate(input_ids=CANARY_IDS, sampling_params=CANARY)["output_ids"]


def check(engine: jaxserve.Engine, call: Call, expected: list[int]) -> str:
    """Makes one call and says how it ended: "answered", or the class of our own error. Raises
    AssertionError, with the call, for everything else."""
    outcome: list[Any] = []

    def run() -> None:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                perform(engine, call)
            outcome.append("answered")
        except BaseException as error:
            outcome.append(error)

    shown = describe(call)
    thread = threading.Thread(target=run, daemon=True)
    started = time.perf_counter()
    thread.start()
    thread.join(SECONDS)
    seconds = time.perf_counter() - started
    assert outcome, f"no end after {seconds:.1f} s: {shown}"
    [ended] = outcome
    if isinstance(ended, BaseException):
        assert isinstance(ended, JaxserveError), f"{ended!r} from {shown}"
        assert len(str(ended)) <= MESSAGE, f"a message of {len(str(ended))} characters: {shown}"
        ended = type(ended).__name__
    assert canary(engine) == expected, f"other tokens after {shown}"
    return ended


def describe(call: Call) -> str:
    """The call as text, whatever its arguments do when shown."""
    parts = []
    for name, value in call.arguments.items():
        try:
            text = repr(value)
        except Exception as error:
            text = f"<{type(value).__name__}: {type(error).__name__}>"
        parts.append(f"{name}={text[:300]}")
    return f"{call.method}({', '.join(parts)}) [{call.how}]"


def run(engine: jaxserve.Engine, count: int, seed: int) -> collections.Counter[str]:
    """`count` calls; how many ended how. Raises AssertionError with those that broke a rule."""
    calls = Calls(seed)
    expected = canary(engine)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    outcomes: collections.Counter[str] = collections.Counter()
    broken: list[str] = []
    for number in range(count):
        call = calls.draw()
        try:
            outcomes[check(engine, call, expected)] += 1
        except AssertionError as error:
            broken.append(f"{number}: {error}")
        if len(broken) >= SHOWN:
            break
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before
        assert grown <= MEBIBYTES, f"{grown:.0f} MiB more after call {number}: {describe(call)}"
    assert not broken, "\n".join(broken)
    return outcomes


def table(outcomes: collections.Counter[str]) -> str:
    """A line for each way to end: its share."""
    total = outcomes.total()
    return "\n".join(f"{n:6d} {n / total:6.1%}  {name}" for name, n in outcomes.most_common())


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.calls", description=__doc__)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as folder,
        jaxserve.Engine(model_path=make_checkpoint(folder), **OPTIONS) as engine,
    ):
        print(table(run(engine, options.count, options.seed)))


if __name__ == "__main__":
    main()
