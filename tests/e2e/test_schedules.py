"""Schedules beyond one rate while a job trains with two workers: metrics, momentum, functions, live edits, state_dicts."""

from __future__ import annotations

import copy
import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from optserve.client import Job, Server, connect, errors
from optserve.server.app import App

STEPS = 12


def wave(epoch: int) -> float:
    return math.cos(epoch)


def tide(epoch: int) -> float:
    return math.sin(epoch)


class Reference:
    """The same two groups under torch, each step with the mean of the workers' gradients."""

    def __init__(self, **options: Any) -> None:
        self.parameters = {name: torch.nn.Parameter(torch.tensor(value)) for name, value in values().items()}
        groups = [{"params": [self.parameters["w"]]}, {"params": [self.parameters["v"]], "lr": 0.3}]
        self.optimizer = torch.optim.SGD(groups, lr=0.1, **options)

    def step(self, scheduler: Any, *gradients: dict[str, Any], metric: float | None = None) -> None:
        for name, parameter in self.parameters.items():
            parameter.grad = torch.tensor(sum(entry[name] for entry in gradients) / np.float32(len(gradients)))
        self.optimizer.step()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch's about its own scheduler
            scheduler.step(*(() if metric is None else (metric,)))

    def groups(self) -> list[dict[str, Any]]:
        return [{key: value for key, value in group.items() if key != "params"} for group in self.optimizer.param_groups]


def values() -> dict[str, Any]:
    return {"w": np.linspace(-1, 1, 6, dtype=np.float32), "v": np.ones((2, 3), np.float32)}


def create(server: Server, name: str = "j", workers: int = 2, **options: Any) -> Job:
    groups = [{"params": {"w": values()["w"]}}, {"params": {"v": values()["v"]}, "lr": 0.3}]
    return server.create_job(name, groups, optimizer="sgd", lr=0.1, workers=workers, **options)


def drawn(rank: int, step: int) -> dict[str, Any]:
    bits = np.random.default_rng((rank, step))
    return {"w": bits.normal(size=6).astype(np.float32), "v": bits.normal(size=(2, 3)).astype(np.float32)}


def groups_of(job: Job) -> list[dict[str, Any]]:
    return [{key: value for key, value in group.items() if key != "params"} for group in job.param_groups]


def loss(step: int) -> float:
    return [1.0, 0.5, 0.5, math.nan, 0.6, 0.4, 0.4, 0.4, math.inf, 0.5, 0.3, 0.35][step % 12]


def train(job: Job, side_by_side: Any, steps: range, metric: Any = lambda _: None) -> dict[str, Any]:
    with job.join(rank=0) as first, job.join(rank=1) as second:

        def work(worker: Any) -> dict[str, Any]:
            weights = worker.pull()
            for step in steps:
                weights = worker.push_pull(drawn(worker.rank, step), out=weights)
                worker.step_schedule(metric(step))
            return weights

        return side_by_side([lambda: work(first), lambda: work(second)])[0]


def same_weights(found: dict[str, Any], reference: Reference) -> None:
    for name, parameter in reference.parameters.items():
        np.testing.assert_allclose(found[name], parameter.detach().numpy(), rtol=1.3e-6, atol=1e-6)


def test_a_metric_steps_the_plateau_as_torchs(server: Server, side_by_side: Any) -> None:
    options = {"patience": 1, "factor": 0.5, "cooldown": 1, "min_lr": [0.01, 0.2]}
    job, reference = create(server), Reference()
    job.set_lr_schedule("ReduceLROnPlateau", **options)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(reference.optimizer, **options)
    found = train(job, side_by_side, range(STEPS), loss)
    for step in range(STEPS):
        reference.step(scheduler, drawn(0, step), drawn(1, step), metric=loss(step))
    same_weights(found, reference)
    assert groups_of(job) == reference.groups()
    assert job.lr_schedule.state_dict() == scheduler.state_dict()
    assert job.param_groups[0]["lr"] < 0.1


def test_a_one_cycle_turns_momentum_as_torchs(server: Server, side_by_side: Any) -> None:
    options = {"max_lr": [0.2, 0.1], "total_steps": STEPS, "three_phase": True}
    job, reference = create(server), Reference()
    assert job.param_groups[0]["momentum"] == 0
    job.set_lr_schedule("OneCycleLR", **options)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(reference.optimizer, **options)
    assert groups_of(job) == reference.groups()
    found = train(job, side_by_side, range(STEPS))
    for step in range(STEPS):
        reference.step(scheduler, drawn(0, step), drawn(1, step))
    same_weights(found, reference)
    assert groups_of(job) == reference.groups()


