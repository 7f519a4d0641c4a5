"""The input of a job: which files, how many rows, whether they are the ones a job began with."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from jaxserve import checks
from jaxserve.batch import csv_rows, jsonl, kinds, parquet
from jaxserve.batch.columns import Columns
from jaxserve.batch.rows import STRIDE, Part, Row, Scan
from jaxserve.errors import InvalidRequestError

Format = Literal["jsonl", "csv", "parquet"]
SUFFIXES: dict[str, Format] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".parquet": "parquet",
    ".pq": "parquet",
}
HEAD = 4096
"""Bytes at a file's beginning in which a text file has no zero."""
LEAST_PART, USUAL_PART, LARGEST_PART = STRIDE, 256, 4096
"""Rows. A part is what a crash makes an engine answer again."""


@dataclasses.dataclass(frozen=True, slots=True)
class InputFile:
    """One file of a job's input, as its manifest keeps it."""

    path: str
    """Absolute."""
    format: Format
    """Of its rows."""
    size: int
    """Bytes."""
    mtime_ns: int
    """When it was last changed."""
    sha256: str
    """Of its content: a copy elsewhere, or of another time, is the same input."""
    rows: int
    """How many it has."""
    offsets: list[int]
    """Where each part begins, in bytes. Not of Parquet."""

    def parts(self, number: int, index: int, size: int) -> list[Part]:
        """Its parts of `size` rows. number, index: of the first part and row among the job's."""
        firsts = range(0, self.rows, size)
        begins = self.offsets or [0] * len(firsts)
        ends = [*begins[1:], self.size]
        return [
            Part(
                number=number + place,
                path=self.path,
                index=index + first,
                first=first,
                rows=min(size, self.rows - first),
                begin=begins[place],
                end=ends[place],
            )
            for place, first in enumerate(firsts)
        ]


@dataclasses.dataclass(frozen=True, slots=True)
class Input:
    """All of a job's input."""

    files: tuple[InputFile, ...]
    """In the order of their rows; of one format and with the same columns."""
    columns: dict[str, str]
    """The columns and what they hold (`jaxserve.batch.kinds`)."""
    part_rows: int
    """Rows of a part, but for the last of a file."""

    @property
    def rows(self) -> int:
        """Of all files."""
        return sum(file.rows for file in self.files)

    @property
    def parts(self) -> list[Part]:
        """In the order of the rows."""
        parts: list[Part] = []
        index = 0
        for file in self.files:
            parts += file.parts(len(parts), index, self.part_rows)
            index += file.rows
        return parts

    def difference(self, paths: Sequence[str]) -> str | None:
        """How the files at `paths` differ from these; None if they do not. Files of the same name,
        size and time are taken for the same, others are read."""
        if len(paths) != len(self.files):
            return f"{len(paths)} input files instead of {len(self.files)}"
        for path, file in zip(paths, self.files, strict=True):
            found = os.stat(path)
            same = (path, found.st_size, found.st_mtime_ns) == (file.path, file.size, file.mtime_ns)
            if not same and (found.st_size != file.size or digest(path) != file.sha256):
                return f"input {path!r} has another content than {file.path!r} had"
        return None

    def at(self, paths: Sequence[str]) -> Input:
        """The same input where its files lie now."""
        files = [
            dataclasses.replace(file, path=path)
            for path, file in zip(paths, self.files, strict=True)
        ]
        return dataclasses.replace(self, files=tuple(files))


