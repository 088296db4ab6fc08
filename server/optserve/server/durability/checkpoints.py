"""Checkpoints: a folder each, `<root>/<folder>/<name>/`, that is whole or not there.

It holds parameters.safetensors (named as the parameters are, so that any safetensors reader loads a model from it),
state.safetensors ("exp_avg/w1") and manifest.json.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import xxhash

from optserve.server.durability import safetensors
from optserve.server.durability.manifest import FILES, MANIFEST, MAX_BYTES, PARAMETERS, STATE, Fingerprint, Manifest
from optserve.server.durability.shelves import Shelves, check_name, exists
from optserve.server.durability.upload import Upload
from optserve.server.storage import Reader, Storage, Writer
from optserve.wire.errors import (
    CheckpointCorruptError,
    CheckpointError,
    CheckpointNotFoundError,
    InvalidArgumentError,
    InvalidNameError,
)

_LOG = logging.getLogger(__name__)

_NAMES_SHOWN = 8
"""Of the checkpoints that a message lists."""

Array = safetensors.Array


@dataclass(frozen=True)
class Content:
    """What is saved. `document` is JSON with a dict under "position"; the arrays are read piece by piece, never copied."""

    document: dict[str, Any]
    parameters: Mapping[str, Array]
    state: Mapping[str, Array]


@dataclass(frozen=True)
class Info:
    """A checkpoint in a list. `size` is the bytes of its three files, `position` the document's."""

    name: str
    size: int
    time_seconds: float
    position: dict[str, Any]


Infos = list[Info]
Sizes = list[tuple[str, int]]


class Checkpoints:
    """Every checkpoint under `root` of a storage. Thread safe; reads go on while the same checkpoint is replaced or deleted.

    Names: letters, digits, '.', '_', '-', at most 128, not '.' first; else InvalidNameError. One process at a time.
    """

    def __init__(self, storage: Storage, root: str = "checkpoints") -> None:
        """Frees what a killed process left half written."""
        self._storage = storage
        self._root = root
        self._shelves = Shelves(storage)
        self._shelves.reclaim(root)
        for folder in self.folders():
            self._shelves.reclaim(self._shelf(folder))

    def folders(self) -> list[str]:
        """Sorted names of the folders that were saved to."""
        return self._shelves.names(self._root)

    def save(self, folder: str, name: str, content: Content, time_seconds: float, *, replace: bool = False) -> Info:
        """All or nothing: after an error or a crash the old checkpoint of that name is whole, or the new one.

        CheckpointExistsError unless `replace`.
        """
        shelf = self._reserve(folder, name, replace=replace)
        if not isinstance(content.document.get("position"), dict):
            raise InvalidArgumentError("a checkpoint's document must have a dict under 'position'")
        temporary = self._shelves.temporary(shelf)
        try:
            files = {
                file: self._write(f"{temporary}/{file}", tensors)
                for file, tensors in ((PARAMETERS, content.parameters), (STATE, content.state))
            }
            manifest = Manifest(content.document, files, float(time_seconds))
            raw = manifest.encode()
            with self._storage.create(f"{temporary}/{MANIFEST}") as file:
                file.write(raw)
                file.fsync()
            self._shelves.publish(temporary, shelf, name, replace=replace)
        finally:
            self._shelves.discard(temporary)
        return _info(name, manifest, len(raw))

    def receive(self, folder: str, name: str, files: Sequence[tuple[str, int]], *, replace: bool = False) -> Upload:
        """Begins an upload of the three files, with their sizes. Nothing is visible before its `commit`."""
        if sorted(file for file, _ in files) != sorted(FILES) or any(size < 0 for _, size in files):
            found = ", ".join(f"{file} ({size} bytes)" for file, size in files)
            raise InvalidArgumentError(f"a checkpoint consists of {', '.join(FILES)}; found {found or 'nothing'}")
        shelf = self._reserve(folder, name, replace=replace)
        temporary = self._shelves.temporary(shelf)

        def publish() -> Info:
            with self._open(temporary, f"uploaded checkpoint {name!r}") as readers:
                info = _info(name, _verified(readers, f"uploaded checkpoint {name!r}"), readers[MANIFEST].size)
            self._shelves.publish(temporary, shelf, name, replace=replace)
            return info

        return Upload(self._storage, temporary, files, publish, lambda: self._shelves.discard(temporary))

    def list(self, folder: str) -> Infos:
        """Oldest first. A checkpoint whose manifest cannot be read is left out, and a warning logged."""
        found: Infos = []
        for name in self._shelves.names(self._shelf(folder)):
            try:
                found.append(self.info(folder, name))
            except CheckpointNotFoundError:
                continue  # deleted meanwhile
            except CheckpointError as error:
                _LOG.warning("%s; it is left out of the list", error)
        return sorted(found, key=lambda info: (info.time_seconds, info.name))

    def info(self, folder: str, name: str) -> Info:
        """From the manifest alone. CheckpointNotFoundError names some that exist."""
        with self._opened(folder, name, MANIFEST) as readers:
            return _info(name, _manifest(readers, _what(name)), readers[MANIFEST].size)

    def verify(self, folder: str, name: str) -> Info:
        """Reads it whole. CheckpointCorruptError names the file and what differs."""
        with self._opened(folder, name) as readers:
            return _info(name, _verified(readers, _what(name)), readers[MANIFEST].size)

    def read(self, folder: str, name: str) -> Content:
        """Its content, in arrays of its own, once all of it is verified."""
        with self._opened(folder, name) as readers:
            what = _what(name)
            manifest = _verified(readers, what)
            parameters = safetensors.read(readers[PARAMETERS], f"{what}: {PARAMETERS}")
            return Content(manifest.document, parameters, safetensors.read(readers[STATE], f"{what}: {STATE}"))

    def files(self, folder: str, name: str) -> Sizes:
        """Its files and their bytes, for a download."""
        with self._opened(folder, name) as readers:
            return [(file, readers[file].size) for file in FILES]

    def read_file(self, folder: str, name: str, file: str, offset: int, size: int) -> bytes:
        """A piece of one file, fewer than `size` bytes only at its end."""
        if file not in FILES:
            raise InvalidNameError(f"a checkpoint has no file {file!r}; its files are {', '.join(FILES)}")
        if offset < 0 or size < 0:
            raise InvalidArgumentError(f"{size} bytes at {offset} of {file} cannot be read")
        with self._opened(folder, name, file) as readers:
            return readers[file].read(offset, size)

    def delete(self, folder: str, name: str) -> None:
        """CheckpointNotFoundError if there is none."""
        check_name(name)
        if not self._shelves.remove(self._shelf(folder), name):
            raise self._not_found(folder, name)

    def delete_folder(self, folder: str) -> None:
        """With every checkpoint in it, if there is one."""
        self._shelf(folder)
        self._shelves.remove(self._root, folder)

    def _reserve(self, folder: str, name: str, *, replace: bool) -> str:
        """The folder's path, once the names are allowed and the checkpoint may be written."""
        check_name(name)
        shelf = self._shelf(folder)
        if not replace and self._shelves.locate(shelf, name):
            raise exists(name)
        return shelf

    def _shelf(self, folder: str) -> str:
        check_name(folder, "checkpoint folder")
        return f"{self._root}/{folder}"

    def _write(self, path: str, tensors: Mapping[str, Array]) -> Fingerprint:
        with self._storage.create(path) as file:
            sink = _Fingerprinting(file)
            safetensors.write(sink, tensors)
            file.fsync()
        return Fingerprint(sink.size, sink.hash.hexdigest())

    @contextmanager
    def _opened(self, folder: str, name: str, *files: str) -> Iterator[dict[str, Reader]]:
        check_name(name)
        shelf = self._shelf(folder)
        with ExitStack() as stack:
            with self._shelves.lock:
                path = self._shelves.locate(shelf, name)
                if path is None:
                    raise self._not_found(folder, name)
                readers = stack.enter_context(self._open(path, _what(name), *files))
            yield readers

    @contextmanager
    def _open(self, path: str, what: str, *files: str) -> Iterator[dict[str, Reader]]:
        present = self._storage.list(path)
        with ExitStack() as stack:
            readers: dict[str, Reader] = {}
            for file in files or FILES:
                if file not in present:
                    raise CheckpointCorruptError(f"{what}: {file} is missing", file=file)
                readers[file] = stack.enter_context(self._storage.open(f"{path}/{file}"))
            yield readers

    def _not_found(self, folder: str, name: str) -> CheckpointNotFoundError:
        names = self._shelves.names(self._shelf(folder))
        known = ", ".join(repr(entry) for entry in names[:_NAMES_SHOWN]) or "none"
        more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
        return CheckpointNotFoundError(f"no checkpoint {name!r}; known: {known}{more}", name=name)


