"""One extend step of a tiny model, without an engine, against the model in plain mathematics."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import converters
from jaxserve.attention.paged import PagedOps
from jaxserve.cache.pool import make_cache
from jaxserve.config import EngineConfig
from jaxserve.models.dense import DenseOps
from jaxserve.packing.batch import ExtendBatch, ExtendRow
from jaxserve.packing.layout import TOKEN_FIELDS, ExtendLayout, TokenField
from jaxserve.packing.pack import pack_extend
from jaxserve.packing.sequence import Sequence
from jaxserve.packing.slots import Slots
from jaxserve.parallel.mesh import mesh_of
from jaxserve.sampler.sampler import Sampler
from jaxserve.server_args import ServerArgs
from jaxserve.step import step
from jaxserve.step.payloads import USUAL
from jaxserve.step.state import initial_state
from jaxserve.weights import arrange
from tests.machines import CPU
from tests.test_scheduler import make_request

PAGES, ROWS = 16, 4


def spread(sequence, start, stop):
    """Positions three apart, and none is 0."""
    return 3 * np.arange(start, stop) + 5


@pytest.mark.parametrize("given", [False, True])
def test_tokens_are_rotated_to_where_they_are_or_where_the_layout_says(tiny_models, given):
    loaded = converters.load(tiny_models("llama"), dtype="float32")
    args = ServerArgs("x", context_length=64, max_running_requests=ROWS)
    config = EngineConfig.resolve(args, loaded.config, CPU, 0).program
    mesh = mesh_of(jax.devices()[0])
    params, kept = arrange(loaded.declaration, dict(loaded.params), CPU.crossovers, mesh)
    ops = PagedOps("xla", "xla", PAGES, CPU.crossovers)
    sampler = Sampler(config.max_top_logprobs, False, "xla")
    model = step.StepModel(kept.bind, ops, sampler, config.page_size, USUAL.payloads)
    fields = (TokenField("positions", spread),) if given else ()
    layout = ExtendLayout(64, 8, config.table_width, (*TOKEN_FIELDS, *fields))

    slots, rows, prompts = Slots(config.max_rows), [], []
    for number, length in enumerate((20, 9)):
        prompts.append(np.random.default_rng(number).integers(3, 500, length).tolist())
        sequence = Sequence(make_request(f"{number}", prompts[-1], 1), number, slots)
        sequence.slot = slots.take(sequence.request)
        sequence.pages = list(range(4 * number, 4 * number + 4))
        rows.append(ExtendRow(sequence, 0, length, 24 * number, True, True, 0))
    packed = pack_extend(ExtendBatch(tuple(rows), 64, 8), layout, config.max_rows)

    float32 = jnp.dtype("float32")
    cache = make_cache(loaded.config, PAGES, config.page_size, config.max_rows, float32)
    state = initial_state(config, loaded.config.vocab_size)
    run = jax.jit(functools.partial(step.extend_step, model, layout))
    _, (_, hidden) = run(params, cache, *state, packed)
    for row, prompt in zip(rows, prompts, strict=True):
        positions = spread(None, 0, row.stop) if given else np.arange(row.stop)
        expected, _ = loaded.declaration.bind(loaded.params)(
            jnp.asarray(prompt), jnp.asarray(positions), None, None, DenseOps()
        )
        ours = hidden[row.packed_start : row.packed_start + row.stop]
        np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-4)
