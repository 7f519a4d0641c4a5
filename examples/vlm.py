"""Images in prompts: as parts of a chat, beside a text, beside token ids.

    python examples/vlm.py MODEL [--image cat.png] [--question "What is in this image?"]

MODEL is a checkpoint folder or hub id of any family with a vision tower (docs/models.md), such as
Qwen/Qwen2.5-VL-3B-Instruct. --image is a path or a URL; without one a red disc is drawn. The three
answers are one: what differs is who writes the prompt.
"""

from __future__ import annotations

import argparse
from typing import Any

from PIL import Image, ImageDraw

import jaxserve


def disc(side: int = 224) -> Image.Image:
    """A red disc on white."""
    image = Image.new("RGB", (side, side), "white")
    box = (side // 4, side // 4, side * 3 // 4, side * 3 // 4)
    ImageDraw.Draw(image).ellipse(box, fill="red")
    return image


def rendered(tokenizer: Any, question: str) -> str:
    """The question behind a placeholder for an image, as the model's chat template writes it."""
    parts = [{"type": "image"}, {"type": "text", "text": question}]
    messages = [{"role": "user", "content": parts}]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", help="checkpoint folder or hub id")
    parser.add_argument("--image", help="path or URL")
    parser.add_argument("--question", default="What is in this image?")
    parser.add_argument("--tokens", type=int, default=64, help="of each answer, at most")
    given = parser.parse_args()
    image = given.image or disc()
    params = {"temperature": 0, "max_new_tokens": given.tokens}

    with jaxserve.Engine(model_path=given.model) as engine:
        parts = [{"type": "image", "image": image}, {"type": "text", "text": given.question}]
        answer = engine.chat([{"role": "user", "content": parts}], params)
        print(f"chat: {answer['text']!r}")

        tokenizer = engine.tokenizer_manager.tokenizer
        prompt = rendered(tokenizer, given.question)
        # generate() has the tokenizer write its first token; some templates write it, too
        first = tokenizer.decode(tokenizer("")["input_ids"])
        answer = engine.generate(prompt.removeprefix(first), params, image_data=image)
        print(f"text: {answer['text']!r}")

        ids = tokenizer.encode(prompt, add_special_tokens=False)
        answer = engine.generate(input_ids=ids, sampling_params=params, image_data=[image])
        print(f"input_ids: {answer['text']!r}")
        meta = answer["meta_info"]
        print(f"{meta['image_tokens']} of {meta['prompt_tokens']} tokens are the image's")


if __name__ == "__main__":
    main()
