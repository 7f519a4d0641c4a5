"""What images of a call may cost and where they may come from (docs/security.md)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from jaxserve.errors import InvalidRequestError
from jaxserve.options.option import json_object

if TYPE_CHECKING:
    from jaxserve.options import Options

MIB = 1 << 20
MOST_FILE_BYTES = 256 * MIB
"""Of an image's file, of bytes and of text that stands for them."""


@dataclasses.dataclass(frozen=True, slots=True)
class MediaLimits:
    """Of one engine, from its options."""

    count: int | None = None
    """Most images of a prompt."""
    pixels: int = 89_478_485
    """Most of an image, as it is given."""
    url_bytes: int = 64 * MIB
    """Most of a file behind a URL; 0: no URL is opened."""
    domains: tuple[str, ...] = ()
    """Hosts that may be asked, in lower case; empty: any."""
    folder: str | None = None
    """The one that files may be in; empty: none may be read; None: any may."""
    call_bytes: int = 1 << 34
    """Most of the patches and features of a call's images."""

    @classmethod
    def of(cls, options: Options) -> MediaLimits:
        counts = json_of("limit_mm_data_per_request", options.limit_mm_data_per_request)
        return cls(
            count=counts.get("image"),
            pixels=options.max_image_pixels,
            url_bytes=options.media_url_max_file_size_mb * MIB,
            domains=tuple(domain.lower() for domain in options.allowed_media_domains),
            folder=options.allowed_local_media_path,
            call_bytes=options.max_media_bytes,
        )

    def check_count(self, images: int) -> None:
        """Raises InvalidRequestError for more images of a prompt than it may have."""
        if self.count is not None and images > self.count:
            raise InvalidRequestError(
                f"Image count {images} exceeds limit {self.count} per request. "
                f"(limit_mm_data_per_request={{'image': {self.count}}})"
            )


def json_of(name: str, value: str | Mapping[str, Any] | None) -> dict[str, Any]:
    """An option of the kind "json", parsed; {} where nothing is given."""
    return {} if value is None else json_object(name, value)
