"""Saved, restored and continued equals uninterrupted, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from optserve.client import Job, Server, connect, errors
from optserve.server.app import App

CASES: dict[str, tuple[dict[str, Any], Any]] = {
    "sgd momentum": ({"optimizer": "sgd", "lr": 0.1, "momentum": 0.9, "dampening": 0.1, "weight_decay": 0.01}, {}),
    "sgd without state": ({"optimizer": "sgd", "lr": 0.1}, {}),
    "adam amsgrad": ({"optimizer": "adam", "lr": 0.01, "amsgrad": True, "weight_decay": 0.01}, {}),
    "adamw bfloat16": ({"optimizer": "adamw", "lr": 0.01}, {"w": ml_dtypes.bfloat16, "embedding": ml_dtypes.bfloat16}),
    "adam mixed": ({"optimizer": "adam", "lr": 0.01}, {"w": np.float16, "b": np.float64}),
    "sgd momentum bfloat16": ({"optimizer": "sgd", "lr": 0.1, "momentum": 0.9}, {"embedding": ml_dtypes.bfloat16}),
}
SCHEDULES: dict[str, dict[str, Any]] = {
    "StepLR": {"step_size": 2, "gamma": 0.5},
    "CosineAnnealingLR": {"T_max": 7},
    "MultiStepLR": {"milestones": [2, 5]},
    "LinearLR": {"total_iters": 6},
    "ExponentialLR": {"gamma": 0.9},
    "CosineAnnealingWarmRestarts": {"T_0": 2, "T_mult": 2},
    "ReduceLROnPlateau": {"patience": 1, "cooldown": 1},
    "CyclicLR": {"base_lr": 0.01, "max_lr": [0.1, 0.2], "step_size_up": 3},
    "OneCycleLR": {"max_lr": 0.1, "total_steps": 12},
    "SWALR": {"swa_lr": 0.05, "anneal_epochs": 5},
    "LambdaLR": {"lr_lambda": lambda epoch: 0.9**epoch},
    "SequentialLR": {
        "schedulers": [
            ("LinearLR", {"total_iters": 4}),
            ("ChainedScheduler", {"schedulers": [("MultiplicativeLR", {"lr_lambda": lambda _: 0.9}), ("ConstantLR", {})]}),
        ][::-1],
        "milestones": [4],
    },
}


@pytest.fixture(params=CASES, ids=str)
def case(request: pytest.FixtureRequest, model: Any) -> tuple[dict[str, Any], Any]:
    options, dtypes = CASES[request.param]
    return options, type(model)(dtypes)


def create(server: Server, name: str, options: dict[str, Any], model: Any, schedule: str = "StepLR") -> Job:
    job = server.create_job(name, model.groups(lr=0.05), **options)
    job.set_lr_schedule(schedule, **SCHEDULES[schedule])
    return job


def go_on(job: Job, model: Any, steps: range) -> None:
    metrics = [0.5, 0.25, 0.5] if job.lr_schedule.name == "ReduceLROnPlateau" else [None]
    with job.join() as worker:
        for step in steps:
            gradients = model.draw(1, step)
            if step % 3 == 1:
                gradients["b"] = None
            worker.push_pull(gradients)
            worker.step_schedule(metrics[step % len(metrics)])
            if step == 2:
                job.update_group(1, lr=0.03)


@pytest.fixture
def alike(same: Any) -> Callable[[Job, Job], None]:
    def check(found: Job, expected: Job) -> None:
        same(found.pull(), expected.pull())
        assert [dict(group) for group in found.param_groups] == [dict(group) for group in expected.param_groups]
        assert found.lr_schedule == expected.lr_schedule
        left, right = found.state_dict(), expected.state_dict()
        assert left["param_groups"] == right["param_groups"]
        assert list(left["state"]) == list(right["state"])
        for key, entry in right["state"].items():
            same(left["state"][key], entry)
        assert found.position().step == expected.position().step

    return check


def test_restored_in_place(client: Server, case: Any, alike: Any) -> None:
    options, model = case
    straight = create(client, "straight", options, model)
    go_on(straight, model, range(8))
    job = create(client, "job", options, model)
    go_on(job, model, range(4))
    job.save_checkpoint("middle")
    go_on(job, model, range(100, 103))
    job.update_group(0, lr=5.0)
    job.set_lr_schedule(None)
    job.restore_checkpoint("middle")
    go_on(job, model, range(4, 8))
    alike(job, straight)


def test_downloaded_and_created_again(client: Server, embedded: Server, case: Any, alike: Any, tmp_path: Path) -> None:
    """On another server, another backend."""
    options, model = case
    straight = create(client, "straight", options, model)
    go_on(straight, model, range(8))
    job = create(client, "job", options, model)
    go_on(job, model, range(4))
    job.save_checkpoint("middle")
    folder = job.download_checkpoint("middle", tmp_path / "middle")
    again = embedded.create_job("again", from_checkpoint=folder)
    go_on(again, model, range(4, 8))
    alike(again, straight)


def test_stopped_and_started_again(start_app: Callable[..., App], case: Any, alike: Any, tmp_path: Path) -> None:
    options, model = case
    with connect(start_app().address) as server:
        straight = create(server, "straight", options, model)
        go_on(straight, model, range(8))
        app = start_app(data_dir=tmp_path / "data")
        with connect(app.address) as first:
            go_on(create(first, "job", options, model), model, range(4))
        app.stop()
        with connect(start_app(data_dir=tmp_path / "data").address) as second:
            job = second.job("job")
            go_on(job, model, range(4, 8))
            alike(job, straight)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_continues(server: Server, small: Any, alike: Any, schedule: str) -> None:
    options = {"optimizer": "adam", "lr": 0.1}
    straight = create(server, "straight", options, small, schedule)
    go_on(straight, small, range(9))
    job = create(server, "job", options, small, schedule)
    go_on(job, small, range(3))
    job.save_checkpoint("c")
    go_on(job, small, range(3, 5))
    job.restore_checkpoint("c")
    go_on(job, small, range(3, 9))
    alike(job, straight)


def test_a_state_dict_taken_and_put_back_continues(server: Server, case: Any, alike: Any) -> None:
    options, model = case
    straight = create(server, "straight", options, model)
    go_on(straight, model, range(5))
    job = create(server, "job", options, model)
    go_on(job, model, range(3))
    state = job.state_dict()
    job.load_state_dict(state)
    go_on(job, model, range(3, 5))
    alike(job, straight)


def test_a_rate_below_zero_that_a_schedule_left_comes_back(server: Server, small: Any) -> None:
    """torch takes such a rate from a schedule, though from nobody else."""
    job = server.create_job("j", small.groups(), optimizer="sgd", lr=0.5)
    job.set_lr_schedule("LambdaLR", lr_lambda=lambda epoch: 1 - 2 * epoch)
    job.step_schedule()
    job.set_lr_schedule(None)
    saved = job.state_dict()
    job.save_checkpoint("c")
    for again in (lambda: job.restore_checkpoint("c"), lambda: job.load_state_dict(saved)):
        job.update_group(0, lr=0.25)
        again()
        assert [group["lr"] for group in job.param_groups] == [-0.5, -0.5]
    with pytest.raises(errors.InvalidHyperparameterError, match="Invalid learning rate"):
        job.update_group(0, lr=-0.5)


def test_a_worker_goes_on_through_its_own_clients_restore(server: Server, small: Any, same: Any) -> None:
    job = server.create_job("j", small.draw(0), optimizer="sgd", lr=1.0)
    with job.join() as worker:
        worker.push(small.draw(1, 0))
        job.save_checkpoint("c")
        expected = worker.push_pull(small.draw(1, 1))
        worker.push(small.draw(1, 2))
        job.restore_checkpoint("c")
        found = worker.push_pull(small.draw(1, 1))
    same(found, expected)


def test_every_worker_of_one_client_goes_on_through_its_restore(
    server: Server, small: Any, side_by_side: Any, same: Any
) -> None:
    job = server.create_job("j", small.draw(0), optimizer="sgd", lr=1.0, workers=2)
    with job.join() as first, job.join() as second:
        job.save_checkpoint("c")

        def both() -> list[Any]:
            return side_by_side([lambda: first.push_pull(small.draw(1)), lambda: second.push_pull(small.draw(2))])

        expected = both()
        job.restore_checkpoint("c")
        for found, wanted in zip(both(), expected, strict=True):
            same(found, wanted)


def test_other_clients_are_told_once_of_a_restore(app: App, small: Any) -> None:
    with connect(app.address) as one, connect(app.address) as other:
        job = one.create_job("j", small.draw(0), optimizer="sgd", lr=1.0)
        job.save_checkpoint("c")
        theirs = other.job("j")
        with theirs.join() as worker:
            worker.push(small.draw(1, 0))
            worker.push(small.draw(1, 1))
            job.restore_checkpoint("c")
            with pytest.raises(errors.RolledBackError, match="went back to version 1") as caught:
                worker.push(small.draw(1, 2))
            assert caught.value.metadata["from"] == "4"
            assert caught.value.metadata["to"] == "1"
            assert worker.push(small.draw(1, 0)).step == 1


def test_a_restore_ends_a_round_that_gathers(app: App, small: Any, until: Any) -> None:
    with connect(app.address) as one, connect(app.address) as other:
        job = one.create_job("j", small.draw(0), optimizer="sgd", lr=1.0, workers=2)
        job.save_checkpoint("c")
        theirs = other.job("j")
        with theirs.join() as worker:
            waiting = worker.push_pull_async(small.draw(1))
            running = app.registry.find("j")
            until(lambda: running.pushes._round.busy, "the push waits")
            job.restore_checkpoint("c")
            with pytest.raises(errors.RolledBackError, match="checkpoint 'c' was restored"):
                waiting.result(20)


def test_checkpoints_are_listed_oldest_first_and_deleted(server: Server, small: Any) -> None:
    job = server.create_job("j", small.draw(0), optimizer="sgd", lr=1.0)
    for name in ("b", "a"):
        job.save_checkpoint(name)
    assert [entry.name for entry in job.checkpoints()] == ["b", "a"]
    job.delete_checkpoint("b")
    assert [entry.name for entry in job.checkpoints()] == ["a"]


def test_a_diverged_loss_does_not_keep_a_job_from_being_saved(server: Server, small: Any) -> None:
    job = server.create_job("j", small.draw(0), optimizer="sgd", lr=1.0)
    with job.join() as worker:
        worker.push(small.draw(1), metrics={"loss": float("nan"), "other": float("inf")})
    job.save_checkpoint("c")
    assert job.verify_checkpoint("c").position.step == 1
    job.restore_checkpoint("c")
