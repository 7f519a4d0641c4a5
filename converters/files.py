"""The one place that opens files of a model.

What a model folder says is not trusted: its names may be paths, its entries links, pipes or
devices, and a file may shrink while it is read. So a name must be plain, the file a regular one
inside the folder, and bytes are read by position into memory of ours. (Pages of a mapped file that
was truncated kill the process with SIGBUS; `pread` just comes back short.)

A snapshot of the Hugging Face cache, models--X/snapshots/REVISION, holds links to models--X/blobs:
these are part of the folder.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from jaxserve.errors import ModelLoadError
from jaxserve.shown import quoted

_FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
"""O_NONBLOCK: opening a pipe that took a file's place must not wait for a writer."""


class OpenFile:
    """A regular file, open for reading. Every method raises ModelLoadError, naming the file, where
    the file does not have the bytes that it had when it was opened."""

    def __init__(self, path: Path, opened: Path):
        """path: as the user knows it. opened: what to open, links resolved."""
        self.path = path
        self._descriptor = -1
        try:
            # Opening a device may do something: look first, and again at what was opened.
            _check_regular(path, os.lstat(opened))
            self._descriptor = os.open(opened, _FLAGS | os.O_NOFOLLOW)
            status = os.fstat(self._descriptor)
            _check_regular(path, status)
        except OSError as error:
            self.close()
            raise unreadable(path, error) from error
        except ModelLoadError:
            self.close()
            raise
        self.size = status.st_size
        """Bytes, when it was opened."""
        self._stamp = (status.st_size, status.st_mtime_ns)

    def read(self, offset: int, size: int) -> bytes:
        """`size` bytes from `offset`."""
        out = np.empty(size, np.uint8)
        self.read_into(out, offset)
        return out.tobytes()

    def read_into(self, out: np.ndarray, offset: int) -> None:
        """Fills `out`, which is C-contiguous, with the bytes from `offset`."""
        if self._descriptor < 0:
            raise ModelLoadError(f"{self.path}: read after close")
        view = out.reshape(-1).view(np.uint8).data
        done = 0
        while done < len(view):
            try:
                count = os.preadv(self._descriptor, [view[done:]], offset + done)
            except OSError as error:
                raise unreadable(self.path, error) from error
            if count == 0:
                raise ModelLoadError(
                    f"{self.path}: truncated: it ends at byte {offset + done}, and should go on to "
                    f"{offset + len(view)}; it had {self.size} bytes when it was opened"
                )
            done += count

    def check_size(self, limit: int) -> None:
        """Raises ModelLoadError when the file has more than `limit` bytes."""
        if self.size > limit:
            raise ModelLoadError(
                f"{self.path}: {self.size:,} bytes long; such a file may have {limit:,}"
            )

    def check_unchanged(self) -> None:
        """Raises ModelLoadError when somebody has written to the file since it was opened."""
        status = os.fstat(self._descriptor)
        if (status.st_size, status.st_mtime_ns) != self._stamp:
            raise ModelLoadError(
                f"{self.path}: changed while it was read ({self.size} bytes, then "
                f"{status.st_size}); load it when nobody writes to it"
            )

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> OpenFile:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def open_named(path: Path) -> OpenFile:
    """Opens a file that the user named; it may be a link to anywhere."""
    with _system_calls(path):
        return OpenFile(path, Path(os.path.realpath(path, strict=True)))


def open_inside(folder: Path, *names: str) -> OpenFile:
    """Opens the file `names` (subfolders, then the file) of a model folder.

    Raises ModelLoadError where a name is no plain one, or what it names is missing, not a regular
    file, or outside the folder. The message has nothing of a file's content.
    """
    path = folder.joinpath(*map(plain_name, names))
    with _system_calls(path):
        return OpenFile(path, _resolve_inside(folder, path))


def read_inside(folder: Path, *names: str, limit: int) -> bytes:
    """A small file's content. Raises ModelLoadError, also where it has more than `limit` bytes."""
    with open_inside(folder, *names) as file:
        file.check_size(limit)
        return file.read(0, file.size)


def is_file(path: Path) -> bool:
    """True for a file that the user named, False for a folder. Raises ModelLoadError for what is
    neither, a pipe for example."""
    with _system_calls(path):
        status = os.stat(path)
        if not stat.S_ISDIR(status.st_mode):
            _check_regular(path, status)
        return stat.S_ISREG(status.st_mode)


def has(folder: Path, name: str) -> bool:
    """Whether the folder has an entry `name`, be it what it may."""
    with _system_calls(folder / name):
        return os.path.lexists(folder / name)


def entries(folder: Path, suffix: str = "") -> list[str]:
    """Names of the folder's entries that end with `suffix`, sorted."""
    with _system_calls(folder):
        return sorted(name for name in os.listdir(folder) if name.endswith(suffix))


def subfolder(folder: Path, name: str) -> Path:
    """The folder `name` of a model folder. Raises ModelLoadError where that links out of it."""
    path = folder / plain_name(name)
    with _system_calls(path):
        return _resolve_inside(folder, path)


def plain_name(name: str) -> str:
    """`name`, which must be that of an entry of a folder. Raises ModelLoadError for a path."""
    separators = set("/\\\0")
    if (
        not name
        or name in (".", "..")
        or separators & set(name)
        or len(name.encode("utf-8", "replace")) > 255
    ):
        raise ModelLoadError(
            f"{quoted(name)} is not the plain name of a file in the model's folder"
        )
    return name


def unreadable(path: Path, error: OSError | ValueError) -> ModelLoadError:
    """What to raise for a failed system call, without what libraries add to the message."""
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    if isinstance(error, FileNotFoundError):
        return ModelLoadError(f"{path}: no such file")
    return ModelLoadError(f"{path}: cannot be read: {reason}")


@contextlib.contextmanager
def _system_calls(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:  # ValueError: a zero byte in a path
        if isinstance(error, ModelLoadError):
            raise
        raise unreadable(path, error) from error


def _resolve_inside(folder: Path, path: Path) -> Path:
    root = os.path.realpath(folder, strict=True)
    roots = [root]
    snapshots = os.path.dirname(root)
    if os.path.basename(snapshots) == "snapshots":
        roots.append(os.path.join(os.path.dirname(snapshots), "blobs"))
    target = os.path.realpath(path, strict=True)
    if not any(target.startswith(allowed + os.sep) for allowed in roots):
        raise ModelLoadError(
            f"{path}: a link to a file outside the model's folder; such files are not read. Copy "
            "the file into the folder"
        )
    return Path(target)


def _check_regular(path: Path, status: os.stat_result) -> None:
    if stat.S_ISREG(status.st_mode):
        return
    kinds = {
        stat.S_IFDIR: "a folder",
        stat.S_IFIFO: "a pipe",
        stat.S_IFSOCK: "a socket",
        stat.S_IFCHR: "a device",
        stat.S_IFBLK: "a device",
    }
    kind = kinds.get(stat.S_IFMT(status.st_mode), "something else")
    raise ModelLoadError(f"{path}: cannot be read: {kind}, not a regular file")
