"""The argument `image_data` of a call: its forms, to the list of each prompt's images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxserve import checks
from jaxserve.errors import InvalidRequestError

NAME = "image_data"


def image_lists(image_data: Any, prompts: int, single: bool) -> list[list[Any]]:
    """The images of each prompt, as they were given: of `image_data` as SGLang nests it.

    A single prompt has an item, or a list of them. In a batch a bare item goes to every prompt; a
    list has an entry for each prompt: an item, None, or a list of items. None within a list of
    items is no image, and an empty list is none for anybody. n > 1 changes nothing of it.

    Raises InvalidRequestError for a list of another length than the batch, and for lists within
    lists of items.
    """
    if checks.absent(image_data):
        return [[] for _ in range(prompts)]
    if not isinstance(image_data, list | tuple):
        return [[image_data] for _ in range(prompts)]
    if single:
        inner = image_data[0] if len(image_data) == 1 else None  # as for a batch of one
        return [_items(inner if isinstance(inner, list | tuple) else image_data, NAME)]
    if len(image_data) != prompts:
        raise InvalidRequestError(
            "The length of image_data should be equal to the batch size. It has "
            f"{len(image_data)} entries for {prompts} prompts, got {checks.shown(image_data)}"
        )
    return [
        _items(entry, f"{NAME}[{row}]") if isinstance(entry, list | tuple) else _given([entry])
        for row, entry in enumerate(image_data)
    ]


def _items(entry: Sequence[Any], where: str) -> list[Any]:
    for index, item in enumerate(entry):
        if isinstance(item, list | tuple):
            raise InvalidRequestError(
                f"{where}[{index}] must be an image, got a list within a list of images: "
                f"{checks.shown(item)}"
            )
    return _given(entry)


def _given(items: Sequence[Any]) -> list[Any]:
    return [item for item in items if item is not None]
