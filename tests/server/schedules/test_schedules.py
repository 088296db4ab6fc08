"""Schedules against torch's own schedulers, bit for bit."""

from __future__ import annotations

import json
import math
import warnings
from typing import Any

import pytest
import torch
from schedule_pairs import CASES, WITHOUT_LAST_EPOCH, Pair, hexes, split

from optserve.server import schedules
from optserve.server.schedules import GROUP_KEYS, SCHEDULES
from optserve.wire.errors import InvalidArgumentError, InvalidHyperparameterError, InvalidStateDictError

LISTED = ("base_lr", "max_lr", "base_momentum", "max_momentum", "min_lr", "swa_lr", "lr_lambda")
"""Arguments that may have one value a group."""


def names(cases: list[tuple[str, dict[str, Any]]]) -> list[str]:
    return [f"{name}{index}" for index, (name, _) in enumerate(cases)]


def has_a_list(arguments: dict[str, Any]) -> bool:
    inner = [entry for _, entry in arguments.get("schedulers", ())]
    return any(isinstance(arguments.get(name), tuple | list) for name in LISTED) or any(map(has_a_list, inner))


@pytest.mark.parametrize(("name", "arguments"), CASES, ids=names(CASES))
class TestTorch:
    def test_200_steps_are_bitwise_torchs(self, name: str, arguments: dict[str, Any]) -> None:
        Pair(name, arguments).step(200)

    def test_values_edited_by_hand_go_on_as_in_torch(self, name: str, arguments: dict[str, Any]) -> None:
        pair = Pair(name, arguments)
        for at, (index, rate) in enumerate([(0, 0.7), (2, 1e-5), (0, 0.0), (1, 3), (3, 0.2)]):
            pair.step(11 + 13 * at)
            pair.edit(index, lr=rate, momentum=0.3)
            for key in pair.groups[index].keys() & GROUP_KEYS - {"initial_lr"}:
                pair.edit(index, **{key: rate / 2})
        pair.step(14)

    def test_a_second_schedule_starts_from_what_the_first_left(self, name: str, arguments: dict[str, Any]) -> None:
        first = Pair("ExponentialLR", {"gamma": 0.9})
        first.step(5)
        Pair(name, arguments, first.groups).step(60)


RESUMED = [(name, arguments) for name, arguments in CASES if name not in WITHOUT_LAST_EPOCH]


@pytest.mark.parametrize(("name", "arguments"), RESUMED, ids=names(RESUMED))
def test_resuming_with_last_epoch_is_torchs(name: str, arguments: dict[str, Any]) -> None:
    first = Pair(name, arguments)
    first.step(9)
    Pair(name, arguments | {"last_epoch": 8}, first.groups).step(60)


EXTENDED = [(name, arguments) for name, arguments in CASES if not has_a_list(arguments)]


@pytest.mark.parametrize(("name", "arguments"), EXTENDED, ids=names(EXTENDED))
def test_a_group_added_in_mid_run(name: str, arguments: dict[str, Any]) -> None:
    """As in torch, which breaks for some: there as in torch that had been told of the group."""
    pair = Pair(name, arguments)
    pair.step(6)
    pair.add_group(0.25)
    if name != "ReduceLROnPlateau":
        pair.teach_torch_the_group()
    pair.step(60)
    assert ("initial_lr" in pair.groups[-1]) == ("OneCycleLR" in str(arguments) + name)


def test_every_schedule_is_compared_with_torch() -> None:
    assert {name for name, _ in CASES} == {schedule.name for schedule in SCHEDULES.values()}


@pytest.mark.parametrize("name", ["CyclicLR", "OneCycleLR"])
@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.NAdam, torch.optim.RMSprop])
def test_momentum_is_turned_where_the_optimizer_has_it(name: str, kind: type[torch.optim.Optimizer]) -> None:
    for case, arguments in CASES:
        if case == name:
            pair = Pair(name, arguments, kind=kind)
            pair.step(100)
            assert schedules.state_dict(pair.state).get("use_beta1") == pair.scheduler.state_dict().get("use_beta1")


def test_keys_that_schedules_write_are_declared() -> None:
    written: set[str] = set()
    for name, arguments in CASES:
        pair = Pair(name, arguments)
        written |= pair.groups[0].keys()
    assert written - torch.optim.SGD([torch.zeros(1)]).param_groups[0].keys() == GROUP_KEYS


