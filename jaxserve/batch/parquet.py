"""Parquet, read and written with pyarrow."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
from collections.abc import Mapping, Sequence
from typing import IO, TYPE_CHECKING, Any

from jaxserve.batch import kinds
from jaxserve.batch.rows import Part, Row, Scan
from jaxserve.errors import InvalidRequestError, NotSupportedError

if TYPE_CHECKING:
    import pyarrow  # pyright: ignore[reportMissingImports]


def installed() -> bool:
    """Whether there is a pyarrow to import."""
    return importlib.util.find_spec("pyarrow") is not None


def check_installed() -> None:
    """Raises NotSupportedError without pyarrow."""
    if not installed():
        raise NotSupportedError(
            "Parquet needs the pyarrow package: pip install jaxserve[parquet] (or jaxserve[ray])"
        )


def scan(path: str) -> Scan:
    """The number of rows and the columns, from the file's end. Raises InvalidRequestError."""
    check_installed()
    import pyarrow  # pyright: ignore[reportMissingImports]
    from pyarrow import parquet  # pyright: ignore[reportMissingImports]

    try:
        with parquet.ParquetFile(path) as file:
            rows, names = file.metadata.num_rows, file.schema_arrow.names
    except pyarrow.ArrowException as error:
        raise InvalidRequestError(f"input {path!r} is no Parquet file: {error}") from error
    return Scan(rows, [], 1, dict.fromkeys(names, kinds.NATIVE))


def read(part: Part) -> list[Row]:
    """The rows of a part. A struct's fields that are null are left out of `values`: in Parquet
    each row has all of them."""
    from pyarrow import parquet  # pyright: ignore[reportMissingImports]

    rows: list[dict[str, Any]] = []
    with parquet.ParquetFile(part.path) as file:
        first = 0
        for number in range(file.metadata.num_row_groups):
            size = file.metadata.row_group(number).num_rows
            low, high = max(part.first - first, 0), min(part.first + part.rows - first, size)
            if low < high:
                group = _row_group(part.path, os.stat(part.path).st_mtime_ns, number)
                rows += group.slice(low, high - low).to_pylist()
            first += size
    return [Row(part.index + number, _given(row)) for number, row in enumerate(rows)]


@functools.lru_cache(maxsize=2)
def _row_group(path: str, mtime_ns: int, number: int) -> pyarrow.Table:
    """The parts of a row group are read one after another: it is decoded once for all of them.
    mtime_ns: another file of the same name is another one."""
    from pyarrow import parquet  # pyright: ignore[reportMissingImports]

    with parquet.ParquetFile(path) as file:
        return file.read_row_group(number)


def _given(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _given(item) for name, item in value.items() if item is not None}
    return [_given(item) for item in value] if isinstance(value, list) else value


IDS = "ids"
"""The kind of a column of token ids."""


def columns(path: str, names: list[str]) -> list[dict[str, Any]]:
    """Some columns of a file."""
    from pyarrow import parquet  # pyright: ignore[reportMissingImports]

    with parquet.ParquetFile(path) as file:  # read_table looks at folders
        return file.read(columns=names).to_pylist()


def write(
    file: IO[bytes],
    rows: Sequence[Mapping[str, Any]],
    carried: Mapping[str, str],
    results: Mapping[str, str],
    source: str,
) -> None:
    """Writes rows of output. carried, results: their columns and what they hold. source: the input
    file, which has the types of the columns of kind NATIVE."""
    import pyarrow  # pyright: ignore[reportMissingImports]
    from pyarrow import parquet  # pyright: ignore[reportMissingImports]

    first = next(iter(results))
    held = {first: results[first], **carried, **results}
    table = pyarrow.Table.from_pylist(
        [{name: _cell(row.get(name), kind) for name, kind in held.items()} for row in rows],
        schema=_schema(held, source),
    )
    parquet.write_table(table, file)


def _schema(columns: Mapping[str, str], source: str) -> pyarrow.Schema:
    import pyarrow  # pyright: ignore[reportMissingImports]
    from pyarrow import parquet  # pyright: ignore[reportMissingImports]

    types = {
        kinds.TEXT: pyarrow.string(),
        kinds.FLAG: pyarrow.bool_(),
        kinds.INTEGER: pyarrow.int64(),
        kinds.NUMBER: pyarrow.float64(),
        kinds.JSON: pyarrow.string(),
        kinds.NULL: pyarrow.string(),
        IDS: pyarrow.list_(pyarrow.int32()),
    }
    native = parquet.read_schema(source) if kinds.NATIVE in columns.values() else None
    return pyarrow.schema(
        [
            native.field(name).with_nullable(True)
            if native is not None and kind == kinds.NATIVE
            else pyarrow.field(name, types[kind])
            for name, kind in columns.items()
        ]
    )


def _cell(value: Any, kind: str) -> Any:
    if value is None or kind == kinds.NATIVE:
        return value
    if kind == kinds.JSON or (kind == kinds.TEXT and not isinstance(value, str)):
        return json.dumps(value)
    if kind == kinds.NUMBER:
        return float(value)
    if isinstance(value, str) and not value.isascii():
        # half of a surrogate pair, which JSON can have, is no UTF-8
        return value.encode("utf-8", "surrogatepass").decode("utf-8", "replace")
    return value
