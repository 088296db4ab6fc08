from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from optserve.client import Job, Server, Worker, connect
from optserve.wire import errors

Floats = npt.NDArray[np.float32]


def job_of(server: Server, name: str | None = None, workers: int = 1, **arguments: Any) -> Job:
    values = {"w": np.zeros((2, 2), np.float32), "b": np.zeros(2, np.float32)}
    return server.create_job(name, values, **{"optimizer": "sgd", "lr": 1.0, **arguments}, workers=workers)


def gradients(value: float, names: str = "wb") -> dict[str, Floats]:
    shapes = {"w": (2, 2), "b": (2,)}
    return {name: np.full(shapes[name], value, np.float32) for name in names}


def together(*calls: Any) -> list[Any]:
    with ThreadPoolExecutor(len(calls)) as pool:
        return [future.result(timeout=30) for future in [pool.submit(call) for call in calls]]


def test_a_step_is_applied_and_told(server: Server) -> None:
    with job_of(server).join() as worker:
        assert (worker.name, worker.rank, worker.last_step) == ("rank0", 0, None)
        weights = worker.pull()
        assert worker.push_pull(gradients(2), out=weights) is weights
        assert weights["w"].tolist() == [[-2, -2], [-2, -2]]
        step = worker.last_step
        assert step is not None
        assert (step.step, step.lr, step.ranks, step.skipped, step.waited_for) == (1, (1.0,), (0,), False, None)
        assert step.grad_norm == pytest.approx(2 * 6**0.5)
        assert worker.push(gradients(1)).step == 2
        assert worker.pull()["b"].tolist() == [-3, -3]


def test_a_step_tells_what_was_done_to_its_gradient(server: Server) -> None:
    job = job_of(server, accumulation=2)
    with job.join() as worker:
        norm = 6**0.5
        first = worker.push(gradients(1), metrics={"loss": 2})
        assert (first.step, first.accumulated, first.clip_factor, first.evaluations) == (0, 1, 1.0, 0)
        assert first.metrics == {"loss": 2.0}
        second = worker.push(gradients(8), loss_scale=8, clip_grad_norm=norm / 2)
        assert (second.step, second.accumulated) == (1, 0)
        assert (second.grad_norm, second.clip_factor) == (pytest.approx(norm), pytest.approx(0.5, rel=1e-5))
        assert worker.pull()["b"] == pytest.approx([-0.5, -0.5], rel=1e-5)
        third = worker.push(None, loss_scale=8, found_inf=True)
        assert (third.skipped, third.skip_reason, third.accumulated) == (True, "nonfinite", 0)


def test_ranks_are_averaged_by_weight(server: Server) -> None:
    job = job_of(server, workers=2)
    with job.join(rank=0) as first, job.join(rank=1) as second:
        one, two = together(
            lambda: first.push_pull(gradients(1), weight=1, metrics={"loss": 1}),
            lambda: second.push_pull(gradients(5), weight=3, metrics={"loss": 2}),
        )
        assert one["w"].tolist() == two["w"].tolist() == [[-4, -4], [-4, -4]]
        assert first.last_step is not None
        assert first.last_step.ranks == (0, 1)


def test_a_name_absent_everywhere_is_left_alone_and_absent_in_some_is_zero_there(server: Server) -> None:
    job = job_of(server, workers=2)
    with job.join() as first, job.join() as second:
        assert {first.rank, second.rank} == {0, 1}
        weights, _ = together(
            lambda: first.push_pull({"w": np.full((2, 2), 4, np.float32), "b": None}), lambda: second.push_pull({})
        )
        assert weights["w"].tolist() == [[-2, -2], [-2, -2]]
        assert weights["b"].tolist() == [0, 0]


def test_a_rank_that_skips_still_gets_the_weights(server: Server) -> None:
    job = job_of(server, workers=2)
    with job.join() as first, job.join() as second:
        weights, _ = together(first.skip_round, lambda: second.push(gradients(3)))
        assert weights["b"].tolist() == [-3, -3]
        assert first.last_step is not None
        assert first.last_step.ranks == (1,)


