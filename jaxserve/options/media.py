"""Options of images in prompts, a part of the table (`options/table.py`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxserve import checks
from jaxserve.errors import InvalidRequestError, NotSupportedError
from jaxserve.options.option import option

MODALITIES = ("image", "video", "audio")


def check_counts(limits: dict[str, Any]) -> None:
    """Of `limit_mm_data_per_request`: counts by modality."""
    for modality, count in limits.items():
        _check_modality("limit_mm_data_per_request", modality)
        checks.integer(f"limit_mm_data_per_request[{modality!r}]", count, 0)


def check_processing(config: dict[str, Any]) -> None:
    """Of `mm_process_config`: keyword arguments of processors by modality. Which of them a model's
    images have is checked with the model."""
    for modality, arguments in config.items():
        _check_modality("mm_process_config", modality)
        if not isinstance(arguments, dict):
            raise InvalidRequestError(
                f"mm_process_config[{modality!r}] must be a dict, got {checks.shown(arguments)}"
            )
        if arguments and modality != "image":
            raise NotSupportedError(
                f"mm_process_config[{modality!r}]={checks.shown(arguments)} is not supported yet; "
                "jaxserve takes images"
            )


def _check_modality(name: str, modality: Any) -> None:
    if modality not in MODALITIES:
        raise InvalidRequestError(
            f"{name} must have the keys {', '.join(MODALITIES)}, got {checks.shown(modality)}"
            f"{checks.near_matches(modality, MODALITIES)}"
        )


@dataclasses.dataclass(init=False, repr=False, eq=False)
class MediaOptions:
    """In normal form, as `Options`, which has them behind its own."""

    enable_multimodal: bool | None = option(
        "flag",
        None,
        "take images; None: where the model sees any; False: such a model runs as one of text",
    )
    limit_mm_data_per_request: str | Mapping[str, Any] | None = option(
        "json", None, 'most images of a prompt, as {"image": n}; None: any', then=check_counts
    )
    mm_process_config: str | Mapping[str, Any] | None = option(
        "json",
        None,
        "arguments of the model's image processor in place of its files', as "
        '{"image": {"max_pixels": n}}',
        then=check_processing,
    )
    allowed_media_domains: tuple[str, ...] = option(
        "strings", (), "hosts that images may be fetched from, redirections included; none: any"
    )
    media_url_max_file_size_mb: int = option(
        "integer", 64, "most MiB of an image behind a URL; 0: no URL is opened", low=0, high=4096
    )
    allowed_local_media_path: str | None = option(
        "path", None, "the folder that images may be read from; '': no file is; None: any file"
    )
    max_image_pixels: int = option(
        "integer", 89_478_485, "most pixels of an image, before it is resized", low=1
    )
    max_media_bytes: int = option(
        "integer",
        1 << 34,
        "most bytes of resized images that a call may have",
        low=1,
        high=1 << 62,
    )
