"""Both storages behave alike, stay under their root and let no OSError out."""

import errno
import os
import threading
from pathlib import Path

import pytest

from optserve.server.storage import DiskStorage, MemoryStorage, Storage, remove_tree
from optserve.wire.errors import InvalidArgumentError, StorageError


@pytest.fixture(params=["disk", "memory"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    return DiskStorage(tmp_path / "data" / "dir") if request.param == "disk" else MemoryStorage()


def put(storage: Storage, path: str, data: bytes) -> None:
    with storage.create(path) as file:
        file.write(data)
        file.fsync()


def get(storage: Storage, path: str) -> bytes:
    with storage.open(path) as file:
        return file.read(0, file.size)


def test_pieces_are_written_and_read_at_offsets(storage: Storage) -> None:
    with storage.create("a") as file:
        for piece in (b"abc", bytearray(b"de"), memoryview(b"fgh"), b"", memoryview(b"")):
            file.write(piece)
    with storage.open("a") as reader:
        assert reader.size == 8
        assert reader.read(2, 3) == b"cde"
        assert reader.read(6, 1 << 60) == b"gh"
        assert reader.read(8, 5) == reader.read(100, 5) == b""
        buffer = bytearray(4)
        assert reader.read_into(5, memoryview(buffer)) == 3
        assert buffer == b"fgh\0"


def test_create_empties_and_append_continues(storage: Storage) -> None:
    put(storage, "a", b"old")
    put(storage, "a", b"new")
    with storage.append("a") as file:
        file.write(b"er")
    with storage.append("b") as file:
        file.write(b"first")
    assert get(storage, "a") == b"newer"
    assert get(storage, "b") == b"first"


def test_folders_are_made_listed_and_removed(storage: Storage) -> None:
    storage.make_folder("x/y/z")
    storage.make_folder("x/y")
    put(storage, "x/y/b", b"1")
    put(storage, "x/y/a", b"2")
    assert storage.list("x/y") == ["a", "b", "z"]
    assert storage.list("nothing") == storage.list("x/y/z") == []
    assert [storage.is_folder(path) for path in ("", "x", "x/y/a", "nothing")] == [True, True, False, False]
    with pytest.raises(StorageError, match=r"cannot delete folder .*x/y'.*: Directory not empty"):
        storage.remove_folder("x/y")
    storage.fsync_folder("x/y")
    storage.fsync_folder("")
    remove_tree(storage, "x")
    assert storage.list("") == []


def test_rename_replaces_files_and_empty_folders_only(storage: Storage) -> None:
    put(storage, "a", b"a")
    put(storage, "b", b"b")
    storage.rename("a", "b")
    assert storage.list("") == ["b"]
    assert get(storage, "b") == b"a"
    for folder in ("full", "empty", "new"):
        storage.make_folder(folder)
    put(storage, "full/file", b"1")
    put(storage, "new/file", b"2")
    with pytest.raises(StorageError, match="Directory not empty"):
        storage.rename("new", "full")
    with pytest.raises(StorageError, match="Not a directory"):
        storage.rename("new", "b")
    with pytest.raises(StorageError, match="Is a directory"):
        storage.rename("b", "full")
    storage.rename("new", "empty")
    assert get(storage, "empty/file") == b"2"
    assert get(storage, "full/file") == b"1"


def test_a_reader_keeps_what_it_opened(storage: Storage) -> None:
    storage.make_folder("old")
    put(storage, "old/a", b"before")
    with storage.open("old/a") as reader:
        storage.rename("old", "hidden")
        storage.make_folder("old")
        put(storage, "old/a", b"after!")
        remove_tree(storage, "hidden")
        assert reader.read(0, 100) == b"before"
    assert get(storage, "old/a") == b"after!"


@pytest.mark.parametrize("path", ["/etc/passwd", "..", "a/../../b", "a//b", "./a", "a/", "a\0b"])
def test_a_path_that_could_leave_the_root_is_refused(storage: Storage, path: str) -> None:
    for call in (storage.create, storage.append, storage.open, storage.list, storage.make_folder, storage.unlink):
        with pytest.raises(InvalidArgumentError, match="does not stay under the storage's root"):
            call(path)
    put(storage, "a", b"")
    for old, new in ((path, "b"), ("a", path)):
        with pytest.raises(InvalidArgumentError):
            storage.rename(old, new)


def test_a_failure_names_the_path_and_what_failed(storage: Storage) -> None:
    put(storage, "file", b"")
    storage.make_folder("folder")
    failures = {
        "open .*nothing.*No such file": lambda: storage.open("nothing"),
        "open .*no/folder.*No such file": lambda: storage.create("no/folder"),
        "open .*folder.*Is a directory": lambda: storage.create("folder"),
        "list .*file.*Not a directory": lambda: storage.list("file"),
        "create folder .*file.*File exists": lambda: storage.make_folder("file"),
        "rename .*nothing.*No such file": lambda: storage.rename("nothing", "a"),
        "delete .*nothing.*No such file": lambda: storage.unlink("nothing"),
        "delete folder .*nothing.*No such file": lambda: storage.remove_folder("nothing"),
        "delete folder .*file.*Not a directory": lambda: storage.remove_folder("file"),
        "fsync folder .*nothing.*No such file": lambda: storage.fsync_folder("nothing"),
    }
    for message, call in failures.items():
        with pytest.raises(StorageError, match=f"cannot {message}"):
            call()


def test_writers_on_several_threads_do_not_mix(storage: Storage) -> None:
    def work(index: int) -> None:
        storage.make_folder(f"f{index}")
        put(storage, f"f{index}/a", bytes([index]) * 100_000)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index in range(4):
        assert get(storage, f"f{index}/a") == bytes([index]) * 100_000


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_says_so() -> None:
    with (
        DiskStorage("/dev").create("full") as file,
        pytest.raises(StorageError, match=r"/dev/full.*the disk is full") as caught,
    ):
        file.write(b"abc")
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.metadata["errno"] == "ENOSPC"


def test_a_root_that_cannot_be_made_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="cannot create folder"):
        DiskStorage(tmp_path / "file")
    with pytest.raises(StorageError, match="cannot create folder"):
        DiskStorage(tmp_path / "file" / "below")


def test_links_are_neither_followed_nor_descended(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_text("kept")
    storage = DiskStorage(tmp_path / "root")
    (storage.root / "folder").symlink_to(outside)
    (storage.root / "file").symlink_to(outside / "secret")
    for call in (storage.open, storage.create, storage.append):
        with pytest.raises(StorageError):
            call("file")
    remove_tree(storage, "folder")
    assert (outside / "secret").read_text() == "kept"


def test_an_error_inside_with_is_the_one_that_is_raised(storage: Storage) -> None:
    with pytest.raises(KeyError), storage.create("a"):
        raise KeyError("mine")
