"""A job's checkpoints: the same name twice, and which jobs a start continues."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from optserve.server.backends import select
from optserve.server.durability.archive import Archive
from optserve.server.durability.checkpoints import Checkpoints
from optserve.server.jobs import Job, spec
from optserve.server.records import new_id
from optserve.server.storage import MemoryStorage, Storage
from optserve.server.store import StoreState
from optserve.v1 import jobs_pb2, types_pb2
from optserve.wire.errors import CheckpointExistsError
from optserve.wire.values import to_hyperparameters

Saved = tuple[dict[str, Any], StoreState]


def made(job_id: str, name: str = "j") -> Job:
    parameters = [types_pb2.Parameter(name="w", shape=(3,), dtype=types_pb2.DATA_TYPE_FLOAT32)]
    wanted = jobs_pb2.JobSpec(
        name=name,
        optimizer="sgd",
        workers=1,
        defaults=to_hyperparameters({"lr": 1.0}),
        groups=[jobs_pb2.GroupSpec(parameters=parameters)],
    )
    job = Job(job_id, spec.plan(wanted), select("numpy"), new_id())
    job.store.set_values({"w": np.ones(3, np.float32)})
    job.store.seal()
    job.initialized = True
    return job


def captured(job: Job) -> Saved:
    tensors = job.store.export()
    return job.to_document(tensors.steps), tensors


class Gate(Checkpoints):
    """Lets a save begin only once as many have been asked for as its barrier counts."""

    def __init__(self, storage: Storage, parties: int) -> None:
        super().__init__(storage)
        self._barrier = threading.Barrier(parties, timeout=20)

    def _write(self, path: str, tensors: Any) -> Any:
        if path.endswith("/parameters.safetensors"):
            self._barrier.wait()
        return super()._write(path, tensors)


def results(works: list[Callable[[], Any]]) -> list[Any]:
    def one(work: Callable[[], Any]) -> Any:
        try:
            return work()
        except CheckpointExistsError as error:
            return type(error)

    with ThreadPoolExecutor(len(works)) as pool:
        return list(pool.map(one, works))


def test_saves_of_one_name_at_one_version_at_the_same_time_give_the_same() -> None:
    archive = Archive(Gate(MemoryStorage(), 3))
    document, tensors = captured(made("a"))
    first, *others = results([lambda: archive.save("a", "e1", document, tensors)] * 3)
    assert others == [first, first]
    assert [info.name for info in archive.checkpoints.list("a")] == ["e1"]


def test_of_saves_of_one_name_at_two_versions_at_the_same_time_one_is_refused() -> None:
    archive = Archive(Gate(MemoryStorage(), 2))
    document, tensors = captured(made("a"))
    later = {**document, "position": {**document["position"], "version": 7}}
    found = results([lambda: archive.save("a", "e1", document, tensors), lambda: archive.save("a", "e1", later, tensors)])
    assert found.count(CheckpointExistsError) == 1


def test_the_job_that_was_saved_last_is_recovered_first(monkeypatch: pytest.MonkeyPatch) -> None:
    archive = Archive(Checkpoints(MemoryStorage()))
    for job_id, moment in (("b", 10.0), ("c", 30.0), ("a", 20.0)):
        monkeypatch.setattr("time.time", lambda moment=moment: moment)
        archive.save(job_id, "e1", *captured(made(job_id)))
    assert [job.job_id for job in archive.recover(select("numpy"))] == ["c", "a", "b"]


def test_an_upload_that_a_kill_cut_off_is_no_job() -> None:
    storage = MemoryStorage()
    archive = Archive(Checkpoints(storage))
    archive.save("a", "e1", *captured(made("a")))
    files = archive.checkpoints.files("a", "e1")
    with archive.receive(files) as (folder, upload):
        for index, (name, size) in enumerate(files):
            upload.write(index, 0, archive.checkpoints.read_file("a", "e1", name, 0, size))
        upload.commit()
        assert folder in archive.checkpoints.folders()
        again = Archive(Checkpoints(storage))
        assert [job.job_id for job in again.recover(select("numpy"))] == ["a"]
        assert again.checkpoints.folders() == ["a"]


def test_a_checkpoint_that_is_not_there_names_eight_that_are() -> None:
    archive = Archive(Checkpoints(MemoryStorage()))
    for index in range(20):
        archive.save("a", f"e{index:02d}", *captured(made("a")))
    with pytest.raises(Exception, match=r"known: 'e00', .*'e07' and 12 more$"):
        archive.checkpoints.read("a", "e99")
