"""A checkpoint that is being received."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from types import TracebackType
from typing import TYPE_CHECKING, Self

from optserve.server.storage import Storage
from optserve.wire.errors import ClosedError, IncompleteStreamError, InvalidChunkError, StorageError

if TYPE_CHECKING:
    from optserve.server.durability.checkpoints import Info


class Upload:
    """Files that come in pieces, each file from its begin to its end. Leaving the `with` without `commit` aborts."""

    def __init__(
        self,
        storage: Storage,
        temporary: str,
        files: Sequence[tuple[str, int]],
        publish: Callable[[], Info],
        discard: Callable[[], None],
    ) -> None:
        self._files = list(files)
        self._received = [0] * len(self._files)
        self._publish, self._discard = publish, discard
        self._stack = ExitStack()
        self._open = True
        try:
            self._writers = [self._stack.enter_context(storage.create(f"{temporary}/{name}")) for name, _ in files]
        except BaseException:
            self.abort()
            raise

    def write(self, file_index: int, offset: int, data: bytes | memoryview) -> None:
        """The next piece of a file. InvalidChunkError if it is not that."""
        self._check_open()
        if not 0 <= file_index < len(self._files):
            raise InvalidChunkError(f"a chunk names file {file_index}; there are {len(self._files)}")
        name, size = self._files[file_index]
        received = self._received[file_index]
        if offset != received:
            raise InvalidChunkError(f"a chunk of {name} begins at byte {offset}; the next one is {received}")
        if offset + len(data) > size:
            raise InvalidChunkError(f"a chunk of {name} ends at byte {offset + len(data)}; it was announced with {size}")
        self._writers[file_index].write(data)
        self._received[file_index] += len(data)

    def commit(self) -> Info:
        """Verifies it and makes it visible. CheckpointCorruptError if it is not whole; it is then gone."""
        self._check_open()
        try:
            for (name, size), received in zip(self._files, self._received, strict=True):
                if received != size:
                    raise IncompleteStreamError(f"{name} ended after {received} of {size} bytes")
            with self._stack:
                for writer in self._writers:
                    writer.fsync()
            return self._publish()
        finally:
            self.abort()

    def abort(self) -> None:
        """Frees what came. Does nothing after `commit`."""
        if self._open:
            self._open = False
            with suppress(StorageError), self._stack:
                pass
            self._discard()

    def _check_open(self) -> None:
        if not self._open:
            raise ClosedError("the upload has ended")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.abort()