def test_a_push_in_a_thread_raises_what_is_wrong_at_once_and_the_rest_from_the_future(server: Server) -> None:
    with job_of(server).join() as worker:
        with pytest.raises(errors.ShapeMismatchError):
            worker.push_pull_async({"w": np.zeros(3, np.float32)})
        futures = [worker.push_pull_async(gradients(1)) for _ in range(3)]
        assert futures[2].result(timeout=30)["b"].tolist() == [-3, -3]
        assert all(future.done() for future in futures)
        bad = worker.push_pull_async(gradients(np.nan))
        with pytest.raises(errors.NonfiniteGradientError):
            bad.result(timeout=30)


@pytest.mark.parametrize(
    "call",
    [
        Worker.pull,
        lambda worker: worker.push(gradients(1)),
        lambda worker: worker.push_pull(gradients(1)),
        lambda worker: worker.push_pull_async(gradients(1)),
        Worker.skip_round,
        lambda worker: worker.update_group(0, lr=0.5),
        Worker.step_schedule,
        Worker.leave,
    ],
    ids=["pull", "push", "push_pull", "push_pull_async", "skip_round", "update_group", "step_schedule", "leave"],
)
@pytest.mark.parametrize("value", [1, np.nan], ids=["applied", "failed"])
def test_every_call_comes_after_a_pending_push_and_does_not_fail_with_it(
    embedded: Server, call: Callable[[Worker], object], value: float
) -> None:
    job = job_of(embedded)
    job.set_lr_schedule("StepLR", step_size=1)
    with job.join() as worker:
        lock = worker._lock

        class Late:
            """Lets the other calls go first."""

            def __enter__(self) -> None:
                if threading.current_thread().name.startswith("optserve-push"):
                    time.sleep(0.1)
                lock.acquire()

            def __exit__(self, *_: object) -> None:
                lock.release()

        worker._lock = Late()  # type: ignore[assignment]
        future = worker.push_pull_async(gradients(value))
        call(worker)
        assert future.done()
        if value == 1:
            assert future.result()["b"].tolist() == [-1, -1]
        else:
            assert isinstance(future.exception(), errors.NonfiniteGradientError)


def test_nan_is_rejected_and_the_worker_may_push_again_in_the_same_round(server: Server) -> None:
    with job_of(server).join() as worker:
        with pytest.raises(errors.NonfiniteGradientError):
            worker.push(gradients(np.nan))
        assert worker.push(gradients(1)).step == 1


def test_nan_skips_the_step_where_the_job_says_so(server: Server) -> None:
    with job_of(server, on_nonfinite="skip").join() as worker:
        step = worker.push(gradients(np.inf))
        assert (step.step, step.skipped, step.skip_reason) == (0, True, "nonfinite")
        assert worker.push(gradients(1)).step == 1


@pytest.mark.parametrize(
    "bad", [{"v": np.zeros(2, np.float32)}, {"b": np.zeros(3, np.float32)}, {"b": np.zeros(2, int)}, [1.0]]
)
def test_gradients_that_do_not_fit_change_nothing(server: Server, bad: Any) -> None:
    job = job_of(server)
    with job.join() as worker:
        before = job.position()
        with pytest.raises(errors.InputError):
            worker.push(bad)
        assert job.position() == before
        worker.push(gradients(1))


def test_counted_schedule_steps_are_one_for_all_ranks(server: Server) -> None:
    job = job_of(server, workers=2)
    job.set_lr_schedule("ExponentialLR", gamma=0.5)
    with job.join() as first, job.join() as second:
        for _ in range(2):
            together(first.step_schedule, second.step_schedule)
        schedule = job.lr_schedule
        assert schedule is not None
        assert schedule.learning_rates == (0.25,)
        first.step_schedule()
    with job.join(rank=0) as late:
        assert late.step_schedule().last_epoch == 4


def test_a_joining_worker_fences_the_older_one_of_its_name(server: Server) -> None:
    job = job_of(server, "notebook")
    old = job.join()
    old.push(gradients(1))
    again = server.create_job("notebook", old.pull(), optimizer="sgd", lr=1.0, exist_ok=True)
    new = again.join()
    new.push(gradients(1))
    with pytest.raises(errors.FencedError):
        old.push(gradients(1))
    with pytest.raises(errors.ClosedError, match="worker 'rank0' of job 'notebook' is closed"):
        old.pull()
    old.leave()
    assert new.push(gradients(1)).step == 3


