"""Chat messages whose content has parts: what templates see of them, and the images in order."""

from __future__ import annotations

import pytest
from PIL import Image

from jaxserve.errors import InvalidRequestError, NotSupportedError
from jaxserve.text.chat import ChatPrompts
from jaxserve.text.parts import images_of

PAD = "<|image_pad|>"
OF_PARTS = (
    "{% for message in messages %}<{{ message['role'] }}>"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}[" + PAD + "]{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}</>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
ONLY_PARTS = (
    "{% for message in messages %}{{ message['role'] }}: "
    "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}" + PAD + "\n"
    "{% endfor %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ part['text'] }} {% endfor %}{% endfor %}"
)
OF_STRINGS = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}</>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
STRICT_STRINGS = "{% for message in messages %}{{ '>' + message['content'] }}{% endfor %}"
IMAGE = Image.new("RGB", (4, 4))
TALK = [
    {"role": "system", "content": "be kind"},
    {
        "role": "user",
        "content": [
            {"type": "text", "text": "see "},
            {"type": "image", "image": IMAGE},
            {"type": "image_url", "image_url": {"url": "http://x/y", "detail": "low"}},
            {"type": "text", "text": "what?"},
        ],
    },
    {"role": "assistant", "content": "a cat"},
    {"role": "user", "content": [{"type": "image", "path": "cat.png"}]},
]


@pytest.mark.parametrize(
    ("template", "wanted"),
    [
        (
            OF_PARTS,
            f"<system>be kind</><user>see [{PAD}][{PAD}]what?</><assistant>a cat</>"
            f"<user>[{PAD}]</><assistant>",
        ),
        (
            ONLY_PARTS,
            f"system: be kind user: {PAD}\n{PAD}\nsee  what? assistant: a cat user: {PAD}\n",
        ),
        (
            OF_STRINGS,
            f"<system>be kind</><user>see {PAD}{PAD}what?</><assistant>a cat</>"
            f"<user>{PAD}</><assistant>",
        ),
        (STRICT_STRINGS, f">be kind>see {PAD}{PAD}what?>a cat>{PAD}"),
    ],
    ids=["parts", "only parts", "strings", "strict strings"],
)
def test_templates_get_what_they_know(template, wanted):
    chats = ChatPrompts(template, {}, PAD)
    assert chats.render(TALK) == wanted == chats.render(TALK)
    assert chats.render([{"role": "user", "content": "hi"}]).replace(" ", "") in (
        "<user>hi</><assistant>",
        "user:hi",
        ">hi",
    )


def test_images_are_in_order():
    assert images_of(TALK) == [IMAGE, {"url": "http://x/y", "detail": "low"}, "cat.png"]
    assert images_of([{"role": "assistant", "content": None, "tool_calls": []}]) == []
    for part, item in (
        ({"type": "image", "url": "http://a/b"}, "http://a/b"),
        ({"type": "image", "base64": "AAAA"}, "AAAA"),
        ({"type": "image_url", "image_url": "data:,x"}, "data:,x"),
    ):
        assert images_of([{"role": "user", "content": [part]}]) == [item]


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image"},
        {"type": "image", "image": None},
        {"type": "image", "image": IMAGE, "url": "http://x/y"},
        {"type": "image_url", "url": "http://x/y"},
    ],
    ids=range(4),
)
def test_parts_without_one_image(part):
    with pytest.raises(InvalidRequestError, match=f"the type '{part['type']}' must have one of"):
        images_of([{"role": "user", "content": [part]}])


def test_a_final_message_of_parts_is_continued():
    chats = ChatPrompts(OF_PARTS, {}, PAD)
    for content in ("It is", [{"type": "text", "text": "It is"}]):
        talk = [TALK[1], {"role": "assistant", "content": content}]
        text = chats.render(talk, template_kwargs={"continue_final_message": True})
        assert text.endswith("what?</><assistant>It is")
    with pytest.raises(InvalidRequestError, match="no such text"):
        chats.render(TALK, template_kwargs={"continue_final_message": True})


def test_what_a_model_does_not_see():
    for marker, kind in ((None, "image"), (None, "image_url"), (PAD, "video"), (PAD, "audio")):
        with pytest.raises(NotSupportedError, match=f"content of the type '{kind}'"):
            ChatPrompts(OF_PARTS, {}, marker).render(
                [{"role": "user", "content": [{"type": kind, "image": IMAGE}]}]
            )
    assert ChatPrompts(OF_PARTS, {}).render(TALK[:1]) == "<system>be kind</><assistant>"
