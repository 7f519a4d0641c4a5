"""The constructor options of SGLang's two releases, read from the table beside this file.

`upstream.tsv` has a row for each name: its type, its default in SGLang main of February and of
August 2026 as JSON ("-": that release has no such name, or no default), and whether jaxserve
ignores it where it has no such option. What is ignored has no meaning here (CUDA kernels,
processes, an HTTP server): another value than a default causes one warning. What is not would
change what the engine does: another value is an error.
"""

from __future__ import annotations

import dataclasses
import importlib.resources
import json
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from jaxserve import checks
from jaxserve.options.table import ALIASES, OPTIONS

MISSING = "-"
CONTAINERS = (str, int, float, list, dict)
"""What defaults are of. Other values are compared with none: arrays refuse to be."""


@dataclasses.dataclass(frozen=True, slots=True)
class UpstreamOption:
    """One row of the table."""

    name: str
    """The attribute's."""
    kind: str
    """bool, int, float, str, list[int], list[float], list[str], json or any."""
    optional: bool
    """Whether upstream's type allows None."""
    defaults: tuple[Any, ...]
    """Of the releases that have the name, the newest first."""
    ignored: bool
    """Whether it has no meaning in jaxserve. Not looked at where jaxserve has the option."""

    @property
    def default(self) -> Any:
        """What the attribute reads when nothing is given."""
        return self.defaults[0]

    def is_default(self, value: Any) -> bool:
        """Whether a value asks for nothing: either release's default, or "not wanted" (None, False
        and what is empty), which it is for every option of SGLang, whatever its type."""
        if checks.absent(value) or (isinstance(value, str) and not value):
            return True
        value = list(value) if isinstance(value, tuple) else checks.plain(value)
        return isinstance(value, CONTAINERS) and value in self.defaults


def _read() -> Mapping[str, UpstreamOption]:
    table = importlib.resources.files("jaxserve.options").joinpath("upstream.tsv")
    options = {}
    for line in table.read_text(encoding="utf-8").splitlines()[1:]:
        name, kind, february, august, ignored = line.split("\t")
        defaults = tuple(json.loads(text) for text in (august, february) if text != MISSING)
        options[name] = UpstreamOption(
            name, kind.removesuffix("?"), kind.endswith("?"), defaults, ignored == "yes"
        )
    return MappingProxyType(options)


UPSTREAM = _read()
FOREIGN: Mapping[str, UpstreamOption] = MappingProxyType(
    {n: option for n, option in UPSTREAM.items() if n not in OPTIONS and n not in ALIASES}
)
"""Those that jaxserve does not have: ignored or unsupported."""
