"""A run that is edited while it trains: groups, hyperparameters, schedules counted over the ranks."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest

from optserve.client import Server, connect, errors
from optserve.server.app import App

ONES = {"w": np.ones(4, np.float32)}


def test_an_edit_by_another_client_holds_from_the_next_step_on_and_is_not_undone(app: App) -> None:
    with connect(app.address) as one, connect(app.address) as admin:
        job = one.create_job("j", {"w": np.zeros(4, np.float32)}, optimizer="sgd", lr=1.0)
        with job.join() as worker:
            np.testing.assert_array_equal(worker.push_pull(ONES)["w"], -np.ones(4))
            assert worker.last_step.lr == (1.0,)
            admin.job("j").update_group(0, lr=0.5)
            np.testing.assert_array_equal(worker.push_pull(ONES)["w"], -1.5 * np.ones(4))
            assert worker.last_step.lr == (0.5,)
            np.testing.assert_array_equal(worker.push_pull(ONES)["w"], -2 * np.ones(4))
            assert job.param_groups[0]["lr"] == 0.5


def test_an_edit_that_turns_an_option_on_in_mid_run(app: App) -> None:
    with connect(app.address) as one, connect(app.address) as admin:
        job = one.create_job("j", {"w": np.zeros(4, np.float32)}, optimizer="sgd", lr=1.0)
        with job.join() as worker:
            worker.push(ONES)
            admin.job("j").update_group(0, momentum=0.5)
            worker.push(ONES)
            found = worker.push_pull(ONES)
        np.testing.assert_array_equal(found["w"], -(1 + 1 + 1.5) * np.ones(4))


def test_a_group_added_in_mid_run_trains_with_the_others(server: Server, small: Any) -> None:
    job = server.create_job("j", {"w": np.zeros(4, np.float32)}, optimizer="sgd", lr=1.0)
    with job.join() as worker:
        weights = worker.push_pull(ONES)
        job.add_param_group({"params": {"v": np.full(3, 10.0), "u": np.zeros(2, np.float16)}, "lr": 0.5})
        weights = worker.push_pull(ONES, out=weights)
        np.testing.assert_array_equal(weights["v"], np.full(3, 10.0))
        weights = worker.push_pull({**ONES, "v": np.ones(3)}, out=weights)
        np.testing.assert_array_equal(weights["v"], np.full(3, 9.5))
        np.testing.assert_array_equal(weights["w"], -3 * np.ones(4))
        assert worker.last_step.lr == (1.0, 0.5)
    assert job.param_groups[1]["params"] == ["v", "u"]
    assert list(job.pull()) == ["w", "v", "u"]


def test_a_group_added_by_another_client_while_a_worker_waits(app: App, until: Any, side_by_side: Any) -> None:
    with connect(app.address) as one, connect(app.address) as admin:
        job = one.create_job("j", {"w": np.zeros(4, np.float32)}, optimizer="sgd", lr=1.0, workers=2)
        with job.join() as first, job.join() as second:
            waiting = first.push_pull_async(ONES)
            running = app.registry.find("j")
            until(lambda: running.pushes._round.busy, "the first push waits")
            admin.job("j").add_param_group({"params": {"v": np.zeros(3, np.float32)}})
            second.push_pull({**ONES, "v": np.ones(3, np.float32)})
            np.testing.assert_array_equal(waiting.result(20)["v"], -0.5 * np.ones(3))
            np.testing.assert_array_equal(waiting.result(20)["w"], -np.ones(4))


def test_a_schedule_stepped_by_four_workers_advances_once(server: Server, side_by_side: Any) -> None:
    job = server.create_job("j", {"w": np.zeros(4, np.float32)}, optimizer="sgd", lr=1.0, workers=4)
    job.set_lr_schedule("ExponentialLR", gamma=0.5)
    barrier = threading.Barrier(4)

    def work() -> list[tuple[float, ...]]:
        rates = []
        with job.join() as worker:
            barrier.wait(30)
            for _ in range(4):
                worker.push(ONES)
                rates.append(worker.last_step.lr)
                worker.step_schedule()
            barrier.wait(30)
        return rates

    for rates in side_by_side([work] * 4):
        assert rates == [(1.0,), (0.5,), (0.25,), (0.125,)]
    assert job.param_groups[0]["lr"] == 1 / 16
    assert job.lr_schedule.last_epoch == 4
    job.step_schedule()
    assert job.lr_schedule.last_epoch == 5


def test_a_worker_that_joins_later_counts_from_where_the_job_stands(server: Server) -> None:
    job = server.create_job("j", {"w": np.zeros(4, np.float32)}, optimizer="sgd", lr=1.0, workers=2)
    job.set_lr_schedule("ExponentialLR", gamma=0.5)
    with job.join() as first:
        for _ in range(3):
            first.step_schedule()
        with job.join() as second:
            assert second.step_schedule().last_epoch == 4
            assert first.step_schedule().last_epoch == 4


def test_torchs_schedule_on_the_same_gradients(server: Server) -> None:
    torch = pytest.importorskip("torch")
    parameter = torch.nn.Parameter(torch.zeros(4))
    reference = torch.optim.SGD([parameter], lr=1.0)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(reference, T_max=5)
    job = server.create_job("j", {"w": np.zeros(4, np.float32)}, optimizer="sgd", lr=1.0)
    job.set_lr_schedule("CosineAnnealingLR", T_max=5)
    with job.join() as worker:
        for step in range(12):
            parameter.grad = torch.ones(4)
            reference.step()
            worker.push(ONES)
            if step == 3:
                reference.param_groups[0]["lr"] = 0.7
                job.update_group(0, lr=0.7)
            scheduler.step()
            worker.step_schedule()
            assert job.param_groups[0]["lr"] == reference.param_groups[0]["lr"]


def test_a_waiting_pushs_edit_is_seen_by_its_step(app: App, until: Any) -> None:
    with connect(app.address) as one, connect(app.address) as admin:
        job = one.create_job("j", {"w": np.zeros(4, np.float32)}, optimizer="sgd", lr=1.0, workers=2)
        with job.join() as first, job.join() as second:
            waiting = first.push_pull_async(ONES)
            running = app.registry.find("j")
            until(lambda: running.pushes._round.busy, "the first push waits")
            admin.job("j").update_group(0, lr=0.25)
            second.push(ONES)
            np.testing.assert_array_equal(waiting.result(20)["w"], -0.25 * np.ones(4))


def test_an_edit_is_an_event(server: Server) -> None:
    job = server.create_job("j", {"w": np.zeros(4, np.float32)}, optimizer="sgd", lr=1.0)
    job.update_group(0, lr=0.25)
    event = job.events()[-1]
    assert event.kind == "group"
    assert "lr=0.25" in event.message


def test_wait_for_version(server: Server) -> None:
    job = server.create_job("j", {"w": np.zeros(4, np.float32)}, optimizer="sgd", lr=1.0)
    with pytest.raises(errors.DeadlineExceededError, match=r"did not reach version 99 within 0\.05 s"):
        job.wait_for_version(99, timeout_seconds=0.05)
    assert job.wait_for_version(1).version == 1
