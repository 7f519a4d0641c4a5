"""A call's prompts and images together: nesting, limits, dicts, many at a time, failures."""

from __future__ import annotations

import threading
import time
import types

import numpy as np
import pytest
import torch
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from jaxserve import ServerArgs
from jaxserve.errors import InvalidRequestError, ModelLoadError, NotSupportedError
from jaxserve.media import decode, reader
from jaxserve.media.arguments import image_lists
from jaxserve.media.pool import MOST_THREADS, Pool
from jaxserve.media.reader import Reader
from tests.pictures import GEMMA3, IDEFICS3, LLAVA, QWEN2, QWEN3, file_of, noise, text_of

PAD = 300
ONE, TWO = noise(40, 40), noise(64, 24, seed=1)
SQUARE = {"height": 32, "width": 32}
FILES = {
    "qwen": (QWEN2, Qwen2VLImageProcessorPil, {"patch_size": 4, "min_pixels": 64}),
    "gemma3": (GEMMA3, Gemma3ImageProcessorPil, {"size": SQUARE}),
    "idefics3": (
        IDEFICS3,
        Idefics3ImageProcessorPil,
        {"size": {"longest_edge": 64}, "max_image_size": {"longest_edge": 32}},
    ),
    "llava": (
        LLAVA,
        LlavaImageProcessorPil,
        {"size": {"shortest_edge": 32}, "crop_size": SQUARE},
    ),
}


def make(name="qwen", **options):
    config, _, file = FILES[name]
    return Reader(config, file, lambda text: [ord(c) for c in text], ServerArgs("x", **options))


READER = make()


def digests(rows):
    return [[] if media is None else [p.digest for p in media.pictures] for _, media in rows]


FIRST, SECOND = digests(READER.read([[PAD, PAD]], [ONE, TWO], single=True))[0]


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (None, [[]]),
        ([], [[]]),
        ([None], [[]]),
        ("a", [["a"]]),
        (["a", "b"], [["a", "b"]]),
        (["a", None], [["a"]]),
        ([["a", "b"]], [["a", "b"]]),
        (("a",), [["a"]]),
        ([[], [None]], [[]]),
        (False, [[]]),
        ({}, [[]]),
    ],
    ids=range(11),
)
def test_images_of_a_single_prompt(given, wanted):
    assert image_lists(given, 1, single=True) == wanted


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (None, [[], []]),
        ([], [[], []]),
        ("a", [["a"], ["a"]]),
        (["a", "b"], [["a"], ["b"]]),
        ([None, "b"], [[], ["b"]]),
        ([None, ["b", "c"]], [[], ["b", "c"]]),
        ([["a"], None], [["a"], []]),
        ([[None], []], [[], []]),
        ([["a", "b"], "c"], [["a", "b"], ["c"]]),
    ],
    ids=range(9),
)
def test_images_of_a_batch(given, wanted):
    assert image_lists(given, 2, single=False) == wanted


def test_wrong_nesting():
    deep = ["a"]
    for _ in range(10_000):
        deep = [deep]
    endless = []
    endless += [endless, endless]
    for given in (deep, endless):
        for single in (True, False):
            with pytest.raises(InvalidRequestError, match="image_data"):
                image_lists(given, 1, single=single)
    for given, count in ((["a"], 2), (["a"] * 3, 2)):
        with pytest.raises(InvalidRequestError, match="The length of image_data should be equal"):
            image_lists(given, count, single=False)
    for given, single, name in (
        (["a", ["b"]], True, r"image_data\[1\] must be an image"),
        (["a", ["b", ["c"]]], False, r"image_data\[1\]\[1\] must be an image"),
    ):
        with pytest.raises(InvalidRequestError, match=name):
            image_lists(given, 2 - single, single=single)


def test_rows_get_their_own_images():
    prompts = [[PAD, 5], [5], [PAD, 5, PAD]]
    rows = READER.read(prompts, [[ONE], None, [TWO, ONE]], single=False)
    assert digests(rows) == [[FIRST], [], [SECOND, FIRST]]
    assert rows[1] == ([5], None) and prompts == [[PAD, 5], [5], [PAD, 5, PAD]]
    assert [ids.count(PAD) for ids, _ in rows] == [25, 0, 24 + 25]
    assert READER.read([[PAD], [5]], None, single=False) == [([PAD], None), ([5], None)]


def test_texts_are_encoded_together():
    asked = []

    def encode(texts):
        asked.append(texts)
        return [[PAD if c == "|" else 5 for c in t.replace("<|image_pad|>", "|")] for t in texts]

    rows = READER.read(["<|image_pad|>a", "b"], [ONE, None], single=False, encode=encode)
    assert asked == [["<|image_pad|>a", "b"]]
    assert rows[0][0] == [PAD] * 25 + [5] and rows[1] == ([5], None)