GOES_ON = ("StepLR", "MultiStepLR", "ConstantLR", "LinearLR", "ExponentialLR", "PolynomialLR")
BREAKS = [
    ("CosineAnnealingLR", {"T_max": 3}, {}),
    ("CosineAnnealingWarmRestarts", {"T_0": 3}, {}),
    ("CyclicLR", {"base_lr": 0.1, "max_lr": 0.2}, {}),
    ("OneCycleLR", {"max_lr": 0.1, "total_steps": 90}, {}),
    ("SWALR", {"swa_lr": 0.1}, {}),
    ("LambdaLR", {"lr_lambda": math.cos}, {}),
    ("MultiplicativeLR", {"lr_lambda": math.cos}, {}),
]


@pytest.mark.parametrize(("name", "arguments"), [case for case in CASES if case[0] in GOES_ON])
def test_torch_itself_goes_on_with_an_added_group(name: str, arguments: dict[str, Any]) -> None:
    pair = Pair(name, arguments)
    pair.step(6)
    pair.add_group(0.25)
    pair.step(60)
    assert "initial_lr" not in pair.groups[-1]


@pytest.mark.parametrize(("name", "arguments", "more"), BREAKS)
def test_torch_itself_fails_for_an_added_group(name: str, arguments: dict[str, Any], more: dict[str, Any]) -> None:
    pair = Pair(name, arguments)
    pair.optimizer.add_param_group({"params": [torch.zeros(1)], "lr": 0.25, **more})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises((ValueError, KeyError), match=r"zip|max_lr|initial_lr|swa_lr"):
            [pair.scheduler.step() for _ in range(10)]


KEYS = {"initial_lr": 0.01, "max_lr": 0.3, "min_lr": 1e-5, "max_momentum": 0.9, "base_momentum": 0.7}


def test_a_group_that_brings_the_keys_of_a_one_cycle_is_stepped_by_them() -> None:
    pair = Pair("OneCycleLR", {"max_lr": (1, 0.2, 3e-4, 5.0), "total_steps": 90, "max_momentum": [0.9, 0.8, 0.7, 0.6]})
    pair.step(6)
    pair.add_group(0.25, **KEYS)
    pair.step(80)


def test_a_group_that_brings_its_swa_lr() -> None:
    pair = Pair("SWALR", {"swa_lr": [0.1, 0.2, 0.3, 0.4]})
    pair.step(3)
    pair.add_group(0.25, swa_lr=0.5)
    pair.step(30)
    assert pair.groups[-1]["lr"] == 0.5


@pytest.mark.parametrize(
    ("name", "arguments", "argument"),
    [
        ("CyclicLR", {"base_lr": [0.1], "max_lr": 0.2}, "base_lr"),
        ("CyclicLR", {"base_lr": 0.1, "max_lr": [0.2]}, "max_lr"),
        ("CyclicLR", {"base_lr": 0.1, "max_lr": 0.2, "base_momentum": [0.8]}, "base_momentum"),
        ("OneCycleLR", {"max_lr": [0.1], "total_steps": 10}, "max_lr"),
        ("OneCycleLR", {"max_lr": 0.1, "total_steps": 10, "max_momentum": [0.9]}, "max_momentum"),
        ("SWALR", {"swa_lr": [0.1]}, "swa_lr"),
        ("ChainedScheduler", {"schedulers": [("LinearLR", {}), ("SWALR", {"swa_lr": [0.1]})]}, "swa_lr"),
    ],
)
def test_one_value_a_group_has_none_for_another(name: str, arguments: dict[str, Any], argument: str) -> None:
    group = {"lr": 0.1, "momentum": 0.5}
    state, _ = schedules.create(name, arguments, [group])
    with pytest.raises(
        InvalidArgumentError, match=f"{argument} has one value for each of 1 param groups, and none for another"
    ):
        schedules.extend(state, group, 1)


