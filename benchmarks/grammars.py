"""What grammars cost: the host's time of a constrained row, and the speed of rows beside such.

    python -m benchmarks.grammars --model qwen2.5-0.5b --rows 16 --constrained 8 --out result.json

Host: us of a row and step (its last token consumed, its mask filled), and of the token alone, for
each of some grammars, along texts that are random but for matching; "first" texts build automata as
they go, "again" find them. Engine: the time of the free rows of a batch, with and without
constrained ones beside them, in turns; random weights, and a schema that never ends. The tokenizer
is `--tokenizer`, a folder, or has made-up words, as many as the model has tokens.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from benchmarks import machine, workloads
from benchmarks.engine import Counts, differences, dummy_engine
from benchmarks.interference import percentile
from jaxserve.grammars.grammars import Grammars
from jaxserve.grammars.guide import GrammarSpec
from jaxserve.sampling_params import Grammar, SamplingParams
from jaxserve.server_args import ServerArgs
from jaxserve.text.codec import Codec

ENDS = (1, 2)
"""Of the made-up tokenizer, as the shapes' configs have them."""
PROMPT, RUN = 128, 150
"""Tokens of a prompt; of a text along which masks are timed."""
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 40},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "email": {"type": "string", "format": "email"},
        "code": {"type": "string", "pattern": "^[A-Z]{3}-[0-9]{4}$"},
        "tags": {"type": "array", "items": {"enum": ["new", "old", "hot"]}, "maxItems": 5},
        "place": {"type": "object", "additionalProperties": {"type": "number"}},
    },
    "required": ["name", "age", "email", "code", "tags", "place"],
    "additionalProperties": False,
}
ENDLESS = {"type": "array", "items": PERSON, "minItems": 1_000_000}
GRAMMARS = {
    "schema": Grammar("json_schema", json.dumps(PERSON)),
    "any object": Grammar("json_schema", '{"type": "object"}'),
    "phone number": Grammar("regex", r"\(\d{3}\) \d{3}-\d{4}"),
    "prose": Grammar("regex", r"[A-Z][a-z ,]{10,200}\."),
    "arithmetic": Grammar("ebnf", 'root ::= v (("+" | "*") v)*\nv ::= [0-9]+ | "(" root ")"'),
}


