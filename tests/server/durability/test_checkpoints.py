"""Checkpoints: round trip, names, verification, listing, upload."""

import json
import logging
import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors.torch

from optserve.server.durability import manifest
from optserve.server.durability.checkpoints import Checkpoints, Content, Info
from optserve.server.storage import DiskStorage, MemoryStorage, Storage
from optserve.wire.errors import (
    CheckpointCorruptError,
    CheckpointExistsError,
    CheckpointMismatchError,
    CheckpointNotFoundError,
    ClosedError,
    IncompleteStreamError,
    InvalidArgumentError,
    InvalidChunkError,
    InvalidNameError,
)

JOB = "6b0f1c1e-0a6f-4a43-9a55-4d4a3b0c2f11"


def content(seed: int = 0) -> Content:
    generator = np.random.default_rng(seed)

    def array(shape: tuple[int, ...], dtype: Any) -> np.ndarray[Any, Any]:
        return np.frombuffer(generator.bytes(int(np.prod(shape)) * np.dtype(dtype).itemsize), dtype).reshape(shape)

    dtypes = {"a.f32": np.float32, "b/f64": np.float64, "c f16": np.float16, "d.bf16": ml_dtypes.bfloat16}
    dtypes |= {"e.c64": np.complex64, "f.c128": np.complex128}
    parameters = {name: array((5, 3), dtype) for name, dtype in dtypes.items()}
    parameters |= {"empty": array((2, 0), np.float32), "scalar": array((), ml_dtypes.bfloat16)}
    state = {f"exp_avg/{name}": array((5, 3), np.complex128 if "c128" in name else np.float32) for name in dtypes}
    document = {"position": {"version": seed, "step": 3}, "groups": [{"lr": 0.1 + seed, "betas": [0.9, 0.999]}], "ü": "ö\n"}
    return Content(document, parameters, state)


def same(left: Content, right: Content) -> bool:
    return left.document == right.document and all(
        list(one) == list(other)
        and all(
            one[name].dtype == other[name].dtype
            and one[name].shape == other[name].shape
            and one[name].tobytes() == other[name].tobytes()
            for name in one
        )
        for one, other in ((left.parameters, right.parameters), (left.state, right.state))
    )