def test_one_object_for_all_rows_is_prepared_once(monkeypatch):
    asked = []
    prepare = READER.family.prepare
    monkeypatch.setattr(READER.family, "prepare", lambda image: asked.append(1) or prepare(image))
    rows = READER.read([[PAD]] * 5, ONE, single=False)
    assert digests(rows) == [[FIRST]] * 5 and len(asked) == 1
    text = text_of(file_of(ONE))
    again = READER.read([[PAD], [PAD]], [text, "".join(list(text))], single=False)
    assert digests(again) == [[FIRST]] * 2 and len(asked) == 2


@pytest.mark.parametrize(
    ("options", "prompts", "images", "fragments"),
    [
        ({}, [[PAD], [PAD]], [ONE, b""], ["image_data[1][0]", "index 0", "0 bytes"]),
        ({}, [[PAD, PAD]], [[ONE, "x"]], ["image_data[0][1]", "index 1", "'x'"]),
        ({}, [[PAD]], noise(1, 300), ["image_data[0][0]", "aspect ratio"]),
        ({}, [[PAD]], [[ONE, TWO]], ["1 image placeholders but 2 image inputs"]),
        ({}, [[PAD, 5, PAD]], ONE, ["2 image placeholders but 1 image inputs"]),
        ({}, [[PAD]], [[ONE, {"format": "processor_output"}]], ["stands alone", "2 items"]),
        ({}, [[PAD]], {"format": "x"}, ["image_data[0][0]", "processor_output", "'x'"]),
        ({}, [[PAD]], {"a": 1}, ['key "format"', "None"]),
        (
            {"limit_mm_data_per_request": {"image": 1}},
            [[PAD, PAD]],
            [[ONE, TWO]],
            ["Image count 2 exceeds limit 1 per request."],
        ),
        ({"max_image_pixels": 1000}, [[PAD]], ONE, ["max_image_pixels=1000", "40 x 40"]),
        ({"max_media_bytes": 5000}, [[PAD], [PAD]], [ONE, TWO], ["max_media_bytes=5000"]),
        ({"media_url_max_file_size_mb": 0}, [[PAD]], "http://x/y", ["media_url_max_file_size_mb"]),
        ({"allowed_local_media_path": ""}, [[PAD]], "/x.png", ["allowed_local_media_path=''"]),
        ({"allowed_media_domains": ["a.b"]}, [[PAD]], "http://x/y", ["allowed_media_domains"]),
    ],
    ids=range(14),
)
def test_what_is_refused(options, prompts, images, fragments):
    with pytest.raises(InvalidRequestError) as error:
        make(**options).read(prompts, images, single=False)
    assert all(fragment in str(error.value) for fragment in fragments), error.value
    assert len(str(error.value)) < 2000


def test_images_beyond_the_placeholders_are_not_loaded():
    with pytest.raises(InvalidRequestError, match="1 image placeholders but 2 image inputs"):
        READER.read([[PAD]], [object(), object()], single=True)


@pytest.mark.parametrize(
    ("kind", "name", "options", "fragment"),
    [
        (InvalidRequestError, "qwen", {"image": {"max_crops": 5}}, "max_crops"),
        (ModelLoadError, "qwen", {"image": {"max_pixels": "x"}}, "max_pixels"),
        (ModelLoadError, "gemma3", {"image": {"pan_and_scan_max_num_crops": 0}}, "num_crops"),
    ],
    ids=range(3),
)
def test_arguments_of_processors(kind, name, options, fragment):
    with pytest.raises(kind, match=fragment):
        make(name, mm_process_config=options)


def test_arguments_of_processors_count():
    small = make(mm_process_config='{"image": {"max_pixels": 256}}')
    ((ids, media),) = small.read([[PAD]], ONE, single=True)
    assert media.pictures[0].shape.patches <= 16 and len(ids) == media.pictures[0].tokens == 4
    config, _, file = FILES["gemma3"]
    arguments = {"do_pan_and_scan": True, "pan_and_scan_min_crop_size": 20}
    cut = Reader(
        config,
        file,
        lambda text: [PAD] * text.count("<image_soft_token>"),
        ServerArgs("x", mm_process_config={"image": arguments}),
    )
    ((ids, media),) = cut.read([[302]], noise(100, 40), single=True)
    assert media.pictures[0].shape.tiles == 4 and len(ids) == 64


