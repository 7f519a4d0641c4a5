"""The options as the documentation lists them."""

from __future__ import annotations

import dataclasses
from typing import Literal

from jaxserve.options.option import Option
from jaxserve.options.table import OPTIONS
from jaxserve.options.upstream import FOREIGN


@dataclasses.dataclass(frozen=True, slots=True)
class DocsRow:
    """One row, in plain text: no Markdown but code spans in `meaning`."""

    name: str
    """The option's."""
    type: str
    """As annotated, or as SGLang's table calls it."""
    default: str
    """As Python writes it; "required" where there is none."""
    meaning: str
    """One sentence without a full stop; empty for what jaxserve does not have."""
    treatment: Literal["implemented", "ignored", "unsupported"]
    """ignored: accepted with a warning, has no effect. unsupported: other values than the default
    are an error."""


def docs_rows() -> tuple[DocsRow, ...]:
    """All options: those implemented in the order of their table, then SGLang's others in that of
    theirs."""
    implemented = (
        DocsRow(
            name,
            option.type,
            "required" if option.required else repr(option.default),
            _meaning(option),
            "implemented",
        )
        for name, option in OPTIONS.items()
    )
    others = (
        DocsRow(
            name,
            option.kind + (" | None" if option.optional else ""),
            repr(option.default),
            "",
            "ignored" if option.ignored else "unsupported",
        )
        for name, option in FOREIGN.items()
    )
    return (*implemented, *others)


def _meaning(option: Option) -> str:
    choices = f" ({', '.join(option.choices)})" if option.choices else ""
    also = "".join(f"; also spelled `{spelling}`" for spelling in option.spellings)
    return f"{option.help}{choices}{also}"
