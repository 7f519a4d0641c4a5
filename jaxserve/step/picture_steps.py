"""Pictures of one runner: what is queued before the steps that read them."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.packing.media import Encoding, Run, pack_runs
from jaxserve.step.catalogue import ProgramKey
from jaxserve.step.picture_programs import FEATURES
from jaxserve.step.programs import Facts


class Queued(NamedTuple):
    """One program that puts pictures on the device, and what it is given."""

    key: ProgramKey
    given: dict[str, Any]


class PictureSteps:
    """Packs pictures and queues their towers' runs. A model without a tower has none."""

    def __init__(
        self,
        facts: Facts,
        run: Callable[..., Any],
        arrays: dict[str, Any],
        programs: Container[ProgramKey],
    ) -> None:
        """run, arrays: the runner's. programs: what is compiled."""
        self._tower = facts.tower
        self._spec = facts.media
        self._run, self._arrays, self._programs = run, arrays, programs

    def reset(self) -> None:
        """An empty buffer; None where there are no pictures."""
        spec, empty = self._spec, None
        if spec is not None:
            empty = jax.device_put(jnp.zeros(spec.shape, spec.dtype), spec.sharding)
        self._arrays["media"] = empty

    def prepare(self, encodings: Sequence[Encoding]) -> tuple[Queued, ...]:
        """What is to run before the step that has `encodings`."""
        tower = self._tower
        if not encodings or tower is None:
            return ()
        runs = pack_runs(encodings, tower.sizes.at_once)
        return (*map(self._encoded, runs), *self._placed(encodings))

    def queue(self, prepared: Sequence[Queued]) -> None:
        """Run it."""
        for key, given in prepared:
            self._run(key, **given)

    def _encoded(self, run: Run) -> Queued:
        assert self._tower is not None
        declaration, sizes = self._tower.declaration, self._tower.sizes
        kind, count = "encode_normalized" if run.normalized else "encode", run.patches
        ready = (size for size in sizes.patches if (kind, size) in self._programs and size >= count)
        bucket = next(ready, sizes.bucket(count))
        dtype = np.float32 if run.normalized else np.uint8
        patches = np.zeros((bucket, declaration.config.patch_width), dtype)
        parts = [picture.patches for picture in run.pictures if picture.patches is not None]
        np.concatenate(parts, out=patches[:count])
        shapes = [picture.shape for picture in run.pictures if picture.shape is not None]
        about = dict(self._tower.about(shapes, bucket))
        rows = self._rows(run.rows, bucket // declaration.config.patches_per_token)
        return Queued((kind, bucket), {"patches": patches, "about": about, "rows": rows})

    def _placed(self, encodings: Sequence[Encoding]) -> Iterator[Queued]:
        for picture, rows in encodings:
            for start in range(0, 0 if picture.features is None else picture.tokens, FEATURES):
                assert picture.features is not None
                part = picture.features[start : start + FEATURES]
                features = np.zeros((FEATURES, part.shape[1]), np.float32)
                features[: len(part)] = part
                given = {
                    "features": features,
                    "rows": self._rows(rows[start:][:FEATURES], FEATURES),
                }
                yield Queued(("place_features", FEATURES), given)

    def _rows(self, rows: np.ndarray, count: int) -> np.ndarray:
        """`rows`, and behind them numbers past the end of the buffer."""
        assert self._spec is not None
        padded = np.full(count, self._spec.shape[0], np.int32)
        padded[: len(rows)] = rows
        return padded