def find(given: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> list[str]:
    """The absolute paths of the files given: themselves, or all in a folder with a known suffix, in
    the order of their names. Raises InvalidRequestError."""
    paths: list[str] = []
    for place in [given] if isinstance(given, str | os.PathLike) else given:
        path = Path(os.path.abspath(checks.text("input", os.fspath(place))))
        if not path.exists():
            raise InvalidRequestError(f"input {str(place)!r} does not exist")
        if path.is_dir():
            inside = sorted(p for p in path.iterdir() if p.suffix in SUFFIXES and _shown(p))
            if not inside:
                raise InvalidRequestError(
                    f"input {str(place)!r} is a folder without a file of {', '.join(SUFFIXES)}"
                )
            paths += map(str, inside)
        elif path.is_file():
            paths.append(str(path))
        else:
            raise InvalidRequestError(f"input {str(place)!r} is neither a file nor a folder")
    if not paths:
        raise InvalidRequestError("input is an empty list")
    return paths


def _shown(path: Path) -> bool:
    return path.is_file() and not path.name.startswith((".", "_"))


def format_of(paths: Sequence[str]) -> Format:
    """By their suffixes. Raises InvalidRequestError for unknown ones, and for several formats."""
    formats = {}
    for path in paths:
        suffix = Path(path).suffix.lower()
        if suffix not in SUFFIXES:
            raise InvalidRequestError(
                f"input {path!r} has the suffix {suffix!r}; jobs read {', '.join(SUFFIXES)}"
            )
        formats[SUFFIXES[suffix]] = path
    if len(formats) > 1:
        raise InvalidRequestError(f"the input files of a job have one format, got {[*formats]}")
    [found] = formats
    return found


def scan(paths: Sequence[str], columns: Columns, part_rows: int | None, typed: bool) -> Input:
    """Reads the files once. part_rows: None chooses. typed: the output wants to know what each
    column holds. Raises InvalidRequestError for what is no file of rows, NotSupportedError for
    Parquet without pyarrow."""
    format = format_of(paths)
    stride = part_rows or STRIDE
    scans = [_scan(path, format, stride, typed) for path in paths]
    total = sum(found.rows for found in scans)
    if not total:
        raise InvalidRequestError(f"input {paths[0]!r} has no rows")
    names = _same_columns(paths, scans, format)
    if not any(name in names for name in columns.asked.values()):
        raise InvalidRequestError(
            f"input {paths[0]!r} has none of the columns {', '.join(columns.asked.values())}; it "
            f"has {checks.quoted([*names])}. Which column is which can be said: prompt_column, "
            "messages_column, input_ids_column"
        )
    size = part_rows or usual_part(total)
    files = []
    for path, found in zip(paths, scans, strict=True):
        stat = os.stat(path)
        offsets = found.offsets[:: size // found.stride] if found.offsets else []
        files.append(
            InputFile(
                path, format, stat.st_size, stat.st_mtime_ns, digest(path), found.rows, offsets
            )
        )
    return Input(tuple(files), names, size)


def usual_part(rows: int) -> int:
    """Rows of a part where nobody says it: not so many files that a folder suffers, and for small
    inputs several parts for each engine."""
    size = max(min(rows // 2000, LARGEST_PART), min(USUAL_PART, rows // 16), LEAST_PART)
    return size // STRIDE * STRIDE


def read(part: Part, columns: Columns) -> list[Row]:
    """The rows of a part. InvalidRequestError: the file has changed."""
    match format_of([part.path]):
        case "jsonl":
            rows = jsonl.read(part)
        case "csv":
            rows = csv_rows.read(part, columns)
        case "parquet":
            rows = parquet.read(part)
    if len(rows) != part.rows:
        raise InvalidRequestError(
            f"input {part.path!r} has changed: rows {part.first} to {part.first + part.rows - 1} "
            f"are {len(rows)} now"
        )
    return rows


def _scan(path: str, format: Format, stride: int, typed: bool) -> Scan:
    if format == "parquet":
        return parquet.scan(path)
    with open(path, "rb") as file:
        head = file.read(HEAD)
    if b"\0" in head:
        raise InvalidRequestError(f"input {path!r} is no {format.upper()} file: it is binary")
    return jsonl.scan(path, stride, typed) if format == "jsonl" else csv_rows.scan(path, stride)


def _same_columns(paths: Sequence[str], scans: Sequence[Scan], format: Format) -> dict[str, str]:
    columns = dict(scans[0].columns)
    for path, found in zip(paths[1:], scans[1:], strict=True):
        if format != "jsonl" and list(found.columns) != list(columns):
            raise InvalidRequestError(
                f"the input files of a job have the same columns, but {paths[0]!r} has "
                f"{checks.quoted([*columns])} and {path!r} {checks.quoted([*found.columns])}"
            )
        for name, kind in found.columns.items():
            columns[name] = kinds.common(columns.get(name, kinds.NULL), kind)
    return columns


def digest(path: str) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
