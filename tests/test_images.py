"""Images in prompts, in the engine: tokens are Hugging Face's, however prompts are batched, cut and
cached."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jaxserve import Engine, InvalidRequestError, NotSupportedError
from tests import vision_models
from tests.oracles.vision import BIAS, HfVision, families
from tests.pictures import noise
from tests.vision_models import IMAGE

pytestmark = pytest.mark.usefixtures("kept_programs")

QWEN = {
    "size": {"shortest_edge": 64, "longest_edge": 64 * 40}, "patch_size": 4, "merge_size": 2
}  # fmt: skip
SQUARE = {"size": {"height": 32, "width": 32}}
TILES = {"size": {"longest_edge": 64}, "max_image_size": {"longest_edge": 32}}
CROPPED = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
PROCESSOR = {
    "qwen2_vl": QWEN, "qwen2_5_vl": QWEN, "qwen3_vl": QWEN, "gemma3": SQUARE,
    "smolvlm": TILES, "idefics3": TILES, "llava": CROPPED,
}  # fmt: skip
QUICK = ("qwen3_vl",)
"""That which `make test` has: three positions and deepstack."""
NEW = 32
SIZES = ((64, 40), (30, 80), (9, 17))
BIASED = {str(IMAGE): -BIAS}
GREEDY = {"max_new_tokens": NEW, "temperature": 0, "ignore_eos": True, "logit_bias": BIASED}
CHUNK = 40
"""Tokens of an extend step: less than what the largest picture stands for and its text."""


class Model:
    """An engine, and Hugging Face's model of the same folder."""

    def __init__(self, family: str, folder: Path, **options) -> None:
        self.path = vision_models.make(family, folder)
        processor = PROCESSOR[family]
        (folder / "preprocessor_config.json").write_text(json.dumps(processor))
        self.hf = HfVision(family, self.path, processor)
        self.engine = self.start(**options)

    def start(self, **options) -> Engine:
        """Another engine of the folder."""
        given = {"chunked_prefill_size": CHUNK, "max_total_tokens": 1024, **options}
        return Engine(
            self.path, skip_tokenizer_init=True, dtype="float32", context_length=384,
            max_running_requests=4, page_size=8, **{"cuda_graph_bs": [4], **given},
        )  # fmt: skip

    def spread(self, ids, images) -> list[int]:
        """ids with runs of placeholders, where without a tokenizer nobody else can write them."""
        family = self.engine._prompts._reader.family
        alone = all(family.frame(family.prepare(x)) == family.token_text for x in images)
        if alone or ids.count(IMAGE) > len(images):
            return ids
        pictures = map(family.prepare, images)
        spread = []
        for token in ids:
            picture = next(pictures) if token == IMAGE else None
            one = [token] if picture is None else [302, *[IMAGE] * picture.run, 303] * picture.runs
            spread += one
        return spread

    def check(self, result, images) -> None:
        """A result's tokens are what Hugging Face would draw, with the same logprobs."""
        outputs = result["output_ids"]
        expected = self.hf.logprobs(result["prompt_token_ids"], outputs, images)
        assert len(outputs) == NEW and expected.argmax(-1).tolist() == outputs
        logprobs = [logprob for logprob, *_ in result["meta_info"]["output_token_logprobs"]]
        np.testing.assert_allclose(logprobs, expected.max(-1), atol=1e-4)


@pytest.fixture(
    scope="module",
    params=[
        name if name in QUICK else pytest.param(name, marks=pytest.mark.long) for name in families()
    ],
)
def model(request, tmp_path_factory):
    found = Model(request.param, tmp_path_factory.mktemp(request.param))
    yield found
    found.engine.shutdown()


@pytest.fixture(scope="module")
def images():
    return [noise(*size, seed=seed) for seed, size in enumerate(SIZES)]


PROMPTS = (
    # ids, numbers of images
    ([5, 6, 7, IMAGE, 9, 10], [0]),
    ([11, 12, 13, 14], []),
    ([IMAGE, 9, 8, IMAGE, 7, IMAGE, 3], [0, 1, 2]),
    ([IMAGE], [1]),
    ([5, 6, IMAGE, 8, IMAGE, 4], [2, 2]),
)


def run(model, prompts, images, **options):
    """The results of prompts in one batch."""
    shown = [[images[n] for n in which] for _, which in prompts]
    ids = [model.spread(ids, own) for (ids, _), own in zip(prompts, shown, strict=True)]
    return model.engine.generate(
        input_ids=ids, image_data=shown, sampling_params=GREEDY, return_prompt_token_ids=True,
        return_logprob=True, **options,
    )  # fmt: skip


