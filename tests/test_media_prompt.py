"""Prompts with images: which tokens they become, and what is said of each token."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2VLConfig,
    Qwen3VLConfig,
)
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.gemma3.processing_gemma3 import Gemma3Processor
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.idefics3.processing_idefics3 import Idefics3Processor
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.llava.processing_llava import LlavaProcessor
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLModel
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLModel

from jaxserve.errors import InvalidRequestError, ModelLoadError
from jaxserve.media.families.registry import family_of
from jaxserve.media.prompt import Expander
from tests.pictures import GEMMA3, IDEFICS3, LLAVA, QWEN2, QWEN3, noise

ROWS = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
SPECIAL = [
    "<image>",
    "<fake_token_around_image>",
    "<global-img>",
    "<end_of_utterance>",
    "<start_of_image>",
    "<image_soft_token>",
    "<end_of_image>",
    "<|image_pad|>",
    *ROWS,
]
NEWLINE = "\u010a"
"""As byte-level BPE writes it."""


def make_tokenizer():
    """Bytes, and two and three line breaks in one token: so does Gemma's vocabulary have it."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*letters, NEWLINE * 2, NEWLINE * 3]
    backend = Tokenizer(
        models.BPE(
            {word: number for number, word in enumerate(words)},
            [(NEWLINE, NEWLINE), (NEWLINE * 2, NEWLINE)],
        )
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(text, special=True) for text in SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<end_of_utterance>",
        extra_special_tokens={
            "boi_token": "<start_of_image>",
            "image_token": "<image_soft_token>",
            "eoi_token": "<end_of_image>",
        },
    )


TOKENIZER = make_tokenizer()
ID = dict(zip(SPECIAL, TOKENIZER.convert_tokens_to_ids(SPECIAL), strict=True))


def encode(text):
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


FILES = {
    "gemma3": {"size": {"height": 32, "width": 32}},
    "idefics3": {"size": {"longest_edge": 96}, "max_image_size": {"longest_edge": 32}},
    "llava": {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}},
}
GIVEN = {
    "gemma3": {
        "do_pan_and_scan": True,
        "pan_and_scan_max_num_crops": 4,
        "pan_and_scan_min_crop_size": 20,
        "pan_and_scan_min_ratio_to_activate": 1.5,
    }
}
GEMMA3_IDS = {
    **GEMMA3,
    "image_token_index": ID["<image_soft_token>"],
    "boi_token_index": ID["<start_of_image>"],
}
IDEFICS3_IDS = {**IDEFICS3, "image_token_id": ID["<image>"]}
LLAVA_IDS = {**LLAVA, "image_token_index": ID["<image>"]}
QWEN_IDS = {**QWEN2, "image_token_id": ID["<|image_pad|>"]}
FAMILIES = {
    "gemma3": family_of(GEMMA3_IDS, FILES["gemma3"], GIVEN["gemma3"]),
    "idefics3": family_of(IDEFICS3_IDS, FILES["idefics3"], {}),
    "llava": family_of(LLAVA_IDS, FILES["llava"], {}),
    "qwen": family_of(QWEN_IDS, {"min_pixels": 64, "max_pixels": 2000}, {}),
}
IMAGES = (noise(64, 64), noise(120, 30, seed=1), noise(30, 100, seed=2))
PROMPTS = (
    "{0}",
    "user\n{0}What is this?",
    "a{0}b{0}\n\n{0}",
    "{0}{0}\nsame? ",
)


