"""Loads changed model files in `jaxserve.Engine`, one after the other, beside a healthy engine.

    python -m tests.fuzz.files --count 1000 --seed 1

Each either loads, and then generates, or is refused with a JaxserveError of at most 10 kB; within
10 seconds (what compiling programs takes apart, which a change of a constant makes new), and with
at most 500 MB of memory more than a good model takes. The healthy engine gives
the same tokens after each. Prints how many ended how, and exits with 1 where one did not.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import random
import shutil
import sys
import tempfile
import threading
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

import jaxserve
from jaxserve.errors import JaxserveError
from tests.checkpoints import make_checkpoint
from tests.fuzz.mutations import Mutant, mutate
from tests.gguf_files import write_model

SECONDS, BYTES, MESSAGE = 10.0, 500 << 20, 10_000
LONGEST = 60.0
"""Seconds by the clock. SECONDS counts the process's own time where that is less, so that a busy
machine is no failure."""
OPTIONS = {
    "max_running_requests": 1, "chunked_prefill_size": 64, "max_total_tokens": 128,
    "log_level": "error",
}  # fmt: skip
SIZES = {
    "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1,
    "num_hidden_layers": 1, "max_position_embeddings": 128,
}  # fmt: skip
PROMPT, IDS = "The capital of France", [5, 6, 7]
GREEDY = {"temperature": 0, "max_new_tokens": 4, "ignore_eos": True}


@dataclasses.dataclass(frozen=True)
class Outcome:
    target: str
    how: str
    ended: str
    """ "answers", the error's class, or, after "FAULT: ", what is wrong."""
    seconds: float
    bytes: int
    """Growth of the resident memory to its peak."""

    @property
    def is_fault(self) -> bool:
        return self.ended.startswith("FAULT")


class Loads:
    """The healthy engine, the good files and the measurements of a run."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.bases = {"folder": folder / "good", "gguf": folder / "good.gguf"}
        make_checkpoint(self.bases["folder"], shards=2, **SIZES)
        write_model(self.bases["gguf"], hidden=32, mlp=32, heads=2, kv_heads=1, layers=1,
                    metadata={"{arch}.context_length": 128})  # fmt: skip
        self.healthy = jaxserve.Engine(model_path=str(self.bases["folder"]), **OPTIONS)
        self.expected = self._healthy_tokens()
        self.good_bytes = 0
        for base in self.bases.values():
            outcome = self.load(Mutant(base, "good", "unchanged"))
            if outcome.ended != "answers":
                raise AssertionError(outcome)
            self.good_bytes = max(self.good_bytes, outcome.bytes)

    def close(self) -> None:
        self.healthy.shutdown()

    def run(self, seed: int) -> Outcome:
        """Makes the mutant of `seed`, loads it, and removes it."""
        folder = self.folder / f"mutant-{seed}"
        try:
            mutant = mutate(random.Random(seed), self.bases, folder)
            # Every other one decodes: that is a second program, and half the time.
            outcome = self.load(mutant, tokens=4 if seed % 2 else 1)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        if self._healthy_tokens() != self.expected:
            return dataclasses.replace(outcome, ended="FAULT: the healthy engine answers otherwise")
        return outcome

    def load(self, mutant: Mutant, tokens: int = 4) -> Outcome:
        """tokens: how many the model must give."""
        started, computed = time.perf_counter(), time.process_time()
        with Peak() as peak:
            ended, compiling = _try(mutant.path, tokens)
        elapsed = time.perf_counter() - started
        seconds = max(0.0, min(elapsed, time.process_time() - computed) - compiling)
        if elapsed > LONGEST or seconds > SECONDS:
            ended = f"FAULT: {ended} after {seconds:.1f} s of its own, {elapsed:.1f} s in all"
        if self.good_bytes and peak.bytes > self.good_bytes + BYTES:
            ended = f"FAULT: {ended} with {peak.bytes >> 20} MiB"
        return Outcome(mutant.target, mutant.how, ended, seconds, peak.bytes)

    def _healthy_tokens(self) -> list[int]:
        return self.healthy.generate(input_ids=IDS, sampling_params=GREEDY)["output_ids"]


def _try(path: Path, tokens: int) -> tuple[str, float]:
    """How it ended, and the seconds of compilation."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            engine = jaxserve.Engine(model_path=str(path), **OPTIONS)
    except JaxserveError as error:
        if len(str(error)) > MESSAGE:
            return f"FAULT: a message of {len(str(error))} characters", 0.0
        return type(error).__name__, 0.0
    except BaseException as error:  # panics of Rust are BaseExceptions
        if isinstance(error, KeyboardInterrupt):
            raise
        return f"FAULT: loading raised {_short(error)}", 0.0
    with engine:
        ended = _canary(engine, GREEDY | {"max_new_tokens": tokens})
        return ended, engine.get_server_info()["compile_seconds"]


