"""One item of `image_data` to a PIL image in RGB, whatever it was given as."""

from __future__ import annotations

import base64
import binascii
import contextlib
import os
import urllib.parse
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from jaxserve import checks
from jaxserve.errors import InvalidRequestError
from jaxserve.media import paths, urls
from jaxserve.media.decode import ImageError, decoded, is_image, rgb
from jaxserve.media.limits import MIB, MOST_FILE_BYTES, MediaLimits
from jaxserve.media.paths import FileError
from jaxserve.media.urls import FetchError

if TYPE_CHECKING:
    from PIL.Image import Image

JPEG_TEXT = "/9j/"
"""How base64 of a JPEG begins: as an absolute path."""
LEAST_TEXT = 44
"""Characters of base64 that an image has at least: a GIF of one pixel."""


def fetched(item: Any, where: str, index: int, limits: MediaLimits) -> Image | bytes:
    """A PIL image as it is, or the bytes of the file that `item` is or leads to: `bytes`, a URL
    (http, https, file, data), a path, base64, or an object with such a `url` (SGLang's ImageData).
    Waits for servers and disks, and takes little of a processor.

    where, index: how messages call it. Raises InvalidRequestError.
    """
    with _naming(item, where, index):
        return _fetched(item, limits)


def rgb_of(item: Any, source: Image | bytes, where: str, index: int, limits: MediaLimits) -> Image:
    """The image in RGB, decoded. source: `fetched` of the item. Raises InvalidRequestError."""
    with _naming(item, where, index):
        if isinstance(source, bytes):
            return decoded(source, limits.pixels)
        return rgb(source, limits.pixels)


@contextlib.contextmanager
def _naming(item: Any, where: str, index: int) -> Iterator[None]:
    try:
        yield
    except (ImageError, FetchError, FileError) as error:
        raise InvalidRequestError(
            f"{where}: An exception occurred while loading IMAGE data at index {index}: Error "
            f"while loading data {checks.shown(item)}: {error}"
        ) from None


def _fetched(item: Any, limits: MediaLimits) -> Image | bytes:
    if is_image(item):
        return item
    if isinstance(item, bytes | bytearray | memoryview):
        return _bounded(bytes(item))
    if isinstance(item, str):
        return _content(item, limits)
    if isinstance(item, os.PathLike):
        return paths.read(os.fspath(item), limits)
    url = item.get("url") if isinstance(item, Mapping) else getattr(item, "url", None)
    if isinstance(url, str | bytes) or is_image(url):
        return _fetched(url, limits)
    raise ImageError(
        "Invalid image: it must be a PIL image, bytes of a file, a URL, a path, base64 or a dict "
        'with the key "format"'
    )


def _content(text: str, limits: MediaLimits) -> bytes:
    """The bytes that a string stands for."""
    start = text[:8].lower()
    if start.startswith(("http://", "https://")):
        return urls.fetch(text, limits)
    if start.startswith("data:"):
        return _data_url(text)
    if start.startswith("file://"):
        return paths.read(_file_path(text), limits)
    if paths.is_file(text, limits):
        return paths.read(text, limits)
    if text.startswith("/") and not text.startswith(JPEG_TEXT):
        return paths.read(text, limits)  # and says why it cannot
    if len(text) >= LEAST_TEXT and (content := _base64(text)) is not None:
        return content
    raise ImageError("it is no URL, no path of a file that may be read, and no base64")


def _file_path(url: str) -> str:
    try:
        parts = urllib.parse.urlsplit(url)
    except ValueError:
        raise FileError("no URL") from None
    if parts.netloc not in ("", "localhost"):
        raise FileError("a file:// URL of another host")
    return urllib.parse.unquote(parts.path)


def _data_url(text: str) -> bytes:
    header, comma, data = text.partition(",")
    if not comma:
        raise ImageError("a data URL without a comma")
    if not header.lower().rstrip().endswith(";base64"):
        raise ImageError("a data URL that is not base64")
    content = _base64(urllib.parse.unquote(data) if "%" in data else data)
    if content is None:
        raise ImageError("a data URL whose base64 is damaged")
    return content


def _base64(text: str) -> bytes | None:
    """None where it is no base64; line breaks and missing padding are let through."""
    if len(text) > MOST_FILE_BYTES // 3 * 4:
        raise ImageError(f"text for more than {MOST_FILE_BYTES // MIB} MiB")
    packed = "".join(text.split()).rstrip("=")
    try:
        return base64.b64decode(packed + "=" * (-len(packed) % 4), validate=True)
    except (binascii.Error, ValueError):
        return None


def _bounded(content: bytes) -> bytes:
    if len(content) > MOST_FILE_BYTES:
        raise ImageError(f"it has more than {MOST_FILE_BYTES // MIB} MiB")
    return content
