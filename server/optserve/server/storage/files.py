"""The small file interface through which every byte under the data directory goes; tests inject faults here.

Paths are relative to the storage's root, "/"-separated; "" is the root. A path that could leave the root is an
InvalidArgumentError. No OSError leaves this room: StorageError names the path and what failed. All of it is thread safe,
except that one Writer or Reader belongs to one thread at a time.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from optserve.wire.errors import InvalidArgumentError, StorageError


class File:
    """What readers and writers share: a `with` that closes. Closing twice is allowed."""

    def close(self) -> None:
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None:
            self.close()
        else:
            with suppress(StorageError):  # the first error is the one to report
                self.close()


class Writer(File):
    """A file open for writing at its end."""

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Writes all of a contiguous buffer."""
        raise NotImplementedError

    def fsync(self) -> None:
        """What was written survives the machine's death, if the folder's entry does (`fsync_folder`)."""
        raise NotImplementedError


class Reader(File):
    """A file open for reading; it stays whole for the reader when its path is renamed or unlinked meanwhile."""

    size: int
    """Bytes when it was opened."""

    def read_into(self, offset: int, buffer: memoryview) -> int:
        """Fills the buffer from `offset`; returns the bytes read, fewer only at the file's end."""
        raise NotImplementedError

    def read(self, offset: int, size: int) -> bytes:
        """At most `size` bytes, fewer only at the file's end."""
        buffer = bytearray(max(0, min(size, self.size - offset)))
        return bytes(memoryview(buffer)[: self.read_into(offset, memoryview(buffer))])


Names = list[str]


class Storage(Protocol):
    """Files in folders."""

    def create(self, path: str) -> Writer:
        """A new or emptied file."""

    def append(self, path: str) -> Writer:
        """A new or existing file."""

    def open(self, path: str) -> Reader:
        """An existing file."""

    def list(self, path: str) -> Names:
        """Sorted names in a folder; none if there is no such folder."""

    def is_folder(self, path: str) -> bool:
        """False for a file and for nothing."""

    def make_folder(self, path: str) -> None:
        """With its parents; an existing one is left as it is."""

    def rename(self, old: str, new: str) -> None:
        """Atomic. Replaces a file, or an empty folder; survives the machine's death after `fsync_folder`."""

    def unlink(self, path: str) -> None:
        """Removes a file."""

    def remove_folder(self, path: str) -> None:
        """Removes an empty folder."""

    def fsync_folder(self, path: str) -> None:
        """The folder's entries survive the machine's death."""


def remove_tree(storage: Storage, path: str) -> None:
    """Removes a file, or a folder with all that is in it."""
    if not storage.is_folder(path):
        storage.unlink(path)
        return
    for name in storage.list(path):
        remove_tree(storage, f"{path}/{name}")
    storage.remove_folder(path)


def parts(path: str) -> list[str]:
    """The path's names. InvalidArgumentError for one that is absolute or could leave the root."""
    names = path.split("/") if path else []
    if any(name in ("", ".", "..") or "\0" in name or os.sep in name for name in names):
        raise InvalidArgumentError(f"path {path!r} does not stay under the storage's root", path=path)
    return names


def failure(action: str, path: str | Path, code: int | None) -> StorageError:
    """The error for an errno."""
    full = "; the disk is full" if code in (errno.ENOSPC, errno.EDQUOT) else ""
    text = os.strerror(code) if code is not None else "unknown error"
    error = StorageError(f"cannot {action} {str(path)!r}: {text}{full}", path=path, errno=errno.errorcode.get(code or 0, code))
    error.errno = code
    return error


@contextmanager
def reporting(action: str, path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise failure(action, path, error.errno) from error