def oracle_of(name):
    if name == "gemma3":
        images = Gemma3ImageProcessorPil(**FILES[name])
        return Gemma3Processor(images, TOKENIZER, image_seq_length=16)
    if name == "idefics3":
        return Idefics3Processor(
            Idefics3ImageProcessorPil(**FILES[name]), make_tokenizer(), image_seq_len=16
        )
    plain = PreTrainedTokenizerFast(tokenizer_object=TOKENIZER.backend_tokenizer)
    return LlavaProcessor(
        LlavaImageProcessorPil(**FILES[name]),
        plain,
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def expanded(name, prompt, images):
    """Ids and media of a text, or of ids."""
    expander = Expander(FAMILIES[name], encode)
    pictures = [FAMILIES[name].prepare(image) for image in images]
    if isinstance(prompt, str):
        text, framed = expander.text(prompt, pictures)
        ids = encode(text)
        return expander.media(ids if framed else expander.framed(ids, pictures), pictures)
    return expander.media(expander.framed(prompt, pictures), pictures)


@pytest.mark.parametrize("prompt", PROMPTS, ids=range(len(PROMPTS)))
@pytest.mark.parametrize("name", ["gemma3", "idefics3", "llava"])
def test_texts_become_the_tokens_of_transformers(name, prompt):
    text = prompt.format(FAMILIES[name].marker_text)
    images = list(IMAGES[: prompt.count("{0}")])
    output = oracle_of(name)(
        text=[text], images=[images], add_special_tokens=False, **GIVEN.get(name, {})
    )
    ids, media = expanded(name, text, images)
    assert ids == output["input_ids"][0]
    assert [picture.tokens for picture in media.pictures] == [
        (media.owners == number).sum() for number in range(len(images))
    ]
    for given in (ids, TOKENIZER.decode(ids)):  # what is expanded stays as it is
        again, same = expanded(name, given, images)
        assert again == ids
        np.testing.assert_array_equal(same.keys, media.keys)
    if "\n" not in text:  # else texts and ids of them may differ: "user\n" and "\n\n" stay apart
        assert expanded(name, encode(text), images)[0] == ids


def test_ids_keep_their_own_tokens_around_what_is_expanded():
    ids, _ = expanded("gemma3", encode("user\n<start_of_image>x"), IMAGES[:1])
    frame = encode("\n\n<start_of_image>") + [ID["<image_soft_token>"]] * 16
    assert ids == encode("user\n") + frame + encode("<end_of_image>\n\n") + encode("x")


def test_qwen_prompts_by_hand():
    pad = ID["<|image_pad|>"]
    one, two = FAMILIES["qwen"].prepare(IMAGES[0]), FAMILIES["qwen"].prepare(IMAGES[1])
    for prompt in ("a<|image_pad|>b<|image_pad|>", "a<|image_pad|>b" + "<|image_pad|>" * two.run):
        ids, media = expanded("qwen", prompt, IMAGES[:2])
        assert ids == [*encode("a"), *[pad] * one.run, *encode("b"), *[pad] * two.run]
        owners = [-1] + [0] * one.run + [-1] + [1] * two.run
        assert media.owners.tolist() == owners and media.owners.dtype == np.int32
        offsets = [0, *range(one.run), 0, *range(two.run)]
        assert media.offsets.tolist() == offsets
    adjacent = [pad] * (one.run + two.run)
    assert expanded("qwen", adjacent, IMAGES[:2])[0] == adjacent
    assert expanded("qwen", [pad, pad], IMAGES[:2])[0] == adjacent


def test_keys_are_words_of_the_digest_with_the_sign_set():
    ids, media = expanded("qwen", "a<|image_pad|>", IMAGES[:1])
    digest = media.pictures[0].digest
    words = [int.from_bytes(digest[4 * i : 4 * i + 4], "little") | 1 << 31 for i in range(8)]
    wanted = [words[j % 8] - (1 << 32) for j in range(len(ids) - 1)]
    assert media.keys.tolist() == [*encode("a"), *wanted] and max(wanted) < 0
    assert len(digest) == len(hashlib.sha256().digest())


@pytest.mark.parametrize(
    ("name", "prompt", "images", "found"),
    [
        ("qwen", "none", 1, 0),
        ("qwen", "<|image_pad|>a<|image_pad|>", 1, 2),
        ("qwen", "<|image_pad|>", 2, 1),
        ("qwen", "<|image_pad|>" * 5, 1, 1),
        ("gemma3", "<start_of_image>", 2, 1),
        ("gemma3", "<start_of_image><start_of_image>", 1, 2),
        ("gemma3", "<image_soft_token>" * 5, 1, 1),
        ("gemma3", "<start_of_image>" + "<image_soft_token>" * 17, 1, 1),
        ("idefics3", "<image>" * 20, 1, 1),
        ("idefics3", "<image><image>", 1, 1),
        ("llava", "<image>" * 63, 1, 1),
    ],
    ids=range(11),
)
def test_wrong_counts(name, prompt, images, found):
    for given in (prompt, encode(prompt)):
        with pytest.raises(InvalidRequestError) as error:
            expanded(name, given, IMAGES[:images])
        assert str(error.value).startswith(
            f"Prompt has {found} image placeholders but {images} image inputs were provided"
        )


def test_without_a_tokenizer_frames_must_be_there():
    family = FAMILIES["gemma3"]
    picture = family.prepare(IMAGES[0])
    expander = Expander(family, None)
    with pytest.raises(InvalidRequestError, match="runs of 16 tokens"):
        expander.framed([family.marker], [picture])
    assert expander.framed([family.marker, *[family.token] * 16], [picture]) == [
        family.marker,
        family.token,
    ]
    qwen = FAMILIES["qwen"]
    assert Expander(qwen, None).framed([5, qwen.token], [qwen.prepare(IMAGES[0])]) == [
        5,
        qwen.token,
    ]


def test_a_tokenizer_of_other_ids_is_told():
    family = family_of({**GEMMA3_IDS, "image_token_index": 5}, FILES["gemma3"], {})
    picture = family.prepare(IMAGES[0])
    with pytest.raises(ModelLoadError, match="'<image_soft_token>' as the token 5"):
        Expander(family, encode).framed([family.marker], [picture])


def rope_oracle(kind, config_class, **vision):
    sizes = {"patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2, "depth": 1}
    text = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    text |= {"intermediate_size": 8, "num_key_value_heads": 2, "vocab_size": 400}
    config = config_class(text_config=text, vision_config=sizes | vision)
    config.image_token_id = ID["<|image_pad|>"]
    with torch.device("meta"):
        return kind(config)


@pytest.mark.parametrize("prompt", PROMPTS, ids=range(len(PROMPTS)))
@pytest.mark.parametrize("name", ["qwen2", "qwen2.5", "qwen3"])
def test_positions_are_those_of_get_rope_index(name, prompt):
    model = {
        "qwen2": lambda: rope_oracle(Qwen2VLModel, Qwen2VLConfig, embed_dim=32, num_heads=4),
        "qwen2.5": lambda: rope_oracle(
            Qwen2_5_VLModel, Qwen2_5_VLConfig, hidden_size=32, num_heads=4, out_hidden_size=64
        ),
        "qwen3": lambda: rope_oracle(
            Qwen3VLModel,
            Qwen3VLConfig,
            hidden_size=32,
            num_heads=4,
            out_hidden_size=64,
            deepstack_visual_indexes=[0],
        ),
    }[name]()
    images = IMAGES[: prompt.count("{0}")]
    ids, media = expanded("qwen", prompt.format("<|image_pad|>"), images)
    grids = [[1, picture.shape.height, picture.shape.width] for picture in media.pictures]
    if "{0}{0}" in prompt:  # the oracle takes adjacent pictures for one
        at = next(n for n, owner in enumerate(media.owners) if owner == 1)
        ids.insert(at, 5)
        media = Expander(FAMILIES["qwen"], encode)
        pictures = [FAMILIES["qwen"].prepare(image) for image in images]
        _, media = media.media(media.framed(ids, pictures), pictures)
    positions, delta = model.get_rope_index(
        torch.tensor([ids]),
        mm_token_type_ids=torch.tensor(np.int32(media.owners[None] >= 0)),
        image_grid_thw=torch.tensor(grids),
    )
    np.testing.assert_array_equal(media.positions, positions[:, 0].numpy())
    assert media.positions.dtype == np.int32 and media.delta == int(delta)


def test_tokens_of_a_block_see_to_its_end():
    ids, media = expanded("gemma3", "ab<start_of_image>c<start_of_image>", IMAGES[:2])
    token = ID["<image_soft_token>"]
    for place, value in enumerate(ids):
        last = place
        while value == token and last + 1 < len(ids) and ids[last + 1] == token:
            last += 1
        assert media.reach[place] == last
    assert media.reach.dtype == np.int32 and media.positions is None
    assert media.pictures[1].tokens == 5 * 16  # four crops


def test_rows_of_deepstack_are_counted_in_the_width():
    assert family_of(QWEN2, None, {}).width == 64 and family_of(QWEN3, None, {}).width == 192
