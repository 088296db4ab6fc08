"""A run that is edited while it trains: groups, hyperparameters, schedules counted over the ranks."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from edits_by_hand import Straight, edits_of, stepped

from optserve.client import Job, Server, connect, errors
from optserve.server.app import App
from optserve.server.formulas import OPTIMIZERS
from optserve.server.jobs.spec import hyperparameters

ONES = {"w": np.ones(4, np.float32)}


def state_of(job: Job) -> dict[str, Any]:
    """A state_dict's state, keyed as a store's is."""
    state_dict = job.state_dict()
    names = state_dict["param_groups"][0]["param_names"]
    entries = [(names[index], slot, value) for index, entry in state_dict["state"].items() for slot, value in entry.items()]
    return {f"{slot}/{name}": np.asarray(value) for name, slot, value in entries}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_hyperparameter_of_every_optimizer_can_be_edited_while_it_trains(app: App, name: str, same: Any) -> None:
    """By the worker with its push and by another client in turn; bit for bit the run with the same edits by hand."""
    bits = np.random.default_rng(1)
    shapes = {"w": (40, 50), "v": (3, 7)}

    def draw() -> dict[str, Any]:
        return {key: bits.normal(size=shape).astype(np.float32) for key, shape in shapes.items()}

    values = draw()
    straight = Straight(name, values)
    with connect(app.address) as one, connect(app.address) as other:
        job = one.create_job("j", values, optimizer=name)
        admin = other.job("j")
        with job.join() as worker:
            for step, (edit, group) in enumerate([({}, hyperparameters(OPTIMIZERS[name])), *edits_of(OPTIMIZERS[name])]):
                by_worker = step % 2 == 0
                version = 0
                if by_worker:
                    worker.update_group(0, **edit)
                elif edit:
                    version = admin.update_group(0, **edit).version
                gradients = draw()
                same(stepped(worker, OPTIMIZERS[name], gradients), straight.step(group, gradients))
                assert {**group, "params": ["w", "v"]} == worker.param_groups[0] == job.param_groups[0]
                assert [key for key in worker.param_groups[0] if key != "params"] == list(group)
                if edit:
                    (event,) = [event for event in job.events()[-3:] if event.kind == "group"]
                    assert event.message == f"group 0: {', '.join(f'{key}={value!r}' for key, value in edit.items())}"
                    assert event.position.version == (version or worker.last_step.version)
        expected = straight.state()
        found = state_of(job)
        same({key: found[key] for key in expected}, expected)


@pytest.mark.parametrize("workers", [1, 2, 4])
@pytest.mark.parametrize("consistency", ["sync", "async"])
def test_an_edit_on_every_rank_is_one_edit_and_every_rank_is_told(
    server: Server, side_by_side: Any, workers: int, consistency: str
) -> None:
    job = server.create_job("j", {"w": np.zeros(4)}, optimizer="sgd", lr=1.0, workers=workers, consistency=consistency)
    barrier = threading.Barrier(workers)

    def work() -> tuple[float, ...]:
        rates = []
        with job.join() as worker:
            for rate in (1.0, 0.5, 0.25):
                barrier.wait(30)
                worker.update_group(0, lr=rate)
                worker.push({"w": np.ones(4)})
                barrier.wait(30)
                rates.append(worker.param_groups[0]["lr"])
                assert worker.last_step.lr == (rate,)
        return tuple(rates)

    assert side_by_side([work] * workers) == [(1.0, 0.5, 0.25)] * workers
    assert job.param_groups[0]["lr"] == 0.25
    messages = [event.message for event in job.events() if event.kind == "group"]
    assert messages == [
        f"group 0: lr={rate}" for rate in (1.0, 0.5, 0.25) for _ in range(1 if consistency == "sync" else workers)
    ]


@pytest.mark.parametrize("workers", [2, 4])
def test_ranks_that_disagree_are_all_told_both_values_and_go_on(server: Server, side_by_side: Any, workers: int) -> None:
    job = server.create_job("j", {"w": np.zeros(4, np.float32)}, optimizer="sgd", lr=1.0, workers=workers)
    ranks = [job.join() for _ in range(workers)]
    before = job.param_groups
    ranks[0].update_group(0, lr=0.5)
    ranks[-1].update_group(0, lr=0.25)

    def refused(worker: Any) -> Any:
        with pytest.raises(errors.RanksDisagreeError) as caught:
            worker.push(ONES)
        return caught.value

    for rank, error in enumerate(side_by_side([lambda worker=worker: refused(worker) for worker in ranks])):
        assert f"lr of group 0 to different values: rank 0 to 0.5, rank {workers - 1} to 0.25" in str(error)
        assert hasattr(error, "__notes__") == (rank in (0, workers - 1)), "who had an edit is told that it is dropped"
    assert (job.param_groups, job.position().step) == (before, 0)
    found = side_by_side([lambda worker=worker: worker.push_pull(ONES) for worker in ranks])
    assert [weights["w"].tolist() for weights in found] == [[-1.0] * 4] * workers
    for worker in ranks:
        worker.leave()


@pytest.mark.parametrize("how", ["restored", "created again", "started again"])
def test_edits_and_the_schedules_position_survive_a_checkpoint(
    start_app: Callable[..., App], embedded: Server, same: Any, tmp_path: Path, how: str
) -> None:
    draw = np.random.default_rng(2).normal(size=(12, 4)).astype(np.float32)

    def go_on(job: Job, steps: range) -> list[Any]:
        rates = []
        with job.join() as worker:
            for step in steps:
                if step in (1, 6):
                    worker.update_group(0, lr=0.7 / step, betas=(0.5, 0.5 + step / 100))
                if step in (2, 7):
                    job.update_group(0, weight_decay=step / 10)
                worker.push({"w": draw[step]})
                rates.append(worker.last_step.lr)
                worker.step_schedule()
        return [rates, job.param_groups, job.lr_schedule, job.pull()["w"].tobytes(), job.position().step]

    def create(server: Server, name: str) -> Job:
        job = server.create_job(name, {"w": np.zeros(4, np.float32)}, optimizer="adam", lr=0.1)
        job.set_lr_schedule("CosineAnnealingLR", T_max=6)
        go_on(job, range(5))
        return job

    expected = go_on(create(embedded, "straight"), range(5, 10))
    app = start_app(data_dir=tmp_path / "data")
    with connect(app.address) as server:
        job = create(server, "job")
        before = [job.param_groups, job.lr_schedule]
        if how == "restored":
            job.save_checkpoint("c")
            go_on(job, range(5, 8))
            job.restore_checkpoint("c")
        elif how == "created again":
            job.save_checkpoint("c")
            job = server.create_job("again", from_checkpoint=job.download_checkpoint("c", tmp_path / "c"))
        else:
            app.stop()
            start_app(data_dir=tmp_path / "data", address=app.address)
        assert [job.param_groups, job.lr_schedule] == before
        assert go_on(job, range(5, 10)) == expected


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


@pytest.mark.parametrize("by", ["job", "worker"])
@pytest.mark.parametrize("when", ["before the push", "before the step of the schedule", "after it"])
def test_torchs_schedule_on_the_same_gradients(server: Server, by: str, when: str) -> None:
    torch = pytest.importorskip("torch")
    parameter = torch.nn.Parameter(torch.zeros(4))
    reference = torch.optim.SGD([parameter], lr=1.0)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(reference, T_max=5)
    job = server.create_job("j", {"w": np.zeros(4, np.float32)}, optimizer="sgd", lr=1.0)
    job.set_lr_schedule("CosineAnnealingLR", T_max=5)
    with job.join() as worker:

        def edit(step: int, now: str) -> None:
            if step == 3 and now == when:
                reference.param_groups[0]["lr"] = 0.7
                (job if by == "job" else worker).update_group(0, lr=0.7)

        for step in range(12):
            edit(step, "before the push")
            parameter.grad = torch.ones(4)
            reference.step()
            worker.push(ONES)
            edit(step, "before the step of the schedule")
            scheduler.step()
            worker.step_schedule()
            assert job.param_groups[0]["lr"] == reference.param_groups[0]["lr"]
            edit(step, "after it")
        np.testing.assert_allclose(worker.pull()["w"], parameter.detach().numpy(), rtol=1e-6)


@pytest.mark.parametrize("workers", [1, 2, 4])
@pytest.mark.parametrize("consistency", ["sync", "async"])
def test_an_edit_on_every_rank_before_a_step_of_the_schedule_is_one_edit(
    server: Server, side_by_side: Any, workers: int, consistency: str
) -> None:
    job = server.create_job("j", {"w": np.zeros(4)}, optimizer="sgd", lr=1.0, workers=workers, consistency=consistency)
    job.set_lr_schedule("ExponentialLR", gamma=0.5)
    ranks = [job.join() for _ in range(workers)]

    def work(worker: Any) -> None:
        for rate in (0.75, 3.0):
            worker.push({"w": np.ones(4)})
            worker.update_group(0, lr=rate)
            worker.step_schedule()

    side_by_side([lambda worker=worker: work(worker) for worker in ranks])
    assert job.param_groups[0]["lr"] == 1.5
    found = [(event.kind, event.message) for event in job.events() if event.kind in ("group", "schedule")]
    assert found[1:] == [
        entry for rate in (0.75, 3.0) for entry in (("group", f"group 0: lr={rate}"), ("schedule", "schedule stepped"))
    ]
    for worker in ranks:
        worker.leave()


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
