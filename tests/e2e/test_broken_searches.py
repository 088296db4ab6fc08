"""Streams, workers and servers that break off in a search, and what others do to its job: a step is one version, or none."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cutting_proxy import Proxy
from valley import LBFGS, SIZE, Array, Valley, all_of, round_events, stepped

from optserve.client import Server, Worker, connect, errors


@pytest.fixture
def proxy(app: Any) -> Iterator[Proxy]:
    found = Proxy(app.address)
    yield found
    found.close()


CUTS = [
    *[("up", count) for count in (10, 200, 100_000, 319_000, 330_000, 500_000, 650_000, 900_000)],
    *[("down", count) for count in (1, 100, 100_000, 321_000, 500_000, 641_000, 900_000)],
]


@pytest.mark.parametrize(("direction", "count"), CUTS)
def test_a_search_that_is_cut_at_any_byte_is_one_step(
    app: Any, proxy: Proxy, embedded: Any, same: Any, direction: str, count: int
) -> None:
    """An evaluation is 320 kB up, and as much down before it."""
    told, weights = stepped(embedded, 2, Valley(1, SIZE))
    assert told[0].evaluations >= 4
    valley = Valley(1, SIZE)
    with connect(app.address) as direct, connect(proxy.address) as server:
        job = direct.create_job("j", valley.zeros(), **LBFGS)
        with server.job("j").join() as worker:
            version = job.position().version
            proxy.cut_after(direction, count)
            worker.step(valley)
            assert proxy.cuts == 1
            worker.step(valley)
            assert (worker.last_step.step, worker.last_step.version) == (2, version + 2)
            same(worker.pull(), weights)
        assert [event.fields["evaluations"] for event in round_events(job)] == [str(step.evaluations) for step in told]


@pytest.mark.parametrize(
    ("direction", "count"), [("up", 10), ("up", 400_000), ("down", 200), ("down", 400_000), ("down", 700_000)]
)
def test_one_of_two_ranks_is_cut_in_the_middle_of_a_search(
    app: Any, proxy: Proxy, embedded: Any, same: Any, direction: str, count: int
) -> None:
    _, weights = stepped(embedded, 2, Valley(1, SIZE), Valley(2, SIZE))
    valleys = [Valley(1, SIZE), Valley(2, SIZE)]
    with connect(app.address) as direct, connect(proxy.address) as cut:
        job = direct.create_job("j", valleys[0].zeros(), **LBFGS, workers=2)
        workers = [job.join(rank=0), cut.job("j").join(rank=1)]
        for _ in range(2):
            proxy.cut_after(direction, count)
            found = all_of([lambda w=w, v=v: w.step(v) for w, v in zip(workers, valleys, strict=True)])
            assert all(isinstance(loss, float) for loss in found), found
        assert proxy.cuts == 2
        same(workers[0].pull(), weights)
        assert len(round_events(job)) == job.position().step == 2
        for worker in workers:
            worker.leave()


@pytest.mark.parametrize("number", [0, 1, 3])
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_stream_that_is_lost_while_a_closure_runs(server: Server, embedded: Any, same: Any, number: int, ranks: int) -> None:
    _, weights = stepped(embedded, 2, *[Valley(seed) for seed in range(ranks)])
    valleys = [Valley(seed) for seed in range(ranks)]
    job = server.create_job("lost", valleys[0].zeros(), **LBFGS, workers=ranks)
    workers = [job.join(rank=rank) for rank in range(ranks)]
    for _ in range(2):
        valleys[-1].begin(**{f"_{number}": workers[-1]._session.drop})
        found = all_of([lambda w=w, v=v: w.step(v) for w, v in zip(workers, valleys, strict=True)])
        assert all(isinstance(loss, float) for loss in found), found
    same(workers[0].pull(), weights)
    assert len(round_events(job)) == job.position().step == 2
    for worker in workers:
        worker.leave()


def vanish(worker: Worker) -> Callable[[], object]:
    """As a process that is killed: the stream and the heartbeats end, and nothing is said."""

    def act() -> None:
        worker._session.abandon()
        raise KeyError("killed")

    return act


@pytest.mark.parametrize("number", [0, 1, 3])
def test_the_others_go_on_without_a_worker_that_was_killed(server: Server, embedded: Any, same: Any, number: int) -> None:
    """It is dropped when its lease ends: the step is that of the other's own loss."""
    _, weights = stepped(embedded, 2, Valley(1))
    valleys = [Valley(1), Valley(2)]
    job = server.create_job("killed", valleys[0].zeros(), **LBFGS, workers=2, lease_seconds=0.4)
    with job.join(rank=0) as first:
        second = job.join(rank=1)
        valleys[1].begin(**{f"_{number}": vanish(second)})
        found = all_of([lambda: first.step(valleys[0]), lambda: second.step(valleys[1])])
        assert isinstance(found[0], float), found
        assert isinstance(found[1], KeyError)
        assert (first.last_step.step, first.last_step.ranks) == (1, (0,))
        first.step(valleys[0])
        same(first.pull(), weights)
        assert len(round_events(job)) == job.position().step == 2


