"""How runs begin: every rank runs the same script, one of them creates, the others wait for its values."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from optserve.client import Server, connect, errors
from optserve.server.app import App
from optserve.v1 import jobs_pb2, types_pb2

VALUES = {"w": np.arange(4, dtype=np.float32)}


def test_every_rank_runs_the_same_script(app: App, model: Any, side_by_side: Any, same: Any, no_thread_left: None) -> None:
    """All of them create with exist_ok; whose values win does not depend on who joins when."""
    barrier = threading.Barrier(4)

    def script(rank: int) -> Callable[[], Any]:
        def run() -> Any:
            with connect(app.address) as server:
                barrier.wait(20)
                job = server.create_job("j", model.groups(lr=0.5), optimizer="sgd", lr=1.0, workers=4, exist_ok=True)
                with job.join(rank=rank) as worker:
                    first = worker.pull()
                    for step in range(3):
                        last = worker.push_pull(model.draw(1 + rank, step))
                    barrier.wait(20)
            return first, last

        return run

    found = side_by_side([script(rank) for rank in range(4)])
    for first, last in found:
        same(first, model.draw(0))
        same(last, found[0][1])


@pytest.fixture
def half_created(app: App) -> Callable[[], None]:
    """A job "j" whose creator has not uploaded the values; calling it uploads them."""
    spec = jobs_pb2.JobSpec(
        name="j",
        optimizer="sgd",
        workers=2,
        groups=[jobs_pb2.GroupSpec(parameters=[types_pb2.Parameter(name="w", shape=[4], dtype=types_pb2.DATA_TYPE_FLOAT32)])],
    )
    create = app.handlers["/optserve.v1.JobService/CreateJob"]
    job_id = create(jobs_pb2.CreateJobRequest(job_id=str(uuid.uuid4()), session_id="creator", spec=spec), None).job.job_id
    flat = np.zeros(32, np.float32)
    flat[:4] = VALUES["w"]
    request = jobs_pb2.InitializeJobRequest

    def upload() -> None:
        items = [
            request(begin=jobs_pb2.InitializeBegin(job_id=job_id, session_id="creator")),
            request(chunk=types_pb2.TensorChunk(data=flat.tobytes())),
            request(end=types_pb2.StreamEnd()),
        ]
        app.handlers["/optserve.v1.JobService/InitializeJob"](iter([item.SerializeToString() for item in items]), None)

    return upload


def test_the_others_wait_for_the_initial_values(
    app: App, half_created: Callable[[], None], until: Any, side_by_side: Any, same: Any
) -> None:
    host = app.registry.find("j").host
    with connect(app.address) as server:
        job = server.job("j")

        def waits() -> Any:
            with job.join() as worker:
                return worker.pull()

        def uploads() -> None:
            until(lambda: len(host.changed._waiters) == 2, "both join")
            half_created()

        for found in side_by_side([waits, waits, uploads])[:2]:
            same(found, VALUES)


def test_the_others_wait_no_longer_than_they_say(client: Server, half_created: Callable[[], None], same: Any) -> None:
    job = client.job("j")
    with pytest.raises(errors.JobNotInitializedError, match=r"job 'j': its creator has not uploaded") as caught:
        job.join(timeout_seconds=0.3)
    assert isinstance(caught.value, TimeoutError)
    with pytest.raises(errors.JobNotInitializedError, match="'j'"):
        job.pull()
    half_created()
    same(job.pull(), VALUES)


def test_a_creation_that_fails_half_way_frees_the_name(client: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    from optserve.client import _packing

    def broken(*_: Any) -> Any:
        raise MemoryError("no room")

    monkeypatch.setattr(_packing, "blocks", broken)
    with pytest.raises(MemoryError):
        client.create_job("j", VALUES, optimizer="sgd", lr=1.0)
    monkeypatch.undo()
    assert client.jobs() == []
    client.create_job("j", VALUES, optimizer="sgd", lr=1.0)


def test_rank_comes_from_the_environment(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    job = server.create_job("j", VALUES, optimizer="sgd", lr=1.0, workers=3)
    monkeypatch.setenv("RANK", "2")
    with job.join() as worker:
        assert (worker.rank, worker.name) == (2, "rank2")
        with job.join(rank=1) as other:
            assert other.rank == 1
    monkeypatch.setenv("RANK", "many")
    with pytest.raises(errors.InvalidArgumentError, match="RANK"):
        job.join()


def test_a_job_is_found_by_name_and_by_id(server: Server) -> None:
    job = server.create_job("user/digits", VALUES, optimizer="sgd", lr=1.0)
    assert server.job("user/digits").job_id == server.job(job.job_id).job_id == job.job_id


def test_two_servers_of_one_process_do_not_mix(start_app: Callable[..., App], same: Any) -> None:
    with connect(start_app().address) as one, connect(start_app().address) as two:
        one.create_job("j", VALUES, optimizer="sgd", lr=1.0)
        assert two.jobs() == []


def test_deleting_a_job_ends_what_waits_on_it(app: App, client: Server, until: Any) -> None:
    job = client.create_job("j", VALUES, optimizer="sgd", lr=1.0, workers=2)
    worker = job.join()
    waiting = worker.push_pull_async(VALUES)
    running = app.registry.find("j")
    until(lambda: running.pushes._round.busy, "the push waits")
    job.delete()
    job.delete()
    with pytest.raises(errors.JobNotFoundError, match="'j' was deleted"):
        waiting.result(20)
    with pytest.raises((errors.JobNotFoundError, errors.ClosedError)):
        worker.push(VALUES)


def test_an_initial_rate_that_is_no_number_does_not_break_schedules(server: Server) -> None:
    """`initial_lr` is torch's own key; whoever writes nonsense into it gets a typed error, at once or later."""
    job = server.create_job("j", VALUES, optimizer="sgd", lr=1.0)
    for value in ("x", True, (1.0, 2.0), -1.0, None):
        try:
            job.update_group(0, initial_lr=value)
            job.set_lr_schedule("LinearLR", total_iters=3)
            job.step_schedule()
        except errors.InputError:
            continue
        assert isinstance(job.param_groups[0]["lr"], float), value
