"""Prompts and their images to token ids and what stands in them: the one entry of this package."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jaxserve import checks
from jaxserve.errors import InvalidRequestError
from jaxserve.media.arguments import NAME, image_lists
from jaxserve.media.decode import ImageError, check_pillow
from jaxserve.media.families.family import Family, Prepared
from jaxserve.media.families.registry import family_of, sees_pictures
from jaxserve.media.given import check_alone, is_made, pictures_of
from jaxserve.media.limits import MediaLimits, json_of
from jaxserve.media.picture import PromptMedia
from jaxserve.media.pool import Pool, default_turns
from jaxserve.media.prompt import Encode, Expander
from jaxserve.media.sources import fetched, rgb_of

if TYPE_CHECKING:
    from jaxserve.options import Options

EncodeAll = Callable[[list[str]], list[list[int]]]
Row = tuple[list[int], PromptMedia | None]


class Reader:
    """Of one model. Thread-safe; calls share nothing but the turns of their images."""

    def __init__(
        self,
        config: Mapping[str, Any],
        processor_config: Mapping[str, Any] | None,
        encode: Encode | None,
        options: Options,
    ) -> None:
        """config: of config.json. processor_config: of preprocessor_config.json, or of
        processor_config.json; None: the family's defaults. encode: token ids of a text, without
        those that a tokenizer puts around a prompt; None without a tokenizer.

        Raises NotSupportedError (an architecture without images, arguments that it does not do,
        Pillow missing), ModelLoadError and InvalidRequestError (`mm_process_config`).
        """
        check_pillow()
        given = json_of("mm_process_config", options.mm_process_config).get("image", {})
        self.family: Family = family_of(config, processor_config, given)
        """Sizes, ids, `normalize`."""
        self._expander = Expander(self.family, encode)
        self._limits = MediaLimits.of(options)
        self._pool = Pool(default_turns())

    @classmethod
    def of(
        cls,
        config: Mapping[str, Any],
        processor_config: Mapping[str, Any] | None,
        encode: Encode | None,
        options: Options,
    ) -> Reader | None:
        """The reader of a model; None where images are not taken: by a model without a tower, and
        with `enable_multimodal=False`. Errors as the constructor's; InvalidRequestError also where
        options about images are given for a model that sees none."""
        if sees_pictures(config):
            if options.enable_multimodal is False:
                return None
            return cls(config, processor_config, encode, options)
        for name in ("enable_multimodal", "mm_process_config"):
            value = getattr(options, name)
            if value and (name == "enable_multimodal" or json_of(name, value).get("image")):
                raise InvalidRequestError(
                    f"{name}={checks.quoted(value)} needs a model that sees images, and this one "
                    f"is {checks.quoted(config.get('architectures'))}"
                )
        return None

    def read(
        self,
        prompts: Sequence[str] | Sequence[list[int]],
        image_data: Any,
        single: bool,
        encode: EncodeAll | None = None,
    ) -> list[Row]:
        """Each prompt's ids, with its images' placeholders expanded, and its media; None of a
        prompt without images, whose ids are as they were.

        prompts: texts, which `encode` makes ids of after the frames of images are written into
        them, or ids. image_data, single: as `image_lists`. Raises InvalidRequestError, naming
        `image_data[row][index]`; nothing is left behind then.
        """
        given = image_lists(image_data, len(prompts), single)
        for row, items in enumerate(given):
            if items:
                check_alone(items, f"{NAME}[{row}]")
                self._limits.check_count(len(items))
                self._check_room(prompts[row], len(items))
        prepared = self._prepare(given)
        rows: list[tuple[str | list[int], bool]] = []
        for prompt, pictures in zip(prompts, prepared, strict=True):
            if isinstance(prompt, str):
                rows.append(self._expander.text(prompt, pictures) if pictures else (prompt, True))
            else:
                rows.append((prompt, False))
        encoded = self._encoded([row for row, _ in rows], encode)
        return [
            self._media(ids, framed, pictures)
            for ids, (_, framed), pictures in zip(encoded, rows, prepared, strict=True)
        ]

    def _encoded(self, rows: list[str | list[int]], encode: EncodeAll | None) -> list[list[int]]:
        texts = [row for row in rows if isinstance(row, str)]
        ids = iter(encode(texts) if encode is not None and texts else ())
        return [next(ids) if isinstance(row, str) else list(row) for row in rows]

    def _media(self, ids: list[int], framed: bool, pictures: list[Prepared]) -> Row:
        if not pictures:
            return ids, None
        return self._expander.media(
            ids if framed else self._expander.framed(ids, pictures), pictures
        )

    def _check_room(self, prompt: str | list[int], images: int) -> None:
        """Before any of them is loaded: raises InvalidRequestError for more images than a prompt
        has places for, however it is written."""
        family = self.family
        if isinstance(prompt, str):
            places = prompt.count(family.marker_text) + prompt.count(family.token_text)
        else:
            places = sum(x == family.token or x == family.marker for x in prompt)
        if images > places:
            raise InvalidRequestError(
                f"Prompt has {places} image placeholders but {images} image inputs were provided"
            )

    def _prepare(self, given: list[list[Any]]) -> list[list[Prepared]]:
        """Of each prompt. What is given twice, as one object, is prepared once."""
        places: dict[Any, tuple[Any, int, int]] = {}
        for row, items in enumerate(given):
            for index, item in enumerate(items):
                places.setdefault(_identity(item), (item, row, index))
        room = _Room(self._limits.call_bytes)

        def one(place: tuple[Any, int, int]) -> list[Prepared]:
            item, row, index = place
            where = f"{NAME}[{row}][{index}]"
            if is_made(item):
                pictures = pictures_of(self.family, item, where)
            else:
                pictures = [self._prepared(item, where, index)]
            room.take(pictures)
            return pictures

        made = self._pool.prepare_all(one, list(places.values()))
        by_item = dict(zip(places, made, strict=True))
        return [[p for item in items for p in by_item[_identity(item)]] for items in given]

    def _prepared(self, item: Any, where: str, index: int) -> Prepared:
        source = fetched(item, where, index, self._limits)
        try:
            with self._pool.turn:
                return self.family.prepare(rgb_of(item, source, where, index, self._limits))
        except ImageError as error:
            raise InvalidRequestError(f"{where}: {error}") from None


def _identity(item: Any) -> Any:
    """Equal for what is given more than once."""
    return item if isinstance(item, str) else id(item)


class _Room:
    """What a call's pictures may take of the host's memory."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._taken = 0
        self._lock = threading.Lock()

    def take(self, pictures: list[Prepared]) -> None:
        """Raises InvalidRequestError where there is not enough left."""
        sizes = (
            array.nbytes
            for prepared in pictures
            for array in (prepared.picture.patches, prepared.picture.features)
            if array is not None
        )
        with self._lock:
            self._taken += sum(sizes)
            if self._taken > self._most:
                raise InvalidRequestError(
                    f"the images of the call take more than max_media_bytes={self._most} bytes "
                    "when they are resized: make several calls, or give "
                    "Engine(max_media_bytes=...)"
                )
