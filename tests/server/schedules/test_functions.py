"""LambdaLR and MultiplicativeLR: the functions stay with the client, their numbers come with the call."""

from __future__ import annotations

from typing import Any

import pytest
from schedule_pairs import decay, split, warmup

from optserve.server import schedules
from optserve.wire.arguments import Factors
from optserve.wire.errors import InvalidArgumentError, InvalidHyperparameterError, MissingFunctionError

GROUPS = [{"lr": 0.1, "initial_lr": 0.1}, {"lr": 0.2, "initial_lr": 0.2}]
TREE = {
    "schedulers": [
        ("LambdaLR", {"lr_lambda": warmup}),
        ("ChainedScheduler", {"schedulers": [("MultiplicativeLR", {"lr_lambda": decay}), ("LinearLR", {})]}),
        ("LambdaLR", {"lr_lambda": warmup}),
    ]
}


def awaited(error: pytest.ExceptionInfo[MissingFunctionError]) -> str:
    return error.value.metadata["awaited"]


def test_a_lambda_is_made_of_its_number_at_epoch_0() -> None:
    with pytest.raises(MissingFunctionError, match="LambdaLR calls lr_lambda at epoch 0, and set_lr_schedule") as error:
        schedules.create("LambdaLR", {}, GROUPS)
    assert awaited(error) == "0"
    state, edits = schedules.create("LambdaLR", {}, GROUPS, [Factors(0, (0.5,), True)], "who/3")
    assert edits == [{"lr": 0.05}, {"lr": 0.1}]
    assert schedules.awaited(state, GROUPS) == [1]
    with pytest.raises(MissingFunctionError, match="pass lr_lambda=f") as error:
        schedules.step(state, GROUPS)
    assert (awaited(error), error.value.metadata["setting"]) == ("1", "who/3")


def test_a_multiplicative_one_is_not_called_when_it_is_made() -> None:
    with pytest.raises(MissingFunctionError) as error:
        schedules.create("MultiplicativeLR", {}, GROUPS)
    assert awaited(error) == "-1"
    state, edits = schedules.create("MultiplicativeLR", {}, GROUPS, [Factors(-1)])
    assert edits == [{}, {}]
    _, edits = schedules.step(state, GROUPS, factors=[Factors(1, (2.0, 3.0))])
    assert edits == [{"lr": 0.2}, {"lr": 0.2 * 3.0}]


def test_the_entries_of_a_tree_come_depth_first() -> None:
    given, _ = split(TREE)
    with pytest.raises(MissingFunctionError) as error:
        schedules.create("ChainedScheduler", given, GROUPS)
    assert awaited(error) == "0,-1,0"
    factors = [Factors(0, (2.0,), True), Factors(-1), Factors(0, (4.0,), True)]
    state, edits = schedules.create("ChainedScheduler", given, GROUPS, factors)
    assert edits == [{"lr": 0.4}, {"lr": 0.8}]
    assert schedules.awaited(state, GROUPS) == [1, 1, 1]


def test_a_sequence_calls_the_functions_of_its_turn() -> None:
    given, _ = split(TREE | {"schedulers": [TREE["schedulers"][0], TREE["schedulers"][2]], "milestones": [2]})
    groups = [dict(group) for group in GROUPS]
    calls = []
    state, _ = schedules.create("SequentialLR", given, groups, [Factors(0, (1.0,), True)] * 2)
    for _ in range(4):
        calls.append(schedules.awaited(state, groups))
        state, _ = schedules.step(state, groups, factors=[Factors(at, (1.0,), True) for at in calls[-1]])
    assert calls == [[1, -1], [-1, 0], [-1, 1], [-1, 2]]


