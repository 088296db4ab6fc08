"""A checkpoint is the old one or the new one, whichever operation of the storage fails, is the last before a kill, or is lost
with the machine's power."""

import errno
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from optserve.server.durability.checkpoints import Checkpoints, Content
from optserve.server.storage import DiskStorage, MemoryStorage, Reader, Storage, Writer
from optserve.server.storage.files import failure
from optserve.server.storage.memory import MemoryFile, MemoryFolder
from optserve.wire.errors import CheckpointNotFoundError, StorageError

JOB = "job"


class Killed(BaseException):
    """The process ends here."""


@dataclass
class Faults:
    """What happens at the `at`-th operation, counted from 0: an errno once, an errno from then on, or a kill."""

    at: int = -1
    code: int | None = None
    lasting: bool = False
    count: int = 0
    dead: bool = False
    seen: list[str] = field(default_factory=list)

    def check(self, action: str, path: str) -> None:
        if self.dead:
            raise Killed
        now, self.count = self.count, self.count + 1
        self.seen.append(f"{action} {path}")
        if now == self.at or (self.lasting and self.at >= 0 and now > self.at):
            if self.code is None:
                self.dead = True
                raise Killed
            raise failure(action, path, self.code)


class FaultyWriter(Writer):
    def __init__(self, inner: Writer, faults: Faults, path: str) -> None:
        self._inner, self._faults, self._path = inner, faults, path

    def write(self, data: bytes | bytearray | memoryview) -> None:
        try:
            self._faults.check("write", self._path)
        except BaseException:
            self._inner.write(data[: len(data) // 2])  # as a disk that fills up, or a kill between two pages
            raise
        self._inner.write(data)

    def fsync(self) -> None:
        self._faults.check("fsync", self._path)
        self._inner.fsync()

    def close(self) -> None:
        self._inner.close()
        self._faults.check("close", self._path)


class FaultyReader(Reader):
    def __init__(self, inner: Reader, faults: Faults, path: str) -> None:
        self._inner, self._faults, self._path = inner, faults, path
        self.size = inner.size

    def read_into(self, offset: int, buffer: memoryview) -> int:
        self._faults.check("read", self._path)
        return self._inner.read_into(offset, buffer)

    def close(self) -> None:
        self._inner.close()


class FaultyStorage:
    """Any storage, with faults."""

    def __init__(self, inner: Storage, faults: Faults) -> None:
        self._inner, self.faults = inner, faults

    def create(self, path: str) -> Writer:
        self.faults.check("create", path)
        return FaultyWriter(self._inner.create(path), self.faults, path)

    def append(self, path: str) -> Writer:
        self.faults.check("append", path)
        return FaultyWriter(self._inner.append(path), self.faults, path)

    def open(self, path: str) -> Reader:
        self.faults.check("open", path)
        return FaultyReader(self._inner.open(path), self.faults, path)

    def is_folder(self, path: str) -> bool:
        self.faults.check("is_folder", path)
        return self._inner.is_folder(path)

    def make_folder(self, path: str) -> None:
        self.faults.check("make_folder", path)
        self._inner.make_folder(path)

    def rename(self, old: str, new: str) -> None:
        self.faults.check(f"rename {old}", new)
        self._inner.rename(old, new)

    def unlink(self, path: str) -> None:
        self.faults.check("unlink", path)
        self._inner.unlink(path)

    def remove_folder(self, path: str) -> None:
        self.faults.check("remove_folder", path)
        self._inner.remove_folder(path)

    def fsync_folder(self, path: str) -> None:
        self.faults.check("fsync_folder", path)
        self._inner.fsync_folder(path)

    def list(self, path: str) -> Any:
        self.faults.check("list", path)
        return self._inner.list(path)


class PowerStorage(MemoryStorage):
    """Remembers what was fsynced, to model a machine that loses power."""

    def __init__(self) -> None:
        super().__init__()
        self.durable: dict[int, tuple[object, Any]] = {}

    def synced(self, node: MemoryFile | MemoryFolder) -> None:
        kept = bytes(node.data) if isinstance(node, MemoryFile) else dict(node.entries)
        self.durable[id(node)] = (node, kept)

    def after_power_loss(self, *, names_lost: bool, bytes_lost: bool) -> MemoryStorage:
        """What the disk may hold: what was not fsynced is lost, or was written all the same, for names and bytes apart."""

        def survivor(node: MemoryFile | MemoryFolder) -> MemoryFile | MemoryFolder:
            kept = self.durable.get(id(node), (node, None))[1]
            if isinstance(node, MemoryFile):
                return MemoryFile(bytearray(kept or b"")) if bytes_lost else MemoryFile(bytearray(node.data))
            entries = (kept or {}) if names_lost else node.entries
            return MemoryFolder({name: survivor(entry) for name, entry in entries.items()})

        storage = MemoryStorage()
        root = survivor(self.root)
        assert isinstance(root, MemoryFolder)
        storage.root = root
        return storage


def content(seed: int) -> Content:
    values = np.arange(40, dtype=np.float32) * seed
    return Content({"position": {"version": seed}}, {"w": values, "b": values[:3]}, {"exp_avg/w": values})


def version(checkpoints: Checkpoints, name: str = "a", folder: str = JOB) -> int | None:
    """Of a checkpoint that is whole; None if there is none. Anything else is the failure that these tests look for."""
    try:
        found = checkpoints.read(folder, name)
    except CheckpointNotFoundError:
        assert name not in [info.name for info in checkpoints.list(folder)]
        return None
    seed: int = found.document["position"]["version"]
    np.testing.assert_array_equal(found.parameters["w"], content(seed).parameters["w"])
    np.testing.assert_array_equal(found.state["exp_avg/w"], content(seed).state["exp_avg/w"])
    assert name in [info.name for info in checkpoints.list(folder)]
    return seed


def save(checkpoints: Checkpoints) -> None:
    checkpoints.save(JOB, "a", content(2), 2.0)


def replace(checkpoints: Checkpoints) -> None:
    checkpoints.save(JOB, "a", content(2), 2.0, replace=True)


def upload(checkpoints: Checkpoints) -> None:
    source = Checkpoints(MemoryStorage())
    source.save(JOB, "a", content(2), 2.0)
    files = source.files(JOB, "a")
    with checkpoints.receive(JOB, "a", files, replace=True) as receiving:
        for index, (name, size) in enumerate(files):
            for offset in range(0, size, 100):
                receiving.write(index, offset, source.read_file(JOB, "a", name, offset, 100))
        receiving.commit()


def delete(checkpoints: Checkpoints) -> None:
    checkpoints.delete(JOB, "a")


def delete_folder(checkpoints: Checkpoints) -> None:
    checkpoints.delete_folder(JOB)


@dataclass(frozen=True)
class Change:
    """`before` and `after`: the version of checkpoint "a"."""

    act: Callable[[Checkpoints], None]
    before: int | None
    after: int | None
    stale: bool = False
    """An earlier replacement left the version before under its hidden name."""


CHANGES = {
    "save": Change(save, None, 2),
    "replace": Change(replace, 1, 2),
    "replace beside a leftover": Change(replace, 1, 2, stale=True),
    "upload": Change(upload, None, 2),
    "upload over": Change(upload, 1, 2),
    "delete": Change(delete, 1, None),
    "delete beside a leftover": Change(delete, 1, None, stale=True),
    "delete folder": Change(delete_folder, 1, None),
}


def prepare(storage: Storage, change: Change) -> Checkpoints:
    checkpoints = Checkpoints(storage)
    checkpoints.save("other", "kept", content(7), 1.0)
    if change.before is not None:
        checkpoints.save(JOB, "a", content(change.before), 1.0)
    if change.stale:
        checkpoints.save(JOB, "leftover", content(5), 0.5)
        storage.rename(f"checkpoints/{JOB}/leftover", f"checkpoints/{JOB}/.old-a")
        storage.fsync_folder(f"checkpoints/{JOB}")
    return checkpoints


def hidden(storage: Storage) -> list[str]:
    folders = storage.list("checkpoints")
    return [name for folder in ["", *folders] for name in storage.list(f"checkpoints/{folder}".rstrip("/")) if name[0] == "."]


def reopened(storage: Storage, allowed: set[int | None]) -> Checkpoints:
    """A new server on what is there: whole, without leftovers, and usable."""
    checkpoints = Checkpoints(storage)
    assert version(checkpoints) in allowed
    assert version(checkpoints, "kept", "other") == 7
    assert hidden(storage) == []
    checkpoints.save(JOB, "a", content(3), 3.0, replace=True)
    assert version(checkpoints) == 3
    checkpoints.delete_folder(JOB)
    assert version(checkpoints) is None
    return checkpoints


def operations(change: Change) -> int:
    storage = FaultyStorage(MemoryStorage(), Faults())
    checkpoints = prepare(storage, change)
    storage.faults.count = 0
    change.act(checkpoints)
    return storage.faults.count


def every_operation(
    change: Change, make: Callable[[], Storage], **fault: Any
) -> Iterator[tuple[Storage, FaultyStorage, Checkpoints]]:
    for at in range(operations(change)):
        inner = make()
        faulty = FaultyStorage(inner, Faults())
        checkpoints = prepare(faulty, change)
        faulty.faults = Faults(at, **fault)
        yield inner, faulty, checkpoints


@pytest.mark.parametrize("lasting", [False, True], ids=["once", "lasting"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO], ids=["ENOSPC", "EIO"])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_an_error_at_any_operation_leaves_the_old_or_the_new(
    change: Change, code: int, lasting: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL)
    failures: list[StorageError] = []
    for inner, faulty, checkpoints in every_operation(change, MemoryStorage, code=code, lasting=lasting):
        allowed = {change.before, change.after}
        try:
            change.act(checkpoints)
            allowed = {change.after}
        except StorageError as error:
            failures.append(error)
        faulty.faults.at = -1
        found = version(checkpoints)
        assert found in allowed, faulty.faults.seen
        assert version(checkpoints, "kept", "other") == 7
        reopened(inner, {found})
    assert len(failures) > 2
    assert {error.errno for error in failures} == {code}
    assert {"the disk is full" in str(error) for error in failures} == {code == errno.ENOSPC}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_failed_change_can_be_tried_again(change: Change, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL)
    for _, faulty, checkpoints in every_operation(change, MemoryStorage, code=errno.EIO):
        try:
            change.act(checkpoints)
        except StorageError:
            faulty.faults.at = -1
            if version(checkpoints) != change.after:
                change.act(checkpoints)
        assert version(checkpoints) == change.after


@pytest.mark.parametrize("disk", [False, True], ids=["memory", "disk"])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_kill_at_any_operation_leaves_the_old_or_the_new(change: Change, disk: bool, tmp_path: Path) -> None:
    folders = iter(range(1000))

    def make() -> Storage:
        return DiskStorage(tmp_path / str(next(folders))) if disk else MemoryStorage()

    for inner, faulty, checkpoints in every_operation(change, make):
        with pytest.raises(Killed):
            change.act(checkpoints)
        assert faulty.faults.dead
        reopened(inner, {change.before, change.after})


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_kill_while_starting_after_a_kill_loses_nothing(change: Change) -> None:
    for at in range(operations(change)):
        for second in range(200):
            inner = MemoryStorage()
            faulty = FaultyStorage(inner, Faults())
            checkpoints = prepare(faulty, change)
            faulty.faults = Faults(at)
            with pytest.raises(Killed):
                change.act(checkpoints)
            try:
                Checkpoints(FaultyStorage(inner, Faults(second)))
                break
            except Killed:
                reopened(inner, {change.before, change.after})


@pytest.mark.parametrize("bytes_lost", [False, True], ids=["bytes kept", "bytes lost"])
@pytest.mark.parametrize("names_lost", [False, True], ids=["names kept", "names lost"])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_loss_of_power_leaves_the_old_or_the_new(change: Change, names_lost: bool, bytes_lost: bool) -> None:
    for inner, _, checkpoints in every_operation(change, PowerStorage):
        with pytest.raises(Killed):
            change.act(checkpoints)
        assert isinstance(inner, PowerStorage)
        reopened(inner.after_power_loss(names_lost=names_lost, bytes_lost=bytes_lost), {change.before, change.after})


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_was_confirmed_survives_a_loss_of_power(change: Change) -> None:
    storage = PowerStorage()
    change.act(prepare(storage, change))
    reopened(storage.after_power_loss(names_lost=True, bytes_lost=True), {change.after})


def test_an_error_while_reading_is_a_storage_error_and_passes() -> None:
    storage = FaultyStorage(MemoryStorage(), Faults())
    checkpoints = prepare(storage, CHANGES["replace"])
    storage.faults.count = 0
    checkpoints.read(JOB, "a")
    for at in range(storage.faults.count):
        storage.faults = Faults(at, errno.EIO)
        with pytest.raises(StorageError, match="Input/output error"):
            checkpoints.read(JOB, "a")
        assert version(checkpoints) == 1
