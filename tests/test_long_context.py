"""Long contexts: sliding windows that give their pages back, and wide page tables."""

from __future__ import annotations

import time

import numpy as np
import pytest

import jaxserve
from jaxserve.packing.batch import ExtendBatch, ExtendRow
from jaxserve.packing.layout import ExtendLayout
from jaxserve.packing.pack import pack_extend
from jaxserve.packing.sequence import Sequence
from jaxserve.packing.slots import Slots
from tests.prompts import text
from tests.test_scheduler import make_request

pytestmark = pytest.mark.usefixtures("exact_products", "kept_programs")
OPTIONS = {
    "skip_tokenizer_init": True, "max_running_requests": 4, "chunked_prefill_size": 128,
    "cuda_graph_bs": [1, 4], "dtype": "float32", "precompile": False, "page_size": 16,
}  # fmt: skip
TINY = {
    "num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1,
    "intermediate_size": 32, "max_position_embeddings": 131_072, "tokenizer": False,
}  # fmt: skip


def results(model, prompts, params, **options):
    """(outputs, retractions, server info at the end)."""
    with jaxserve.Engine(model_path=model, **{**OPTIONS, **options}) as engine:
        found = engine.generate(input_ids=prompts, sampling_params=params)
        info = engine.get_server_info()
    found = found if isinstance(found, list) else [found]
    assert info["available_tokens"] == info["max_total_num_tokens"]
    retractions = sum(r["meta_info"]["num_retractions"] for r in found)
    return [r["output_ids"] for r in found], retractions, info


@pytest.mark.parametrize(("radix", "steps"), [(True, 1), (False, 4)])
def test_a_window_generates_more_than_the_pool_holds(tiny_models, radix, steps):
    model = tiny_models("mistral", sliding_window=64, max_position_embeddings=4096)
    params = {"temperature": 0.8, "sampling_seed": 3, "max_new_tokens": 400, "ignore_eos": True}
    options = {"disable_radix_cache": not radix, "num_continuous_decode_steps": steps}
    prompts = [text(i, 30 + i) for i in range(2)]
    plain, _, _ = results(model, prompts, params, max_total_tokens=8192)
    tight, retractions, info = results(model, prompts, params, max_total_tokens=256, **options)
    assert info["max_total_num_tokens"] == 256 and retractions == 0
    assert tight == plain and [len(ids) for ids in tight] == [400] * 2


@pytest.mark.long
def test_a_windowed_prompt_may_be_longer_than_the_pool(tiny_models):
    """Three of them, with samples, contend for a ring of pages each."""
    model = tiny_models("mistral", sliding_window=64, max_position_embeddings=4096)
    params = {"temperature": 0.8, "sampling_seed": 3, "max_new_tokens": 80, "n": 2}
    prompts = [text(i, 500 + 40 * i) for i in range(3)]
    plain, _, _ = results(model, prompts, params, max_total_tokens=8192)
    tight, _, _ = results(model, prompts, params, max_total_tokens=256)
    assert tight == plain


def test_layers_without_a_window_keep_everything(tiny_models):
    model = tiny_models(
        "qwen2", use_sliding_window=True, sliding_window=64, max_window_layers=1,
        max_position_embeddings=4096,
    )  # fmt: skip
    with jaxserve.Engine(model_path=model, **OPTIONS, max_total_tokens=256) as engine:
        result = engine.generate(
            input_ids=text(0, 30), sampling_params={"max_new_tokens": 700, "ignore_eos": True}
        )
        with pytest.raises(jaxserve.InvalidRequestError, match="can never fit the KV cache"):
            engine.generate(input_ids=text(0, 300))
    assert len(result["output_ids"]) == 256 - 30


@pytest.mark.long
def test_the_whole_of_131072_tokens(tiny_models):
    """A prompt that is too long is cut to the context, and runs in 2,048 columns of the table."""
    model = tiny_models("mistral", sliding_window=128, **TINY)
    prompt = text(0, 140_000)
    options = {
        **OPTIONS, "page_size": 64, "chunked_prefill_size": 4096, "allow_auto_truncate": True,
        "max_total_tokens": 16_384,
    }  # fmt: skip
    with jaxserve.Engine(model_path=model, **options) as engine:
        info = engine.get_server_info()
        assert info["max_req_input_len"] == 131_071 and info["max_total_num_tokens"] == 16_384
        with pytest.warns(UserWarning, match="cut to 131071 tokens"):
            result = engine.generate(input_ids=prompt, sampling_params={"temperature": 0})
        meta = result["meta_info"]
        assert (meta["prompt_tokens"], meta["completion_tokens"]) == (131_071, 1)
        # the last window and what it was computed from say the same: 1 layer sees 128 tokens
        tail = engine.generate(
            input_ids=prompt[131_071 - 128 : 131_071],
            sampling_params={"temperature": 0, "max_new_tokens": 1},
        )
    assert tail["output_ids"] == result["output_ids"]


def test_context_length_caps_prompt_and_output(tiny_models):
    model = tiny_models("mistral", sliding_window=128, **TINY)
    options = {**OPTIONS, "context_length": 5000, "max_total_tokens": 1024}
    with jaxserve.Engine(model_path=model, **options) as engine:
        ask = {"input_ids": text(1, 4_990)}
        with pytest.raises(jaxserve.InvalidRequestError, match="max_new_tokens=11"):
            engine.generate(**ask, sampling_params={"max_new_tokens": 11})
        params = {"max_new_tokens": None, "ignore_eos": True}
        assert len(engine.generate(**ask, sampling_params=params)["output_ids"]) == 10
        with pytest.raises(jaxserve.InvalidRequestError, match=r"5000 tokens\) is longer"):
            engine.generate(input_ids=text(1, 5_000))


def test_packing_wide_tables_takes_the_host_little_time():
    """128 rows of 2,048 columns, one prompt of which is 120,000 tokens in: a megabyte."""
    slots = Slots(128)
    rows = []
    for number in range(128):
        prompt = [1] * (120_040 if number == 0 else 40)
        sequence = Sequence(make_request(f"r{number}", prompt, 4), number, slots)
        sequence.slot = slots.take(sequence.request)
        sequence.pages = list(range(-(-len(prompt) // 64)))
        start, stop, epoch = len(prompt) - 40, len(prompt), sequence.epoch
        rows.append(ExtendRow(sequence, start, stop, 40 * number, True, True, epoch=epoch))
    batch = ExtendBatch(tuple(rows), 6144, 128)
    times = {}
    for width in (64, 2048):
        if width == 64:
            rows[0].sequence.pages = rows[0].sequence.pages[:64]
        layout = ExtendLayout(6144, 128, width)
        taken = []
        for _ in range(10):
            started = time.perf_counter()
            packed = pack_extend(batch, layout, 128)
            taken.append(time.perf_counter() - started)
        times[width] = min(taken)
    print({width: f"{1e6 * seconds:.0f} us" for width, seconds in times.items()})
    table = layout.unpack(packed).page_table
    assert np.array_equal(table[0, :64], np.arange(64)) and not table[1:, 1:].any()
    assert times[2048] < times[64] + 2e-3
