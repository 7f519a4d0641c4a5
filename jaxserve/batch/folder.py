"""The output folder of a job: part files that are there whole or not at all, and its manifest.

    OUT/part-000000.jsonl ...     rows; a part that is there is done
    OUT/_job/manifest.json        which job this is
    OUT/_job/report.json          when it is finished: its counts
    OUT/_job/unfinished/          files being written

Readers of folders (Spark, pyarrow, Ray Data) pass over names that begin with an underscore.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from jaxserve.errors import InvalidRequestError

OWN = "_job"
NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK, errno.EINVAL)
"""What file systems without locks say."""


class Folder:
    """A job's output folder. Can be pickled: engines elsewhere write to it under the same path."""

    def __init__(self, path: str, suffix: str) -> None:
        """suffix: of part files, with its dot."""
        self.path = Path(os.path.abspath(path))
        self.own = self.path / OWN
        self.manifest = self.own / "manifest.json"
        self.report = self.own / "report.json"
        self._unfinished = self.own / "unfinished"
        self._suffix = suffix

    def check(self) -> None:
        """Raises InvalidRequestError for what is no folder, and for one that has files and no
        manifest that says whose they are."""
        if self.path.exists() and not self.path.is_dir():
            raise InvalidRequestError(f"output {str(self.path)!r} is a file, not a folder")
        if not self.manifest.exists() and self.path.exists():
            others = [name for name in os.listdir(self.path) if name != OWN]
            if others:
                raise InvalidRequestError(
                    f"output {str(self.path)!r} has files of no batch job (no {OWN}/"
                    f"{self.manifest.name} is there): {', '.join(sorted(others)[:3])}"
                )

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """For the process that runs the job; makes the folder. InvalidRequestError: another one
        does. The lock goes with its process, however that ends. What an earlier one left
        unfinished is deleted."""
        self.own.mkdir(parents=True, exist_ok=True)
        with open(self.own / "lock", "a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InvalidRequestError(
                    f"output {str(self.path)!r} is being written by another run of this job"
                ) from None
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise
            shutil.rmtree(self._unfinished, ignore_errors=True)
            self._unfinished.mkdir(exist_ok=True)
            yield

    def part(self, number: int) -> Path:
        """The file of a part."""
        return self.path / f"part-{number:06d}{self._suffix}"

    def missing(self, numbers: Iterable[int]) -> list[int]:
        """Those of the parts that are not there."""
        there = set(os.listdir(self.path))
        return [number for number in numbers if self.part(number).name not in there]

    def begin(self, number: int) -> int:
        """Notes that a part is begun; how often this run has begun it."""
        self._unfinished.mkdir(parents=True, exist_ok=True)
        with open(self._unfinished / f"begun-{number:06d}", "ab") as file:
            file.write(b"+")
            return file.tell()

    @contextlib.contextmanager
    def writing(self, target: Path) -> Iterator[IO[bytes]]:
        """A file that is `target`, on the disk, once the block has ended without an error. Several
        processes may write the same one: the last is there, whole."""
        self._unfinished.mkdir(parents=True, exist_ok=True)
        unfinished = self._unfinished / f"{target.name}.{uuid.uuid4().hex}"
        try:
            with open(unfinished, "xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(unfinished, target)
        except BaseException:
            unfinished.unlink(missing_ok=True)
            raise
        _sync(target.parent)

    def write_json(self, target: Path, value: Any) -> None:
        """A file of the job's own."""
        with self.writing(target) as file:
            file.write(json.dumps(value, indent=1).encode() + b"\n")


def read_json(path: Path) -> Any:
    """The content of such a file; None where it is not there. InvalidRequestError: it is damaged,
    which no crash of a job does."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise InvalidRequestError(f"{str(path)!r} is damaged: {error}") from error


def _sync(folder: Path) -> None:
    """The names in a folder are on the disk too."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
