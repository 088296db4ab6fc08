"""Schedules against torch's own schedulers, bit for bit."""

import json
import re
import warnings
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler

from optserve.server import schedules
from optserve.server.schedules import ScheduleState
from optserve.server.schedules.table import SCHEDULES, checked_arguments, find
from optserve.v1 import optimizer_pb2
from optserve.wire.errors import InvalidArgumentError, InvalidHyperparameterError, InvalidStateDictError, UnknownScheduleError
from optserve.wire.values import from_hyperparameters, to_hyperparameters

CASES: list[tuple[str, dict[str, Any]]] = [
    ("StepLR", {"step_size": 7}),
    ("StepLR", {"step_size": 3, "gamma": 0.97}),
    ("StepLR", {"step_size": 2.5, "gamma": 0.9}),
    ("MultiStepLR", {"milestones": (3, 50, 50, 50, 120)}),
    ("MultiStepLR", {"milestones": (), "gamma": 0.5}),
    ("MultiStepLR", {"milestones": (120, 7, 0), "gamma": 0.3}),
    ("ExponentialLR", {"gamma": 0.987}),
    ("ExponentialLR", {"gamma": -0.9}),
    ("CosineAnnealingLR", {"T_max": 30}),
    ("CosineAnnealingLR", {"T_max": 30.0, "eta_min": 1e-3}),
    ("CosineAnnealingLR", {"T_max": 1, "eta_min": 0.01}),
    ("CosineAnnealingLR", {"T_max": 12.5, "eta_min": 5}),
    ("CosineAnnealingLR", {"T_max": 1000}),
    ("LinearLR", {}),
    ("LinearLR", {"start_factor": 0.01, "end_factor": 0.7, "total_iters": 150}),
    ("LinearLR", {"start_factor": 1.0, "end_factor": 0.0, "total_iters": 33}),
    ("LinearLR", {"total_iters": 0}),
]
RATES = (0.1, 3e-4, 1, 0.0)


def optimizer(rates: tuple[float, ...] = RATES) -> torch.optim.SGD:
    return torch.optim.SGD([{"params": [torch.zeros(1)], "lr": rate} for rate in rates])


def hexes(groups: list[dict[str, Any]]) -> list[tuple[str, str | None]]:
    return [(float(group["lr"]).hex(), float(group["initial_lr"]).hex() if "initial_lr" in group else None) for group in groups]


class Pair:
    """The same schedule in torch and here, moved together and compared after each move."""

    def __init__(self, name: str, arguments: dict[str, Any], groups: list[dict[str, Any]] | None = None) -> None:
        self.optimizer = optimizer()
        if groups is not None:
            for mine, theirs in zip(groups, self.optimizer.param_groups, strict=True):
                theirs.update(mine)
        self.groups = [{key: value for key, value in g.items() if key != "params"} for g in self.optimizer.param_groups]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.scheduler = getattr(lr_scheduler, name)(self.optimizer, **arguments)
        self.state, edits = schedules.create(name, arguments, self.groups)
        self.compare(edits)

    def compare(self, edits: list[dict[str, Any]]) -> None:
        for group, edit in zip(self.groups, edits, strict=True):
            group.update(edit)
        assert hexes(self.groups) == hexes(self.optimizer.param_groups)
        assert self.state.last_epoch == self.scheduler.last_epoch

    def step(self, times: int = 1) -> None:
        for _ in range(times):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self.scheduler.step()
            self.state, edits = schedules.step(self.state, self.groups)
            self.compare(edits)

    def edit(self, index: int, rate: float) -> None:
        self.groups[index]["lr"] = self.optimizer.param_groups[index]["lr"] = rate

    def add_group(self, rate: float) -> None:
        self.optimizer.add_param_group({"params": [torch.zeros(1)], "lr": rate})
        self.groups.append({"lr": rate})
        self.state, edits = schedules.extend(self.state, self.groups[-1])
        self.groups[-1].update(edits)


