"""Storage in the server's memory, for servers without a data directory; gone with the process."""

from __future__ import annotations

import errno
import threading
from dataclasses import dataclass, field

from optserve.server.storage.files import Names, Reader, Writer, failure, parts
from optserve.wire.errors import OutOfMemoryError


@dataclass
class MemoryFile:
    """A file, whatever its name: readers and renames keep the object."""

    data: bytearray = field(default_factory=bytearray)


@dataclass
class MemoryFolder:
    """A folder's entries."""

    entries: dict[str, MemoryFile | MemoryFolder] = field(default_factory=dict)


class _MemoryWriter(Writer):
    def __init__(self, storage: MemoryStorage, path: str, file: MemoryFile) -> None:
        self._storage, self._path, self._file = storage, path, file

    def write(self, data: bytes | bytearray | memoryview) -> None:
        try:
            with self._storage.lock:
                self._file.data += data
        except MemoryError as error:
            raise OutOfMemoryError(f"no memory left while writing {self._path!r}, which is kept in memory") from error

    def fsync(self) -> None:
        with self._storage.lock:
            self._storage.synced(self._file)

    def close(self) -> None:
        pass


class _MemoryReader(Reader):
    def __init__(self, storage: MemoryStorage, file: MemoryFile) -> None:
        self._storage, self._file = storage, file
        self.size = len(file.data)

    def read_into(self, offset: int, buffer: memoryview) -> int:
        with self._storage.lock:
            count = max(0, min(buffer.nbytes, len(self._file.data) - offset))
            with memoryview(self._file.data) as view:
                buffer[:count] = view[offset : offset + count]
        return count

    def close(self) -> None:
        pass


class MemoryStorage:
    """A tree of folders and files. `lock` guards the tree and every file's bytes."""

    def __init__(self) -> None:
        self.root = MemoryFolder()
        self.lock = threading.RLock()

    def synced(self, node: MemoryFile | MemoryFolder) -> None:
        """Called for each fsync; here for tests that model what a machine's death leaves."""

    def _find(self, names: list[str]) -> MemoryFile | MemoryFolder | None:
        node: MemoryFile | MemoryFolder | None = self.root
        for name in names:
            node = node.entries.get(name) if isinstance(node, MemoryFolder) else None
        return node

    def _parent(self, action: str, path: str) -> tuple[MemoryFolder, str]:
        names = parts(path)
        folder = self._find(names[:-1])
        if not names or not isinstance(folder, MemoryFolder):
            raise failure(action, path, errno.ENOENT)
        return folder, names[-1]

    def _file(self, action: str, path: str, *, make: bool, empty: bool = False) -> MemoryFile:
        folder, name = self._parent(action, path)
        found = folder.entries.get(name)
        if isinstance(found, MemoryFolder):
            raise failure(action, path, errno.EISDIR)
        if found is None and not make:
            raise failure(action, path, errno.ENOENT)
        if found is None or empty:
            found = folder.entries[name] = MemoryFile()
        return found

    def create(self, path: str) -> Writer:
        with self.lock:
            return _MemoryWriter(self, path, self._file("open", path, make=True, empty=True))

    def append(self, path: str) -> Writer:
        with self.lock:
            return _MemoryWriter(self, path, self._file("open", path, make=True))

    def open(self, path: str) -> Reader:
        with self.lock:
            return _MemoryReader(self, self._file("open", path, make=False))

    def list(self, path: str) -> Names:
        with self.lock:
            found = self._find(parts(path))
            if isinstance(found, MemoryFile):
                raise failure("list", path, errno.ENOTDIR)
            return sorted(found.entries) if found is not None else []

    def is_folder(self, path: str) -> bool:
        with self.lock:
            return isinstance(self._find(parts(path)), MemoryFolder)

    def make_folder(self, path: str) -> None:
        with self.lock:
            folder = self.root
            for name in parts(path):
                found = folder.entries.setdefault(name, MemoryFolder())
                if not isinstance(found, MemoryFolder):
                    raise failure("create folder", path, errno.EEXIST)
                folder = found

    def rename(self, old: str, new: str) -> None:
        with self.lock:
            source, name = self._parent("rename", old)
            target, new_name = self._parent("rename", new)
            node, replaced = source.entries.get(name), target.entries.get(new_name)
            if node is None:
                raise failure("rename", old, errno.ENOENT)
            if isinstance(node, MemoryFolder) and isinstance(replaced, MemoryFile):
                raise failure(f"rename {old!r} to", new, errno.ENOTDIR)
            if isinstance(replaced, MemoryFolder) and (replaced.entries or isinstance(node, MemoryFile)):
                code = errno.ENOTEMPTY if isinstance(node, MemoryFolder) else errno.EISDIR
                raise failure(f"rename {old!r} to", new, code)
            del source.entries[name]
            target.entries[new_name] = node

    def unlink(self, path: str) -> None:
        with self.lock:
            folder, name = self._parent("delete", path)
            found = folder.entries.get(name)
            if not isinstance(found, MemoryFile):
                raise failure("delete", path, errno.ENOENT if found is None else errno.EISDIR)
            del folder.entries[name]

    def remove_folder(self, path: str) -> None:
        with self.lock:
            folder, name = self._parent("delete folder", path)
            found = folder.entries.get(name)
            if not isinstance(found, MemoryFolder) or found.entries:
                code = errno.ENOENT if found is None else errno.ENOTEMPTY if isinstance(found, MemoryFolder) else errno.ENOTDIR
                raise failure("delete folder", path, code)
            del folder.entries[name]

    def fsync_folder(self, path: str) -> None:
        with self.lock:
            found = self._find(parts(path))
            if not isinstance(found, MemoryFolder):
                raise failure("fsync folder", path, errno.ENOENT)
            self.synced(found)