def test_a_worker_that_was_killed_fails_the_step_where_the_job_says_so(server: Server, snapshot: Any) -> None:
    valleys = [Valley(1), Valley(2)]
    job = server.create_job("j", valleys[0].zeros(), **LBFGS, workers=2, lease_seconds=0.4, on_missing="fail")
    with job.join(rank=0) as first:
        second = job.join(rank=1)
        before = snapshot(job)
        valleys[1].begin(_2=vanish(second))
        found = all_of([lambda: first.step(valleys[0]), lambda: second.step(valleys[1])])
        assert isinstance(found[0], errors.RoundFailedError), found
        assert snapshot(job) == before


def test_a_worker_that_takes_a_killed_ones_place_in_the_middle_of_a_search(server: Server, embedded: Any, same: Any) -> None:
    _, weights = stepped(embedded, 1, Valley(1), Valley(2))
    valleys = [Valley(1), Valley(2)]
    job = server.create_job("j", valleys[0].zeros(), **LBFGS, workers=2, on_missing="wait")
    with job.join(rank=0) as first:
        second = job.join(rank=1)

        def replaced() -> None:
            with pytest.raises(KeyError):
                second.step(valleys[1].begin(_2=vanish(second)))
            with job.join(rank=1) as third:
                third.step(valleys[1].begin())

        found = all_of([lambda: first.step(valleys[0]), replaced])
        assert isinstance(found[0], float), found
        assert found[1] is None
        same(first.pull(), weights)
        assert job.position().step == 1


def test_a_worker_that_leaves_in_the_middle_of_a_search_is_not_waited_for(server: Server, embedded: Any, same: Any) -> None:
    _, weights = stepped(embedded, 1, Valley(1))
    valleys = [Valley(1), Valley(2)]
    job = server.create_job("left", valleys[0].zeros(), **LBFGS, workers=2)
    with job.join(rank=0) as first:
        second = job.join(rank=1)
        valleys[1].begin(_2=second.leave)
        found = all_of([lambda: first.step(valleys[0]), lambda: second.step(valleys[1])])
        assert isinstance(found[0], float), found
        assert isinstance(found[1], errors.ClosedError)
        same(first.pull(), weights)
        assert job.position().step == 1


@pytest.mark.parametrize("number", [0, 2])
def test_a_server_that_starts_again_without_its_memory_loses_the_job(start_app: Any, number: int) -> None:
    app = start_app()
    valley = Valley(1)

    def restart() -> None:
        app.stop(1.0)
        start_app(address=app.address)

    with connect(app.address, retry_timeout_seconds=20) as server:
        worker = server.create_job("j", valley.zeros(), **LBFGS).join()
        with pytest.raises(errors.JobLostError):
            worker.step(valley.begin(**{f"_{number}": restart}))
        with pytest.raises(errors.ClosedError):
            worker.step(valley.begin())