def test_ranks_and_names_are_checked(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    job = job_of(server, workers=2)
    with pytest.raises(errors.InvalidArgumentError, match="ranks count from 0"):
        job.join(rank=-1)
    with pytest.raises(errors.TooManyWorkersError):
        job.join(rank=2)
    monkeypatch.setenv("RANK", "1")
    with job.join() as worker:
        assert (worker.rank, worker.name) == (1, "rank1")
        with pytest.raises(errors.RankHeldError):
            job.join(name="other", rank=1)
    monkeypatch.setenv("RANK", "first")
    with pytest.raises(errors.InvalidArgumentError, match="RANK is 'first'"):
        job.join()


def test_joining_waits_for_initial_values_with_a_deadline(server: Server) -> None:
    from optserve.client._spec import Group, JobOptions, job_spec
    from optserve.v1 import jobs_pb2

    spec = job_spec("slow", [Group(gradients(0), {})], "sgd", {"lr": 1.0}, JobOptions(1, "sync", "reject", "drop", 1, 0, 0))
    ids = ("11111111-1111-4111-8111-111111111111", "22222222-2222-4222-8222-222222222222")
    request = jobs_pb2.CreateJobRequest(job_id=ids[0], session_id=ids[1], spec=spec)
    server._connection.call(request, jobs_pb2.CreateJobResponse)
    with pytest.raises(errors.JobNotInitializedError):
        server.job("slow").join(timeout_seconds=0.5)


def test_leaving_is_idempotent_and_the_rank_is_free_again(server: Server) -> None:
    job = job_of(server)
    with job.join() as worker:
        worker.push(gradients(1))
    worker.leave()
    worker.close()
    with pytest.raises(errors.ClosedError, match="it has left"):
        worker.push(gradients(1))
    with job.join(name="another") as other:
        assert other.push(gradients(1)).step == 2


def test_an_exception_in_the_block_leaves_too(server: Server) -> None:
    job = job_of(server)

    def broken() -> None:
        with job.join():
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        broken()
    assert [event.kind for event in job.events()][-1] == "left"


def test_closing_ends_a_push_that_waits_for_other_ranks(server: Server) -> None:
    job = job_of(server, workers=2)
    worker = job.join()
    future = worker.push_pull_async(gradients(1))
    time.sleep(0.2)
    assert not future.done()
    worker.close()
    with pytest.raises((errors.ClosedError, errors.NotJoinedError)):
        future.result(timeout=10)


def test_a_worker_that_is_forgotten_ends_its_heartbeats_and_stream(start_server: Any) -> None:
    before = set(threading.enumerate())

    def beating() -> list[str]:
        names = [thread.name for thread in threading.enumerate() if thread not in before]
        return [name for name in names if name.startswith(("optserve-heartbeat", "optserve-stream"))]

    with connect(start_server().address) as server:
        worker: Worker | None = job_of(server, "j").join()
        assert worker is not None
        worker.push(gradients(1))
        assert [name for name in beating() if "worker" in name]
        worker = None
        gc.collect()
        deadline = time.monotonic() + 10
        while [name for name in beating() if "worker" in name or "watch" in name] and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not [name for name in beating() if "worker" in name or "watch" in name]
        while server.info().streams and time.monotonic() < deadline:
            time.sleep(0.02)
        assert server.info().streams == 0


def test_a_missing_rank_is_named_when_the_round_ends(server: Server) -> None:
    job = job_of(server, workers=2, round_timeout_seconds=0.5)
    with job.join(rank=0) as worker, pytest.raises(errors.RoundTimeoutError, match="rank 1"):
        worker.push(gradients(1))


def test_async_jobs_take_each_push_as_a_step(server: Server) -> None:
    job = job_of(server, workers=2, consistency="async")
    with job.join() as first, job.join() as second:
        first.push(gradients(1))
        assert second.push_pull(gradients(1))["b"].tolist() == [-2, -2]