class _Fingerprinting:
    def __init__(self, file: Writer) -> None:
        self._file = file
        self.size = 0
        self.hash = xxhash.xxh3_128()

    def write(self, data: memoryview) -> None:
        self._file.write(data)
        self.hash.update(data)
        self.size += data.nbytes


def _what(name: str) -> str:
    return f"checkpoint {name!r}"


def _info(name: str, manifest: Manifest, manifest_bytes: int) -> Info:
    size = manifest_bytes + sum(mark.size for mark in manifest.files.values())
    return Info(name, size, manifest.time_seconds, manifest.document["position"])


def _manifest(readers: Mapping[str, Reader], what: str) -> Manifest:
    file = readers[MANIFEST]
    if file.size > MAX_BYTES:
        raise CheckpointCorruptError(f"{what}: {MANIFEST} has {file.size} bytes; at most {MAX_BYTES} are read", file=MANIFEST)
    return Manifest.decode(file.read(0, file.size), f"{what}: {MANIFEST}")


def _verified(readers: Mapping[str, Reader], what: str) -> Manifest:
    manifest = _manifest(readers, what)
    for file, expected in manifest.files.items():
        _compare(readers[file], expected, file, what)
        safetensors.entries(readers[file], f"{what}: {file}")
    return manifest


def _compare(reader: Reader, expected: Fingerprint, file: str, what: str) -> None:
    if reader.size != expected.size:
        raise CheckpointCorruptError(
            f"{what}: {file} has {reader.size} bytes; its manifest says {expected.size} (truncated or replaced)", file=file
        )
    digest = xxhash.xxh3_128()
    buffer = memoryview(bytearray(min(reader.size, safetensors.PIECE_BYTES)))
    offset = 0
    while count := reader.read_into(offset, buffer):
        digest.update(buffer[:count])
        offset += count
    if digest.hexdigest() != expected.xxh3_128:
        raise CheckpointCorruptError(
            f"{what}: {file} was altered: its xxh3-128 is {digest.hexdigest()}; its manifest says {expected.xxh3_128}",
            file=file,
        )