@pytest.mark.parametrize(
    "factors",
    [
        [],
        [Factors(2, (1.0,), True)],
        [Factors(-1)],
        [Factors(1, (1.0,), True), Factors(1, (1.0,), True)],
    ],
)
def test_factors_of_another_epoch_or_number_are_not_applied(factors: list[Factors]) -> None:
    state, _ = schedules.create("LambdaLR", {}, GROUPS, [Factors(0, (0.5,), True)])
    with pytest.raises(MissingFunctionError) as error:
        schedules.step(state, GROUPS, factors=factors)
    assert awaited(error) == "1"


@pytest.mark.parametrize(
    "factors", [Factors(1, (1.0,)), Factors(1, ()), Factors(1, (1.0,) * 3), Factors(1, (1.0, 2.0, 3.0), True)]
)
def test_one_factor_a_group_is_torchs_one_function_a_group(factors: Factors) -> None:
    state, _ = schedules.create("LambdaLR", {}, GROUPS, [Factors(0, (0.5,), True)])
    with pytest.raises(InvalidArgumentError, match=f"Expected 2 lr_lambdas, but got {len(factors.values)}"):
        schedules.step(state, GROUPS, factors=[factors])


def test_one_function_serves_a_group_that_is_added() -> None:
    state, _ = schedules.create("LambdaLR", {}, GROUPS, [Factors(0, (0.5,), True)])
    state, edits = schedules.extend(state, {"lr": 8.0}, 2)
    assert edits == {}
    _, changed = schedules.step(state, [*GROUPS, {"lr": 8.0}], factors=[Factors(1, (0.25,), True)])
    assert changed == [{"lr": 0.025}, {"lr": 0.05}, {"lr": 2.0}]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e308])
def test_a_factor_that_gives_no_finite_rate_changes_nothing(value: float) -> None:
    groups: list[dict[str, Any]] = [{"lr": 10.0, "initial_lr": 10.0}]
    state, _ = schedules.create("LambdaLR", {}, groups, [Factors(0, (0.5,), True)])
    with pytest.raises(InvalidHyperparameterError, match="would set lr of param group 0"):
        schedules.step(state, groups, factors=[Factors(1, (value,), True)])


def test_factors_for_a_schedule_without_functions_are_refused() -> None:
    state, _ = schedules.create("LinearLR", {}, GROUPS)
    with pytest.raises(InvalidArgumentError, match="LinearLR calls no functions"):
        schedules.step(state, GROUPS, factors=[Factors(1, (1.0,), True)])


def test_two_epochs_at_once_are_refused() -> None:
    """Made with a last_epoch and stepped on from 0 within the same constructor: what one entry a schedule cannot say."""
    inner = ("SequentialLR", {"schedulers": [("LinearLR", {}), ("LambdaLR", {"last_epoch": 3})], "milestones": [1]})
    outer = {"schedulers": [inner], "milestones": []}
    with pytest.raises(InvalidHyperparameterError, match="epochs 4 and 0 at once; leave last_epoch out"):
        schedules.create("SequentialLR", outer, GROUPS)


def test_factors_of_another_settings_functions_are_not_applied() -> None:
    state, _ = schedules.create("LambdaLR", {}, GROUPS, [Factors(0, (0.5,), True)], "who/3")
    factors = [Factors(1, (0.25,), True)]
    with pytest.raises(MissingFunctionError) as error:
        schedules.step(state, GROUPS, factors=factors, setting="who/2")
    assert error.value.metadata == {"awaited": "1", "setting": "who/3"}
    schedules.step(state, GROUPS, factors=factors, setting="who/3")


def test_a_step_that_cannot_be_made_still_says_how_many_functions_there_are() -> None:
    given = {"schedulers": [("CyclicLR", {"base_lr": 0.1, "max_lr": 0.2, "cycle_momentum": False}), ("LambdaLR", {})]}
    state, _ = schedules.create("ChainedScheduler", given, GROUPS, [Factors(0, (0.5,), True)])
    assert schedules.awaited(state, GROUPS) == [1]
    assert schedules.awaited(state, GROUPS[:1]) == [-1]
