"""What docs/add_a_field.md, docs/add_a_program.md and docs/add_an_option.md add, in a source tree
that they have been applied to.

python -m tests.added_hooks TREE CHECKPOINT
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np

import converters
import jaxserve
from jaxserve.mailbox import Mailbox
from jaxserve.models.dense import DenseOps
from jaxserve.packing.sequence import Sequence
from jaxserve.packing.slots import Slots
from jaxserve.request import Request
from jaxserve.sampling_params import SamplingParams
from jaxserve.scheduler.policy import WaitingQueue
from tests import inside

OPTIONS = {
    "dtype": "float32",
    "skip_tokenizer_init": True,
    "context_length": 64,
    "max_total_tokens": 512,
    "max_running_requests": 8,
    "cuda_graph_bs": [8],
    "chunked_prefill_size": 128,
    "precompile": True,
    "enable_priority_scheduling": True,
}
PROMPTS = [np.random.default_rng(i).integers(3, 500, 9 + i).tolist() for i in range(6)]
SIGMAS = [0.0, 0.5, 1.0, 2.0, 1.0, 0.0]
SECONDS = 30.0


def log_softmax(x):
    x = x - x.max()
    return x - np.log(np.exp(x).sum())


def generate(engine):
    params = [
        {"max_new_tokens": 12, "ignore_eos": True, "sampling_seed": i, "top_n_sigma": sigmas}
        for i, sigmas in enumerate(SIGMAS)
    ]
    return engine.generate(input_ids=PROMPTS, sampling_params=params, return_logprob=True)


def check_field(folder, results):
    """Each token is one that NumPy keeps, with its logprob among those; rows without the field draw
    others, too."""
    loaded = converters.load(folder, dtype="float32")
    model = loaded.declaration.bind(loaded.params)
    elsewhere = 0
    for prompt, sigmas, result in zip(PROMPTS, SIGMAS, results, strict=True):
        output = result["output_ids"]
        ids = jnp.asarray(prompt + output, jnp.int32)
        hidden, _ = model(ids, jnp.arange(len(ids)), None, None, DenseOps())
        table = np.asarray(model.logits(hidden), np.float64)[len(prompt) - 1 :]
        reported = result["meta_info"]["output_token_logprobs"]
        for logits, token, (logprob, _, _) in zip(table, output, reported, strict=False):
            near = logits >= logits.max() - (sigmas or 1.0) * logits.std()
            elsewhere += not sigmas and not near[token]
            kept = near if sigmas else np.full(len(logits), True)
            assert kept[token]
            assert abs(log_softmax(np.where(kept, logits, -np.inf))[token] - logprob) < 1e-4
    assert elsewhere > 0


def check_program(engine, results):
    """Flushing leaves zeros, and an engine that gives the same again."""
    runner = inside.runner(engine)

    def pages():
        return [np.array(x) for x in inside.call(engine, lambda: runner.cache[:2])]

    assert all(x.any() for x in pages())
    assert engine.flush_cache().success
    assert not any(x.any() for x in pages())
    again = generate(engine)
    assert [r["output_ids"] for r in again] == [r["output_ids"] for r in results]
    assert all(x.any() for x in pages())


def check_option(policy):
    """The queue's order is that of priorities which grow while the clock runs."""
    rng = np.random.default_rng(0)
    queue, slots = WaitingQueue(), Slots(1)
    requests = []
    for number, (priority, time) in enumerate(
        zip(rng.integers(0, 9, 40), rng.uniform(0, 200, 40), strict=True)
    ):
        request = Request(
            rid=str(number),
            index=number,
            prompt_ids=[1],
            params=SamplingParams(),
            max_new_tokens=1,
            stop_ids=frozenset(),
            masked_ids=(),
            seed=0,
            sample_index=0,
            mailbox=Mailbox(),
            priority=int(priority),
            submitted_time=float(time),
        )
        requests.append(request)
        queue.add(Sequence(request, number, slots, policy.rank(request)))
    order = [sequence.request for sequence in queue]
    for now in (200.0, 1000.0):
        aged = {r.rid: r.priority + (now - r.submitted_time) / SECONDS for r in requests}
        assert order == sorted(requests, key=lambda r: -aged[r.rid])
    without = dataclasses.replace(policy, aging=None)
    assert order != sorted(requests, key=without.rank)


def main(tree: str, folder: str) -> None:
    assert Path(jaxserve.__file__).is_relative_to(tree), jaxserve.__file__
    with jaxserve.Engine(folder, priority_aging_seconds=SECONDS, **OPTIONS) as engine:
        results = generate(engine)
        check_field(folder, results)
        check_program(engine, results)
        check_option(inside.loop(engine).config.policy)
        assert engine.get_server_info()["late_compiles"] == 0


if __name__ == "__main__":
    main(*sys.argv[1:])