def write_tokenizer(folder: Path, size: int) -> None:
    """A byte-level tokenizer of `size` tokens: bytes, numbers, and random words."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    draw, letters = random.Random(0), "eeeeeetttttaaaaoooiiinnnssshhhrrrddllccuumwfgypbvkjxqz"
    specials = ["<unk>", "<s>", "</s>"]
    words = dict.fromkeys([*specials, *sorted(pre_tokenizers.ByteLevel.alphabet())])
    words |= dict.fromkeys(
        ['":', '",', '"}', '{"', '["', '"]', "},", "Ċ", "ĊĠĠ", *map(str, range(1000))]
    )
    while len(words) < size:
        word = "".join(draw.choices(letters, k=draw.randint(2, 11)))
        words[draw.choice(("", "Ġ", "Ġ")) + draw.choice((word, word, word.capitalize()))] = None
    numbers = {word: number for number, word in enumerate(list(words)[:size])}
    tokenizer = Tokenizer(models.BPE(vocab=numbers, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in specials])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


def timed_run(
    spec: GrammarSpec, ends: frozenset[int], vocab_size: int, draw: random.Random
) -> tuple[list[float], list[float]]:
    """Seconds of each step of a text, and of consuming each token."""
    request: Any = SimpleNamespace(params=SamplingParams(), stop_ids=ends)
    guide, matcher = spec.guide(request), spec.start.deep_copy()
    steps, consumed, outputs = [], [], []
    for _ in range(RUN):
        bits = np.full(-(-vocab_size // 32), -1, np.int32)
        started = time.perf_counter()
        guide.mask(outputs, bits)
        steps.append(time.perf_counter() - started)
        allowed = np.flatnonzero(np.unpackbits(bits.view(np.uint8), bitorder="little"))
        token = int(draw.choice(allowed))
        if token in ends:
            break
        outputs = [*outputs, token]
        started = time.perf_counter()
        matcher.consume_token(token)
        consumed.append(time.perf_counter() - started)
    return steps, consumed


def host(folder: Path, vocab_size: int, texts: int) -> dict[str, Any]:
    """us of a row and step of each grammar, without a model; the same texts both times."""
    from transformers import AutoTokenizer

    started = time.perf_counter()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ends = frozenset(ENDS) | {tokenizer.eos_token_id}
    args = ServerArgs("m", grammar_backend="llguidance")
    read = time.perf_counter()
    grammars = Grammars(args, Codec(tokenizer), vocab_size, ends)
    made = time.perf_counter()
    found = {}
    for name, grammar in GRAMMARS.items():
        since = time.perf_counter()
        spec = grammars.spec(grammar, grammars.ask(grammar))
        compiled = time.perf_counter() - since
        row: dict[str, Any] = {"compile_ms": round(1e3 * compiled, 2)}
        for kind in ("first", "again"):
            draw, steps, consumed = random.Random(name), [], []
            for _ in range(texts):
                masked, eaten = timed_run(spec, ends, vocab_size, draw)
                steps += masked
                consumed += eaten
            row[kind] = {
                "us_p50": round(1e6 * percentile(steps, 0.5), 1),
                "us_p99": round(1e6 * percentile(steps, 0.99), 1),
                "us_mean": round(1e6 * statistics.mean(steps), 1),
                "consume_us_p50": round(1e6 * percentile(consumed, 0.5), 1),
            }
        found[name] = row
    return {
        "vocab_size": vocab_size,
        "tokenizer_read_s": round(read - started, 3),
        "tokenizer_for_grammars_s": round(made - read, 3),
        "grammars": found,
    }


def beside(engine: Any, model: str, given: argparse.Namespace) -> dict[str, Any]:
    """Seconds of batches with and without constrained rows."""
    draw, size = random.Random(0), workloads.SHAPES[model]["vocab_size"]
    free = {"max_new_tokens": given.tokens, "ignore_eos": True, "temperature": 0.8}
    constrained = {**free, "json_schema": ENDLESS}
    ways = {
        "free": [free] * given.rows,
        "mixed": [free] * (given.rows - given.constrained) + [constrained] * given.constrained,
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    counted: dict[str, Any] = {}
    for round_ in range(given.repeats + 1):  # the first warms up
        for name, params in ways.items():
            prompts = [workloads.random_ids(draw, size, PROMPT) for _ in params]
            before = engine.get_server_info()
            results = engine.generate(input_ids=prompts, sampling_params=params)
            made = [len(result["output_ids"]) for result in results]
            assert made == [given.tokens] * given.rows, made
            counted[name] = differences(before, engine.get_server_info(), Counts())
            if round_:
                alone = results[: given.rows - given.constrained]
                longest = max(result["meta_info"]["e2e_latency"] for result in alone)
                seconds[name].append(longest)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    slower = [b / a for a, b in zip(seconds["free"], seconds["mixed"], strict=True)]
    return {
        "rows": given.rows,
        "constrained": given.constrained,
        "tokens": given.tokens,
        "ms_a_token": {name: round(1e3 * s / given.tokens, 3) for name, s in medians.items()},
        "mixed_to_free": round(statistics.median(slower), 4),
        "spread": [round(min(slower), 4), round(max(slower), 4)],
        "counted": counted,
    }


def run(given: argparse.Namespace, options: Mapping[str, Any]) -> dict[str, Any]:
    """The whole result."""
    size = workloads.SHAPES[given.model]["vocab_size"]
    with tempfile.TemporaryDirectory() as root:
        folder = given.tokenizer
        if folder is None:
            folder = Path(root)
            write_tokenizer(folder, size)
        options = {
            "skip_tokenizer_init": False,
            "tokenizer_path": str(folder),
            "max_running_requests": given.rows,
            "context_length": PROMPT + given.tokens + 64,
            "constrained_json_disable_any_whitespace": True,
            "random_seed": 0,
            **options,
        }
        with dummy_engine(given.model, options) as (engine, _):
            result = {**machine.describe(), "benchmark": "grammars", "model": given.model}
            result["host"] = host(folder, size, given.texts)
            print(json.dumps(result["host"], indent=1), flush=True)
            result["engine"] = beside(engine, given.model, given)
            print(json.dumps(result["engine"], indent=1), flush=True)
    return result


def parser() -> argparse.ArgumentParser:
    """Of the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="qwen2.5-0.5b", choices=sorted(workloads.SHAPES))
    parser.add_argument("--tokenizer", type=Path, help="folder; none: made-up words")
    parser.add_argument("--rows", type=int, default=16, help="of the batch")
    parser.add_argument("--constrained", type=int, default=8, help="of them")
    parser.add_argument("--tokens", type=int, default=256, help="of each output")
    parser.add_argument("--texts", type=int, default=10, help="along which masks are timed")
    parser.add_argument("--repeats", type=int, default=5, help="timed batches of each kind")
    parser.add_argument("--engine", type=json.loads, default={}, help="JSON of Engine options")
    parser.add_argument("--out", type=Path)
    return parser


def main() -> None:
    given = parser().parse_args()
    result = run(given, given.engine)
    if given.out:
        given.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