def test_min_lr_of_each_group_stops_where_torch_stops() -> None:
    pair = Pair("ReduceLROnPlateau", {"min_lr": [0.1] * 4, "patience": 0})
    pair.metrics = iter([1.0])
    pair.step()
    pair.add_group(0.25)
    with pytest.raises(RuntimeError, match="min_lrs"):
        pair.scheduler.step(2.0)
    with pytest.raises(InvalidArgumentError, match="has 5 param groups, and min_lr has 4 values"):
        schedules.step(pair.state, pair.groups, metric=2.0)
    longer = schedules.state_dict(pair.state) | {"min_lrs": [0.1] * 5}
    _, edits = schedules.step(schedules.load(pair.state, longer, pair.groups), pair.groups, metric=2.0)
    assert edits == [{}, {}, {"lr": 0.1}, {}, {"lr": 0.1}]


@pytest.mark.parametrize(("name", "arguments"), CASES, ids=names(CASES))
def test_arguments_are_shown_in_torchs_order_with_defaults(name: str, arguments: dict[str, Any]) -> None:
    state = Pair(name, arguments).state
    given, _ = split(arguments)
    given.pop("last_epoch", None)
    shown = schedules.described(state)
    for key, value in given.items():
        assert shown[key] == (tuple(value) if isinstance(value, list) else value) or key == "schedulers"
    kind = torch.optim.swa_utils.SWALR if name == "SWALR" else getattr(torch.optim.lr_scheduler, name)
    theirs = kind.__init__.__code__.co_varnames[1 : kind.__init__.__code__.co_argcount]
    assert list(shown) == [key for key in theirs if key not in ("optimizer", "last_epoch", "lr_lambda")]
    defaults = dict(zip(reversed(theirs), reversed(kind.__init__.__defaults__ or ()), strict=False))
    assert {key: shown[key] for key in shown.keys() - given.keys()} == {
        key: value for key, value in defaults.items() if key in shown.keys() - given.keys()
    }


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


def test_a_step_that_overflows_changes_nothing() -> None:
    state, _ = schedules.create("MultiStepLR", {"milestones": (1, 1), "gamma": 1e200}, [{"lr": 0.1}])
    with pytest.raises(InvalidHyperparameterError, match="cannot be stepped to last_epoch 1"):
        schedules.step(state, [{"lr": 0.1}])
    state, _ = schedules.create("ExponentialLR", {"gamma": 1e308}, [{"lr": 0.1}])
    with pytest.raises(InvalidHyperparameterError, match="would set lr of param group 0 to inf"):
        schedules.step(state, [{"lr": 1e10}])
    with pytest.raises(InvalidHyperparameterError, match=r"would set betas of param group 0 to \(nan, 0.9\)"):
        schedules.create(
            "OneCycleLR",
            {"max_lr": 1.0, "total_steps": 9, "base_momentum": -1.7e308, "max_momentum": 1.7e308, "anneal_strategy": "linear"},
            [{"lr": 0.1, "betas": (0.9, 0.9)}],
        )


@pytest.mark.parametrize("last", [("CyclicLR", {"base_lr": 0.1, "max_lr": 0.2}), ("ExponentialLR", {"gamma": 0.0})])
def test_a_rate_that_is_not_finite_on_the_way_is_refused_too(last: tuple[str, dict[str, Any]]) -> None:
    """It would stand in the _last_lr of the schedule that gave it."""
    groups = [{"lr": 1e10, "momentum": 0.5}]
    parts = [("ExponentialLR", {"gamma": 1e308}), last]
    state, edits = schedules.create("ChainedScheduler", {"schedulers": parts}, groups)
    groups[0] |= edits[0] | {"lr": 1e10}
    with pytest.raises(InvalidHyperparameterError, match="ExponentialLR would set lr of param group 0 to inf at epoch 1"):
        schedules.step(state, groups)


def test_a_cosine_of_infinity_is_no_number() -> None:
    state, _ = schedules.create("CosineAnnealingLR", {"T_max": 1e-320}, [{"lr": 0.1}])
    with pytest.raises(InvalidHyperparameterError, match="CosineAnnealingLR cannot be stepped to last_epoch 1: math domain"):
        schedules.step(state, [{"lr": 0.1}])


def test_a_one_cycle_ends_where_torchs_ends() -> None:
    pair = Pair("OneCycleLR", {"max_lr": 0.1, "total_steps": 7})
    pair.step(7)
    with pytest.raises(ValueError, match="Tried to step 8 times") as theirs:
        pair.scheduler.step()
    with pytest.raises(InvalidArgumentError) as ours:
        schedules.step(pair.state, pair.groups)
    assert str(ours.value) == str(theirs.value)


