"""Preprocessing of each vision family, against the PIL processors of transformers."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from jaxserve.errors import InvalidRequestError, ModelLoadError, NotSupportedError
from jaxserve.media.decode import ImageError, rgb
from jaxserve.media.families.registry import FAMILIES, family_of, sees_pictures
from tests.pictures import (
    GEMMA3,
    IDEFICS3,
    LLAVA,
    QWEN2,
    QWEN3,
    SIZES,
    SMOLVLM,
    noise,
    with_sizes,
)

MODES = ("RGB", "L", "RGBA", "LA", "P", "1", "CMYK", "I;16")
SQUARE = {"height": 32, "width": 32}
QWEN_FILE = {"patch_size": 4, "size": {"shortest_edge": 256, "longest_edge": 20_000}}
HALF = [0.5, 0.5, 0.5]
CASES = {
    "qwen2": (QWEN2, Qwen2VLImageProcessorPil, QWEN_FILE, {}),
    "qwen2 of the file's other spelling": (
        QWEN2,
        Qwen2VLImageProcessorPil,
        {"patch_size": 4, "min_pixels": 1000, "max_pixels": 4000},
        {},
    ),
    "qwen2 with fewer pixels": (
        QWEN2,
        Qwen2VLImageProcessorPil,
        {**QWEN_FILE, "max_pixels": 50_000},
        {"size": {"shortest_edge": 256, "longest_edge": 2000}},
    ),
    "qwen3": (
        with_sizes(QWEN3, patch_size=8),
        Qwen2VLImageProcessorPil,
        {**QWEN_FILE, "patch_size": 8, "image_mean": HALF, "image_std": HALF},
        {},
    ),
    "gemma3": (GEMMA3, Gemma3ImageProcessorPil, {"size": SQUARE}, {}),
    "gemma3 pan and scan": (
        GEMMA3,
        Gemma3ImageProcessorPil,
        {"size": SQUARE},
        {
            "do_pan_and_scan": True,
            "pan_and_scan_min_crop_size": 20,
            "pan_and_scan_max_num_crops": 4,
            "pan_and_scan_min_ratio_to_activate": 1.2,
        },
    ),
    "idefics3": (
        IDEFICS3,
        Idefics3ImageProcessorPil,
        {"size": {"longest_edge": 128}, "max_image_size": {"longest_edge": 32}},
        {},
    ),
    "smolvlm in whole": (
        SMOLVLM,
        SmolVLMImageProcessorPil,
        {"size": {"longest_edge": 90}, "max_image_size": {"longest_edge": 32}},
        {"do_image_splitting": False},
    ),
    "llava": (
        LLAVA,
        LlavaImageProcessorPil,
        {"size": {"shortest_edge": 32}, "crop_size": SQUARE},
        {},
    ),
    "llava padded": (
        LLAVA,
        LlavaImageProcessorPil,
        {"size": {"shortest_edge": 32}, "crop_size": SQUARE, "do_pad": True},
        {},
    ),
    "llava within black": (
        LLAVA,
        LlavaImageProcessorPil,
        {"size": {"shortest_edge": 21}, "crop_size": SQUARE, "rescale_factor": 1 / 128},
        {},
    ),
}


def made(case):
    config, oracle, file, given = CASES[case]
    return family_of(config, file, given), oracle(**file)


def expected(case, oracle, image):
    """The oracle's values as patches in our order, one frame of them."""
    given = CASES[case][-1]
    output = oracle(image, return_tensors="np", input_data_format="channels_last", **given)
    values = np.asarray(output["pixel_values"])
    if "image_grid_thw" in output:
        patch = oracle.patch_size**2
        frames = values.reshape(len(values), 3, 2, patch)
        return frames[:, :, 0].reshape(len(values), -1)
    squares = values.reshape(-1, 3, 8, 4, 8, 4)
    return squares.transpose(0, 2, 4, 1, 3, 5).reshape(-1, 48)