@pytest.mark.parametrize("number", [0, 2])
def test_a_server_that_starts_again_in_the_middle_of_a_search_goes_on(
    start_app: Any, tmp_path: Path, embedded: Any, same: Any, number: int
) -> None:
    _, weights = stepped(embedded, 2, Valley(1))
    app = start_app(data_dir=tmp_path)
    valley = Valley(1)

    def restart() -> None:
        app.stop(1.0)
        start_app(address=app.address, data_dir=tmp_path)

    with connect(app.address, retry_timeout_seconds=20) as server:
        job = server.create_job("j", valley.zeros(), **LBFGS)
        with job.join() as worker:
            worker.step(valley)
            worker.step(valley.begin(**{f"_{number}": restart}))
            same(worker.pull(), weights)
            assert job.position().step == 2


def test_an_edit_in_the_middle_of_a_search_begins_it_again(server: Server, embedded: Any, same: Any) -> None:
    _, weights = stepped(embedded, 1, Valley(1), lr=0.5)
    valley = Valley(1)
    job = server.create_job("edited", valley.zeros(), **LBFGS)
    with job.join() as worker:
        worker.step(valley.begin(_2=lambda: job.update_group(0, lr=0.5)))
        assert worker.last_step.lr == (0.5,)
        same(worker.pull(), weights)
        assert job.position().step == 1


def test_a_restore_in_the_middle_of_a_step_is_told(server: Server) -> None:
    valley = Valley(1)
    job = server.create_job("restored", valley.zeros(), **LBFGS)
    with job.join() as worker:
        job.save_checkpoint("c")
        worker.step(valley)
        with pytest.raises(errors.RolledBackError):
            worker.step(valley.begin(_2=lambda: job.restore_checkpoint("c")))
        assert job.position().step == 0
        worker.step(valley.begin())
        assert worker.last_step.step == 1


def test_a_parameter_that_is_replaced_in_the_middle_of_a_step_begins_it_again(server: Server) -> None:
    valley = Valley(1)
    job = server.create_job("j", valley.zeros(), optimizer="adam", lr=0.1)
    seen = []

    def closure(weights: Mapping[str, Array]) -> Any:
        seen.append(weights["b"][0, 0])
        return valley(weights)

    with job.join() as worker:
        valley.begin(_0=lambda: job.replace_parameter("b", np.full((2, 1), -2.0)))
        worker.step(closure)
        assert seen == [2.0, -2.0]
        assert worker.last_step.step == 1


def test_a_parameter_that_is_renamed_in_the_middle_of_a_search_begins_it_again(
    server: Server, embedded: Any, same: Any
) -> None:
    _, weights = stepped(embedded, 1, Valley(1))
    valley = Valley(1)
    job = server.create_job("renamed", valley.zeros(), **LBFGS)

    def closure(found: Mapping[str, Array]) -> Any:
        name = "v" if "v" in found else "w"
        loss, gradients = valley({"w": found[name], "b": found["b"]})
        return loss, {name: gradients["w"], "b": gradients["b"]}

    with job.join() as worker:
        valley.begin(_2=lambda: job.rename_parameter("w", "v"))
        worker.step(closure)
        assert worker.last_step.step == 1
        found = worker.pull()
        same({"w": found["v"], "b": found["b"]}, weights)


def test_a_job_that_is_deleted_in_the_middle_of_a_search(server: Server) -> None:
    valley = Valley(1)
    job = server.create_job("gone", valley.zeros(), **LBFGS)
    worker = job.join()
    with pytest.raises(errors.JobNotFoundError):
        worker.step(valley.begin(_1=job.delete))
    with pytest.raises(errors.ClosedError):
        worker.pull()