def test_batches_of_any_mix_are_hugging_faces(model, images):
    results = run(model, PROMPTS, images)
    for result, (ids, which) in zip(results, PROMPTS, strict=True):
        shown = [images[n] for n in which]
        model.check(result, shown)
        media = result["meta_info"].get("image_tokens", 0)
        assert media == result["prompt_token_ids"].count(IMAGE)
        length = result["meta_info"]["prompt_tokens"]
        assert length == len(model.spread(ids, shown)) or length == len(ids) - len(which) + media
    assert model.engine.get_server_info()["late_compiles"] == 0


def test_the_same_image_is_found_in_the_cache_and_another_is_not(model, images):
    prompt = [([21, 22, 23, IMAGE, *range(30, 44)], [0])]
    model.engine.flush_cache()
    (first,) = run(model, prompt, images)
    encoded = model.engine.get_server_info()["images_encoded"]
    (again,) = run(model, prompt, images)
    assert model.engine.get_server_info()["images_encoded"] == encoded
    assert first["meta_info"]["cached_tokens"] == 0
    length = first["meta_info"]["prompt_tokens"]
    assert again["meta_info"]["cached_tokens"] >= length - 16
    assert again["output_ids"] == first["output_ids"]
    pixels = np.array(images[0])
    pixels[20, 32] ^= 0xFF
    other = [Image.fromarray(pixels)]
    (changed,) = run(model, prompt, other)
    assert model.engine.get_server_info()["images_encoded"] == encoded + 1
    assert changed["meta_info"]["cached_tokens"] < 8
    model.check(changed, other)


def test_samples_streams_and_expanded_prompts(model, images):
    (alone,) = run(model, PROMPTS[:1], images)
    expanded = [(alone["prompt_token_ids"], [0])]
    (given,) = run(model, expanded, images)
    assert given["output_ids"] == alone["output_ids"]
    assert given["meta_info"]["prompt_tokens"] == alone["meta_info"]["prompt_tokens"]
    prompt = model.spread(PROMPTS[0][0], images[:1])
    both = model.engine.generate(
        input_ids=prompt, image_data=images[0], sampling_params={**GREEDY, "n": 2}
    )
    assert [each["output_ids"] for each in both] == [alone["output_ids"]] * 2
    *_, last = model.engine.generate(
        input_ids=prompt, image_data=[images[0]], sampling_params=GREEDY, stream=True
    )
    assert last["output_ids"] == alone["output_ids"]


def test_mistakes_cost_their_call_alone(model, images):
    with pytest.raises(InvalidRequestError, match="1 image placeholders but 2 image inputs"):
        model.engine.generate(input_ids=[5, IMAGE], image_data=images[:2])
    with pytest.raises(InvalidRequestError, match="too long after expanding"):
        run(model, [([IMAGE] * 24, [0] * 24)], images)
    (fine,) = run(model, PROMPTS[1:2], images)
    assert len(fine["output_ids"]) == NEW


def test_retracted_prompts_show_their_images_again(model, images):
    """A pool for both prompts and for half of what they generate."""
    prompts = [PROMPTS[0], ([5, 6, 7, IMAGE, 9, 10], [1])]
    alone = [run(model, [prompt], images)[0] for prompt in prompts]
    pages = sum(-(-result["meta_info"]["prompt_tokens"] // 8) for result in alone)
    engine = model.start(max_total_tokens=8 * pages + NEW)
    try:
        results = engine.generate(
            input_ids=[result["prompt_token_ids"] for result in alone],
            image_data=[[images[n] for n in which] for _, which in prompts],
            sampling_params=GREEDY,
        )
        for result, expected in zip(results, alone, strict=True):
            assert result["output_ids"] == expected["output_ids"]
        assert sum(result["meta_info"]["num_retractions"] for result in results)
    finally:
        engine.shutdown()


def test_the_decoder_alone_takes_no_images(model, images):
    engine = model.start(enable_multimodal=False)
    try:
        with pytest.raises(NotSupportedError, match="image_data needs a model that takes images"):
            engine.generate(input_ids=[5, IMAGE], image_data=images[0])
        (text,) = run(model, PROMPTS[1:2], images)
        alone = engine.generate(input_ids=PROMPTS[1][0], sampling_params=GREEDY)
        assert alone["output_ids"] == text["output_ids"]
    finally:
        engine.shutdown()
