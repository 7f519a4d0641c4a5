"""Bytes of an image's file: a regular one, inside the folder that files may be in."""

from __future__ import annotations

import os
import stat

from jaxserve.media.limits import MIB, MOST_FILE_BYTES, MediaLimits

LONGEST_PATH = 4096
"""Characters; what is longer is no path on Linux."""
_FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY | os.O_NOFOLLOW
"""O_NONBLOCK: opening a pipe that took the file's place must not wait for a writer."""


class FileError(Exception):
    """A file cannot be read; the message says why, and quotes nothing of it."""


def is_file(path: str, limits: MediaLimits) -> bool:
    """Whether there is a file, of which more may be asked. Nothing is looked at outside of the
    folder that files may be in."""
    if len(path) > LONGEST_PATH or limits.folder == "":
        return False
    try:
        return os.path.isfile(_resolved(path, limits))
    except FileError:
        return False


def read(path: str, limits: MediaLimits) -> bytes:
    """The file's content. Links are followed, and must end in the folder. Raises FileError."""
    target = _resolved(path, limits)
    try:
        _check_regular(os.lstat(target))  # opening a device may do something
        descriptor = os.open(target, _FLAGS)
    except OSError as error:
        raise FileError(_reason(error)) from None
    with open(descriptor, "rb", buffering=0) as file:
        _check_regular(os.fstat(descriptor))
        try:
            content = _read(file)
        except OSError as error:
            raise FileError(_reason(error)) from None
    return content


def _read(file: object) -> bytes:
    pieces, size = [], 0
    while piece := file.read(1 << 20):  # pyright: ignore
        pieces.append(piece)
        size += len(piece)
        if size > MOST_FILE_BYTES:
            raise FileError(f"it has more than {MOST_FILE_BYTES // MIB} MiB")
    return b"".join(pieces)


def _resolved(path: str, limits: MediaLimits) -> str:
    if limits.folder == "":
        raise FileError("files are not read (allowed_local_media_path='')")
    if len(path) > LONGEST_PATH:
        raise FileError(f"a path of {len(path)} characters")
    try:
        target = os.path.realpath(path, strict=True)
        root = None if limits.folder is None else os.path.realpath(limits.folder, strict=True)
    except (OSError, ValueError) as error:  # ValueError: a zero byte
        if limits.folder is not None:
            # Whether something is there is nobody's to learn outside of the folder.
            raise FileError("no such file in allowed_local_media_path") from None
        raise FileError(_reason(error)) from None
    if root is not None and not target.startswith(root.rstrip(os.sep) + os.sep):
        raise FileError("no such file in allowed_local_media_path")
    return target


def _check_regular(status: os.stat_result) -> None:
    if stat.S_ISDIR(status.st_mode):
        raise FileError("a folder, not a file")
    if not stat.S_ISREG(status.st_mode):
        raise FileError("not a regular file")


def _reason(error: OSError | ValueError) -> str:
    if isinstance(error, FileNotFoundError):
        return "no such file"
    return getattr(error, "strerror", None) or "not a path"