@pytest.mark.parametrize("name", FILES)
def test_output_of_a_processor_is_the_image(name):
    _, oracle, file = FILES[name]
    ready = make(name)
    family = ready.family
    pictures = [family.prepare(image) for image in (ONE, TWO)]
    output = dict(oracle(**file)(images=[[ONE, TWO]] if name == "idefics3" else [ONE, TWO]))
    ids = [x for picture in pictures for x in [5, *[PAD] * picture.run] * picture.runs]
    for form in (dict, torched):
        item = {"format": "processor_output", "input_ids": [[1]], **form(output)}
        ((given, media),) = ready.read([ids], [item], single=True)
        assert given == ids
        wanted = np.concatenate([family.normalize(p.picture.patches) for p in pictures])
        made = np.concatenate([picture.patches for picture in media.pictures])
        np.testing.assert_allclose(made, wanted, rtol=0, atol=1e-6)
        assert made.dtype == np.float32
        shapes = [picture.shape for picture in media.pictures]
        assert sum(shape.patches for shape in shapes) == len(wanted)
        assert (media.owners >= 0).sum() == sum(p.picture.tokens for p in pictures)
    if name == "qwen":
        ((_, own),) = ready.read([[PAD, PAD]], [ONE, TWO], single=True)
        ((_, its),) = ready.read([[PAD, PAD]], [item], single=True)
        np.testing.assert_array_equal(own.positions, its.positions)


def torched(output):
    return {key: torch.tensor(np.asarray(value)) for key, value in output.items()}


@pytest.mark.parametrize("name", ["qwen", "qwen3", "gemma3", "llava"])
def test_embeddings_take_the_place_of_pictures(name):
    ready = make("qwen" if name == "qwen3" else name)
    width = 64
    if name == "qwen3":
        ready, width = Reader(QWEN3, None, None, ServerArgs("x")), 192
    run = {"qwen": 6, "qwen3": 6, "gemma3": 16, "llava": 64}[name]
    feature = np.random.default_rng(0).normal(size=(2 * run, width)).astype(np.float32)
    item = {"format": "precomputed_embedding", "feature": torch.tensor(feature).bfloat16()}
    item["image_grid_thw"] = [[1, 4, 6], [1, 6, 4]]
    ids = [5, *[PAD] * run, 5, *[PAD] * run]
    ((given, media),) = ready.read([ids], [item], single=True)
    assert given == ids and [p.tokens for p in media.pictures] == [run, run]
    features = np.concatenate([picture.features for picture in media.pictures])
    np.testing.assert_array_equal(features, item["feature"].float().numpy())
    assert media.pictures[0].digest != media.pictures[1].digest
    if name.startswith("qwen"):
        turned = {**item, "image_grid_thw": [[1, 6, 4], [1, 6, 4]]}
        ((_, other),) = ready.read([ids], [turned], single=True)
        same = [a.digest == b.digest for a, b in zip(media.pictures, other.pictures, strict=True)]
        assert same == [False, True]  # what follows the picture is elsewhere
        assert media.positions[:, 1:7].tolist() == [[1] * 6, [1, 1, 1, 2, 2, 2], [1, 2, 3] * 2]


VALUES = np.zeros((24, 96), np.float32)
GRID = {"image_grid_thw": [[1, 4, 6]]}


@pytest.mark.parametrize(
    ("name", "item", "fragment"),
    [
        ("qwen", {"pixel_values": VALUES}, "image_grid_thw must have 2 dimensions"),
        ("qwen", {**GRID}, "pixel_values must have 2 dimensions"),
        ("qwen", {"pixel_values": VALUES[:, :9], **GRID}, "96 columns"),
        ("qwen", {"pixel_values": VALUES[:20], **GRID}, "20 patches, and image_grid_thw says 24"),
        ("qwen", {"pixel_values": VALUES, "image_grid_thw": [[2, 4, 6]]}, "rows of 1 and two"),
        ("qwen", {"pixel_values": VALUES, "image_grid_thw": [[1, 3, 8]]}, "multiples of 2"),
        ("qwen", {"pixel_values": VALUES, "image_grid_thw": [[1, 4]]}, "3 columns"),
        ("qwen", {"pixel_values": VALUES + np.arange(96), **GRID}, "different frames"),
        ("qwen", {"pixel_values": VALUES + np.nan, **GRID}, "infinite or none"),
        ("qwen", {"pixel_values": [[1], [1, 2]], **GRID}, "array of numbers"),
        ("qwen", {"pixel_values": "x", **GRID}, "array of numbers"),
        ("llava", {"pixel_values": np.zeros((1, 3, 16, 16))}, "3 x 32 x 32"),
        ("gemma3", {"pixel_values": np.zeros((2, 3, 32, 32)), "num_crops": [5]}, "says 6"),
        ("gemma3", {"pixel_values": np.zeros((2, 3, 32, 32)), "num_crops": [-5, 5]}, "says 2"),
        ("idefics3", {"pixel_values": np.zeros((2, 3, 3, 32, 32))}, "3 x 32 x 32"),
    ],
    ids=range(15),
)
def test_dicts_that_do_not_fit(name, item, fragment):
    with pytest.raises(InvalidRequestError, match=fragment) as error:
        make(name).read([[PAD]], {"format": "processor_output", **item}, single=True)
    assert str(error.value).startswith("image_data[0][0]: processor_output: ")


