"""What every family's image processor is, and what they share.

Letters: P patches, C colour channels, p a patch's side in pixels, T tokens of a prompt.
"""

from __future__ import annotations

import abc
import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from jaxserve.errors import NotSupportedError
from jaxserve.media.decode import ImageError
from jaxserve.media.normal import Normal
from jaxserve.media.picture import Picture, Shape
from jaxserve.media.settings import Settings, processor_settings

if TYPE_CHECKING:
    from PIL.Image import Image

CHANNELS = 3
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5)
COMMON = (
    "do_convert_rgb",
    "do_normalize",
    "do_rescale",
    "do_resize",
    "image_mean",
    "image_std",
    "resample",
    "rescale_factor",
    "size",
)
"""Arguments that every family's processor has."""


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class Prepared:
    """A picture, and how the prompt speaks of it."""

    picture: Picture
    """As the tower takes it."""
    runs: int = 1
    """How many runs of placeholders it has in a prompt, `picture.tokens` in all, equally long."""
    split: tuple[int, int] = (0, 0)
    """Rows and columns: of its tokens (Qwen), or of the tiles that it was cut into (Idefics3)."""

    @property
    def run(self) -> int:
        """Tokens of one run."""
        return self.picture.tokens // self.runs


class Family(abc.ABC):
    """Made once per model from its config.json and its image processor's file; thread-safe.

    The constructors raise ModelLoadError for values that are missing or out of range,
    InvalidRequestError for overrides that the family does not know, NotSupportedError for those
    that it does not do.
    """

    known: ClassVar[tuple[str, ...]] = COMMON
    """What `mm_process_config["image"]` may say."""
    marker_text: ClassVar[str]
    """What a chat template writes for a picture."""
    token_text: ClassVar[str]
    """The text of the token that stands at each of a picture's places."""
    mean: ClassVar[tuple[float, ...]] = HALF
    """The default of `image_mean`."""
    std: ClassVar[tuple[float, ...]] = HALF
    """The default of `image_std`."""
    resample: ClassVar[int] = 3
    """Pillow's number of the default filter; 3 is bicubic."""

    def __init__(
        self, config: Mapping[str, Any], files: Mapping[str, Any] | None, given: Mapping[str, Any]
    ) -> None:
        """config: of config.json. files: of preprocessor_config.json or processor_config.json; None
        of a folder without them. given: `mm_process_config["image"]`."""
        self.config = Settings("config.json", config)
        self.vision = self.config.within("vision_config")
        self.settings = processor_settings(files, given, self.known)
        text = self.config.within("text_config")
        nested = text.given("hidden_size") is not None
        self.width = (text if nested else self.config).integer("hidden_size")
        """Numbers of a row that the tower makes for a token."""
        self.token = self._id("image_token_id", "image_token_index")
        """Token id at each of a picture's places in a prompt."""
        self.marker = self.token
        """Token id that stands for a whole picture in a prompt that is not expanded."""
        self.patch_size = self.vision.integer("patch_size", high=1024)
        """p."""
        self._filter = self.settings.integer("resample", default=self.resample, low=0, high=5)
        if not self.settings.flag("do_resize", True):
            raise NotSupportedError(f"{self.settings.where}: do_resize=False is not supported")
        scaled = self.settings.flag("do_rescale", True)
        factor = self.settings.number("rescale_factor", 1 / 255, above=0.0)
        self.rescale_factor = np.float32(factor if scaled else 1.0)
        """What pixels are multiplied with, before `image_mean` is taken off."""
        normal = self.settings.flag("do_normalize", True)
        means = self.settings.channels("image_mean", self.mean) if normal else (0.0,) * CHANNELS
        deviations = (1.0,) * CHANNELS
        if normal:
            deviations = self.settings.channels("image_std", self.std, above=0.0)
        self.image_mean = np.asarray(means, np.float32)
        """[C] float32."""
        self.image_std = np.asarray(deviations, np.float32)
        """[C] float32: what is divided by, at last."""
        self._means = means
        self._signature = repr(
            (type(self).__name__, factor, scaled, means, deviations, self.patch_size)
        ).encode()

    @property
    def normal(self) -> Normal:
        """What pixels become before the tower."""
        mean, std = self.image_mean.tolist(), self.image_std.tolist()
        return Normal(float(self.rescale_factor), tuple(mean), tuple(std))

    @property
    @abc.abstractmethod
    def patch_range(self) -> tuple[int, int]:
        """P of the smallest picture (or of a square of several), and of the largest."""

    @property
    def block(self) -> int:
        """Tokens of a picture that see each other; 0: they do not."""
        return 0

    @abc.abstractmethod
    def prepare(self, image: Image) -> Prepared:
        """A PIL image in RGB, resized and cut into patches. Raises ImageError."""

    @abc.abstractmethod
    def of_output(self, output: Mapping[str, Any]) -> list[Prepared]:
        """The pictures of what Hugging Face's processor made of a prompt. Raises ImageError."""

    @abc.abstractmethod
    def of_features(self, output: Mapping[str, Any], features: np.ndarray) -> list[Prepared]:
        """The pictures whose rows are `features` [tokens, width]; output: what else the dict has.
        Raises ImageError."""

    def frame(self, prepared: Prepared) -> str:
        """What stands in an expanded prompt in place of a marker, with one placeholder a run."""
        return self.token_text

    def places(
        self, owners: np.ndarray, pictures: Sequence[Prepared]
    ) -> tuple[np.ndarray | None, int]:
        """`PromptMedia.positions` and `delta`, of [T] owners."""
        return None, 0

    def reach(self, owners: np.ndarray) -> np.ndarray | None:
        """`PromptMedia.reach`, of [T] owners."""
        return None

    def normalize(self, patches: np.ndarray) -> np.ndarray:
        """uint8 patches [P, C * p * p] as the tower takes them, float32."""
        return self.normal.apply(patches.astype(np.float32))

    def picture(self, tokens: int, shape: Shape, patches: np.ndarray) -> Picture:
        """One of patches, uint8 or normalized."""
        digest = hashlib.sha256(self._signature)
        digest.update(repr((str(patches.dtype), tuple(shape))).encode())
        digest.update(np.ascontiguousarray(patches).data)
        return Picture(tokens, digest.digest(), shape, patches)

    def featured(self, features: np.ndarray, split: tuple[int, int] = (0, 0)) -> Picture:
        """One of features [tokens, width] float32. split: `Prepared.split`, which positions follow
        from."""
        digest = hashlib.sha256(b"features" + repr((features.shape, split)).encode())
        features = np.ascontiguousarray(features)
        digest.update(features.data)
        return Picture(len(features), digest.digest(), features=features)

    def _id(self, *keys: str) -> int:
        return self.config.integer(*keys, low=0, high=1 << 30)


