"""Items of `image_data` that are dicts: what a processor returned, or what a tower made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jaxserve import checks
from jaxserve.errors import InvalidRequestError
from jaxserve.media.decode import ImageError
from jaxserve.media.families.family import Family, Prepared, array

OUTPUT, EMBEDDING = "processor_output", "precomputed_embedding"
FORMATS = (OUTPUT, EMBEDDING)


def is_made(item: Any) -> bool:
    """Whether an item has gone through a processor, or more, already."""
    return isinstance(item, Mapping) and "url" not in item


def check_alone(items: Sequence[Any], where: str) -> None:
    """Raises InvalidRequestError where a prompt has a dict of what a processor or a tower made
    beside other images: one dict has all of the prompt's."""
    if len(items) > 1 and any(map(is_made, items)):
        raise InvalidRequestError(
            f"{where}: a dict of processor output or of embeddings has all images of its prompt "
            f"and stands alone, got {len(items)} items: {checks.shown(list(items))}"
        )


def pictures_of(family: Family, item: Mapping[str, Any], where: str) -> list[Prepared]:
    """All pictures of a prompt from one dict.

    {"format": "processor_output", "pixel_values": ..., ...} is what Hugging Face's processor
    returned: float32, normalized. {"format": "precomputed_embedding", "feature": ...} has the
    tower's rows, [tokens, width]. Both with `image_grid_thw` for the Qwen families. The prompt is
    `input_ids` of the call, not those of the dict. Raises InvalidRequestError.
    """
    kind = item.get("format")
    if kind not in FORMATS:
        raise InvalidRequestError(
            f'{where}: the key "format" must be one of {", ".join(FORMATS)}, got '
            f"{checks.shown(kind)}"
        )
    try:
        if kind == OUTPUT:
            return family.of_output(item)
        features = array("feature", item.get("feature"), 2)
        if features.shape[1] != family.width:
            raise ImageError(
                f"feature must have {family.width} columns, got shape {features.shape}"
            )
        return family.of_features(item, features)
    except ImageError as error:
        raise InvalidRequestError(f"{where}: {kind}: {error}") from None
