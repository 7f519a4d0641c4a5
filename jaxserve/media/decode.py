"""Bytes of an image's file, or a PIL image, to a PIL image in RGB."""

from __future__ import annotations

import importlib.util
import io
import sys
from typing import TYPE_CHECKING, Any

from jaxserve.errors import NotSupportedError

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
"""Pillow's names of what is decoded. Its others are rare, and one (EPS) runs a program."""


class ImageError(Exception):
    """What was given is no image that can be used; the message says why."""


def check_pillow() -> None:
    """Raises NotSupportedError without Pillow."""
    if importlib.util.find_spec("PIL") is None:
        raise NotSupportedError(
            "images in prompts need the Pillow package: pip install jaxserve[vision]"
        )


def decoded(content: bytes, most_pixels: int) -> Image:
    """The first frame of an image's file in RGB, as `rgb`. Raises ImageError."""
    from PIL import Image

    if not content:
        raise ImageError("it is empty (0 bytes)")
    Image.init()
    try:
        known = [name for name in FORMATS if name in Image.OPEN]  # as Pillow was built
        image = Image.open(io.BytesIO(content), formats=known)
    except Exception as error:  # of Pillow's parsers; a bomb's is another one than damage's
        raise ImageError(_reason(error)) from None
    return rgb(image, most_pixels)


def rgb(image: Image, most_pixels: int) -> Image:
    """`image.convert("RGB")`: transparency is dropped, a rotation in EXIF stays undone, as in
    SGLang. Pixels are counted before they are decoded. Raises ImageError."""
    width, height = image.size
    if width < 1 or height < 1:
        raise ImageError(f"it has no pixels ({width} x {height})")
    if width * height > most_pixels:
        raise ImageError(f"{width} x {height} pixels are more than max_image_pixels={most_pixels}")
    try:
        return image.convert("RGB")
    except Exception as error:  # a truncated file, and whatever a decoder meets
        raise ImageError(_reason(error)) from None


def is_image(value: Any) -> bool:
    """Whether a value is a PIL image."""
    module = sys.modules.get("PIL.Image")
    return module is not None and isinstance(value, module.Image)


def _reason(error: Exception) -> str:
    from PIL import UnidentifiedImageError
    from PIL.Image import DecompressionBombError, DecompressionBombWarning

    if isinstance(error, UnidentifiedImageError):
        return f"it is none of {', '.join(FORMATS)}"
    if isinstance(error, DecompressionBombError | DecompressionBombWarning):
        return f"it has more pixels than Pillow decodes: {str(error)[:200]}"
    return f"it cannot be decoded: {type(error).__name__}: {str(error)[:200]}"
