"""The programs that put pictures on the device."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.config.media import MediaSizes
from jaxserve.media.picture import Shape
from jaxserve.models.vision.families import tower_of
from jaxserve.step import pictures
from jaxserve.step.catalogue import Program
from pallas_kernels import range_attention

if TYPE_CHECKING:
    from converters import LoadedTower
    from jaxserve.models.registry import TowerDeclaration
    from jaxserve.models.vision.tower import Tower
    from jaxserve.step.programs import Facts

FEATURES = 256
"""N, rows of features that one program places."""


@dataclasses.dataclass(frozen=True, eq=False)
class TowerFacts:
    """What the programs of a tower are made of."""

    declaration: TowerDeclaration
    """The module's structure, and its parameters' shapes."""
    sizes: MediaSizes
    """Of the buffer and of the programs."""

    def about(self, shapes: Sequence[Shape], patches: int) -> Mapping[str, np.ndarray]:
        """See `Tower.facts`."""
        config = self.declaration.config
        tower = tower_of(config.architecture)
        assert tower is not None
        return tower.facts(config, shapes, patches)

    def model(self, kernels: str | None) -> pictures.TowerModel:
        """The tower as programs see it. kernels: see `ProgramConfig.other_kernels`."""
        of = self.declaration

        def bind(arrays: tuple[jax.Array, ...]) -> Tower:
            return of.bind(dict(zip(of.specs, arrays, strict=True)))

        attention = functools.partial(range_attention, implementation=kernels)
        return pictures.TowerModel(bind, of.dtype, self.sizes.pictures.normal, attention)


def tower_facts(
    loaded: LoadedTower | None, sizes: MediaSizes | None
) -> tuple[TowerFacts | None, tuple[jax.Array, ...]]:
    """What the programs of a loaded tower are made of, and its parameters in their order; None and
    no parameters of a model without one."""
    if loaded is None or sizes is None:
        return None, ()
    return TowerFacts(loaded.declaration, sizes), tuple(loaded.params.values())


def picture_programs(facts: Facts, tower: TowerFacts) -> list[Program]:
    """A tower's, for pixels and for what somebody else has normalized; and one for features."""
    config, sizes = tower.declaration.config, tower.sizes
    model = tower.model(facts.config.program.other_kernels)
    params = tuple(facts.array(*x.shape, dtype=x.dtype) for x in tower.declaration.specs.values())

    def patches(dtype: Any) -> Callable[[int], jax.ShapeDtypeStruct]:
        return lambda count: facts.array(count, config.patch_width, dtype=dtype)

    def about(count: int) -> dict[str, jax.ShapeDtypeStruct]:
        found = tower.about((), count)
        return {name: facts.array(*x.shape, dtype=x.dtype) for name, x in found.items()}

    def encode(kind: str, dtype: Any, buckets: tuple[int, ...]) -> Program:
        return Program(
            kind,
            lambda count: functools.partial(pictures.encode, model),
            {
                "tower": params,
                "media": facts.media,
                "patches": patches(dtype),
                "about": about,
                "rows": lambda count: facts.array(count // config.patches_per_token),
            },
            donated=("media",),
            buckets=buckets,
            first=sizes.patches[-1:],
        )

    return [
        encode("encode", jnp.uint8, sizes.patches[::-1]),
        encode("encode_normalized", jnp.float32, ()),
        Program(
            "place_features",
            lambda count: pictures.place_features,
            {
                "media": facts.media,
                "features": lambda count: facts.array(count, config.width, dtype=jnp.float32),
                "rows": facts.array,
            },
            donated=("media",),
            buckets=(FEATURES,),
        ),
    ]
