"""Arguments that cannot be: torch's own checks with torch's messages, and those that optserve adds."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from schedule_pairs import CASES, optimizer, split, torch_scheduler

from optserve.server import schedules
from optserve.server.schedules import SCHEDULES, ScheduleState
from optserve.server.schedules.arguments import REQUIRED
from optserve.server.schedules.table import unbegun
from optserve.v1 import optimizer_pb2
from optserve.wire.arguments import from_arguments, to_arguments
from optserve.wire.errors import InvalidArgumentError, InvalidHyperparameterError, UnknownScheduleError

STEP, LINE = ("StepLR", {"step_size": 3}), ("LinearLR", {})
PLATEAU = ("ReduceLROnPlateau", {})

TORCHS: list[tuple[str, dict[str, Any]]] = [
    ("ConstantLR", {"factor": 1.1}),
    ("ConstantLR", {"factor": -0.1}),
    ("LinearLR", {"start_factor": 0.0}),
    ("LinearLR", {"start_factor": 1.1}),
    ("LinearLR", {"end_factor": -0.1}),
    ("CosineAnnealingWarmRestarts", {"T_0": 0}),
    ("CosineAnnealingWarmRestarts", {"T_0": 2.0}),
    ("CosineAnnealingWarmRestarts", {"T_0": 2, "T_mult": 0}),
    ("CosineAnnealingWarmRestarts", {"T_0": 2, "T_mult": 1.5}),
    ("ReduceLROnPlateau", {"factor": 1.0}),
    ("ReduceLROnPlateau", {"mode": "least"}),
    ("ReduceLROnPlateau", {"threshold_mode": "square"}),
    ("ReduceLROnPlateau", {"min_lr": [0.1, 0.2]}),
    ("CyclicLR", {"base_lr": 0.1, "max_lr": 0.2, "mode": "square"}),
    ("CyclicLR", {"base_lr": [0.1], "max_lr": 0.2}),
    ("CyclicLR", {"base_lr": 0.1, "max_lr": [0.2] * 5}),
    ("CyclicLR", {"base_lr": 0.1, "max_lr": 0.2, "base_momentum": [0.8]}),
    ("OneCycleLR", {"max_lr": 0.1}),
    ("OneCycleLR", {"max_lr": 0.1, "epochs": 3}),
    ("OneCycleLR", {"max_lr": 0.1, "total_steps": 0}),
    ("OneCycleLR", {"max_lr": 0.1, "total_steps": 2.5}),
    ("OneCycleLR", {"max_lr": 0.1, "epochs": -1, "steps_per_epoch": 3}),
    ("OneCycleLR", {"max_lr": 0.1, "epochs": 3, "steps_per_epoch": 1.5}),
    ("OneCycleLR", {"max_lr": 0.1, "total_steps": 9, "pct_start": 1}),
    ("OneCycleLR", {"max_lr": 0.1, "total_steps": 9, "pct_start": -0.1}),
    ("OneCycleLR", {"max_lr": 0.1, "total_steps": 9, "anneal_strategy": "cubic"}),
    ("OneCycleLR", {"max_lr": [0.1], "total_steps": 9}),
    ("SWALR", {"swa_lr": [0.1]}),
    ("SWALR", {"swa_lr": 0.1, "anneal_epochs": -1}),
    ("SWALR", {"swa_lr": 0.1, "anneal_epochs": 1.5}),
    ("SWALR", {"swa_lr": 0.1, "anneal_strategy": "cubic"}),
    ("SequentialLR", {"schedulers": [], "milestones": []}),
    ("SequentialLR", {"schedulers": [STEP, LINE], "milestones": []}),
    ("SequentialLR", {"schedulers": [STEP, PLATEAU], "milestones": [3]}),
    ("ChainedScheduler", {"schedulers": [PLATEAU]}),
]


@pytest.mark.parametrize(("name", "arguments"), TORCHS)
def test_torchs_checks_have_torchs_messages(name: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError) as theirs:
        torch_scheduler(name, arguments, optimizer())
    groups: list[dict[str, Any]] = [{"lr": 0.1, "momentum": 0.5}] * 4
    with pytest.raises(InvalidHyperparameterError) as ours:
        schedules.create(name, arguments, groups)
    assert str(ours.value) == str(theirs.value)
    assert groups == [{"lr": 0.1, "momentum": 0.5}] * 4


def test_the_table_in_the_docs_has_the_schedules_and_their_arguments() -> None:
    text = (Path(__file__).parents[3] / "docs" / "schedules.md").read_text()
    rows = re.findall(r"^\| (\w+) \| (`.+`) \|$", text, re.MULTILINE)
    told = {}
    for name, arguments in rows:
        told[name] = dict(pair.split("=") if "=" in pair else (pair, None) for pair in re.findall("`([^`]+)`", arguments))
    known = {}
    for schedule in SCHEDULES.values():
        given = {} if not schedule.calls_functions else {"lr_lambda": None}
        defaults = {key: entry.default for key, entry in schedule.arguments.items()}
        known[schedule.name] = given | {key: None if value is REQUIRED else value for key, value in defaults.items()}
    assert {name: list(arguments) for name, arguments in told.items()} == {name: list(entry) for name, entry in known.items()}
    for name, arguments in told.items():
        for key, written in arguments.items():
            value = 1 / 3 if written == "1/3" else written and ast.literal_eval(written)
            assert value == known[name][key], f"{name}: {key}"


def test_torchs_missing_schedulers_of_a_chain() -> None:
    with pytest.raises(ValueError) as theirs:
        torch.optim.lr_scheduler.ChainedScheduler([], optimizer())
    with pytest.raises(InvalidHyperparameterError, match=f"^{re.escape(str(theirs.value))}$"):
        schedules.create("ChainedScheduler", {"schedulers": []}, [{"lr": 0.1}])


@pytest.mark.parametrize("name", ["CyclicLR", "OneCycleLR"])
def test_momentum_is_turned_only_where_there_is_some(name: str) -> None:
    arguments = {"CyclicLR": {"base_lr": 0.1, "max_lr": 0.2}, "OneCycleLR": {"max_lr": 0.1, "total_steps": 9}}[name]
    with pytest.raises(ValueError) as theirs:
        torch_scheduler(name, arguments, optimizer(kind=torch.optim.Adagrad))
    with pytest.raises(InvalidHyperparameterError, match=re.escape(str(theirs.value))):
        schedules.create(name, arguments, [{"lr": 0.1, "eps": 1e-8}])
    schedules.create(name, arguments | {"cycle_momentum": False}, [{"lr": 0.1, "eps": 1e-8}])


@pytest.mark.parametrize("name", ["StepLr2", "", "ReduceLR", "exponential"])
def test_an_unknown_schedule_lists_the_known_ones(name: str) -> None:
    known = ", ".join(sorted(schedule.name for schedule in SCHEDULES.values()))
    with pytest.raises(UnknownScheduleError, match=re.escape(f"known: {known}")):
        schedules.create(name, {}, [{"lr": 0.1}])


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("StepLR", {"stepsize": 3}, r"StepLR has no argument 'stepsize'; did you mean 'step_size'\? known: step_size, gamma"),
        ("ReduceLROnPlateau", {"last_epoch": 3}, "ReduceLROnPlateau has no argument 'last_epoch'"),
        ("ChainedScheduler", {"schedulers": [STEP], "last_epoch": 3}, "ChainedScheduler has no argument 'last_epoch'"),
        ("ChainedScheduler", {"schedulers": [STEP], "milestones": []}, "known: schedulers$"),
        ("ChainedScheduler", {"schedulers": [("Stepper", {})]}, "schedule 'Stepper' is not known"),
        ("LambdaLR", {"lr_lambda": 0.9}, "LambdaLR has no argument 'lr_lambda'"),
    ],
)
def test_an_unknown_argument_names_the_nearest(name: str, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UnknownScheduleError, match=message):
        schedules.create(name, arguments, [{"lr": 0.1}])


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("StepLR", {}, "StepLR needs step_size"),
        ("StepLR", {"step_size": 0}, "StepLR's step_size is 0; it must be more than 0"),
        ("StepLR", {"step_size": -1}, "must be 0 or more"),
        ("StepLR", {"step_size": True}, "must be a finite number"),
        ("StepLR", {"step_size": "3"}, "must be a finite number"),
        ("StepLR", {"step_size": None}, "must be a finite number"),
        ("StepLR", {"step_size": 3, "gamma": float("nan")}, "gamma is nan; it must be a finite number"),
        ("StepLR", {"step_size": 3, "last_epoch": 4}, "param 'initial_lr' is not specified"),
        ("StepLR", {"step_size": 3, "last_epoch": -2}, "last_epoch is -2"),
        ("StepLR", {"step_size": 3, "last_epoch": 1.0}, "last_epoch is 1.0"),
        ("ExponentialLR", {"gamma": float("inf")}, "must be a finite number"),
        ("ExponentialLR", {"gamma": (0.9, 0.8)}, "must be a finite number"),
        ("MultiStepLR", {"milestones": 30}, "must be a list of whole numbers"),
        ("MultiStepLR", {"milestones": (1, 2.5)}, "must be a list of whole numbers"),
        ("MultiStepLR", {"milestones": (1, float("nan"))}, "must be a finite number"),
        ("CosineAnnealingLR", {"T_max": 0}, "must be more than 0"),
        ("CosineAnnealingLR", {"T_max": 10**400}, "must be a finite number"),
        ("LinearLR", {"total_iters": -3}, "must be 0 or more"),
        ("PolynomialLR", {"power": "2"}, "power is '2'"),
        ("ReduceLROnPlateau", {"mode": 3}, "mode 3 is unknown!"),
        ("ReduceLROnPlateau", {"min_lr": ["a"]}, "min_lr is 'a'"),
        ("CyclicLR", {"base_lr": 0.1}, "CyclicLR needs max_lr"),
        (
            "CyclicLR",
            {"base_lr": 0.1, "max_lr": 0.2, "scale_fn": 1.0},
            "scale_fn is 1.0; it must be None: functions never travel",
        ),
        ("CyclicLR", {"base_lr": 0.1, "max_lr": 0.2, "step_size_up": 0}, "must be more than 0"),
        ("CyclicLR", {"base_lr": 0.1, "max_lr": 0.2, "cycle_momentum": 1}, "must be true or false"),
        ("CyclicLR", {"base_lr": 0.1, "max_lr": 0.2, "scale_mode": "x"}, "must be cycle or iterations"),
        ("OneCycleLR", {"max_lr": 0.1, "total_steps": 9, "div_factor": 0}, "cannot divide by its div_factor"),
        ("OneCycleLR", {"max_lr": 0.1, "total_steps": 10, "pct_start": 0.1}, "cannot be stepped to last_epoch 0"),
        ("OneCycleLR", {"max_lr": 0.1, "total_steps": True}, "must be a finite number"),
        ("SequentialLR", {"milestones": []}, "SequentialLR needs schedulers"),
        ("SequentialLR", {"schedulers": "StepLR", "milestones": []}, "a list of"),
        ("SequentialLR", {"schedulers": [("StepLR",)], "milestones": []}, "a list of"),
        ("SequentialLR", {"schedulers": [("StepLR", 3)], "milestones": []}, "a list of"),
        ("SequentialLR", {"schedulers": [(3, {})], "milestones": []}, "a list of"),
        ("SequentialLR", {"schedulers": [STEP, LINE], "milestones": [2.5]}, "must be a list of whole numbers"),
        ("SequentialLR", {"schedulers": [STEP, ("StepLR", {"step_size": 0})], "milestones": [2]}, "must be more than 0"),
    ],
)
def test_a_bad_argument_is_named_with_what_is_allowed(name: str, arguments: dict[str, Any], message: str) -> None:
    groups = [{"lr": 0.1, "momentum": 0.9}]
    with pytest.raises(InvalidHyperparameterError, match=message):
        schedules.create(name, arguments, groups)
    assert groups == [{"lr": 0.1, "momentum": 0.9}]


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (("ChainedScheduler", {"schedulers": [STEP]}), "cannot turn to a ChainedScheduler at a milestone"),
        (("SequentialLR", {"schedulers": [STEP], "milestones": []}), "cannot turn to a SequentialLR at a milestone"),
        (("LinearLR", {"total_iters": 0}), "LinearLR cannot be stepped to last_epoch 0"),
    ],
)
def test_what_a_sequence_could_not_turn_to_is_refused_when_it_is_set(part: tuple[str, Any], message: str) -> None:
    """torch makes it, and breaks at the milestone."""
    arguments = {"schedulers": [STEP, part], "milestones": [2]}
    theirs = torch_scheduler("SequentialLR", arguments, optimizer())
    theirs.optimizer.step()
    theirs.step()
    with pytest.raises((NotImplementedError, ZeroDivisionError)):
        theirs.step()
    with pytest.raises(InvalidHyperparameterError, match=message):
        schedules.create("SequentialLR", arguments, [{"lr": 0.1}])
    first = {"schedulers": [part, STEP], "milestones": [2]}
    schedules.create("SequentialLR", first, [{"lr": 0.1}])


def test_a_metric_is_refused_by_schedules_that_take_none_and_missed_by_the_one_that_does() -> None:
    state, _ = schedules.create("LinearLR", {}, [{"lr": 0.1}])
    with pytest.raises(InvalidArgumentError, match="LinearLR takes no metric; found 1"):
        schedules.step(state, [{"lr": 0.1}], metric=1.0)
    state, _ = schedules.create(*PLATEAU, [{"lr": 0.1}])
    with pytest.raises(InvalidArgumentError, match=r"steps on a metric, and none came: step_schedule\(metric=loss\)"):
        schedules.step(state, [{"lr": 0.1}])


WHOLE = [("StepLR", "step_size"), ("LinearLR", "total_iters"), ("CosineAnnealingLR", "T_max"), ("ConstantLR", "total_iters")]


@pytest.mark.parametrize("value", [1e19, 2.0**63, 1 << 63, 1 << 200, -(1 << 63), 1e308])
@pytest.mark.parametrize(("name", "argument"), [*WHOLE, ("MultiStepLR", "milestones"), ("StepLR", "last_epoch")])
def test_a_whole_number_beyond_64_bits_is_refused(name: str, argument: str, value: float) -> None:
    base = {"StepLR": {"step_size": 3}, "CosineAnnealingLR": {"T_max": 3}}.get(name, {})
    given = {**base, argument: (1, value) if argument == "milestones" else value}
    with pytest.raises(InvalidHyperparameterError, match=argument):
        schedules.create(name, given, [{"lr": 0.1, "initial_lr": 0.1}])


@pytest.mark.parametrize(
    ("name", "arguments"),
    [("CyclicLR", {"base_lr": 0.1, "max_lr": 0.2}), ("OneCycleLR", {"max_lr": 0.1, "total_steps": 9})],
)
def test_momentum_of_each_group_is_checked_even_if_it_is_not_turned(name: str, arguments: dict[str, Any]) -> None:
    """torch does not look; here it is kept, so it must fit, and a group that is added later may have none."""
    fixed = arguments | {"cycle_momentum": False, "base_momentum": (0.8, 0.7)}
    groups = [{"lr": 0.1}] * 2
    with pytest.raises(InvalidHyperparameterError, match="base_momentum has 2 values, param_groups has 1"):
        schedules.create(name, fixed, groups[:1])
    state, edits = schedules.create(name, fixed, groups)
    assert "momentum" not in str(edits)
    state, _ = schedules.extend(state, groups[0], 2)
    assert schedules.from_document(json.loads(json.dumps(schedules.to_document(state)))) == state


LARGEST: list[tuple[str, dict[str, Any]]] = [
    *[(name, {argument: value}) for name, argument in WHOLE for value in ((1 << 63) - 1, 2.0**62, 1e18, 1.5)],
    ("MultiStepLR", {"milestones": (1, 2**53)}),
    ("StepLR", {"step_size": 3, "last_epoch": 1 << 53}),
    ("ExponentialLR", {"gamma": 5e-324}),
    ("OneCycleLR", {"max_lr": 5e-324, "epochs": (1 << 63) - 1, "steps_per_epoch": (1 << 63) - 1}),
    ("CosineAnnealingWarmRestarts", {"T_0": (1 << 63) - 1, "T_mult": (1 << 63) - 1}),
    ("CosineAnnealingWarmRestarts", {"T_0": 5, "T_mult": (1 << 63) - 1}),
    ("SWALR", {"swa_lr": 1.7e308, "anneal_epochs": (1 << 63) - 1}),
]


@pytest.mark.parametrize(("name", "arguments"), [*CASES, *LARGEST])
def test_what_is_accepted_survives_documents_and_messages(name: str, arguments: dict[str, Any]) -> None:
    given, functions = split(arguments)
    sent = from_arguments(to_arguments(given))
    state: ScheduleState = unbegun(name, sent)
    assert unbegun(name, given) == state
    if functions or any(isinstance(value, tuple) for value in given.values()):
        return
    group = {"lr": 0.1, "initial_lr": 0.1, "momentum": 0.5}
    state, edits = schedules.create(name, sent, [group])
    for _ in range(7 if "T_mult" in given else 2):
        assert schedules.from_document(json.loads(json.dumps(schedules.to_document(state)))) == state
        optimizer_pb2.Schedule(name=state.name, last_epoch=state.last_epoch)
        group |= edits[0]
        metric = 0.5 if name == "ReduceLROnPlateau" else None
        state, edits = schedules.step(state, [group], metric)
