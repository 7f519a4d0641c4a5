"""Sizes that follow from a model's pictures."""

from __future__ import annotations

import bisect
import dataclasses
from typing import TYPE_CHECKING

from jaxserve.errors import InvalidRequestError, NotSupportedError

if TYPE_CHECKING:
    from jaxserve.media.normal import Normal
    from jaxserve.models.config import ModelConfig

AT_ONCE = 16
"""Smallest pictures (or tiles) that one run of a tower takes, where they are few patches each."""
MOST_AT_ONCE = 8192
"""Patches of a run that has several pictures: a larger picture has a run of its own."""
LONG = 2048
"""Patches from which on a bucket's padding is worth more programs."""


@dataclasses.dataclass(frozen=True)
class Pictures:
    """What prompts of a model may show."""

    smallest: int
    """Patches of the smallest picture, or of a tile."""
    largest: int
    """Patches of the largest picture."""
    patches_per_token: int
    """Patches that become one token's row."""
    row_bytes: int
    """Of what a tower makes of a token."""
    cost: float
    """What a patch costs in the tower, where a token without context costs 1 in the decoder."""
    normal: Normal
    """What pixels become before the tower."""
    block: int
    """Tokens of a picture that see each other; 0: they do not."""


@dataclasses.dataclass(frozen=True)
class MediaSizes:
    """Of one engine whose model takes pictures."""

    pictures: Pictures
    """What they may be."""
    rows: int
    """Tokens of pictures that the device has room for: those of a step and of the pictures that
    reach into it."""
    picture: int
    """Tokens of the largest picture."""
    patches: tuple[int, ...]
    """P: sizes of a tower's programs, ascending."""
    at_once: int
    """Most patches of a run that has several pictures."""

    @classmethod
    def of(
        cls, pictures: Pictures, model: ModelConfig, context: int, step_tokens: int
    ) -> MediaSizes:
        """context: tokens of a sequence, and so of a picture at most. step_tokens: of the largest
        extend step. InvalidRequestError: a picture whose tokens see each other is longer than that.
        NotSupportedError: such pictures under a window in all layers."""
        each = pictures.patches_per_token
        tokens = min(pictures.largest // each, context)
        if pictures.block > step_tokens:
            raise InvalidRequestError(
                f"chunked_prefill_size and max_prefill_tokens allow steps of {step_tokens} tokens, "
                f"but an image of this model is {pictures.block}, which have to run together"
            )
        if pictures.block and model.window is not None:
            raise NotSupportedError(
                f"pictures whose tokens see each other, in a model whose layers all have a window "
                f"(of at most {model.window} tokens)"
            )
        at_once = max(min(AT_ONCE * pictures.smallest, MOST_AT_ONCE), pictures.smallest)
        most = max(tokens * each, at_once)
        return cls(
            pictures=pictures,
            rows=step_tokens + 2 * tokens,
            picture=tokens,
            patches=_ladder(pictures.smallest, most),
            at_once=at_once,
        )

    @property
    def bytes(self) -> int:
        """Of the device's buffer."""
        return self.rows * self.pictures.row_bytes

    def bucket(self, patches: int) -> int:
        """The smallest size that holds `patches`."""
        return self.patches[bisect.bisect_left(self.patches, patches)]


def _ladder(smallest: int, most: int) -> tuple[int, ...]:
    """Multiples of `smallest` up to `most`: 1, 2, 3, 4, 6, 8, 12, 16, ...; where a run is long,
    four and not two sizes to a doubling, because a tower takes as long as its bucket."""
    sizes, step = {smallest}, 2 * smallest
    while step < most:
        parts = 4 if step >= max(LONG, 4 * smallest) else 2
        sizes |= {step + step * part // parts for part in range(parts)}
        step *= 2
    whole = -(-most // smallest) * smallest
    return tuple(sorted({size for size in sizes if size < whole} | {whole}))