def test_a_group_that_lost_a_key_is_named() -> None:
    group = {"lr": 0.1, "momentum": 0.5}
    state, edits = schedules.create("OneCycleLR", {"max_lr": 0.1, "total_steps": 7}, [group])
    with pytest.raises(InvalidArgumentError, match="OneCycleLR reads 'initial_lr' of every param group, and one has none"):
        schedules.step(state, [group])
    schedules.step(state, [group | edits[0]])


def test_a_group_that_the_schedule_does_not_know_is_an_error() -> None:
    state, _ = schedules.create("LinearLR", {}, [{"lr": 0.1}])
    with pytest.raises(InvalidArgumentError, match="knows 1 param groups; there are 2"):
        schedules.step(state, [{"lr": 0.1}, {"lr": 0.1}])


@pytest.mark.parametrize("rate", [float("nan"), "0.1", None])
def test_an_initial_lr_that_is_no_number_is_refused(rate: object) -> None:
    group = {"lr": 0.1, "initial_lr": rate}
    with pytest.raises(InvalidHyperparameterError, match="initial_lr is"):
        schedules.create("LinearLR", {}, [group])
    state, _ = schedules.create("LinearLR", {}, [])
    with pytest.raises(InvalidHyperparameterError, match="initial_lr is"):
        schedules.extend(state, group, 0)


def test_a_tree_of_schedules_is_bounded() -> None:
    part: tuple[str, dict[str, Any]] = ("LinearLR", {})
    for _ in range(7):
        part = ("ChainedScheduler", {"schedulers": [part]})
    state, _ = schedules.create(*part, [{"lr": 0.1}])
    assert json.loads(json.dumps(schedules.to_document(state)))["state"]["_last_lr"] == [0.1 / 3]
    with pytest.raises(InvalidHyperparameterError, match="8 deep in one another and 64 in all"):
        schedules.create("ChainedScheduler", {"schedulers": [part]}, [{"lr": 0.1}])
    schedules.create("ChainedScheduler", {"schedulers": [("LinearLR", {})] * 63}, [{"lr": 0.1}])
    with pytest.raises(InvalidHyperparameterError, match="8 deep in one another and 64 in all"):
        schedules.create("ChainedScheduler", {"schedulers": [("LinearLR", {})] * 64}, [{"lr": 0.1}])


def test_schedules_times_groups_are_bounded() -> None:
    many = {"schedulers": [("LinearLR", {})] * 63}
    groups = [{"lr": 0.1}] * 130
    state, _ = schedules.create("ChainedScheduler", many, groups)
    with pytest.raises(InvalidArgumentError, match="63 schedules of 131 param groups"):
        schedules.extend(state, groups[0], 130)
    with pytest.raises(InvalidArgumentError, match="63 schedules of 131 param groups"):
        schedules.create("ChainedScheduler", many, groups + groups[:1])


def test_milestones_are_bounded_over_all_schedules() -> None:
    groups = [{"lr": 0.1}]
    half = ("MultiStepLR", {"milestones": [1] * 4096})
    state, _ = schedules.create("ChainedScheduler", {"schedulers": [half] * 2}, groups)
    document = schedules.to_document(state)
    assert schedules.from_document(document) == state
    with pytest.raises(InvalidArgumentError, match="ChainedScheduler has 12288 milestones; there may be 8192"):
        schedules.create("ChainedScheduler", {"schedulers": [half] * 3}, groups)
    parts = document["state"]["_schedulers"]
    parts[0]["milestones"], parts[1]["milestones"] = [[1, 8192]], [[1, 1]]
    with pytest.raises(InvalidStateDictError, match="has 8193 milestones"):
        schedules.load(state, document["state"], groups)


def test_the_order_of_the_schedules_decides() -> None:
    """Each one's constructor takes its initial step on what those before it left."""
    parts = [("OneCycleLR", {"max_lr": 1.0, "total_steps": 9}), ("ConstantLR", {}), ("SWALR", {"swa_lr": 0.5})]
    one, other = (Pair("ChainedScheduler", {"schedulers": order}) for order in (parts, parts[::-1]))
    assert hexes(one.groups) != hexes(other.groups)
    one.step(9)
    other.step(9)
