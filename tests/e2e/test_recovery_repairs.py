"""Jobs, their names and their folders across kills, deletions and sessions that end."""

from __future__ import annotations

import shutil
import threading
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from optserve.client import Job, connect, errors
from optserve.server.app import App
from optserve.server.durability.checkpoints import Checkpoints
from optserve.v1 import jobs_pb2, types_pb2
from optserve.wire.values import to_hyperparameters

W = {"w": np.ones(8, np.float32)}


def created(server: Any, name: str | None, **options: Any) -> Job:
    job: Job = server.create_job(name, W, optimizer="sgd", lr=1.0, **options)
    return job


def folders(app: App) -> list[str]:
    return app._archive.checkpoints.folders()


@pytest.fixture
def imported(start_app: Callable[..., App], tmp_path: Path) -> list[str]:
    """Ids of "digits" and of "again", made from its checkpoint; in data-dir "killed" as a kill leaves it."""
    app = start_app(data_dir=tmp_path / "data")
    with connect(app.address) as server:
        job = created(server, "digits")
        with job.join() as worker:
            worker.push(W)
        job.save_checkpoint("c")
        again = server.create_job("again", from_checkpoint=job.download_checkpoint("c", tmp_path / "c"))
        assert [entry.name for entry in again.checkpoints()] == ["imported"]
        assert again.restore_checkpoint("imported").step == 1
        shutil.copytree(tmp_path / "data", tmp_path / "killed")
        return [job.job_id, again.job_id]


def test_a_job_from_a_checkpoint_is_itself_after_a_kill(
    start_app: Callable[..., App], tmp_path: Path, imported: list[str]
) -> None:
    app = start_app(data_dir=tmp_path / "killed")
    assert sorted(folders(app)) == sorted(imported)
    with connect(app.address) as server:
        assert [(job.name, job.job_id) for job in server.jobs()] == [("again", imported[1]), ("digits", imported[0])]
        assert server.job("again").info().members == ()
        np.testing.assert_array_equal(server.job("again").pull()["w"], np.zeros(8, np.float32))


def test_a_job_from_a_checkpoint_keeps_its_name_though_the_other_is_gone(
    start_app: Callable[..., App], tmp_path: Path, imported: list[str]
) -> None:
    shutil.rmtree(tmp_path / "killed" / "checkpoints" / imported[0])
    with connect(start_app(data_dir=tmp_path / "killed").address) as server:
        assert [(job.name, job.job_id) for job in server.jobs()] == [("again", imported[1])]


def test_a_job_whose_first_save_fails_is_not_made(app: App, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with connect(app.address) as server:
        job = created(server, "digits")
        job.save_checkpoint("c")
        folder = job.download_checkpoint("c", tmp_path / "c")

        def full(*arguments: Any, **options: Any) -> None:
            raise errors.StorageError("the disk is full")

        with monkeypatch.context() as patch:
            patch.setattr(Checkpoints, "save", full)
            with pytest.raises(errors.StorageError, match="the disk is full"):
                server.create_job("again", from_checkpoint=folder)
        assert [entry.name for entry in server.jobs()] == ["digits"]
        assert folders(app) == [job.job_id]
        server.create_job("again", from_checkpoint=folder)


def test_a_job_deleted_while_it_is_saved_leaves_nothing(app: App, monkeypatch: pytest.MonkeyPatch) -> None:
    saving, deleted = threading.Event(), threading.Event()
    write = Checkpoints._write

    def slow(*arguments: Any) -> Any:
        saving.set()
        assert deleted.wait(20)
        return write(*arguments)

    monkeypatch.setattr(Checkpoints, "_write", slow)
    caught: list[Exception] = []

    def save() -> None:
        try:
            job.save_checkpoint("e")
        except errors.OptserveError as error:
            caught.append(error)

    with connect(app.address) as server:
        job = created(server, "j")
        thread = threading.Thread(target=save)
        thread.start()
        assert saving.wait(20)
        server.job("j").delete()
        deleted.set()
        thread.join(20)
    assert [type(error) for error in caught] in ([errors.JobNotFoundError], [errors.JobLostError])
    assert folders(app) == []


def test_an_unnamed_jobs_checkpoints_end_with_its_session(app: App, until: Any) -> None:
    with connect(app.address) as server:
        created(server, None).save_checkpoint("c")
        assert len(folders(app)) == 1
    until(lambda: not app.registry.all(), "the job ends")
    assert folders(app) == []


def test_an_unnamed_jobs_checkpoints_end_with_a_session_that_died(app: App, monkeypatch: pytest.MonkeyPatch) -> None:
    with connect(app.address) as server:
        job = created(server, None)
        job.save_checkpoint("c")
        monkeypatch.setattr(app.registry, "expired", lambda: [job.job_id])
        app.housekeeping()
        app.housekeeping()
        assert app.registry.all() == []
        assert folders(app) == []


def test_housekeeping_outlives_a_storage_that_fails(
    app: App, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(self: object, folder: str) -> None:
        raise errors.StorageError("the disk is gone")

    with connect(app.address) as server:
        job = created(server, None)
        monkeypatch.setattr(app.registry, "expired", lambda: [job.job_id])
        with monkeypatch.context() as patch:
            patch.setattr(Checkpoints, "delete_folder", fail)
            app.housekeeping()
    assert any("the disk is gone" in message for message in caplog.messages)


def test_one_of_two_attachers_takes_a_dead_creators_place(app: App) -> None:
    parameters = [types_pb2.Parameter(name="w", shape=(8,), dtype=types_pb2.DATA_TYPE_FLOAT32)]
    spec = jobs_pb2.JobSpec(
        name="j",
        optimizer="sgd",
        workers=1,
        lease_seconds=0.2,
        defaults=to_hyperparameters({"lr": 1.0}),
        groups=[jobs_pb2.GroupSpec(parameters=parameters)],
    )
    now = [0.0]
    app.registry._clock = lambda: now[0]

    def create(session_id: str) -> bool:
        return app.registry.create(str(uuid.uuid4()), spec, session_id, True)[1]

    assert create("dead")
    assert not create("early")
    now[0] += 1.0
    assert [create("one"), create("two"), create("one")] == [True, False, True]  # the last one asks again, its answer was lost
    now[0] += 1.0
    assert [create("two"), create("one")] == [True, False]
