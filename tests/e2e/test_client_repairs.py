"""What a client does when only half of an answer came, when a creator died, and when it restored while it pushed."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from optserve.client import Job, Server, Worker, _packing, _spec, _weights, connect, errors
from optserve.server.app import App
from optserve.server.store import Store
from optserve.v1 import jobs_pb2

SIZES = {"inline": 8, "in chunks": 300_000}


def zeros(size: int = 8) -> dict[str, Any]:
    return {"w": np.zeros(size, np.float32)}


def ones(size: int = 8, value: float = 1) -> dict[str, Any]:
    return {"w": np.full(size, value, np.float32)}


@pytest.fixture
def fail_next_snapshot(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """The server's next copy of the weights finds no memory."""

    def arm() -> None:
        original = Store.snapshot

        def snapshot(self: Store) -> Any:
            monkeypatch.setattr(Store, "snapshot", original)
            raise errors.OutOfMemoryError("no memory for a copy")

        monkeypatch.setattr(Store, "snapshot", snapshot)

    return arm


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES.keys())
def test_a_push_counts_once_when_the_weights_after_it_fail(
    server: Server, size: int, fail_next_snapshot: Callable[[], None]
) -> None:
    job = server.create_job("j", zeros(size), optimizer="sgd", lr=1.0, consistency="async")
    with job.join() as worker:
        worker.push_pull(ones(size))
        for step, value in ((2, 1), (4, 3)):  # the same gradient again, and another one
            fail_next_snapshot()
            with pytest.raises(errors.OutOfMemoryError):
                worker.push_pull(ones(size))
            assert job.position().step == step
            assert worker.push(ones(size, value)).step == step + 1
        assert worker.pull()["w"].tolist() == [-7.0] * size


