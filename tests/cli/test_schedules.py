"""`optserve schedule` beyond one rate: schedules in schedules, metrics, momentum, and functions, which it has none of."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import click
import pytest
from click.testing import Result

from optserve.cli import exits
from optserve.cli.assignments import Assignment
from optserve.cli.schedulers import parse
from optserve.client import Job

Command = Callable[..., Result]


def ok(result: Result) -> str:
    assert result.exit_code == 0, result.output
    return result.stdout


def test_schedules_in_schedules_are_set_shown_and_stepped(optserve: Command, job: Job) -> None:
    given = "LinearLR(total_iters=2, start_factor=0.5), ChainedScheduler(schedulers=[StepLR(step_size=3), ConstantLR()])"
    refused = optserve("schedule", "set", "j", "SequentialLR", f"schedulers={given}", "milestones=2")
    assert refused.exit_code == exits.USAGE
    assert "cannot turn to a ChainedScheduler at a milestone" in refused.stderr
    given = "LinearLR(total_iters=2, start_factor=0.5), CosineAnnealingLR(T_max=20)"
    text = ok(optserve("schedule", "set", "j", "SequentialLR", f"schedulers={given}", "milestones=2"))
    shown = (
        "SequentialLR(schedulers=[LinearLR(start_factor=0.5, end_factor=1, total_iters=2), "
        "CosineAnnealingLR(T_max=20, eta_min=0)], milestones=(2,))"
    )
    assert shown in text
    assert shown in ok(optserve("schedule", "show", "j"))
    assert shown in ok(optserve("job", "show", "j"))
    again = shown.removeprefix("SequentialLR(schedulers=").removesuffix(", milestones=(2,))")
    assert shown in ok(optserve("schedule", "set", "j", "SequentialLR", f"schedulers={again}", "milestones=2"))
    found = json.loads(ok(optserve("schedule", "step", "j", "--json")))
    assert found["arguments"]["schedulers"][1] == ["CosineAnnealingLR", {"T_max": 20, "eta_min": 0.0}]
    assert found["learning_rates"] == list(job.lr_schedule.learning_rates) == [0.1875, 0.375]


@pytest.mark.parametrize(
    "given", ["CyclicLR(base_lr=0.1, max_lr=0.3, gamma=0.99)", "OneCycleLR(max_lr=0.1, total_steps=9, cycle_momentum=false)"]
)
def test_what_is_shown_of_a_schedule_can_be_given_again(optserve: Command, job: Job, given: str) -> None:
    """None, truth and every bit of a number are in it."""
    ok(optserve("schedule", "set", "j", "ChainedScheduler", f"schedulers={given}, ConstantLR()"))
    set_first = job.lr_schedule.arguments
    shown = ok(optserve("schedule", "show", "j")).splitlines()[0].split("schedulers=", 1)[1].removesuffix(")")
    ok(optserve("schedule", "set", "j", "ChainedScheduler", f"schedulers={shown}"))
    assert job.lr_schedule.arguments == set_first


def test_a_one_cycle_turns_betas(optserve: Command, job: Job) -> None:
    assert "OneCycleLR(max_lr=(0.1, 0.2)" in ok(
        optserve("schedule", "set", "j", "OneCycleLR", "max_lr=0.1,0.2", "total_steps=100")
    )
    assert [group["betas"] for group in job.param_groups] == [(0.95, 0.999)] * 2
    assert "max_lr=0.2" in ok(optserve("group", "list", "j"))
    assert json.loads(ok(optserve("group", "set", "j", "1", "max_lr=0.4", "--json")))["max_lr"] == 0.4


def test_a_plateau_steps_on_a_metric(optserve: Command, job: Job) -> None:
    ok(optserve("schedule", "set", "j", "ReduceLROnPlateau", "mode=max", "patience=0"))
    ok(optserve("schedule", "step", "j", "--metric", "0.5"))
    assert "0.025, 0.05" in ok(optserve("schedule", "step", "j", "--metric", "0.25"))
    refused = optserve("schedule", "step", "j")
    assert refused.exit_code == exits.USAGE
    assert "ReduceLROnPlateau steps on a metric, and none came" in refused.stderr
    assert optserve("schedule", "step", "j", "--metric", "high").exit_code == exits.USAGE
    assert job.lr_schedule.last_epoch == 2


@pytest.mark.usefixtures("job")
@pytest.mark.parametrize(
    "arguments",
    [
        ("LambdaLR",),
        ("lambdalr", "lr_lambda=0.9"),
        ("MultiplicativeLR",),
        ("ChainedScheduler", "schedulers=StepLR(step_size=3), LambdaLR()"),
    ],
)
def test_a_function_cannot_be_given_on_the_command_line(optserve: Command, arguments: tuple[str, ...]) -> None:
    refused = optserve("schedule", "set", "j", *arguments)
    assert refused.exit_code == exits.USAGE
    assert "calls a Python function, and functions never travel" in refused.stderr
    assert json.loads(ok(optserve("schedule", "show", "j", "--json")))["name"] is None


def test_a_schedule_of_functions_is_shown_and_stepped_elsewhere(optserve: Command, job: Job) -> None:
    job.set_lr_schedule("LambdaLR", lr_lambda=lambda epoch: 0.5**epoch)
    assert "LambdaLR()" in ok(optserve("schedule", "show", "j"))
    refused = optserve("schedule", "step", "j")
    assert refused.exit_code == exits.USAGE
    assert "the command line has none: a process that has it steps the schedule" in refused.stderr
    assert job.step_schedule().learning_rates == (0.125, 0.25)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ()),
        ("[]", ()),
        ("LinearLR()", (("LinearLR", {}),)),
        ("[LinearLR(), StepLR(step_size=3)]", (("LinearLR", {}), ("StepLR", {"step_size": 3}))),
        ("StepLR(step_size=3, gamma=-1e-3),", (("StepLR", {"step_size": 3, "gamma": -1e-3}),)),
        ("MultiStepLR(milestones=[1, 2])", (("MultiStepLR", {"milestones": (1, 2)}),)),
        ("MultiStepLR(milestones=(1,))", (("MultiStepLR", {"milestones": (1,)}),)),
        ("MultiStepLR(milestones=1)", (("MultiStepLR", {"milestones": (1,)}),)),
        ("SWALR(swa_lr=0.1, anneal_strategy=linear)", (("SWALR", {"swa_lr": 0.1, "anneal_strategy": "linear"}),)),
        (
            "OneCycleLR(max_lr=1, three_phase=true, epochs=None, anneal_strategy='cos')",
            (("OneCycleLR", {"max_lr": 1, "three_phase": True, "epochs": None, "anneal_strategy": "cos"}),),
        ),
        (
            "ChainedScheduler(schedulers=[ChainedScheduler(schedulers=[LinearLR()])])",
            (("ChainedScheduler", {"schedulers": (("ChainedScheduler", {"schedulers": (("LinearLR", {}),)}),)}),),
        ),
    ],
)
def test_schedules_are_read_as_calls_are_written(text: str, expected: Any) -> None:
    assert parse(text) == expected
    assert Assignment().convert(f"schedulers={text}", None, None) == ("schedulers", expected)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("LinearLR", "not of the form NAME"),
        ("LinearLR(", "cannot be read"),
        ("LinearLR(3)", "not of the form NAME"),
        ("a.LinearLR()", "not of the form NAME"),
        ("LinearLR(**{})", "each key once"),
        ("StepLR(step_size=3, step_size=4)", "each key once"),
        ("StepLR(step_size=1+1)", "is no number, word or list of numbers"),
        ("StepLR(step_size=print(1))", "is no number, word or list of numbers"),
        ("StepLR(step_size={})", "is no number, word or list of numbers"),
        ("StepLR(step_size=['a'])", "is no number, word or list of numbers"),
        ("StepLR(step_size=b'a')", "is no number, word or list of numbers"),
        ("ChainedScheduler(schedulers=LinearLR())", "put it in brackets"),
        ("LinearLR()] + [__import__('os')", "is no list of schedules"),
        ("(" * 3000, "cannot be read"),
        ("\0", "cannot be read"),
    ],
)
def test_what_is_no_schedule_is_refused_and_never_evaluated(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(text)
    with pytest.raises(click.BadParameter, match=message):
        Assignment().convert(f"schedulers={text}", None, None)