@pytest.mark.parametrize(
    ("schedule", "arguments", "edit"),
    [
        ("OneCycleLR", {"max_lr": [0.2, 0.1], "total_steps": 30}, {"max_lr": 0.4, "min_lr": 0.05, "momentum": 0.2}),
        ("ReduceLROnPlateau", {"patience": 1}, {"lr": 0.07, "weight_decay": 0.01}),
        ("SWALR", {"swa_lr": 0.05, "anneal_epochs": 20}, {"swa_lr": 0.5, "lr": 0.2}),
    ],
)
def test_live_edits_survive_a_restore_and_a_new_job_with_the_schedules_position(
    server: Server, side_by_side: Any, same: Any, tmp_path: Path, schedule: str, arguments: Any, edit: Any
) -> None:
    metric = loss if schedule == "ReduceLROnPlateau" else lambda _: None
    job = create(server)
    job.set_lr_schedule(schedule, **arguments)
    train(job, side_by_side, range(4), metric)
    version = job.position().version
    assert job.update_group(1, **edit).version == version + 1
    assert {key: job.param_groups[1][key] for key in edit} == edit
    assert any(event.position.version == version + 1 and str(next(iter(edit))) in event.message for event in job.events())
    train(job, side_by_side, range(4, 7), metric)
    saved = job.save_checkpoint("c")
    stood = job.lr_schedule, groups_of(job)
    expected = train(job, side_by_side, range(7, 15), metric)
    after = job.lr_schedule, groups_of(job)
    assert job.restore_checkpoint("c").version == saved.position.version
    assert (job.lr_schedule, groups_of(job)) == stood
    same(train(job, side_by_side, range(7, 15), metric), expected)
    assert (job.lr_schedule, groups_of(job)) == after
    again = server.create_job("again", from_checkpoint=job.download_checkpoint("c", tmp_path / "c"))
    assert (again.lr_schedule, groups_of(again)) == stood
    same(train(again, side_by_side, range(7, 15), metric), expected)
    assert (again.lr_schedule, groups_of(again)) == after


def test_functions_of_two_processes_step_one_schedule(app: App) -> None:
    """The one that set it holds them; the other is given them; each evaluates its own k-th step."""

    def factor(epoch: int) -> float:
        return 0.5**epoch

    with connect(app.address) as one, connect(app.address) as other:
        job = create(one)
        job.set_lr_schedule("LambdaLR", lr_lambda=[factor, lambda epoch: 1 / (epoch + 1)])
        with job.join() as first, other.job("j").join() as second:
            for _ in range(3):
                first.step_schedule()
            expected = pytest.approx((0.1 * 0.125, 0.3 / 4), rel=0)
            assert job.lr_schedule.learning_rates == expected
            with pytest.raises(errors.MissingFunctionError, match="schedule step 1 called lr_lambda at epoch 1"):
                second.step_schedule()
            with pytest.raises(
                errors.RanksDisagreeError, match=r"made with 0\.5, 0\.5 of .* epoch 1, this rank has 0\.5, 0\.75"
            ):
                second.step_schedule(lr_lambda=[factor, lambda _: 0.75])
            for _ in range(3):
                second.step_schedule(lr_lambda=[factor, lambda epoch: 1 / (epoch + 1)])
                assert job.lr_schedule.learning_rates == expected
            assert second.step_schedule().learning_rates == pytest.approx((0.1 / 16, 0.3 / 5), rel=0)
            first.step_schedule()
            assert job.step_schedule().last_epoch == 5
            assert other.job("j").lr_schedule.last_epoch == 5


def test_a_rank_that_is_behind_goes_on_after_a_restore_of_other_functions(server: Server) -> None:
    job = create(server)
    job.set_lr_schedule("LambdaLR", lr_lambda=wave)
    job.save_checkpoint("c")
    job.set_lr_schedule("LambdaLR", lr_lambda=tide)
    with job.join() as first, job.join() as second:
        first.step_schedule()
        job.restore_checkpoint("c")
        assert second.step_schedule(lr_lambda=wave).last_epoch == 0
        assert second.step_schedule().learning_rates == (0.1 * wave(1), 0.3 * wave(1))
        first.step_schedule()
        assert job.lr_schedule.last_epoch == 1


