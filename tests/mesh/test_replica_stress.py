"""Hundreds of calls of all kinds, on engines whose replicas fail in random order."""

from __future__ import annotations

import random
import threading
import time

import pytest

import jaxserve
from tests.mesh.test_replica_failures import break_down
from tests.mesh.test_replicas import OPTIONS, PROMPTS, SEEDED

pytestmark = pytest.mark.usefixtures("kept_programs")
ENGINES, CALLERS, CALLS = 8, 8, 12
ENDLESS = {**SEEDED, "max_new_tokens": 400}


class Caller:
    """Makes calls from a thread of its own; `wrong` is what should not have come."""

    def __init__(self, engine, wanted, seed):
        self.engine, self.wanted, self.draw = engine, wanted, random.Random(seed)
        self.name, self.wrong = f"caller-{seed}", []

    def run(self):
        ways = (self.whole, self.stream, self.left, self.aborted)
        for number in range(CALLS):
            try:
                self.draw.choice(ways)(self.draw.randrange(len(PROMPTS)), number)
            except Exception as error:
                self.wrong.append(repr(error))

    def expect(self, index, result):
        if result["output_ids"] != self.wanted[index]:
            self.wrong.append((index, result))

    def whole(self, index, number):
        self.expect(index, self.engine.generate(input_ids=PROMPTS[index], sampling_params=SEEDED))

    def stream(self, index, number):
        seen = 0
        for chunk in self.engine.generate(
            input_ids=PROMPTS[index], sampling_params=SEEDED, stream=True
        ):
            if len(chunk["output_ids"]) <= seen:
                self.wrong.append((index, seen, chunk))
            seen = len(chunk["output_ids"])
        self.expect(index, chunk)

    def left(self, index, number):
        stream = self.engine.generate(
            input_ids=PROMPTS[index], sampling_params=ENDLESS, stream=True
        )
        next(stream)
        stream.close()

    def aborted(self, index, number):
        rid = f"{self.name}-{number}"
        wait = self.draw.random() * 0.05
        abort = threading.Timer(wait, self.engine.abort_request, [rid])
        abort.start()
        results = self.engine.generate(
            input_ids=PROMPTS[index], sampling_params={**ENDLESS, "n": 2}, rid=rid
        )
        abort.join()
        self.wrong += [
            (index, result)
            for result in results
            if result["meta_info"]["finish_reason"]["type"] != "abort"
            and len(result["output_ids"]) != ENDLESS["max_new_tokens"]
        ]


@pytest.mark.long
def test_no_request_is_lost_or_answered_twice(tiny_models):
    folder, draw = tiny_models("llama"), random.Random(0)
    with jaxserve.Engine(folder, **OPTIONS) as engine:
        results = engine.generate(input_ids=PROMPTS, sampling_params=SEEDED)
        wanted = [result["output_ids"] for result in results]
    for number in range(ENGINES):
        with jaxserve.Engine(folder, dp_size=3, log_level="critical", **OPTIONS) as engine:
            callers = [Caller(engine, wanted, CALLERS * number + n) for n in range(CALLERS)]
            threads = [threading.Thread(target=caller.run) for caller in callers]
            for thread in threads:
                thread.start()
            for rank in draw.sample(range(3), 2):
                time.sleep(draw.random() * 0.3)
                break_down(engine, rank, draw.randrange(6))
            for thread in threads:
                thread.join(120)
                assert not thread.is_alive()
            assert [caller.wrong for caller in callers] == [[]] * CALLERS
            until = time.monotonic() + 30
            while (info := engine.get_server_info())["num_running"] + info["num_waiting"]:
                assert time.monotonic() < until
            assert info["finished_requests"]["error"] == info["late_compiles"] == 0
            alive = [r for r in engine._loop._replicas if r.runs]
            assert [(r.load.requests, r.load.tokens) for r in alive] == [(0, 0)] * len(alive)
