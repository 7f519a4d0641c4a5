"""A caption for every image of a folder, as a batch job: it goes on where a crash has stopped it.

    python examples/caption_images.py MODEL IMAGES OUT [--question "Describe this image."]

MODEL is a checkpoint folder or hub id of any family with a vision tower (docs/models.md). Captions
lie in OUT/part-*.jsonl; a file that is no image is a row with its error.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import jaxserve.batch

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp")


def rows(folder: Path, question: str) -> list[dict[str, Any]]:
    """One for each image, in the order of their names: a job's input is the same each time."""
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    text = {"type": "text", "text": question}
    return [
        {
            "name": path.name,
            "messages": [
                {
                    "role": "user",
                    "content": [{"type": "image", "path": str(path.resolve())}, text],
                }
            ],
        }
        for path in paths
    ]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", help="checkpoint folder or hub id")
    parser.add_argument("images", type=Path, help="a folder")
    parser.add_argument("out", type=Path, help="a folder, of this job alone")
    parser.add_argument("--question", default="Describe this image in one sentence.")
    parser.add_argument("--tokens", type=int, default=64, help="of each caption, at most")
    given = parser.parse_args()

    report = jaxserve.batch.run(
        rows(given.images, given.question),
        given.out,
        given.model,
        sampling_params={"temperature": 0, "max_new_tokens": given.tokens},
    )
    for part in sorted(given.out.glob("part-*.jsonl")):
        for line in part.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            print(f"{row['name']}: {row['error'] or repr(row['text'])}")
    print(report)


if __name__ == "__main__":
    main()