@pytest.fixture(params=["disk", "memory"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    return DiskStorage(tmp_path / "data") if request.param == "disk" else MemoryStorage()


@pytest.fixture
def checkpoints(storage: Storage) -> Checkpoints:
    return Checkpoints(storage)


def test_a_round_trip_is_bitwise(storage: Storage, checkpoints: Checkpoints) -> None:
    info = checkpoints.save(JOB, "epoch-3", content(), 12.5)
    assert info == Info("epoch-3", sum(size for _, size in checkpoints.files(JOB, "epoch-3")), 12.5, {"version": 0, "step": 3})
    for again in (checkpoints, Checkpoints(storage)):
        found = again.read(JOB, "epoch-3")
        assert same(found, content())
        assert list(found.document) == list(content().document)
        assert again.info(JOB, "epoch-3") == again.verify(JOB, "epoch-3") == info
        assert again.list(JOB) == [info]
        assert again.folders() == [JOB]


def test_any_safetensors_reader_loads_the_parameters(tmp_path: Path) -> None:
    Checkpoints(DiskStorage(tmp_path)).save(JOB, "a", content(), 0)
    folder = tmp_path / "checkpoints" / JOB / "a"
    assert sorted(path.name for path in folder.iterdir()) == ["manifest.json", "parameters.safetensors", "state.safetensors"]
    assert set(safetensors.torch.load_file(folder / "parameters.safetensors")) == set(content().parameters)
    assert set(safetensors.torch.load_file(folder / "state.safetensors")) == set(content().state)
    assert json.loads((folder / "manifest.json").read_text())["document"] == content().document


def test_nothing_saved_is_nothing_found(checkpoints: Checkpoints) -> None:
    assert checkpoints.folders() == checkpoints.list(JOB) == []
    for call in (checkpoints.info, checkpoints.read, checkpoints.verify, checkpoints.files, checkpoints.delete):
        with pytest.raises(CheckpointNotFoundError, match="no checkpoint 'a'; known: none"):
            call(JOB, "a")
    checkpoints.delete_folder(JOB)


def test_an_absent_name_lists_the_known_ones(checkpoints: Checkpoints) -> None:
    for name in ("b", "a"):
        checkpoints.save(JOB, name, content(), 0)
    with pytest.raises(CheckpointNotFoundError, match="no checkpoint 'c'; known: 'a', 'b'"):
        checkpoints.read(JOB, "c")


def test_an_existing_name_is_kept_unless_replaced(checkpoints: Checkpoints) -> None:
    checkpoints.save(JOB, "a", content(1), 1)
    for call in (
        lambda: checkpoints.save(JOB, "a", content(2), 2),
        lambda: checkpoints.receive(JOB, "a", checkpoints.files(JOB, "a")),
    ):
        with pytest.raises(CheckpointExistsError, match="checkpoint 'a' exists"):
            call()
    assert same(checkpoints.read(JOB, "a"), content(1))
    checkpoints.save(JOB, "a", content(2), 2, replace=True)
    assert same(checkpoints.read(JOB, "a"), content(2))
    assert [info.time_seconds for info in checkpoints.list(JOB)] == [2]


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/etc", "../a", ".hidden", "a b", "ä", "a\n", "a\0", "x" * 129, "a\\b"])
def test_a_name_that_is_a_path_is_refused_everywhere(checkpoints: Checkpoints, name: str) -> None:
    calls: list[Callable[[], object]] = [
        lambda: checkpoints.save(JOB, name, content(), 0),
        lambda: checkpoints.save(name, "a", content(), 0),
        lambda: checkpoints.read(JOB, name),
        lambda: checkpoints.info(name, "a"),
        lambda: checkpoints.verify(JOB, name),
        lambda: checkpoints.files(JOB, name),
        lambda: checkpoints.read_file(JOB, name, "manifest.json", 0, 1),
        lambda: checkpoints.delete(JOB, name),
        lambda: checkpoints.delete_folder(name),
        lambda: checkpoints.list(name),
        lambda: checkpoints.receive(JOB, name, [("manifest.json", 0), ("parameters.safetensors", 0), ("state.safetensors", 0)]),
    ]
    for call in calls:
        with pytest.raises(InvalidNameError, match="letters, digits"):
            call()
    assert checkpoints.folders() == []


@pytest.mark.parametrize("name", ["a", "x" * 128, "1.0", "epoch-3_b.2", "-"])
def test_other_names_are_allowed(checkpoints: Checkpoints, name: str) -> None:
    checkpoints.save(JOB, name, content(), 0)
    assert same(checkpoints.read(JOB, name), content())


def test_the_list_is_oldest_first_and_a_bad_manifest_hides_nothing(
    storage: Storage, checkpoints: Checkpoints, caplog: pytest.LogCaptureFixture
) -> None:
    for name, time in (("c", 1.0), ("a", 3.0), ("b", 2.0), ("d", 2.0)):
        checkpoints.save(JOB, name, content(), time)
    with storage.append(f"checkpoints/{JOB}/b/manifest.json") as file:
        file.write(b" ")
    storage.unlink(f"checkpoints/{JOB}/d/manifest.json")
    storage.make_folder(f"checkpoints/{JOB}/not a checkpoint")
    with caplog.at_level(logging.WARNING):
        assert [info.name for info in checkpoints.list(JOB)] == ["c", "a"]
    assert "'b': manifest.json does not end with its hash" in caplog.text
    assert "'d': manifest.json is missing" in caplog.text


def test_deleting_removes_one_checkpoint_or_all(storage: Storage, checkpoints: Checkpoints) -> None:
    for folder in (JOB, "other"):
        for name in ("a", "b"):
            checkpoints.save(folder, name, content(), 0)
    checkpoints.delete(JOB, "a")
    assert [info.name for info in checkpoints.list(JOB)] == ["b"]
    checkpoints.delete_folder(JOB)
    assert checkpoints.folders() == ["other"]
    assert storage.list("checkpoints") == ["other"]
    assert [info.name for info in checkpoints.list("other")] == ["a", "b"]


def test_a_document_without_a_position_is_refused(checkpoints: Checkpoints) -> None:
    with pytest.raises(InvalidArgumentError, match="position"):
        checkpoints.save(JOB, "a", Content({}, {}, {}), 0)
    assert checkpoints.folders() == []


def test_nonfinite_numbers_survive(checkpoints: Checkpoints) -> None:
    document = {"position": {}, "best": float("inf"), "tiny": 5e-324, "third": 1 / 3}
    checkpoints.save(JOB, "a", Content(document, {}, {}), 0)
    assert checkpoints.read(JOB, "a").document == document


@pytest.mark.parametrize("name", manifest.FILES)
def test_every_flipped_bit_and_every_truncation_is_found(storage: Storage, checkpoints: Checkpoints, name: str) -> None:
    checkpoints.save(JOB, "a", content(), 7.0)
    path = f"checkpoints/{JOB}/a/{name}"
    with storage.open(path) as reader:
        whole = reader.read(0, reader.size)
    generator = random.Random(name)
    for attempt in range(100):
        if attempt % 2:
            bit = generator.randrange(8 * len(whole))
            altered = bytearray(whole)
            altered[bit // 8] ^= 1 << bit % 8
        else:
            altered = bytearray(whole[: generator.randrange(len(whole))])
        with storage.create(path) as file:
            file.write(altered)
        for call in (checkpoints.read, checkpoints.verify):
            with pytest.raises(CheckpointCorruptError, match=f"checkpoint 'a': {name} "):
                call(JOB, "a")
    storage.unlink(path)
    with pytest.raises(CheckpointCorruptError, match=f"{name} is missing"):
        checkpoints.read(JOB, "a")
    with storage.create(path) as file:
        file.write(whole)
    assert same(checkpoints.read(JOB, "a"), content())


def reading_goes_on_while(checkpoints: Checkpoints, change: Callable[[int], object]) -> None:
    failures: list[BaseException] = []
    stop = threading.Event()

    def read() -> None:
        try:
            while not stop.is_set():
                found = checkpoints.read(JOB, "a")
                assert same(found, content(found.document["position"]["version"]))
        except BaseException as error:  # seen by the test's own thread
            failures.append(error)

    threads = [threading.Thread(target=read) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for seed in range(30):
            change(seed)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not failures


def test_a_reader_sees_whole_versions_while_the_checkpoint_is_replaced(checkpoints: Checkpoints) -> None:
    checkpoints.save(JOB, "a", content(0), 0)
    reading_goes_on_while(checkpoints, lambda seed: checkpoints.save(JOB, "a", content(seed), seed, replace=True))


def forged(storage: Storage, **changes: Any) -> None:
    """A manifest with a valid hash of its own, as a stranger can make one."""
    path = f"checkpoints/{JOB}/a/manifest.json"
    with storage.open(path) as reader:
        fields = json.loads(reader.read(0, reader.size)) | changes
    fields.pop("xxh3_128")
    head = json.dumps(fields, indent=1).removesuffix("\n}").encode()
    with storage.create(path) as file:
        file.write(head + f',\n "xxh3_128": "{manifest.xxhash.xxh3_128_hexdigest(head)}"\n}}\n'.encode())


@pytest.mark.parametrize(
    "changes",
    [
        {"format": "another"},
        {"time_seconds": "now"},
        {"time_seconds": float("nan")},
        {"files": {}},
        {"files": []},
        {"files": {"parameters.safetensors": 3, "state.safetensors": 4}},
        {"files": {name: {"size": -1, "xxh3_128": ""} for name in manifest.FILES[1:]}},
        {"files": {name: {"size": True, "xxh3_128": ""} for name in manifest.FILES[1:]}},
        {"document": []},
        {"document": {"position": 3}},
    ],
)
def test_a_forged_manifest_is_corrupt(storage: Storage, checkpoints: Checkpoints, changes: dict[str, Any]) -> None:
    checkpoints.save(JOB, "a", content(), 0)
    forged(storage, **changes)
    with pytest.raises(CheckpointCorruptError, match=r"manifest\.json"):
        checkpoints.read(JOB, "a")


def test_a_newer_format_says_so(storage: Storage, checkpoints: Checkpoints) -> None:
    checkpoints.save(JOB, "a", content(), 0)
    forged(storage, format_version=2)
    with pytest.raises(CheckpointMismatchError, match="format version 2; this optserve reads 1"):
        checkpoints.read(JOB, "a")


class TestTransfer:
    def pieces(self, checkpoints: Checkpoints, size: int = 100) -> tuple[list[tuple[str, int]], list[tuple[int, int, bytes]]]:
        checkpoints.save(JOB, "a", content(), 5.0)
        files = checkpoints.files(JOB, "a")
        found = [
            (index, offset, checkpoints.read_file(JOB, "a", name, offset, size))
            for index, (name, total) in enumerate(files)
            for offset in range(0, total, size)
        ]
        return files, found

    def test_a_downloaded_checkpoint_is_uploaded_again(self, storage: Storage, checkpoints: Checkpoints) -> None:
        files, pieces = self.pieces(checkpoints)
        with checkpoints.receive("other", "b", files) as upload:
            for index, offset, data in sorted(pieces, key=lambda piece: piece[1]):  # the files' pieces interleaved
                assert checkpoints.list("other") == []
                upload.write(index, offset, memoryview(data))
            info = upload.commit()
            with pytest.raises(ClosedError):
                upload.write(0, 0, b"")
        assert info == checkpoints.info("other", "b")
        assert info.time_seconds == 5.0
        assert same(checkpoints.read("other", "b"), content())
        assert storage.list("checkpoints/other") == ["b"]

    def test_an_upload_that_ends_early_leaves_nothing(self, storage: Storage, checkpoints: Checkpoints) -> None:
        files, pieces = self.pieces(checkpoints)
        with checkpoints.receive("other", "b", files) as upload:
            for piece in pieces[:-1]:
                upload.write(*piece)
        assert storage.list("checkpoints/other") == []
        with checkpoints.receive("other", "b", files) as upload:
            for piece in pieces[:-1]:
                upload.write(*piece)
            with pytest.raises(IncompleteStreamError, match=r"state\.safetensors ended after \d+ of \d+ bytes"):
                upload.commit()
        assert storage.list("checkpoints/other") == []

    @pytest.mark.parametrize("index", range(3))
    def test_an_altered_upload_never_becomes_visible(self, storage: Storage, checkpoints: Checkpoints, index: int) -> None:
        files, pieces = self.pieces(checkpoints)
        with checkpoints.receive("other", "b", files) as upload:
            for at, offset, data in pieces:
                upload.write(at, offset, bytes([data[0] ^ 1]) + data[1:] if at == index and offset == 100 else data)
            with pytest.raises(CheckpointCorruptError, match=files[index][0]):
                upload.commit()
        assert storage.list("checkpoints/other") == []

    def test_pieces_that_do_not_fit_are_refused(self, checkpoints: Checkpoints) -> None:
        files, pieces = self.pieces(checkpoints)
        with checkpoints.receive("other", "b", files) as upload:
            upload.write(*pieces[0])
            for index, offset, data, message in [
                (3, 0, b"", "names file 3; there are 3"),
                (-1, 0, b"", "names file -1"),
                (0, 0, b"x", r"begins at byte 0; the next one is 100"),
                (0, 200, b"x", r"begins at byte 200; the next one is 100"),
                (0, 100, bytes(files[0][1]), "it was announced with"),
            ]:
                with pytest.raises(InvalidChunkError, match=message):
                    upload.write(index, offset, data)
            for piece in pieces[1:]:
                upload.write(*piece)
            upload.commit()
        assert same(checkpoints.read("other", "b"), content())

    @pytest.mark.parametrize(
        "files",
        [
            [],
            [("manifest.json", 1)],
            [("manifest.json", 1), ("parameters.safetensors", 1), ("../../passwd", 1)],
            [("manifest.json", 1), ("parameters.safetensors", 1), ("state.safetensors", -1)],
            [("manifest.json", 1), ("parameters.safetensors", 1), ("state.safetensors", 1), ("state.safetensors", 1)],
        ],
    )
    def test_other_files_are_refused(self, checkpoints: Checkpoints, files: list[tuple[str, int]]) -> None:
        with pytest.raises(InvalidArgumentError, match=r"a checkpoint consists of manifest\.json, parameters"):
            checkpoints.receive(JOB, "a", files)
        assert checkpoints.folders() == []

    def test_a_name_taken_meanwhile_is_found_at_commit(self, checkpoints: Checkpoints) -> None:
        files, pieces = self.pieces(checkpoints)
        with checkpoints.receive("other", "b", files) as upload:
            for piece in pieces:
                upload.write(*piece)
            checkpoints.save("other", "b", content(9), 0)
            with pytest.raises(CheckpointExistsError):
                upload.commit()
        assert same(checkpoints.read("other", "b"), content(9))

    def test_only_the_three_files_are_read(self, checkpoints: Checkpoints) -> None:
        self.pieces(checkpoints)
        with pytest.raises(InvalidNameError, match="a checkpoint has no file"):
            checkpoints.read_file(JOB, "a", "../a/manifest.json", 0, 1)
        with pytest.raises(InvalidArgumentError, match="cannot be read"):
            checkpoints.read_file(JOB, "a", "manifest.json", -1, 1)
