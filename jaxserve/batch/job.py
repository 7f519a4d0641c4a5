"""One batch job: what every engine of it knows, and how a part of it is done."""

from __future__ import annotations

import dataclasses
import functools
import json
import pickle
import time
from collections.abc import Mapping, Sequence
from typing import IO, TYPE_CHECKING, Any

from jaxserve.batch import inputs, jsonl, kinds, parquet
from jaxserve.batch.answers import Answer, answers, described
from jaxserve.batch.columns import Asking
from jaxserve.batch.folder import Folder
from jaxserve.batch.inputs import Input
from jaxserve.batch.rows import Part, Row
from jaxserve.batch.tally import Tally
from jaxserve.server_args import ServerArgs

if TYPE_CHECKING:
    from jaxserve.engine import Engine

RESULTS: Mapping[str, str] = {
    "index": kinds.INTEGER,
    "text": kinds.TEXT,
    "output_ids": parquet.IDS,
    "finish_reason": kinds.TEXT,
    "prompt_tokens": kinds.INTEGER,
    "completion_tokens": kinds.INTEGER,
    "cached_tokens": kinds.INTEGER,
    "error": kinds.TEXT,
}
"""The columns of an answer and what they hold; docs/guide/batch_jobs.md says what they mean."""
GONE = 70
"""The exit status of a process whose engine died."""
COUNTS = ("prompt_tokens", "completion_tokens", "cached_tokens")


def portable(error: Exception) -> Exception:
    """The error if it can be sent to another process, otherwise one that says the same."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # whatever a class that was not made for it raises
        return RuntimeError(described(error))
    return error


@dataclasses.dataclass(frozen=True)
class Job:
    """What does not change while a job runs. Pickled to each engine's process."""

    input: Input
    """Its rows, in parts."""
    folder: Folder
    """Where parts are written."""
    output_format: str
    """jsonl or parquet."""
    asking: Asking
    """How a row becomes a question."""
    server_args: ServerArgs
    """Of each engine."""
    results: Mapping[str, str]
    """Columns of an answer -> their names in the output."""
    parts_in_flight: int
    """Parts that an engine answers at a time."""

    @functools.cached_property
    def parts(self) -> list[Part]:
        """All parts, by their numbers."""
        return self.input.parts

    @property
    def carried(self) -> dict[str, str]:
        """Columns of the input that the output has too, and what they hold."""
        columns = self.asking.columns
        return {name: kind for name, kind in self.input.columns.items() if columns.carries(name)}

    def do(self, engine: Engine, number: int) -> Tally:
        """Answers a part and writes it. Doing it twice writes the same file."""
        part, started = self.parts[number], time.time()
        rows = inputs.read(part, self.asking.columns)
        found = answers(engine, self.asking, rows)
        written = [self._written(row, answer) for row, answer in zip(rows, found, strict=True)]
        with self.folder.writing(self.folder.part(number)) as file:
            self._write(file, written, part.path)
        return self.tally(written, started)

    def tally(self, written: Sequence[Mapping[str, Any]], started: float) -> Tally:
        """The counts of rows of output, begun at `started` (seconds since the epoch)."""
        count = {name: sum(row[self.results[name]] or 0 for row in written) for name in COUNTS}
        failed = sum(row[self.results["error"]] is not None for row in written)
        return Tally(rows=len(written), failed=failed, started=started, ended=time.time(), **count)

    def count(self, number: int) -> Tally:
        """What a part that is there holds."""
        path = self.folder.part(number)
        if self.output_format == "parquet":
            rows = parquet.columns(str(path), [self.results[name] for name in (*COUNTS, "error")])
        else:
            with open(path, "rb") as file:
                rows = [json.loads(line) for line in file]
        return dataclasses.replace(self.tally(rows, 0.0), ended=0.0)

    def _written(self, row: Row, answer: Answer) -> dict[str, Any]:
        """A row of the output."""
        columns = self.asking.columns
        carried = {name: value for name, value in row.values.items() if columns.carries(name)}
        clash = [name for name in self.results.values() if name in carried]
        if clash:  # a column that only some rows have: `check_names` has looked at the others
            answer = f"the row has a column {clash[0]!r}, which is one of the output's own"
            carried = {name: value for name, value in carried.items() if name not in clash}
        result: dict[str, Any] = dict.fromkeys(self.results)
        result["index"] = row.index
        if isinstance(answer, str):
            result["error"] = answer
        else:
            meta = answer["meta_info"]
            known = {**answer, **meta, "finish_reason": meta["finish_reason"]["type"]}
            result.update({name: known[name] for name in result if name in known})
        named = {self.results[name]: value for name, value in result.items()}
        return {self.results["index"]: row.index, **carried, **named}

    def _write(self, file: IO[bytes], rows: Sequence[Mapping[str, Any]], source: str) -> None:
        if self.output_format == "parquet":
            results = {self.results[name]: RESULTS[name] for name in self.results}
            parquet.write(file, rows, self.carried, results, source)
        else:
            for row in rows:
                file.write(jsonl.line(row))