def test_a_reader_that_was_given_up_is_told_what_the_server_says(
    app: App, client: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = client.create_job("j", zeros(8 << 20), optimizer="sgd", lr=1.0)
    original = _weights.Destination.write
    with job.join() as worker:
        host, session_id = app.registry.find("j").host, worker._session.session.session_id
        written = 0

        def write(self: Any, chunk: Any) -> None:
            nonlocal written
            written += 1
            if written == 2:
                host.release(session_id)
            original(self, chunk)

        monkeypatch.setattr(_weights.Destination, "write", write)
        with pytest.raises(errors.RoundTimeoutError, match="pull again"):
            worker.pull()
        np.testing.assert_array_equal(worker.pull()["w"][:4], np.zeros(4))


@pytest.fixture
def orphan(client: Server) -> Callable[[], str]:
    """Makes job "orphan", whose creator dies before it brings the values, and waits until that is known; its id."""

    def make() -> str:
        spec = _spec.job_spec(
            "orphan", _spec.groups(zeros()), "sgd", {"lr": 1.0}, _spec.JobOptions(1, "sync", "reject", "drop", 1, 1800.0, 0.3)
        )
        job_id = str(uuid.uuid4())
        request = jobs_pb2.CreateJobRequest(job_id=job_id, session_id=str(uuid.uuid4()), spec=spec)
        client._connection.call(request, jobs_pb2.CreateJobResponse)
        time.sleep(0.5)
        return job_id

    return make


def taken_over(client: Server) -> Any:
    return client.create_job("orphan", ones(value=7), optimizer="sgd", lr=1.0, lease_seconds=0.3, exist_ok=True)


def test_who_attaches_to_a_job_whose_creator_died_brings_its_values(client: Server, orphan: Callable[[], str]) -> None:
    job_id = orphan()
    job = taken_over(client)
    assert job.job_id == job_id
    with job.join() as worker:
        assert worker.push_pull(ones())["w"].tolist() == [6.0] * 8
    job.update_group(0, lr=0.5)
    assert [entry.name for entry in client.jobs()] == ["orphan"]


def test_a_job_taken_over_is_not_deleted_when_its_values_do_not_come(
    client: Server, orphan: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = orphan()

    def broken(*_: object) -> Iterator[Any]:
        raise MemoryError("no room")
        yield

    with monkeypatch.context() as patched:
        patched.setattr(_packing, "blocks", broken)
        with pytest.raises(MemoryError, match="no room"):
            taken_over(client)
    time.sleep(0.5)
    assert taken_over(client).job_id == job_id


def test_a_push_that_waits_while_its_own_client_restores_is_not_applied_to_what_was_restored(
    app: App, client: Server, until: Any, side_by_side: Any
) -> None:
    job = client.create_job("j", zeros(), optimizer="sgd", lr=1.0, workers=2)
    job.save_checkpoint("c")
    with job.join(rank=0) as first, job.join(rank=1) as second:
        waiting = first.push_pull_async(ones())
        running = app.registry.find("j")
        until(lambda: running.pushes._round.busy, "the push waits")
        job.restore_checkpoint("c")
        with pytest.raises(errors.RolledBackError, match="checkpoint 'c' was restored"):
            waiting.result(20)
        assert job.position().step == 0
        assert first.pull()["w"].tolist() == [0.0] * 8
        found = side_by_side([lambda: first.push_pull(ones(value=2)), lambda: second.push_pull(ones(value=4))])
        assert [weights["w"].tolist() for weights in found] == [[-3.0] * 8] * 2


def test_pushes_in_a_thread_use_the_learning_rate_from_before_the_next_step_of_the_schedule(server: Server) -> None:
    job = server.create_job("j", zeros(), optimizer="sgd", lr=1.0)
    job.set_lr_schedule("ExponentialLR", gamma=0.5)
    stop = threading.Event()

    def spin() -> None:
        while not stop.is_set():
            pass

    busy = threading.Thread(target=spin)
    busy.start()
    try:
        with job.join() as worker:
            for step in range(40):
                future = worker.push_pull_async(ones())
                worker.step_schedule()
                assert future.done()
                assert worker.last_step is not None
                assert worker.last_step.lr == (0.5**step,)
    finally:
        stop.set()
        busy.join()


def test_a_checkpoint_is_overwritten_only_if_asked(server: Server, job: Job, worker: Worker) -> None:
    first = job.save_checkpoint("latest")
    worker.push({"w": np.ones((3, 4), np.float32)})
    with pytest.raises(errors.CheckpointExistsError, match="'latest' exists"):
        job.save_checkpoint("latest")
    second = job.save_checkpoint("latest", overwrite=True)
    assert second.position.version > first.position.version
    assert job.save_checkpoint("latest", overwrite=True).position == second.position
    assert [entry.name for entry in job.checkpoints()] == ["latest"]
    for name in ("shutdown", "imported"):
        with pytest.raises(errors.InvalidNameError, match="the server's own"):
            job.save_checkpoint(name, overwrite=True)


def test_a_gradient_with_nan_is_named(job: Job, worker: Worker) -> None:
    gradients = {"w": np.ones((3, 4), np.float32), "b": np.array([0, np.nan, 0, 0], np.float32)}
    with pytest.raises(errors.NonfiniteGradientError, match=r"holds NaN or Inf in 'b'; nothing was applied"):
        worker.push(gradients)


def test_counted_schedule_steps_of_several_ranks_are_one_event(server: Server) -> None:
    job = server.create_job("ranks", {"w": np.ones(3, np.float32)}, optimizer="sgd", lr=0.1, workers=2)
    job.set_lr_schedule("ExponentialLR", gamma=0.5)
    with job.join() as first, job.join() as second:
        for rank in (first, second):
            rank.step_schedule()
    stepped = [event for event in job.events() if event.message == "schedule stepped"]
    assert len(stepped) == 1


def test_rounds_do_not_push_other_events_out(server: Server) -> None:
    job = server.create_job("long", {"w": np.ones(3, np.float32)}, optimizer="sgd", lr=0.1)
    with job.join() as worker:
        for _ in range(1010):
            worker.push({"w": np.ones(3, np.float32)})
    events = job.events()
    assert sum(event.kind == "round" for event in events) == 1000
    assert events[0].kind == "initialized"
    assert [event.index for event in events] == sorted(event.index for event in events)


@pytest.mark.parametrize("address", ["http://localhost:50051", "localhost/x:5", "::1:50051", "unix:/tmp/x"])
def test_an_address_that_is_no_host_and_port_is_refused_at_once(address: str) -> None:
    with pytest.raises(errors.InvalidArgumentError, match="it must be host:port"):
        connect(address)