def array(name: str, value: Any, dimensions: int | None = None) -> np.ndarray:
    """A value of a dict as float32; arrays of NumPy, JAX and PyTorch (of the host), and lists.
    dimensions: how many it must have. Raises ImageError."""
    try:
        if hasattr(value, "detach"):
            value = value.detach().float().cpu().numpy()
        elif isinstance(value, list | tuple):
            value = np.stack([np.asarray(item, np.float32) for item in value])
        result = np.asarray(value, np.float32)
    except Exception as error:  # ragged lists, objects, freed buffers
        raise ImageError(f"{name} cannot be an array of numbers: {type(error).__name__}") from None
    if dimensions is not None and result.ndim != dimensions:
        raise ImageError(f"{name} must have {dimensions} dimensions, got shape {result.shape}")
    if not np.isfinite(result).all():
        raise ImageError(f"{name} has numbers that are infinite or none")
    return result


def pixels(image: Image) -> np.ndarray:
    """[height, width, C] uint8."""
    return np.asarray(image)


def raster(image: np.ndarray, patch: int) -> np.ndarray:
    """[height, width, C] -> patches row by row, [P, C * p * p] of the same dtype."""
    height, width, channels = image.shape
    cut = image.reshape(height // patch, patch, width // patch, patch, channels)
    return cut.transpose(0, 2, 4, 1, 3).reshape(-1, channels * patch * patch)