def test_a_schedule_of_schedules_with_functions_is_torchs(server: Server) -> None:
    def parts(found: Any) -> list[Any]:
        scheduler = torch.optim.lr_scheduler
        return [scheduler.LambdaLR(found, [wave, tide]), scheduler.MultiplicativeLR(found, lambda _: 0.9)]

    job, reference = create(server, workers=1), Reference()
    schedulers = [("LambdaLR", {"lr_lambda": [wave, tide]}), ("MultiplicativeLR", {"lr_lambda": lambda _: 0.9})]
    job.set_lr_schedule("SequentialLR", schedulers=schedulers, milestones=[4])
    theirs = torch.optim.lr_scheduler.SequentialLR(reference.optimizer, parts(reference.optimizer), [4])
    with job.join() as worker:
        for step in range(9):
            worker.push(drawn(0, step))
            worker.step_schedule()
            reference.step(theirs, drawn(0, step))
            assert groups_of(job) == reference.groups()
    assert job.lr_schedule.state_dict() == theirs.state_dict()
    assert job.lr_schedule.arguments["schedulers"] == (("LambdaLR", {}), ("MultiplicativeLR", {}))


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("MultiStepLR", {"milestones": [2, 2, 7], "gamma": 0.5}),
        ("CosineAnnealingWarmRestarts", {"T_0": 3, "T_mult": 2}),
        ("CyclicLR", {"base_lr": 0.01, "max_lr": 0.1, "step_size_up": 4}),
        ("ReduceLROnPlateau", {"patience": 1}),
    ],
)
def test_torch_goes_on_from_ours_and_ours_from_torchs(server: Server, name: str, arguments: Any) -> None:
    metrics = [loss(step) for step in range(20)] if name == "ReduceLROnPlateau" else [None] * 20
    job, reference = create(server, workers=1), Reference(momentum=0.5)
    job.update_group(0, momentum=0.5)
    job.update_group(1, momentum=0.5)
    theirs = getattr(torch.optim.lr_scheduler, name)(reference.optimizer, **copy.deepcopy(arguments))
    job.set_lr_schedule(name, **arguments)
    for step in range(5):
        job.step_schedule(metrics[step])
    theirs.load_state_dict(job.lr_schedule.state_dict())
    for group, mine in zip(reference.optimizer.param_groups, groups_of(job), strict=True):
        group.update(mine)
    for step in range(5, 10):
        reference.step(theirs, drawn(0, step), metric=metrics[step])
    for index, group in enumerate(reference.groups()):
        job.update_group(index, **group)
    before = job.position().version
    assert job.load_lr_schedule_state_dict(theirs.state_dict()).last_epoch == theirs.last_epoch
    assert job.position().version == before + 1
    for step in range(10, 20):
        job.step_schedule(metrics[step])
        reference.step(theirs, drawn(0, step), metric=metrics[step])
        assert groups_of(job) == reference.groups()
    assert job.lr_schedule.state_dict() == theirs.state_dict()


def test_a_callable_objects_state_is_given_to_the_one_that_is_held_here(server: Server) -> None:
    class Decay:
        def __init__(self, rate: float) -> None:
            self.rate = rate

        def __call__(self, epoch: int) -> float:
            return self.rate**epoch

    reference = Reference()
    theirs = torch.optim.lr_scheduler.LambdaLR(reference.optimizer, Decay(0.5))
    job = create(server, workers=1)
    job.set_lr_schedule("LambdaLR", lr_lambda=Decay(0.9))
    job.load_lr_schedule_state_dict(theirs.state_dict())
    assert job.step_schedule().learning_rates == (0.05, 0.15)
    other = server.job("j")
    with pytest.raises(errors.InvalidStateDictError, match="the state of a callable object, and this client holds none"):
        other.load_lr_schedule_state_dict(theirs.state_dict())


def test_a_group_added_under_a_one_cycle_takes_part_in_it(server: Server) -> None:
    job = create(server, workers=1)
    job.set_lr_schedule("OneCycleLR", max_lr=0.2, total_steps=10)
    job.step_schedule()
    job.add_param_group({"params": {"u": np.zeros(3, np.float32)}, "lr": 0.5})
    added = dict(job.param_groups[2])
    assert (added["lr"], added["max_lr"], added["max_momentum"]) == (0.5, 0.2, 0.95)
    job.step_schedule()
    assert job.param_groups[2]["lr"] == job.param_groups[0]["lr"]
    job.set_lr_schedule("OneCycleLR", max_lr=[0.1, 0.2, 0.3], total_steps=10)
    with pytest.raises(errors.InvalidArgumentError, match="max_lr has one value for each of 3 param groups"):
        job.add_param_group({"params": {"t": np.zeros(3, np.float32)}})
    assert len(job.param_groups) == 3
