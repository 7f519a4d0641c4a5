"""All parameters of a model in one mapping: its decoder's, and its tower's behind "tower."."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from converters.parts import Part, parts_of
from converters.sizes import stated
from converters.tables import Table, table_for
from jaxserve.models.registry import Declaration, TowerDeclaration

TOWER = "tower."
"""What the paths of a tower's parameters begin with where they are beside the decoder's."""


@dataclasses.dataclass(frozen=True, eq=False)
class Whole:
    """The modules of a model."""

    decoder: Declaration
    """What makes text."""
    tower: TowerDeclaration | None
    """What takes pictures, where it has one."""

    @functools.cached_property
    def specs(self) -> Mapping[str, jax.ShapeDtypeStruct]:
        """Shape and dtype by dotted path, the decoder's first."""
        tower = {} if self.tower is None else self.tower.specs
        return {**self.decoder.specs, **{TOWER + path: spec for path, spec in tower.items()}}

    @property
    def scales(self) -> Mapping[str, str]:
        """Path of each quantized kernel -> path of its scale."""
        return self.decoder.scales

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.decoder.dtype

    @property
    def quantization(self) -> str | None:
        return self.decoder.quantization

    @functools.cached_property
    def table(self) -> Table:
        """How checkpoints are converted."""
        table = table_for(self.decoder.config)
        if self.tower is None:
            return table
        from converters.tower_tables import tower_table  # and with it all towers

        more = tower_table(self.tower.config)
        rules = (dataclasses.replace(rule, path=TOWER + rule.path) for rule in more.rules)
        return Table((*table.rules, *rules), table.ignored + more.ignored)

    def parts_of(self, path: str) -> list[Part]:
        """The tensors of a checkpoint that make up a parameter."""
        return parts_of(path, self.specs[path].shape, self.decoder.config, self.table)

    def stated(self) -> str:
        """The sizes as config.json names them."""
        return stated(self.decoder.config, None if self.tower is None else self.tower.config)

    def joined(
        self, decoder: Mapping[str, jax.Array], tower: Mapping[str, jax.Array]
    ) -> dict[str, jax.Array]:
        """The inverse of `apart`."""
        return {**decoder, **{TOWER + path: array for path, array in tower.items()}}

    def apart(
        self, params: Mapping[str, jax.Array]
    ) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
        """The decoder's parameters and the tower's, by their own paths."""
        tower = {} if self.tower is None else self.tower.specs
        return (
            {path: params[path] for path in self.decoder.specs},
            {path: params[TOWER + path] for path in tower},
        )
