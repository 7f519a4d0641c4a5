"""What an engine needs to know of its model's images, from the loaded model."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

from jaxserve.config.media import Pictures
from jaxserve.options import Options

if TYPE_CHECKING:
    from converters import LoadedModel
    from jaxserve.media.reader import Reader
    from jaxserve.text.codec import Codec


def reader_of(
    options: Options, loaded: LoadedModel, codec: Callable[[], Codec | None]
) -> Reader | None:
    """What reads images, see `Reader.of`. codec: waits for it; it is None with
    skip_tokenizer_init."""
    if loaded.tower is None and not (options.enable_multimodal or options.mm_process_config):
        return None  # and a model of text imports nothing about images
    from jaxserve.media.reader import Reader

    found = codec()
    encode = None if found is None else functools.partial(_encode, found)
    return Reader.of(loaded.hf_config, loaded.processor_config, encode, options)


def pictures_of(reader: Reader, loaded: LoadedModel) -> Pictures:
    """The sizes of what `reader` makes."""
    assert loaded.tower is not None
    family, tower = reader.family, loaded.tower.config
    smallest, largest = family.patch_range
    weights = [sum(x.size for x in of.params.values()) for of in (loaded.tower, loaded)]
    return Pictures(
        smallest=smallest,
        largest=largest,
        patches_per_token=tower.patches_per_token,
        row_bytes=tower.width * loaded.declaration.dtype.itemsize,
        cost=weights[0] / weights[1],
        normal=family.normal,
        block=family.block,
    )


def _encode(codec: Codec, text: str) -> list[int]:
    return codec.encode("image_data", [text], add_special_tokens=False)[0]
