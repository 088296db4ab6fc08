"""Checkpoints that are not there, not whole, not of this job, or have no room: a typed error, and nothing changes."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from optserve.client import Job, Server, Worker, connect, errors
from optserve.server.app import App

W = np.arange(12, dtype=np.float32).reshape(3, 4)
B = np.zeros(4, np.float32)
ONES = {"w": np.ones_like(W), "b": np.ones_like(B)}


@pytest.mark.parametrize("name", ["../x", "a/b", "/tmp/x", "", ".", "..", ".hidden", "x" * 129, "a\\b\0"])
def test_a_checkpoint_name_that_is_a_path(job: Job, tmp_path: Path, refused: Any, name: str) -> None:
    for call in (
        lambda: job.save_checkpoint(name),
        lambda: job.restore_checkpoint(name),
        lambda: job.verify_checkpoint(name),
        lambda: job.delete_checkpoint(name),
        lambda: job.download_checkpoint(name, tmp_path / "x"),
    ):
        with refused(errors.InvalidNameError, "is not allowed"):
            call()
    assert not (tmp_path / "x").exists()


def test_a_checkpoint_that_is_absent(job: Job, tmp_path: Path, refused: Any) -> None:
    job.save_checkpoint("here")
    for call in (
        lambda: job.restore_checkpoint("there"),
        lambda: job.verify_checkpoint("there"),
        lambda: job.delete_checkpoint("there"),
        lambda: job.download_checkpoint("there", tmp_path / "x"),
    ):
        with refused(errors.CheckpointNotFoundError, "no checkpoint 'there'; known: 'here'"):
            call()


def test_a_checkpoint_name_that_stands_for_another_version(job: Job, worker: Worker, refused: Any) -> None:
    saved = job.save_checkpoint("c")
    assert job.save_checkpoint("c") == saved
    worker.push(ONES)
    with refused(errors.CheckpointExistsError, "'c' exists"):
        job.save_checkpoint("c")


def test_a_checkpoint_of_other_shapes(server: Server, job: Job, tmp_path: Path, refused: Any) -> None:
    """Created from a folder, then restored into a job that has grown."""
    job.save_checkpoint("before")
    job.add_param_group({"params": {"v": W}})
    with refused(errors.CheckpointMismatchError, "differ in v"):
        job.restore_checkpoint("before")
    folder = job.download_checkpoint("before", tmp_path / "c")
    with refused(errors.JobExistsError, "'digits' exists"):
        server.create_job("digits", from_checkpoint=folder)
    with refused(errors.InvalidArgumentError, "give only the name"):
        server.create_job("other", {"w": W}, optimizer="adam", from_checkpoint=folder)
    with refused(errors.OptserveError, "nowhere"):
        server.create_job("other", from_checkpoint=tmp_path / "nowhere")


@pytest.fixture
def on_disk(start_app: Callable[..., App], tmp_path: Path) -> Iterator[tuple[Server, Path]]:
    app = start_app(data_dir=tmp_path / "data")
    with connect(app.address) as server:
        yield server, tmp_path / "data"


FILES = ["manifest.json", "parameters.safetensors", "state.safetensors"]


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", ["truncated", "bit flipped", "missing", "empty"])
def test_a_checkpoint_that_is_damaged(
    on_disk: tuple[Server, Path], snapshot: Any, tmp_path: Path, file: str, damage: str
) -> None:
    server, data = on_disk
    job = server.create_job("digits", {"w": W, "b": B}, optimizer="adam", lr=0.1)
    with job.join() as worker:
        worker.push(ONES)
    job.save_checkpoint("c")
    folder = job.download_checkpoint("c", tmp_path / "copy")
    before = snapshot(job)
    for path in (*data.rglob(f"c/{file}"), folder / file):
        raw = bytearray(path.read_bytes())
        if damage == "truncated":
            path.write_bytes(raw[:-1])
        elif damage == "empty":
            path.write_bytes(b"")
        elif damage == "missing":
            path.unlink()
        else:
            raw[len(raw) // 2] ^= 1
            path.write_bytes(raw)
    for call in (
        lambda: job.restore_checkpoint("c"),
        lambda: job.verify_checkpoint("c"),
        lambda: job.download_checkpoint("c", tmp_path / "again"),
    ):
        with pytest.raises(errors.CheckpointCorruptError, match=rf"checkpoint 'c'.*{file}"):
            call()
    assert not (tmp_path / "again").exists()
    with pytest.raises(errors.OptserveError) as caught:
        server.create_job("other", from_checkpoint=folder)
    assert not isinstance(caught.value, errors.InternalError)
    assert file in str(caught.value) or damage == "missing"
    assert [entry.name for entry in server.jobs()] == ["digits"]
    after = snapshot(job)
    assert {key: value for key, value in after.items() if key != "checkpoints"} == {
        key: value for key, value in before.items() if key != "checkpoints"
    }


def test_a_crafted_checkpoint_whose_tensors_do_not_fit(server: Server, job: Job, tmp_path: Path) -> None:
    """A valid manifest and valid hashes, but the contents are of something else."""
    import xxhash

    job.save_checkpoint("c")
    for number, change in enumerate(
        (
            lambda d: d["document"]["group_parameters"][0].append("v"),
            lambda d: d["document"]["position"].update(version="x"),
            lambda d: d["document"]["groups"][0].update(lr=-1.0),
            lambda d: d["document"]["spec"].update(optimizer="nothing"),
            lambda d: d["document"].pop("spec"),
            lambda d: d["document"]["steps"].update(v=1),
        )
    ):
        folder = job.download_checkpoint("c", tmp_path / str(number))
        fields = json.loads((folder / "manifest.json").read_text())
        del fields["xxh3_128"]
        change(fields)
        head = json.dumps(fields, indent=1).removesuffix("\n}").encode()
        digest = xxhash.xxh3_128_hexdigest(head)
        (folder / "manifest.json").write_bytes(head + f',\n "xxh3_128": "{digest}"\n}}\n'.encode())
        with pytest.raises((errors.CheckpointError, errors.InputError)):
            server.create_job(f"other{number}", from_checkpoint=folder)
    assert [entry.name for entry in server.jobs()] == ["digits"]


def test_a_disk_that_is_full_while_saving(on_disk: tuple[Server, Path], snapshot: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from optserve.server.storage import disk

    server, data = on_disk
    job = server.create_job("digits", {"w": W, "b": B}, optimizer="adam", lr=0.1)
    job.save_checkpoint("before")
    before = snapshot(job)

    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(disk.os, "write", full)
    with pytest.raises(errors.StorageError, match="No space left on device"):
        job.save_checkpoint("c")
    monkeypatch.undo()
    assert snapshot(job) == before
    assert not list(data.rglob(".tmp-*"))
    job.save_checkpoint("c")
