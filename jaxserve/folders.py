"""Folders for files that are run as code when they are read: nobody else writes there. No jax."""

from __future__ import annotations

import contextlib
import os
import stat
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
TRUSTED_OWNERS = (0,)
"""Beside the process's own user."""


class UnsafeFileError(OSError):
    """Others could have written this file or folder, or it is none."""


class PrivateFolder:
    """A folder of this user's, to which nobody else can write.

    Folder and files are checked as they were opened, by their descriptors, so that nothing can be
    put in their place in between; symbolic links are not followed. All methods raise OSError, and
    UnsafeFileError for what others may write to.
    """

    def __init__(self, path: Path):
        self.path = path

    def create(self) -> None:
        """Makes the folder where there is none, of mode 0700, and checks it."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            self.path.mkdir(mode=0o700)
        with self._opened():
            pass

    def has(self, name: str) -> bool:
        """Whether there is such a file, which is not looked at; False where it cannot be known."""
        return os.path.lexists(self.path / name)

    def read(self, name: str) -> bytes | None:
        """A file's content; None where there is no such file or no folder."""
        try:
            with self._opened() as folder:
                # non-blocking: a named pipe would wait for somebody who writes
                descriptor = os.open(
                    name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder
                )
        except FileNotFoundError:
            return None
        try:
            _check(self.path / name, os.fstat(descriptor), stat.S_ISREG, "regular file")
            with open(descriptor, "rb", closefd=False) as file:
                return file.read()
        finally:
            os.close(descriptor)

    def write(self, name: str, content: bytes) -> None:
        """A file of mode 0600, whole or not at all; makes the folder if need be."""
        self.create()
        part = f"{name}.{os.getpid()}-{threading.get_ident()}"
        with self._opened() as folder:
            descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600, dir_fd=folder)
            try:
                with os.fdopen(descriptor, "wb") as file:
                    file.write(content)
                os.replace(part, name, src_dir_fd=folder, dst_dir_fd=folder)
            except BaseException:
                os.unlink(part, dir_fd=folder)
                raise

    def touch(self, name: str) -> None:
        """The file is in use: `prune` spares it."""
        with self._opened() as folder:
            os.utime(name, dir_fd=folder, follow_symlinks=False)

    def prune(
        self,
        *,
        suffix: str = "",
        unused_seconds: float | None = None,
        most_bytes: int | None = None,
    ) -> None:
        """Deletes files whose names end in `suffix`: those that nobody has read or written for
        `unused_seconds`, and those unused for longest until all are `most_bytes` together."""
        with self._opened() as folder:
            files = []
            for name in filter(lambda name: name.endswith(suffix), os.listdir(folder)):
                # other processes delete too
                with contextlib.suppress(FileNotFoundError):
                    found = os.stat(name, dir_fd=folder, follow_symlinks=False)
                    if not stat.S_ISDIR(found.st_mode):
                        files.append((max(found.st_atime, found.st_mtime), found.st_size, name))
            total, oldest_kept = sum(size for _, size, _ in files), 0.0
            if unused_seconds is not None:
                oldest_kept = time.time() - unused_seconds
            for used, size, name in sorted(files):
                if used >= oldest_kept and (most_bytes is None or total <= most_bytes):
                    break
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(name, dir_fd=folder)
                total -= size

    @contextlib.contextmanager
    def _opened(self) -> Iterator[int]:
        """A descriptor of the checked folder."""
        if self.path.is_symlink():
            raise UnsafeFileError(f"{self.path} is a symbolic link")
        descriptor = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            _check(self.path, os.fstat(descriptor), stat.S_ISDIR, "folder")
            yield descriptor
        finally:
            os.close(descriptor)


def _check(path: Path, found: os.stat_result, is_kind: Callable[[int], bool], kind: str) -> None:
    if not is_kind(found.st_mode):
        raise UnsafeFileError(f"{path} is no {kind}")
    if found.st_uid not in (os.geteuid(), *TRUSTED_OWNERS):
        raise UnsafeFileError(f"{path} belongs to user {found.st_uid}, not to {os.geteuid()}")
    if found.st_mode & OTHERS_WRITE:
        mode = stat.S_IMODE(found.st_mode)
        raise UnsafeFileError(f"{path} has mode {mode:04o}: others than its owner may write to it")