def _canary(engine: jaxserve.Engine, params: dict[str, Any]) -> str:
    """Token ids must be answered where the context has room for them; text may be refused, by a
    tokenizer that no longer fits."""
    context = engine.tokenizer_manager.context_len
    if context < len(IDS) + 5:
        return "a short context"
    for prompt in ({"input_ids": IDS}, {"prompt": PROMPT}):
        try:
            result = engine.generate(**prompt, sampling_params=params)
        except JaxserveError as error:
            if "prompt" in prompt and not isinstance(error, jaxserve.EngineDeadError):
                return f"answers ids, {type(error).__name__} for text"
            return f"FAULT: the canary raised {_short(error)}"
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            return f"FAULT: the canary raised {_short(error)}"
        if len(result["output_ids"]) != params["max_new_tokens"]:
            return f"FAULT: the canary's tokens are {result['output_ids']}"
    return "answers"


def _short(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)[-2:]
    where = " < ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames[::-1])
    return f"{type(error).__name__}: {str(error)[:200]} ({where})"


class Peak:
    """Samples the resident memory every 5 ms; `bytes` is its growth to the peak."""

    def __enter__(self) -> Peak:
        self._before = self._peak = _resident()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(0.005):
            self._peak = max(self._peak, _resident())

    def __exit__(self, *_: Any) -> None:
        self._stop.set()
        self._thread.join()
        self.bytes = self._peak - self._before


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def table(outcomes: list[Outcome]) -> str:
    """How many of each kind of file ended how, with the share of each."""
    ends = collections.Counter(o.ended.split(":")[0] for o in outcomes)
    lines = [f"{len(outcomes)} changed model files:"]
    for ended, count in ends.most_common():
        kinds = collections.Counter(o.target for o in outcomes if o.ended.split(":")[0] == ended)
        named = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
        lines.append(f"  {100 * count / len(outcomes):5.1f}%  {ended} ({named})")
    slowest = max(outcomes, key=lambda outcome: outcome.seconds)
    largest = max(outcomes, key=lambda outcome: outcome.bytes)
    lines.append(f"  slowest {slowest.seconds:.1f} s ({slowest.target}: {slowest.how})")
    lines.append(f"  largest {largest.bytes >> 20} MiB ({largest.target}: {largest.how})")
    return "\n".join(lines)


def fuzz(folder: Path, count: int, seed: int, verbose: bool = False) -> list[Outcome]:
    """Outcomes of the seeds from `seed` on; `folder` is for the files."""
    loads = Loads(folder)
    try:
        outcomes = []
        for number in range(seed, seed + count):
            outcomes.append(loads.run(number))
            if verbose or outcomes[-1].is_fault:
                last = outcomes[-1]
                print(f"seed {number} {last.target} [{last.how}] {last.ended}", flush=True)
        return outcomes
    finally:
        loads.close()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0, help="of the first file; the next adds one")
    parser.add_argument("--verbose", action="store_true", help="print every outcome")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        outcomes = fuzz(Path(folder), args.count, args.seed, args.verbose)
    print(table(outcomes))
    return int(any(outcome.is_fault for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
