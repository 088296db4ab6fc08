"""A checkpoint's files between the server and a folder here."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

from google.protobuf.message import Message

from optserve.v1 import jobs_pb2
from optserve.wire.chunks import CHUNK_BYTES, Chunk, Coverage
from optserve.wire.errors import IncompleteStreamError, InvalidArgumentError, ProtocolViolationError
from optserve.wire.methods import Item


def read(items: Iterator[Item], path: Path) -> None:
    """Writes the files of a download into the new folder `path`: aside first, so that it is there whole or not at all."""
    aside = path.with_name(f"{path.name}.partial-{os.getpid()}")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        with ExitStack() as stack:
            _fill(items, aside, stack)
        aside.rename(path)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def check_free(path: Path) -> None:
    """InvalidArgumentError if something is there: nothing is ever overwritten."""
    if path.exists():
        raise InvalidArgumentError(f"{path} exists; a checkpoint is downloaded into a new folder")


def _fill(items: Iterator[Item], folder: Path, stack: ExitStack) -> None:
    files: list[BinaryIO] = []
    coverage: list[Coverage] = []
    for item in items:
        if isinstance(item, Chunk):
            if item.array_id >= len(files):
                raise ProtocolViolationError(f"a chunk of file {item.array_id} came; {len(files)} were announced")
            coverage[item.array_id].add(item.offset, item.data.nbytes)
            files[item.array_id].seek(item.offset)
            files[item.array_id].write(item.data)
        elif item.WhichOneof("content") == "begin" and not files:
            for entry in _announced(item):
                files.append(stack.enter_context((folder / entry.name).open("xb")))
                coverage.append(Coverage(entry.name, entry.size))
        elif item.WhichOneof("content") == "end":
            missing = [entry.what for entry in coverage if entry.missing]
            if missing:
                raise IncompleteStreamError(f"the download ended with chunks of {', '.join(missing)} missing")
            return
        else:
            raise ProtocolViolationError(f"{item.WhichOneof('content')} came out of order in a download")
    raise IncompleteStreamError("the download ended without its end")


def _announced(begin: Message) -> Sequence[jobs_pb2.CheckpointFile]:
    files: Sequence[jobs_pb2.CheckpointFile] = begin.begin.files  # type: ignore[attr-defined]
    for entry in files:
        if entry.name in ("", ".", "..") or "/" in entry.name or "\\" in entry.name or ":" in entry.name or "\0" in entry.name:
            raise ProtocolViolationError(f"the server named a file {entry.name!r}; a checkpoint's files lie in no folder")
    return files


def listed(path: Path) -> list[Path]:
    """The files of a downloaded checkpoint. InvalidArgumentError if there is none at `path`."""
    if not path.is_dir():
        raise InvalidArgumentError(f"{path} is no folder; from_checkpoint is one that download_checkpoint wrote")
    files = sorted(entry for entry in path.iterdir() if entry.is_file())
    if not files:
        raise InvalidArgumentError(f"{path} is empty; from_checkpoint is a folder that download_checkpoint wrote")
    return files


def chunks(files: Sequence[Path]) -> Iterator[Chunk]:
    """The files' bytes; array_id is the file's index."""
    for index, path in enumerate(files):
        offset = 0
        with path.open("rb") as file:
            while data := file.read(CHUNK_BYTES):
                yield Chunk(index, offset, memoryview(data))
                offset += len(data)
