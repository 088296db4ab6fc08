"""Schedules, and calls on them, that cannot be: a typed error that says what is allowed, and the job is as it was."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from optserve.client import Job, Server, Worker, errors


@pytest.mark.parametrize(
    ("kind", "name", "arguments", "message"),
    [
        (
            errors.UnknownScheduleError,
            "SteppLR",
            {},
            "'SteppLR' is not known; did you mean 'StepLR'.*known: .*CosineAnnealingLR",
        ),
        (errors.UnknownScheduleError, "Warmup", {}, "known: "),
        (errors.UnknownScheduleError, "StepLR", {"step_size": 1, "gama": 0.1}, "did you mean 'gamma'"),
        (errors.InvalidHyperparameterError, "StepLR", {"step_size": 0}, "step_size is 0"),
        (errors.InvalidHyperparameterError, "StepLR", {"step_size": "a"}, "step_size is 'a'"),
        (errors.InvalidHyperparameterError, "ExponentialLR", {"gamma": math.nan}, "gamma is nan"),
        (errors.InvalidHyperparameterError, "MultiStepLR", {"milestones": 3}, "milestones is 3"),
        (errors.InvalidHyperparameterError, "LinearLR", {"start_factor": 2.0}, "Starting multiplicative factor"),
        (errors.InvalidHyperparameterError, "OneCycleLR", {"max_lr": [0.1, 0.2], "total_steps": 9}, "same length as"),
        (
            errors.InvalidHyperparameterError,
            "OneCycleLR",
            {"max_lr": 0.1, "total_steps": 9, "max_momentum": 1.0},
            "Invalid beta",
        ),
        (errors.InvalidHyperparameterError, "CyclicLR", {"base_lr": 0.1, "max_lr": 1.0, "scale_fn": math.cos}, "never travel"),
        (errors.InvalidHyperparameterError, "LambdaLR", {}, "LambdaLR needs lr_lambda, a function"),
        (errors.InvalidHyperparameterError, "LambdaLR", {"lr_lambda": [math.cos, 0.5]}, "should be a function, but got float"),
        (
            errors.InvalidHyperparameterError,
            "LambdaLR",
            {"lr_lambda": lambda _: math.inf},
            "would set lr of param group 0 to inf",
        ),
        (errors.InvalidArgumentError, "LambdaLR", {"lr_lambda": [math.cos, math.sin]}, "Expected 1 lr_lambdas, but got 2"),
        (errors.InvalidHyperparameterError, "SequentialLR", {"schedulers": [], "milestones": []}, "at least one scheduler"),
        (
            errors.InvalidHyperparameterError,
            "ChainedScheduler",
            {"schedulers": [("ReduceLROnPlateau", {})]},
            "does not support `ReduceLROnPlateau`",
        ),
    ],
    ids=str,
)
def test_a_schedule_that_cannot_be(
    job: Job, refused: Any, kind: Any, name: str, arguments: dict[str, Any], message: str
) -> None:
    with refused(kind, message):
        job.set_lr_schedule(name, **arguments)


@pytest.mark.parametrize("name", ["", 3, torch.optim.lr_scheduler.StepLR])
def test_a_name_that_is_none(job: Job, refused: Any, name: Any) -> None:
    with refused(errors.UnknownScheduleError, "it must be torch's class name as text, or None"):
        job.set_lr_schedule(name, step_size=3)


def test_arguments_of_no_schedule(job: Job, refused: Any) -> None:
    job.set_lr_schedule("StepLR", step_size=3)
    with refused(errors.InvalidArgumentError, "no schedule takes no arguments; found step_size"):
        job.set_lr_schedule(None, step_size=3)


def test_an_argument_whose_name_is_no_text(job: Job, refused: Any) -> None:
    with refused(errors.InvalidHyperparameterError, "it must be a list of"):
        job.set_lr_schedule("ChainedScheduler", schedulers=[("StepLR", {3: 3})])


def test_more_milestones_than_can_be_told_of(job: Job, refused: Any) -> None:
    with refused(errors.InvalidArgumentError, "MultiStepLR has 70000 milestones; there may be 8192"):
        job.set_lr_schedule("MultiStepLR", milestones=[*range(70_000)])


def test_a_step_of_no_schedule(job: Job, worker: Worker, refused: Any) -> None:
    with refused(errors.InvalidArgumentError, "no schedule"):
        job.step_schedule()
    with refused(errors.InvalidArgumentError, "no schedule"):
        worker.step_schedule()


def test_a_schedule_step_that_lacks_what_it_steps_on(job: Job, worker: Worker, server: Server, refused: Any) -> None:
    job.set_lr_schedule("ReduceLROnPlateau")
    for step in (job.step_schedule, worker.step_schedule):
        with refused(errors.InvalidArgumentError, r"steps on a metric, and none came: step_schedule\(metric=loss\)"):
            step()
        with refused(errors.InvalidArgumentError, "metric is '0.5' of type str"):
            step("0.5")
        with refused(errors.InvalidArgumentError, "ReduceLROnPlateau calls no functions; found lr_lambda"):
            step(0.5, lr_lambda=math.cos)
    job.set_lr_schedule("LambdaLR", lr_lambda=math.cos)
    with refused(errors.InvalidArgumentError, r"LambdaLR takes no metric; found 0\.5"):
        worker.step_schedule(0.5)
    other = server.job("digits")
    with refused(errors.MissingFunctionError, "functions stay with the client: pass lr_lambda=f"):
        other.step_schedule()
    with refused(errors.InvalidArgumentError, "Expected 1 lr_lambdas, but got 2"):
        other.step_schedule(lr_lambda=[math.cos, math.sin])
    with refused(errors.InvalidHyperparameterError, "lr_lambda should be a function, but got float"):
        other.step_schedule(lr_lambda=0.5)


@pytest.mark.parametrize(
    ("state_dict", "message"),
    [
        ({}, "lacks"),
        (3, "a schedule's state_dict is a dict; found a int"),
        ({"step_size": object()}, "is of type object"),
        ({"T_max": 3, "eta_min": 0.0}, "not one of StepLR: it lacks 'step_size'"),
    ],
)
def test_a_schedules_state_dict_that_does_not_fit(job: Job, refused: Any, state_dict: Any, message: str) -> None:
    with refused(errors.InvalidArgumentError, "the job has no schedule"):
        job.load_lr_schedule_state_dict({})
    job.set_lr_schedule("StepLR", step_size=3)
    with refused(errors.InvalidStateDictError, message):
        job.load_lr_schedule_state_dict(state_dict)