@pytest.mark.parametrize(("name", "arguments"), CASES)
class TestTorch:
    def test_200_steps_are_bitwise_torchs(self, name: str, arguments: dict[str, Any]) -> None:
        Pair(name, arguments).step(200)

    def test_rates_edited_by_hand_go_on_as_in_torch(self, name: str, arguments: dict[str, Any]) -> None:
        pair = Pair(name, arguments)
        for at, (index, rate) in enumerate([(0, 0.7), (2, 1e-5), (0, 0.0), (1, 3), (3, 0.2)]):
            pair.step(11 + 13 * at)
            pair.edit(index, rate)
        pair.step(100)

    def test_a_state_restored_from_json_goes_on_bitwise(self, name: str, arguments: dict[str, Any]) -> None:
        pair = Pair(name, arguments)
        for _ in range(40):
            pair.step(5)
            restored = ScheduleState.from_document(json.loads(json.dumps(pair.state.to_document())))
            assert restored == pair.state
            pair.state = restored

    def test_a_second_schedule_keeps_initial_lr_and_starts_from_the_rate_now(
        self, name: str, arguments: dict[str, Any]
    ) -> None:
        first = Pair("ExponentialLR", {"gamma": 0.9})
        first.step(5)
        Pair(name, arguments, first.groups).step(60)

    def test_resuming_with_last_epoch_is_torchs(self, name: str, arguments: dict[str, Any]) -> None:
        first = Pair(name, arguments)
        first.step(9)
        Pair(name, arguments | {"last_epoch": 8}, first.groups).step(60)

    def test_arguments_are_shown_in_torchs_order_with_defaults(self, name: str, arguments: dict[str, Any]) -> None:
        pair = Pair(name, arguments)
        theirs = pair.scheduler.state_dict()
        assert list(pair.state.arguments) == [key for key in theirs if key in pair.state.arguments]
        for key, value in pair.state.arguments.items():
            assert (sorted(theirs[key].elements()) if key == "milestones" else theirs[key]) == (
                sorted(value) if isinstance(value, tuple) else value
            )
        assert [rate.hex() for rate in pair.state.base_lrs] == [float(rate).hex() for rate in theirs["base_lrs"]]

    def test_a_group_added_in_mid_run_is_stepped_as_in_torch(self, name: str, arguments: dict[str, Any]) -> None:
        pair = Pair(name, arguments)
        pair.step(6)
        pair.add_group(0.25)
        if name == "CosineAnnealingLR":  # torch's zip(base_lrs, param_groups, strict=True) fails when it leaves the trough
            pair.scheduler.base_lrs.append(0.25)
        pair.step(60)
        assert "initial_lr" not in pair.groups[-1]


def test_every_schedule_is_compared() -> None:
    assert {name for name, _ in CASES} == {schedule.name for schedule in SCHEDULES.values()}


def test_torch_itself_fails_for_a_group_added_under_cosine_annealing() -> None:
    pair = Pair("CosineAnnealingLR", {"T_max": 3})
    pair.add_group(0.25)
    with pytest.raises(ValueError, match="zip"):
        pair.step(10)


def test_names_match_in_any_case_and_are_stored_as_torchs() -> None:
    state, edits = schedules.create("steplr", {"step_size": 2}, [{"lr": 0.1}])
    assert state.name == "StepLR"
    assert edits == [{"initial_lr": 0.1}]


def test_only_what_changes_is_an_edit() -> None:
    groups: list[dict[str, Any]] = [{"lr": 1, "momentum": 0.9}]
    state, edits = schedules.create("StepLR", {"step_size": 2}, groups)
    groups[0].update(edits[0])
    state, edits = schedules.step(state, groups)
    assert edits == [{}]
    _, edits = schedules.step(state, groups)
    assert edits == [{"lr": 0.1}]
    assert groups == [{"lr": 1, "momentum": 0.9, "initial_lr": 1}]


@pytest.mark.parametrize("name", ["StepLr2", "", "ReduceLR", "exponential"])
def test_an_unknown_schedule_lists_the_known_ones(name: str) -> None:
    known = ", ".join(schedule.name for schedule in SCHEDULES.values())
    with pytest.raises(UnknownScheduleError, match=re.escape(f"known: {known}")):
        schedules.create(name, {}, [{"lr": 0.1}])


def test_an_unknown_argument_names_the_nearest() -> None:
    with pytest.raises(UnknownScheduleError, match=r"StepLR has no argument 'stepsize'; did you mean 'step_size'\? known: "):
        schedules.create("StepLR", {"stepsize": 3}, [{"lr": 0.1}])


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
        ("LinearLR", {"start_factor": 0.0}, "Starting multiplicative factor expected to be greater than 0"),
        ("LinearLR", {"start_factor": 1.1}, "Starting multiplicative factor expected to be greater than 0"),
        ("LinearLR", {"end_factor": -0.1}, "Ending multiplicative factor expected to be between 0 and 1"),
        ("LinearLR", {"total_iters": -3}, "must be 0 or more"),
    ],
)
def test_a_bad_argument_is_named_with_what_is_allowed(name: str, arguments: dict[str, Any], message: str) -> None:
    groups = [{"lr": 0.1}]
    with pytest.raises(InvalidHyperparameterError, match=message):
        schedules.create(name, arguments, groups)
    assert groups == [{"lr": 0.1}]


