"""Counted steps of the schedule: what the ranks bring to the same step must be the same."""

from __future__ import annotations

import math

import pytest

from optserve.server.jobs.counted import CountedSteps, Made
from optserve.server.records import Changes
from optserve.wire.arguments import Factors
from optserve.wire.errors import MissingFunctionError, RanksDisagreeError


def mine(metric: float | None, *factors: Factors, setting: str = "s/1") -> Made:
    return Made(setting, metric, factors)


def made(count: int, metric: float | None = None, *factors: Factors) -> CountedSteps:
    steps = CountedSteps()
    steps.note(count, Made("s/1", metric, factors))
    return steps


@pytest.mark.parametrize("metric", [None, 0.5, math.inf, math.nan])
def test_the_same_metric_agrees(metric: float | None) -> None:
    made(3, metric).check(3, mine(metric))


@pytest.mark.parametrize(("here", "there"), [(0.5, 0.25), (None, 0.5), (0.5, None), (math.nan, 0.5), (math.inf, math.nan)])
def test_ranks_that_disagree_on_the_metric_are_told_both(here: float | None, there: float | None) -> None:
    with pytest.raises(RanksDisagreeError, match=f"step 3 was made with the metric {there}, this rank has {here}"):
        made(3, there).check(3, mine(here))


def test_the_same_factors_agree_however_they_are_said() -> None:
    made(3, None, Factors(7, (0.5,), True), Factors(-1)).check(3, mine(None, Factors(7, (0.5, 0.5)), Factors(-1)))


def test_ranks_that_disagree_on_the_factors_are_told_both() -> None:
    steps = made(3, None, Factors(-1), Factors(7, (0.5, 0.25)))
    with pytest.raises(RanksDisagreeError, match=r"step 3 was made with 0.5, 0.25 of lr_lambda at epoch 7, this rank has 0.5$"):
        made(3, None, Factors(7, (0.5, 0.25))).check(3, mine(None, Factors(7, (0.5,), True)))
    with pytest.raises(RanksDisagreeError, match=r"this rank has 0.75 \(schedule 1 of those with functions\)"):
        steps.check(3, mine(None, Factors(-1), Factors(7, (0.75,), True)))


def changed(changes: Changes, metric: float | None = 0.5) -> Made:
    return Made("s/1", metric, (), changes)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [({}, {0: {}}), ({0: {"lr": 1.0, "foreach": None}}, {1: {}, 0: {"foreach": None, "lr": 1}}), ({2: {"lr": 0.5}},) * 2],
)
def test_the_same_changes_agree_however_they_are_said(theirs: Changes, ours: Changes) -> None:
    steps = CountedSteps()
    steps.note(3, changed(theirs))
    steps.check(3, changed(ours))


@pytest.mark.parametrize(
    ("theirs", "ours", "message"),
    [
        ({0: {"lr": 0.5}}, {0: {"lr": 0.25}}, r"lr of group 0 changed to 0\.5, this rank has it changed to 0\.25"),
        ({1: {"foreach": None}}, {}, "foreach of group 1 changed to None, this rank has it unchanged"),
        ({0: {"lr": 0.5}}, {0: {"lr": 0.5, "momentum": 0.9}}, r"momentum of group 0 unchanged, .* changed to 0\.9"),
        ({0: {"lr": 0.5}}, {1: {"lr": 0.5}}, r"lr of group 0 changed to 0\.5, this rank has it unchanged"),
    ],
)
def test_ranks_that_disagree_on_a_change_are_told_both(theirs: Changes, ours: Changes, message: str) -> None:
    steps = CountedSteps()
    steps.note(3, changed(theirs))
    with pytest.raises(RanksDisagreeError, match=f"^schedule step 3 was made with {message}; every rank"):
        steps.check(3, changed(ours))


@pytest.mark.parametrize("factors", [(), (Factors(8, (0.5,), True),), (Factors(-1),), (Factors(7, (0.5,), True),) * 2])
def test_a_rank_that_is_behind_is_told_the_epochs_of_its_step(factors: tuple[Factors, ...]) -> None:
    with pytest.raises(MissingFunctionError, match="schedule step 3 called lr_lambda at epoch 7") as caught:
        made(3, None, Factors(7, (0.5,), True)).check(3, mine(None, *factors))
    assert caught.value.metadata == {"awaited": "7", "setting": "s/1"}


def test_functions_of_another_setting_of_the_schedule_do_not_count() -> None:
    with pytest.raises(MissingFunctionError, match="schedule step 3 called lr_lambda at epoch 7"):
        made(3, None, Factors(7, (0.5,), True)).check(3, mine(None, Factors(7, (0.5,), True), setting="s/0"))
    made(3, 0.5).check(3, mine(0.5, setting="s/0"))


def test_the_last_thousand_steps_are_known() -> None:
    steps = CountedSteps()
    for count in range(1, 2000):
        steps.note(count, Made("s/1", float(count), ()))
    assert [steps.find(count) is not None for count in (1, 975, 976, 1999)] == [False, False, True, True]
    steps.check(1, mine(7.0))
