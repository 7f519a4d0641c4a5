"""What a job may be given: files, a list of rows, a Ray Dataset. The latter two become files of the
output folder, so that a later run has the same rows in the same order."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from jaxserve import checks
from jaxserve.batch import inputs
from jaxserve.batch.folder import Folder
from jaxserve.batch.inputs import Input
from jaxserve.errors import InvalidRequestError


class Source(Protocol):
    """Where the rows of a job come from."""

    def write(self, folder: Folder) -> list[str]:
        """The files of its rows, for a job that begins: those that are its own are written into the
        folder."""
        ...

    def difference(self, folder: Folder, known: Input) -> str | None:
        """How the rows differ from those of the job that the folder belongs to; None if they do
        not."""
        ...

    def paths(self, folder: Folder) -> list[str]:
        """The files of its rows, for a job that goes on."""
        ...


@dataclasses.dataclass(frozen=True)
class Files:
    """Files, as they lie."""

    given: list[str]
    """Absolute paths."""

    def write(self, folder: Folder) -> list[str]:
        return self.given

    def difference(self, folder: Folder, known: Input) -> str | None:
        return known.difference(self.given)

    def paths(self, folder: Folder) -> list[str]:
        return self.given


@dataclasses.dataclass(frozen=True)
class Listed:
    """A list of dicts."""

    content: bytes
    """As JSONL."""

    def write(self, folder: Folder) -> list[str]:
        [target] = self.paths(folder)
        with folder.writing(Path(target)) as file:
            file.write(self.content)
        return [target]

    def difference(self, folder: Folder, known: Input) -> str | None:
        digests = [file.sha256 for file in known.files]
        if digests == [hashlib.sha256(self.content).hexdigest()]:
            return None
        return f"the {len(self.content.splitlines())} rows of the list are others"

    def paths(self, folder: Folder) -> list[str]:
        return [str(folder.own / "input.jsonl")]


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A Ray Dataset. It is read once: of later runs only the columns are compared."""

    rows: Any
    """The ray.data.Dataset."""

    def write(self, folder: Folder) -> list[str]:
        unfinished, target = folder.own / "unfinished" / "input", folder.own / "input"
        for earlier in (unfinished, target):
            shutil.rmtree(earlier, ignore_errors=True)
        self.rows.write_parquet(str(unfinished))
        os.replace(unfinished, target)
        return self.paths(folder)

    def difference(self, folder: Folder, known: Input) -> str | None:
        if not (folder.own / "input").exists():
            return "its rows were not those of a Ray Dataset"
        names = list(self.rows.schema().names)
        if sorted(names) == sorted(known.columns):
            return None
        return f"the dataset has the columns {checks.quoted(names)}"

    def paths(self, folder: Folder) -> list[str]:
        return inputs.find(folder.own / "input")


def source_of(given: Any) -> Source:
    """Raises InvalidRequestError for what is none, and for files that are not there."""
    if type(given).__module__.partition(".")[0] == "ray":
        return Dataset(given)
    if isinstance(given, list | tuple) and given and isinstance(given[0], Mapping):
        return Listed(_jsonl(given))
    paths = [given] if isinstance(given, str | os.PathLike) else given
    if not isinstance(paths, list | tuple) or not all(
        isinstance(path, str | os.PathLike) for path in paths
    ):
        raise InvalidRequestError(
            "input must be a path, a list of paths, a list of dicts or a Ray Dataset, got "
            + checks.shown(given)
        )
    return Files(inputs.find(paths))


def _jsonl(rows: Sequence[Any]) -> bytes:
    lines = []
    for number, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise InvalidRequestError(f"input[{number}] must be a dict, got {checks.shown(row)}")
        plain = {name: checks.listed(value) for name, value in row.items()}
        lines.append(json.dumps(checks.json_value(f"input[{number}]", plain)).encode() + b"\n")
    return b"".join(lines)