def check(case, image):
    family, oracle = made(case)
    prepared = family.prepare(rgb(image, 1 << 30))
    patches = prepared.picture.patches
    assert patches.dtype == np.uint8 and prepared.picture.shape.patches == len(patches)
    wanted = expected(case, oracle, image.convert("RGB"))
    np.testing.assert_allclose(family.normalize(patches), wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_patches_are_those_of_transformers(case, size):
    check(case, noise(*size, seed=sum(size)))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", ["qwen2", "gemma3", "idefics3", "llava"])
def test_any_mode_is_converted(case, mode):
    image = noise(70, 50) if mode == "I;16" else noise(70, 50, mode)
    check(
        case,
        Image.fromarray(np.arange(3500, dtype=np.uint16).reshape(50, 70))
        if mode == "I;16"
        else image,
    )


def test_defaults_are_those_of_the_processors_but_for_sizes():
    for case in ("qwen2", "gemma3", "idefics3", "llava"):
        config, oracle, _, _ = CASES[case]
        family = family_of(config, None, {})
        default = oracle()
        np.testing.assert_array_equal(family.image_mean, np.float32(default.image_mean))
        np.testing.assert_array_equal(family.image_std, np.float32(default.image_std))
        assert family.rescale_factor == np.float32(default.rescale_factor)
        assert family._filter == default.resample


def test_the_processor_may_be_an_object_of_a_file_of_several():
    plain = family_of(GEMMA3, {"image_mean": HALF, "image_std": [0.25, 0.25, 0.25]}, {})
    nested = family_of(GEMMA3, {"image_processor": {"image_std": [0.25] * 3}}, {})
    assert (plain.image_std == nested.image_std).all() and plain.image_std[0] == 0.25


def test_digests_tell_pixels_sizes_and_normalization_apart():
    image = noise(40, 40)
    other = image.copy()
    other.putpixel((20, 20), (1, 2, 3))
    families = [family_of(QWEN2, {"patch_size": 4}, {}), family_of(QWEN2, {"image_std": HALF}, {})]
    digests = {family.prepare(x).picture.digest for family in families for x in (image, other)}
    assert len(digests) == 4 and {len(digest) for digest in digests} == {32}
    assert families[0].prepare(image.copy()).picture.digest in digests


@pytest.mark.parametrize(
    ("case", "image", "fragment"),
    [
        ("qwen2", (1, 201), "absolute aspect ratio must be smaller than 200"),
        ("llava", (1, 100_000), "would be resized to 32 x 3200000"),
        ("llava padded", (1, 10_000), "would be padded to 10000 x 10000"),
    ],
)
def test_shapes_that_would_take_too_much(case, image, fragment):
    with pytest.raises(ImageError, match=fragment):
        made(case)[0].prepare(noise(*image))


@pytest.mark.parametrize(
    ("kind", "config", "file", "given", "fragments"),
    [
        (InvalidRequestError, QWEN2, {}, {"max_pixel": 5}, ["max_pixel", "'max_pixels'"]),
        (ModelLoadError, QWEN2, {}, {"max_pixels": -5}, ["max_pixels", "-5"]),
        (ModelLoadError, QWEN2, {"image_std": [0, 1, 1]}, {}, ["image_std", "0"]),
        (ModelLoadError, QWEN2, {"image_mean": [1, 1]}, {}, ["image_mean", "3 numbers"]),
        (ModelLoadError, QWEN2, {"size": 5}, {}, ["size", "5"]),
        (ModelLoadError, {**QWEN2, "image_token_id": "x"}, {}, {}, ["image_token_id", "'x'"]),
        (ModelLoadError, with_sizes(QWEN2, patch_size=None), {}, {}, ["patch_size is missing"]),
        (ModelLoadError, GEMMA3, {"size": {"height": 64, "width": 32}}, {}, ["64 x 32", "32"]),
        (ModelLoadError, with_sizes(GEMMA3, image_size=33), {}, {}, ["33", "no multiple"]),
        (ModelLoadError, IDEFICS3, {"max_image_size": {"longest_edge": 16}}, {}, ["16", "32"]),
        (ModelLoadError, LLAVA, {"crop_size": {"height": 16}}, {}, ["crop_size", "16"]),
        (NotSupportedError, LLAVA, {"do_center_crop": False}, {}, ["do_center_crop"]),
        (ModelLoadError, QWEN2, {"merge_size": 4}, {}, ["merge_size is 4", "is 2"]),
        (
            NotSupportedError,
            {**LLAVA, "vision_feature_select_strategy": "full"},
            {},
            {},
            ["vision_feature_select_strategy 'full'"],
        ),
        (NotSupportedError, LLAVA, {"do_resize": False}, {}, ["do_resize"]),
        (NotSupportedError, {"architectures": ["LlamaForCausalLM"]}, {}, {}, ["LlamaForCausalLM"]),
    ],
    ids=range(16),
)
def test_what_files_and_options_say_is_checked(kind, config, file, given, fragments):
    with pytest.raises(kind) as error:
        family_of(config, file, given)
    assert all(fragment in str(error.value) for fragment in fragments), error.value


def test_families_are_found_by_architecture():
    assert sees_pictures(QWEN2) and not sees_pictures({}) and len(FAMILIES) == 7
