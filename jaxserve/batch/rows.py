"""The rows of an input file, as they are read: what is broken stays a row, with its error."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

STRIDE = 16
"""Rows between two offsets that a scan keeps, and of which the rows of a part are a multiple."""


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    """One row of the input."""

    index: int
    """Its number among all rows of the job's input, from 0."""
    values: Mapping[str, Any]
    """Its columns; empty where it could not be read."""
    error: str | None = None
    """Why it could not be read."""


@dataclasses.dataclass(frozen=True, slots=True)
class Part:
    """The rows that are answered together and written as one file."""

    number: int
    """Among the job's parts, from 0."""
    path: str
    """The input file."""
    index: int
    """The number of its first row among all rows of the job."""
    first: int
    """The number of its first row in the file."""
    rows: int
    """How many there are."""
    begin: int = 0
    """Where it begins in the file, in bytes. Not of Parquet."""
    end: int = 0
    """Where it ends."""


@dataclasses.dataclass(frozen=True, slots=True)
class Scan:
    """What is known of a file after it was read once."""

    rows: int
    """How many there are, broken ones included."""
    offsets: list[int]
    """Where each stretch of `stride` rows begins, in bytes. Not of Parquet."""
    stride: int
    """Rows between two offsets."""
    columns: dict[str, str]
    """The columns found, and what they hold (`jaxserve.batch.kinds`). Of JSONL whose kinds do not
    matter, those of its first rows."""
