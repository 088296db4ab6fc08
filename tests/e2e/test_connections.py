"""Connections that break at any byte, notices, limits: a proxy between the client and the server cuts them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from cutting_proxy import Proxy

from optserve.client import connect, errors
from optserve.server.app import App

SHAPES = {"w": (700, 1000), "b": (7,)}


def zeros() -> dict[str, np.ndarray]:
    return {name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()}


def gradient(step: int) -> dict[str, np.ndarray]:
    bits = np.random.default_rng(step)
    return {name: bits.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}


@pytest.fixture
def proxy(app: App) -> Iterator[Proxy]:
    found = Proxy(app.address)
    yield found
    found.close()


CUTS = [
    ("up", 10),
    ("up", 300),
    ("up", 1_000_000),
    ("up", 2_500_000),
    ("up", 2_799_000),
    ("down", 1),
    ("down", 200),
    ("down", 1_000_000),
    ("down", 2_700_000),
]


def test_a_push_that_is_cut_at_any_byte_is_applied_exactly_once(app: App, proxy: Proxy, embedded: Any, same: Any) -> None:
    """Upwards the push does not arrive whole; downwards it was applied, and the answer is lost."""
    with connect(app.address) as direct, connect(proxy.address) as server:
        direct.create_job("j", zeros(), optimizer="adam", lr=0.1)
        straight = embedded.create_job("j", zeros(), optimizer="adam", lr=0.1).join()
        with server.job("j").join() as worker:
            for step, (direction, count) in enumerate(CUTS, 1):
                proxy.cut_after(direction, count)
                found = worker.push_pull(gradient(step))
                assert proxy.cuts == step, f"{direction} {count}: the connection was cut"
                assert worker.last_step.step == step
                same(found, straight.push_pull(gradient(step)))
        assert direct.job("j").position().step == len(CUTS)


def test_an_edit_whose_push_is_cut_at_any_byte_is_made_exactly_once(app: App, proxy: Proxy) -> None:
    """Its answer may be lost and another client may edit meanwhile: the repeat does not undo that."""
    with connect(app.address) as direct, connect(proxy.address) as server:
        job = direct.create_job("j", zeros(), optimizer="sgd", lr=1.0, momentum=0.9)
        with server.job("j").join() as worker:
            for step, (direction, count) in enumerate(CUTS, 1):
                proxy.cut_after(direction, count)
                worker.update_group(0, lr=1 / step)
                worker.push_pull(gradient(step))
                assert proxy.cuts == step
                assert worker.last_step.lr == (1 / step,)
                job.update_group(0, momentum=0.5 / step)
                worker.push(gradient(step))
                group = worker.param_groups[0]
                assert (group["lr"], group["momentum"]) == (1 / step, 0.5 / step)
        messages = [event.message for event in job.events() if event.kind == "group"]
        assert messages == [
            f"group 0: {edit}" for n in range(1, len(CUTS) + 1) for edit in (f"lr={1 / n}", f"momentum={0.5 / n}")
        ]
        assert job.position().step == 2 * len(CUTS)


def test_administrative_calls_that_are_cut_are_applied_once(app: App, proxy: Proxy) -> None:
    with connect(app.address) as direct, connect(proxy.address) as server:
        direct.create_job("j", zeros(), optimizer="sgd", lr=1.0)
        job = server.job("j")
        job.set_lr_schedule("ExponentialLR", gamma=0.5)
        for step in range(1, 4):
            proxy.cut_after("down", 1)
            job.step_schedule()
            assert direct.job("j").param_groups[0]["lr"] == 0.5**step
        proxy.cut_after("down", 1)
        job.add_param_group({"params": {"v": np.zeros(3, np.float32)}})
        assert len(direct.job("j").param_groups) == 2
        proxy.cut_after("up", 2_000_000)
        job.load_state_dict(job.state_dict())
        proxy.cut_after("down", 1_000_000)
        job.pull()
        proxy.cut_after("down", 1)
        job.save_checkpoint("c")
        assert [entry.name for entry in job.checkpoints()] == ["c"]
        proxy.cut_after("down", 1)
        job.delete_checkpoint("c")
        assert job.checkpoints() == []


def test_a_creation_that_is_cut_is_made_once(app: App, proxy: Proxy, same: Any) -> None:
    with connect(proxy.address) as server:
        for index, (direction, count) in enumerate((("down", 1), ("up", 1_500_000), ("up", 2_790_000))):
            proxy.cut_after(direction, count)
            job = server.create_job(f"j{index}", gradient(index), optimizer="sgd", lr=1.0)
            same(job.pull(), gradient(index))


def test_one_of_two_workers_is_cut_and_comes_back(app: App, proxy: Proxy, embedded: Any, same: Any, side_by_side: Any) -> None:
    """Whether its push had been folded or not: the sum is the same."""
    with connect(app.address) as direct, connect(proxy.address) as cut:
        jobs = [direct.create_job("j", zeros(), optimizer="adam", lr=0.1, workers=2), cut.job("j")]
        straight = embedded.create_job("j", zeros(), optimizer="adam", lr=0.1, workers=2)
        for low in (0, 1):
            workers = [jobs[0].join(rank=low), jobs[1].join(rank=1 - low)]
            references = [straight.join(rank=low), straight.join(rank=1 - low)]
            for step, (direction, count) in enumerate(CUTS[2:6]):
                proxy.cut_after(direction, count)
                seeds = [10 * step + low, 10 * step + 1 - low]
                found = side_by_side([lambda w=w, s=s: w.push_pull(gradient(s)) for w, s in zip(workers, seeds, strict=True)])
                wanted = side_by_side(
                    [lambda w=w, s=s: w.push_pull(gradient(s)) for w, s in zip(references, seeds, strict=True)]
                )
                same(found[0], wanted[0])
                same(found[1], wanted[0])
                assert workers[0].last_step.ranks == (0, 1)
            for worker in (*workers, *references):
                worker.leave()
        assert jobs[0].position().step == straight.position().step == 8


def test_a_waiting_worker_is_told_for_whom(
    app: App, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, until: Callable[..., Any]
) -> None:
    from optserve.server.rounds import pushes

    monkeypatch.setattr(pushes, "NOTICE_SECONDS", 0.05)
    caplog.set_level(logging.WARNING, "optserve.client")
    with connect(app.address) as server:
        job = server.create_job("j", zeros(), optimizer="sgd", lr=1.0, workers=4)
        workers = [job.join() for _ in range(2)]
        late = job.join("w2")
        done = [worker.push_pull_async(gradient(0)) for worker in workers]
        until(lambda: len(caplog.messages) >= 2, "a notice")
        assert "round 1: waiting 0 s for rank 2 'w2', rank 3" in caplog.messages
        last = job.join()
        done += [late.push_pull_async(gradient(0)), last.push_pull_async(gradient(0))]
        for future in done:
            future.result(30)
        for worker in (*workers, late, last):
            worker.leave()


def test_a_round_timeout_names_who_is_missing(server: Any, small: Any) -> None:
    job = server.create_job("j", small.draw(0), optimizer="sgd", lr=1.0, workers=3, round_timeout_seconds=0.2)
    with job.join() as worker, job.join("w1"):
        with pytest.raises(errors.RoundTimeoutError, match=r"round 1: rank 1 'w1', rank 2 \(never joined\)") as caught:
            worker.push(small.draw(1))
        assert isinstance(caught.value, TimeoutError)


def test_more_workers_than_streams(start_app: Callable[..., App], small: Any, side_by_side: Any) -> None:
    with connect(start_app(max_streams=2).address) as server:
        job = server.create_job("j", small.draw(0), optimizer="sgd", lr=1.0, workers=3)
        with job.join() as first, job.join() as second:
            with pytest.raises(errors.TooManyStreamsError, match="--max-streams allows 2"):
                job.join()
            side_by_side([lambda: first.push(small.draw(1)), lambda: second.push(small.draw(1))])
            assert first.last_step.ranks == (0, 1)
            assert job.info().position.step == 1
            second.leave()
            with job.join() as third:
                side_by_side([lambda: first.push(small.draw(1)), lambda: third.push(small.draw(1))])
                assert first.last_step.step == 2


def test_an_idle_worker_keeps_its_lease(server: Any, small: Any, until: Callable[..., Any]) -> None:
    """Heartbeats have their own thread: a long evaluation is not death."""
    job = server.create_job("j", small.draw(0), optimizer="sgd", lr=1.0, lease_seconds=0.4)
    import time

    with job.join() as worker:
        end = time.monotonic() + 1.2
        until(lambda: time.monotonic() > end, "three leases pass")
        assert [member.alive for member in job.info().members] == [True]
        assert worker.push(small.draw(1)).step == 1


def test_an_unnamed_job_ends_with_its_connection(app: App, small: Any) -> None:
    with connect(app.address) as watcher:
        with connect(app.address) as server:
            job = server.create_job(None, small.draw(0), optimizer="sgd", lr=1.0)
            with job.join() as worker:
                worker.push(small.draw(1))
            assert [entry.name for entry in watcher.jobs()] == [""]
        assert watcher.jobs() == []


def test_embedded_connections_of_a_process_share_a_server(embedded: Any, small: Any) -> None:
    embedded.create_job("j", small.draw(0), optimizer="sgd", lr=1.0)
    with connect() as other:
        assert [entry.name for entry in other.jobs()] == ["j"]
    assert [entry.name for entry in embedded.jobs()] == ["j"]


def test_a_worker_that_leaves_while_others_wait_lets_them_go_on(server: Any, small: Any) -> None:
    job = server.create_job("j", small.draw(0), optimizer="sgd", lr=1.0, workers=2)
    first, second = job.join(), job.join()
    waiting = first.push_pull_async(small.draw(1))
    second.leave()
    np.testing.assert_array_equal(waiting.result(20)["b"], small.draw(0)["b"] - small.draw(1)["b"])
    assert first.last_step.ranks == (0,)
    first.leave()


def test_a_worker_closed_while_its_push_waits(server: Any, small: Any) -> None:
    job = server.create_job("j", small.draw(0), optimizer="sgd", lr=1.0, workers=2)
    first = job.join()
    waiting = first.push_pull_async(small.draw(1))
    first.close()
    with pytest.raises(errors.OptserveError):
        waiting.result(20)
    assert job.position().step == 0
