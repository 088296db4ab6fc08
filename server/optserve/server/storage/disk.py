"""Storage on the operating system's files."""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from pathlib import Path

from optserve.server.storage.files import File, Names, Reader, Writer, failure, parts, reporting
from optserve.wire.errors import StorageError


class _Descriptor(File):
    def __init__(self, path: Path, flags: int) -> None:
        self._path = path
        with reporting("open", path):
            self._descriptor = os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)

    def close(self) -> None:
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor != -1:
            with reporting("close", self._path):
                os.close(descriptor)

    def __del__(self) -> None:
        with suppress(StorageError, AttributeError):
            self.close()


class _DiskWriter(_Descriptor, Writer):
    def write(self, data: bytes | bytearray | memoryview) -> None:
        rest = memoryview(data)
        with reporting("write", self._path):
            while rest.nbytes:
                rest = rest[os.write(self._descriptor, rest) :]

    def fsync(self) -> None:
        with reporting("fsync", self._path):
            os.fsync(self._descriptor)


class _DiskReader(_Descriptor, Reader):
    def __init__(self, path: Path) -> None:
        super().__init__(path, os.O_RDONLY)
        with reporting("read", path):
            self.size = os.fstat(self._descriptor).st_size

    def read_into(self, offset: int, buffer: memoryview) -> int:
        done = 0
        with reporting("read", self._path):
            while done < buffer.nbytes:
                count = os.preadv(self._descriptor, [buffer[done:]], offset + done)
                if not count:
                    break
                done += count
        return done


class DiskStorage:
    """Files of the operating system under `root`, which is made if it is not there."""

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = Path(root)
        with reporting("create folder", self.root):
            self.root.mkdir(parents=True, exist_ok=True)

    def _at(self, path: str) -> Path:
        return self.root.joinpath(*parts(path))

    def create(self, path: str) -> Writer:
        return _DiskWriter(self._at(path), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)

    def append(self, path: str) -> Writer:
        return _DiskWriter(self._at(path), os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def open(self, path: str) -> Reader:
        return _DiskReader(self._at(path))

    def list(self, path: str) -> Names:
        try:
            return sorted(os.listdir(self._at(path)))
        except FileNotFoundError:
            return []
        except OSError as error:
            raise failure("list", self._at(path), error.errno) from error

    def is_folder(self, path: str) -> bool:
        try:
            return stat.S_ISDIR(os.lstat(self._at(path)).st_mode)
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError as error:
            raise failure("look at", self._at(path), error.errno) from error

    def make_folder(self, path: str) -> None:
        with reporting("create folder", self._at(path)):
            self._at(path).mkdir(parents=True, exist_ok=True)

    def rename(self, old: str, new: str) -> None:
        with reporting(f"rename {str(self._at(old))!r} to", self._at(new)):
            os.rename(self._at(old), self._at(new))

    def unlink(self, path: str) -> None:
        with reporting("delete", self._at(path)):
            os.unlink(self._at(path))

    def remove_folder(self, path: str) -> None:
        with reporting("delete folder", self._at(path)):
            os.rmdir(self._at(path))

    def fsync_folder(self, path: str) -> None:
        with reporting("fsync folder", self._at(path)):
            descriptor = os.open(self._at(path), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