def test_a_step_that_overflows_changes_nothing() -> None:
    state, _ = schedules.create("MultiStepLR", {"milestones": (1, 1), "gamma": 1e200}, [{"lr": 0.1}])
    with pytest.raises(InvalidHyperparameterError, match="cannot be stepped to last_epoch 1"):
        schedules.step(state, [{"lr": 0.1}])
    state, _ = schedules.create("ExponentialLR", {"gamma": 1e308}, [{"lr": 0.1}])
    with pytest.raises(InvalidHyperparameterError, match="would set lr of param group 0 to inf"):
        schedules.step(state, [{"lr": 1e10}])


@pytest.mark.parametrize("rate", [float("nan"), "0.1", None])
def test_an_initial_lr_that_is_no_number_is_refused(rate: object) -> None:
    group = {"lr": 0.1, "initial_lr": rate}
    with pytest.raises(InvalidHyperparameterError, match="initial_lr is"):
        schedules.create("LinearLR", {}, [group])
    state, _ = schedules.create("LinearLR", {}, [])
    with pytest.raises(InvalidHyperparameterError, match="initial_lr is"):
        schedules.extend(state, group)


def test_a_metric_is_refused_by_schedules_that_take_none() -> None:
    state, _ = schedules.create("LinearLR", {}, [{"lr": 0.1}])
    with pytest.raises(InvalidArgumentError, match="takes no metric"):
        schedules.step(state, [{"lr": 0.1}], metric=1.0)


def test_a_group_that_the_schedule_does_not_know_is_an_error() -> None:
    state, _ = schedules.create("LinearLR", {}, [{"lr": 0.1}])
    with pytest.raises(InvalidArgumentError, match="knows 1 param groups; there are 2"):
        schedules.step(state, [{"lr": 0.1}, {"lr": 0.1}])


@pytest.mark.parametrize(
    "change",
    [
        {"name": "Nothing"},
        {"name": ["StepLR"]},
        {"arguments": {"step_size": 0}},
        {"arguments": {"unknown": 0}},
        {"arguments": []},
        {"last_epoch": 1.5},
        {"last_epoch": True},
        {"base_lrs": [float("nan")]},
        {"base_lrs": "ab"},
        {"base_lrs": None},
        {"own": None},
    ],
)
def test_a_document_of_a_stranger_is_checked(change: dict[str, Any]) -> None:
    state, _ = schedules.create("StepLR", {"step_size": 3}, [{"lr": 0.1}])
    with pytest.raises(InvalidStateDictError, match="the state of the schedule cannot be used"):
        ScheduleState.from_document(state.to_document() | change)


@pytest.mark.parametrize("document", [None, [], "StepLR", {}, 3])
def test_a_document_of_another_kind_is_refused(document: object) -> None:
    with pytest.raises(InvalidStateDictError):
        ScheduleState.from_document(document)


WHOLE = [("StepLR", "step_size"), ("LinearLR", "total_iters"), ("CosineAnnealingLR", "T_max")]


@pytest.mark.parametrize("value", [1e19, 2.0**63, 1 << 63, 1 << 200, -(1 << 63), 1e308])
@pytest.mark.parametrize(("name", "argument"), [*WHOLE, ("MultiStepLR", "milestones"), ("StepLR", "last_epoch")])
def test_a_whole_number_beyond_64_bits_is_refused(name: str, argument: str, value: float) -> None:
    base = {"StepLR": {"step_size": 3}, "CosineAnnealingLR": {"T_max": 3}}.get(name, {})
    given = {**base, argument: (1, value) if argument == "milestones" else value}
    with pytest.raises(InvalidHyperparameterError, match=argument):
        schedules.create(name, given, [{"lr": 0.1, "initial_lr": 0.1}])


LARGEST: list[tuple[str, dict[str, Any]]] = [
    *[(name, {argument: value}) for name, argument in WHOLE for value in ((1 << 63) - 1, 2.0**62, 1e18, 1.5)],
    ("MultiStepLR", {"milestones": (1, 2**53)}),
    ("StepLR", {"step_size": 3, "last_epoch": 1 << 53}),
    ("ExponentialLR", {"gamma": 5e-324}),
]


@pytest.mark.parametrize(("name", "arguments"), [*CASES, *LARGEST])
def test_what_is_accepted_survives_documents_and_messages(name: str, arguments: dict[str, Any]) -> None:
    state, _ = schedules.create(name, arguments, [{"lr": 0.1, "initial_lr": 0.1}])
    for _ in range(2):
        document = json.loads(json.dumps(state.to_document(), allow_nan=False))
        assert ScheduleState.from_document(document) == state
        sent = from_hyperparameters(to_hyperparameters(state.arguments))
        assert checked_arguments(find(name), sent) == state.arguments
        optimizer_pb2.Schedule(name=state.name, last_epoch=state.last_epoch)
        state, _ = schedules.step(state, [{"lr": 0.1, "initial_lr": 0.1}])
