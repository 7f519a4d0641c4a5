"""CSV: a line of names, then a line of cells a row; cells may hold line ends between quotes."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator

from jaxserve import checks
from jaxserve.batch import kinds
from jaxserve.batch.columns import Columns, cells_of_text
from jaxserve.batch.rows import Part, Row, Scan
from jaxserve.errors import InvalidRequestError, JaxserveError

LONGEST_CELL = (1 << 31) - 1
"""Characters. The csv module's own limit, 131,072, is less than a long prompt."""


class Lines(Iterator[str]):
    """The lines of a binary file as text, counting the bytes that were read. Bytes that are no
    UTF-8 become halves of surrogate pairs, which nothing takes for text."""

    def __init__(self, file: Iterable[bytes]) -> None:
        self._lines = iter(file)
        self.position = 0

    def __next__(self) -> str:
        line = next(self._lines)
        text = line.decode("utf-8-sig" if not self.position else "utf-8", "surrogateescape")
        self.position += len(line)
        return text


def scan(path: str, stride: int) -> Scan:
    """Counts the rows. Raises InvalidRequestError for a file that is no CSV."""
    offsets: list[int] = []
    rows = 0
    with open(path, "rb") as file:
        lines = Lines(file)
        names = header(path, lines)
        position = lines.position
        try:
            for cells in _reader(lines):
                if cells:
                    if not rows % stride:
                        offsets.append(position)
                    rows += 1
                position = lines.position
        except csv.Error as error:
            raise InvalidRequestError(
                f"input {path!r} is no CSV file: {error}, behind row {rows}"
            ) from error
    return Scan(rows, offsets, stride, dict.fromkeys(names, kinds.TEXT))


def header(path: str, lines: Iterator[str]) -> list[str]:
    """The names in the first line. Raises InvalidRequestError."""
    names = next(_reader(lines), [])
    if not names or not all(names) or len(set(names)) < len(names):
        raise InvalidRequestError(
            f"the first line of input {path!r} must name its columns, each once; got "
            + checks.shown(names)
        )
    return names


def read(part: Part, columns: Columns) -> list[Row]:
    """The rows of a part."""
    with open(part.path, "rb") as file:
        names = header(part.path, Lines(file))
        file.seek(part.begin)
        content = file.read(part.end - part.begin)
    lines = Lines(io.BytesIO(content))
    found = [cells for cells in _reader(lines) if cells]
    return [_row(part.index + number, names, cells, columns) for number, cells in enumerate(found)]


def _row(index: int, names: list[str], cells: list[str], columns: Columns) -> Row:
    if len(cells) != len(names):
        return Row(index, {}, f"the row has {len(cells)} cells for {len(names)} columns")
    values = dict(zip(names, cells, strict=True))
    try:
        return Row(index, cells_of_text(values, columns))
    except JaxserveError as error:
        return Row(index, {name: cell or None for name, cell in values.items()}, str(error))


def _reader(lines: Iterator[str]) -> Iterator[list[str]]:
    csv.field_size_limit(LONGEST_CELL)  # of the whole process: the module has no other place
    return csv.reader(lines)
