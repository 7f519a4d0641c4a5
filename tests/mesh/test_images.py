"""Images where a model is cut over devices, or requests run on replicas: as on one device."""

from __future__ import annotations

import json

import pytest

import jaxserve
from tests.marks import long
from tests.pictures import noise
from tests.prompts import ids
from tests.test_images import BIASED, CHUNK, PROCESSOR, PROMPTS, SIZES
from tests.vision_models import IMAGE, make

pytestmark = pytest.mark.usefixtures("kept_programs")
OPTIONS = {
    "skip_tokenizer_init": True, "dtype": "float32", "context_length": 384, "page_size": 8,
    "max_running_requests": 4, "cuda_graph_bs": [4], "max_total_tokens": 1024,
    "chunked_prefill_size": CHUNK,
}  # fmt: skip
PARAMS = {"max_new_tokens": 12, "temperature": 0, "ignore_eos": True, "logit_bias": BIASED}
IMAGES = [noise(*size, seed=seed) for seed, size in enumerate(SIZES)]


def prompts(family):
    """Token ids as Gemma's template writes them: each image between marks of its own."""
    if family == "qwen3_vl":
        return [ids for ids, _ in PROMPTS]
    shown = [302, *[IMAGE] * 16, 303]
    return [[y for x in ids for y in (shown if x == IMAGE else [x])] for ids, _ in PROMPTS]


def answers(folder, family, **mesh):
    """Two batches of the same prompts: all that the second can reuse is cached."""
    shown = [[IMAGES[n] for n in which] for _, which in PROMPTS]
    call = {"input_ids": prompts(family), "image_data": shown, "sampling_params": PARAMS}
    with jaxserve.Engine(folder, **OPTIONS, **mesh) as engine:
        results = [engine.generate(**call) for _ in range(2)]
        assert engine.get_server_info()["late_compiles"] == 0
    return results


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """A folder, and what one device makes of it, by family."""
    found = {}

    def of(family):
        if family not in found:
            path = tmp_path_factory.mktemp(family)
            (path / "preprocessor_config.json").write_text(json.dumps(PROCESSOR[family]))
            folder = make(family, path)
            found[family] = folder, answers(folder, family)
        return found[family]

    return of


@pytest.mark.parametrize(("family", "dp_size", "tp_size"), [
    long("qwen3_vl", 2, 2), long("gemma3", 1, 2),
])  # fmt: skip
def test_the_tokens_of_one_device(expected, family, dp_size, tp_size):
    folder, alone = expected(family)
    results = answers(folder, family, dp_size=dp_size, tp_size=tp_size)
    assert [ids(found) for found in results] == [ids(found) for found in alone]
    first, again = results
    assert sum(result["meta_info"]["cached_tokens"] for result in again) > sum(
        result["meta_info"]["cached_tokens"] for result in first
    )
    assert max(result["meta_info"]["prompt_tokens"] for result in first) > CHUNK
    if dp_size > 1:
        assert {result["meta_info"]["dp_rank"] for result in first} == set(range(dp_size))