def test_embeddings_that_do_not_fit():
    for name, feature, more, fragment in (
        ("qwen", np.zeros((6, 63)), GRID, "64 columns"),
        ("qwen", np.zeros((5, 64)), GRID, "5 rows, and image_grid_thw says 6"),
        ("llava", np.zeros((65, 64)), {}, "no multiple of 64"),
        ("llava", None, {}, "2 dimensions"),
    ):
        item = {"format": "precomputed_embedding", "feature": feature, **more}
        with pytest.raises(InvalidRequestError, match=fragment):
            make(name).read([[PAD]], item, single=True)


def test_models_and_options_without_images():
    text = {"architectures": ["LlamaForCausalLM"]}
    off = ServerArgs("x", enable_multimodal=False)
    assert Reader.of(QWEN2, None, None, off) is None
    assert Reader.of(text, None, None, ServerArgs("x", mm_process_config={"image": {}})) is None
    assert Reader.of(QWEN2, None, None, ServerArgs("x")).family.marker == PAD
    for options in ({"enable_multimodal": True}, {"mm_process_config": {"image": {"size": 1}}}):
        with pytest.raises(InvalidRequestError, match=f"{next(iter(options))}=.*Llama"):
            Reader.of(text, None, None, ServerArgs("x", **options))


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (InvalidRequestError, {"limit_mm_data_per_request": {"images": 1}}),
        (InvalidRequestError, {"limit_mm_data_per_request": {"image": -1}}),
        (InvalidRequestError, {"mm_process_config": {"image": 5}}),
        (NotSupportedError, {"mm_process_config": {"video": {"fps": 1}}}),
        (InvalidRequestError, {"allowed_media_domains": [5]}),
    ],
    ids=range(5),
)
def test_options_are_checked_when_they_are_given(kind, options):
    with pytest.raises(kind, match=next(iter(options))):
        ServerArgs("x", **options)


def test_the_extra_is_named_where_pillow_is_missing(monkeypatch):
    monkeypatch.setattr(decode.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(NotSupportedError, match=r"pip install jaxserve\[vision\]"):
        make()


def test_results_are_in_order_and_threads_are_bounded():
    running, most = [0], [0]
    lock = threading.Lock()

    def prepare(item):
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        time.sleep(0.002 * (item % 3))
        with lock:
            running[0] -= 1
        return -item

    assert Pool(2).prepare_all(prepare, range(60)) == [-item for item in range(60)]
    assert 1 < most[0] <= MOST_THREADS and Pool(2).prepare_all(prepare, []) == []


def test_a_failure_is_told_at_once_and_nothing_begins_after_it():
    started, release = [], threading.Event()

    def prepare(item):
        started.append(item)
        if item == 3:
            raise InvalidRequestError("item 3")
        release.wait(10)

    begun = time.monotonic()
    with pytest.raises(InvalidRequestError, match="item 3"):
        Pool(2).prepare_all(prepare, range(1000))
    assert time.monotonic() - begun < 5
    release.set()
    time.sleep(0.05)
    assert len(started) <= 2 * MOST_THREADS


def test_few_are_decoded_at_a_time_and_a_slow_server_holds_nobody_up(monkeypatch):
    pool = Pool(1)
    monkeypatch.setattr(reader, "Pool", lambda turns: pool)
    slow = make()
    waiting, release = threading.Event(), threading.Event()

    def fetched(item, *_):
        if item == "slow":
            waiting.set()
            release.wait(10)
        return ONE

    monkeypatch.setattr(reader, "fetched", fetched)
    held = []
    prepare = slow.family.prepare

    def counted(image):
        held.append(pool.turn._value)
        return prepare(image)

    monkeypatch.setattr(slow.family, "prepare", counted)
    call = threading.Thread(target=lambda: slow.read([[PAD]], "slow", single=True))
    call.start()
    assert waiting.wait(10)
    assert digests(slow.read([[PAD]] * 4, ["a", "b", "c", "d"], single=False)) == [[FIRST]] * 4
    release.set()
    call.join()
    assert held == [0] * 5


def test_an_object_with_a_url_is_an_image():
    item = types.SimpleNamespace(url=text_of(file_of(ONE)), detail="low")
    assert digests(READER.read([[PAD]], item, single=True)) == [[FIRST]]
