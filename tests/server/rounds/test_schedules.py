"""Calls on the schedule of a running job: state for the momentum that it turns on, ranks that disagree, exactly once."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from optserve.server import schedules
from optserve.server.records import Caller, Changes, GroupAdded, ScheduleLoaded, ScheduleSet, ScheduleStepped
from optserve.wire import errors
from optserve.wire.arguments import Factors

Build = Callable[..., Any]
Until = Callable[..., Any]
W = {"w": np.zeros(8, np.float32)}
G = {"w": np.ones(8, np.float32)}
NEW = ("", 0)
ONE_CYCLE = {"max_lr": 0.5, "total_steps": 10}


def caller(seq: int, fingerprint: str = "") -> Caller:
    return Caller("admin", 0, seq, fingerprint)


def counted(rank: Any, seq: int) -> Caller:
    return Caller(rank.member.session_id, rank.member.epoch, seq, f"step{seq}")


def one_cycle(seq: int, **more: Any) -> ScheduleSet:
    return ScheduleSet(caller(seq), "OneCycleLR", ONE_CYCLE | more)


def step(
    administration: Any,
    who: Caller,
    count: int,
    metric: float | None,
    *factors: Factors,
    setting: str = "",
    changes: Changes | None = None,
) -> Any:
    return administration.step_schedule(who, NEW, ScheduleStepped(who, count, metric, factors, setting, changes or {}))


def standing(running: Any) -> str:
    return json.dumps(running.running.job.to_document({}))


def test_state_for_the_momentum_is_there_before_the_first_step(house: Build) -> None:
    running = house(W)
    store = running.running.job.store
    before = store.state_bytes
    running.running.administration.set_schedule(caller(1), NEW, one_cycle(1))
    assert store.state_bytes > before
    assert not store.lacks_state(running.running.job.groups)
    worker = running.join()
    for _ in range(2):
        worker.send(G)
    lr, momentum = running.running.job.groups[0]["lr"], 0.95
    np.testing.assert_allclose(running.values()["w"], -lr * (2 + momentum) * np.ones(8), rtol=1e-6)


def test_momentum_that_a_step_turns_on_has_its_state(house: Build) -> None:
    running = house(W)
    administration = running.running.administration
    arguments = {"base_lr": 0.1, "max_lr": 0.2, "step_size_up": 2, "max_momentum": 0.0, "base_momentum": 0.5}
    administration.set_schedule(caller(1), NEW, ScheduleSet(caller(1), "CyclicLR", arguments))
    bare = running.running.job.store.state_bytes
    step(administration, caller(2), 0, None)
    assert running.running.job.groups[0]["momentum"] == 0.25
    assert running.running.job.store.state_bytes > bare


@pytest.mark.parametrize("call", ["set", "step"])
def test_memory_that_is_not_there_for_it_changes_nothing(house: Build, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    running = house(W)
    administration = running.running.administration
    arguments = {"base_lr": 0.1, "max_lr": 0.2, "step_size_up": 2, "max_momentum": 0.0, "base_momentum": 0.5}
    administration.set_schedule(caller(1), NEW, ScheduleSet(caller(1), "CyclicLR", arguments))
    before = standing(running)

    def prepare(groups: Any) -> None:
        raise errors.OutOfMemoryError(f"no memory for momentum {groups[0]['momentum']}")

    monkeypatch.setattr(running.running.job.store, "prepare", prepare)
    calls = {
        "set": lambda: administration.set_schedule(caller(2), NEW, one_cycle(2)),
        "step": lambda: step(administration, caller(2), 0, None),
    }
    with pytest.raises(errors.OutOfMemoryError, match="no memory for momentum"):
        calls[call]()
    assert standing(running) == before
    monkeypatch.undo()
    step(administration, caller(2), 0, None)


def test_only_a_schedule_that_needs_new_state_waits_for_who_reads_in_place(house: Build, until: Until) -> None:
    running = house(W, workers=2)
    host, administration = running.running.host, running.running.administration
    worker, other = running.join(), running.join()
    with host.changed:
        hold = host.hold(worker.member.session_id)
    administration.set_schedule(caller(1), NEW, ScheduleSet(caller(1), "ExponentialLR", {"gamma": 0.5}))
    step(administration, caller(2), 0, None)
    waiting = other.in_thread(lambda: administration.set_schedule(caller(3), NEW, one_cycle(3)))
    until(lambda: host.changed.acquire(timeout=1) and (host.changed.release() or True), "the wait lets the lock go")
    assert not waiting.done()
    host.release(worker.member.session_id, hold)
    assert waiting.result(20).value["schedule"]["name"] == "OneCycleLR"
    with host.changed:
        host.hold(worker.member.session_id)
    step(administration, caller(4), 0, None)


def test_ranks_that_disagree_on_a_metric_or_a_factor_change_nothing(house: Build) -> None:
    running = house(W, workers=2)
    administration = running.running.administration
    first, second = running.join(), running.join()
    administration.set_schedule(caller(1), NEW, ScheduleSet(caller(1), "ReduceLROnPlateau", {}))
    step(administration, counted(first, 1), 1, float("nan"))
    before = standing(running)
    with pytest.raises(errors.RanksDisagreeError, match=r"with the metric nan, this rank has 0\.5"):
        step(administration, counted(second, 1), 1, 0.5)
    assert standing(running) == before
    step(administration, counted(second, 1), 1, float("nan"))
    given = (Factors(0, (1.0,), True),)
    administration.set_schedule(caller(2), NEW, ScheduleSet(caller(2), "LambdaLR", {}, given))
    setting = running.running.job.schedule.setting
    step(administration, counted(first, 2), 2, None, Factors(1, (0.5,), True), setting=setting)
    step(administration, counted(first, 3), 3, None, Factors(2, (0.25,), True), setting=setting)
    before = standing(running)
    with pytest.raises(errors.MissingFunctionError) as caught:
        step(administration, counted(second, 2), 2, None, Factors(3, (0.5,), True), setting=setting)
    assert caught.value.metadata["awaited"] == "1"
    with pytest.raises(errors.RanksDisagreeError, match=r"0\.5 of lr_lambda at epoch 1, this rank has 0\.75"):
        step(administration, counted(second, 2), 2, None, Factors(1, (0.75,), True), setting=setting)
    assert standing(running) == before
    result = step(administration, counted(second, 2), 2, None, Factors(1, (0.5,), True), setting=setting)
    assert (result.value["learning_rates"], result.value["awaited"]) == ([0.25], [2])
    assert step(administration, counted(second, 3), 3, None, Factors(2, (0.25,), True), setting=setting).value["awaited"] == [3]


def test_a_schedule_steps_from_what_the_ranks_changed_before_it_and_once(house: Build) -> None:
    running = house(W, workers=4)
    job, administration = running.running.job, running.running.administration
    ranks = [running.join() for _ in range(4)]
    administration.set_schedule(caller(1), NEW, ScheduleSet(caller(1), "ExponentialLR", {"gamma": 0.5}))
    versions = []
    for rank in ranks:
        result = step(administration, counted(rank, 1), 1, None, changes={0: {"lr": 0.25, "weight_decay": 0.5}})
        versions.append(result.position.version)
        administration.update_group(caller(1 + len(versions)), NEW, 0, {"momentum": 0.5})
    assert (job.groups[0]["lr"], job.groups[0]["weight_decay"], job.schedule.last_epoch) == (0.125, 0.5, 1)
    found = [event for event in running.running.host.events.after(0, 0, lambda: True) if event.kind in ("group", "schedule")]
    assert [(event.message, event.position.version) for event in found if "momentum" not in event.message][1:] == [
        ("group 0: lr=0.25, weight_decay=0.5", versions[0]),
        ("schedule stepped", versions[0]),
    ]
    repeated = step(administration, counted(ranks[0], 1), 1, None, changes={0: {"lr": 0.25, "weight_decay": 0.5}})
    assert repeated.position.version == versions[0]
    assert job.groups_since(job.position.lineage_id, versions[0] - 1) == {0: False}


def test_what_is_wrong_with_changes_before_a_step_of_the_schedule_changes_nothing(house: Build) -> None:
    running = house(W, workers=2)
    administration = running.running.administration
    first, second = running.join(), running.join()
    with pytest.raises(errors.InvalidArgumentError, match="the job has no schedule"):
        step(administration, counted(first, 1), 1, None, changes={0: {"lr": 0.5}})
    administration.set_schedule(caller(1), NEW, ScheduleSet(caller(1), "ExponentialLR", {"gamma": 0.5}))
    before = standing(running)
    for changes, error, message in (
        ({1: {"lr": 0.5}}, errors.UnknownParameterError, "there is no group 1"),
        ({0: {"lr": 0.5, "nesterov": True}}, errors.InvalidHyperparameterError, "Nesterov momentum requires"),
        ({0: {"learning": 0.5}}, errors.UnknownHyperparameterError, "no hyperparameter 'learning'"),
    ):
        with pytest.raises(error, match=message):
            step(administration, counted(first, 1), 1, None, changes=changes)
        assert standing(running) == before
    step(administration, counted(first, 1), 1, None, changes={0: {"lr": 0.5}})
    before = standing(running)
    for mine in ({}, {0: {"lr": 0.25}}):
        with pytest.raises(errors.RanksDisagreeError, match=r"with lr of group 0 changed to 0\.5, this rank has it"):
            step(administration, counted(second, 1), 1, None, changes=mine)
        assert standing(running) == before
    step(administration, counted(second, 1), 1, None, changes={0: {"lr": 0.5}})
    assert running.running.job.groups[0]["lr"] == 0.25


def test_momentum_that_comes_with_a_step_of_the_schedule_has_its_state_before(house: Build) -> None:
    running = house(W)
    worker, administration = running.join(), running.running.administration
    administration.set_schedule(caller(1), NEW, ScheduleSet(caller(1), "ExponentialLR", {"gamma": 0.5}))
    bare = running.running.job.store.state_bytes
    step(administration, counted(worker, 1), 1, None, changes={0: {"momentum": 0.5}})
    assert running.running.job.store.state_bytes > bare


def test_a_rank_that_is_behind_goes_on_after_the_schedule_was_set_anew(house: Build) -> None:
    """What its step called is of functions that nobody steps with any more."""
    running = house(W, workers=2)
    job, administration = running.running.job, running.running.administration
    first, second = running.join(), running.join()
    administration.set_schedule(caller(1), NEW, ScheduleSet(caller(1), "LambdaLR", {}, (Factors(0, (1.0,), True),)))
    step(administration, counted(first, 1), 1, None, Factors(1, (0.5,), True), setting=job.schedule.setting)
    administration.set_schedule(caller(2), NEW, ScheduleSet(caller(2), "LambdaLR", {}, (Factors(0, (1.0,), True),)))
    assert step(administration, counted(second, 1), 1, None).value["awaited"] == [1]
    assert (job.schedule.last_epoch, job.schedule_steps) == (0, 1)
    step(administration, counted(second, 2), 2, None, Factors(1, (0.25,), True), setting=job.schedule.setting)
    with pytest.raises(errors.MissingFunctionError, match="schedule step 2 called lr_lambda at epoch 1"):
        step(administration, counted(first, 2), 2, None)
    administration.set_schedule(caller(3), NEW, ScheduleSet(caller(3), "", {}))
    assert step(administration, counted(first, 2), 2, None).value["schedule"] is None


def test_a_state_dict_of_the_schedule_is_loaded_once(house: Build) -> None:
    running = house(W)
    administration = running.running.administration
    with pytest.raises(errors.InvalidArgumentError, match="the job has no schedule"):
        administration.load_schedule_state(caller(1), NEW, ScheduleLoaded(caller(1), {}))
    administration.set_schedule(caller(1), NEW, ScheduleSet(caller(1), "StepLR", {"step_size": 2}))
    state = schedules.state_dict(running.running.job.schedule) | {"last_epoch": 1}
    before = standing(running)
    with pytest.raises(errors.InvalidStateDictError, match="lacks"):
        administration.load_schedule_state(caller(2), NEW, ScheduleLoaded(caller(2), {"last_epoch": 1}))
    assert standing(running) == before
    first = administration.load_schedule_state(caller(2), NEW, ScheduleLoaded(caller(2), state))
    step(administration, Caller("other", 0, 1, ""), 0, None)
    assert administration.load_schedule_state(caller(2), NEW, ScheduleLoaded(caller(2), state)) == first
    assert running.running.job.schedule.last_epoch == 2


def test_a_group_that_the_schedule_has_nothing_for_is_not_added(house: Build) -> None:
    running = house(W)
    administration = running.running.administration
    administration.set_schedule(caller(1), NEW, one_cycle(1, max_lr=[0.5]))
    group = {**running.running.job.plan.optimizer.defaults}
    before = standing(running)
    with pytest.raises(errors.InvalidArgumentError, match="max_lr has one value for each of 1 param groups"):
        administration.add_group(caller(2), NEW, GroupAdded(caller(2), group, [("v", np.ones(2, np.float32))]))
    assert standing(running) == before
    keys = {"initial_lr": 0.1, "max_lr": 0.2, "min_lr": 0.01, "max_momentum": 0.9, "base_momentum": 0.8}
    administration.add_group(caller(2), NEW, GroupAdded(caller(2), group | keys, [("v", np.ones(2, np.float32))]))
    step(administration, caller(3), 0, None)
    assert running.running.job.groups[1]["lr"] > 0.1


def test_a_loaded_state_dict_is_where_the_next_step_begins(house: Build) -> None:
    job = house(W).running.job
    job.apply(ScheduleSet(caller(1), "StepLR", {"step_size": 2, "gamma": 0.5}))
    state = schedules.state_dict(job.schedule) | {"last_epoch": 1, "gamma": 0.25}
    result = job.apply(ScheduleLoaded(caller(2), state))
    assert job.learning_rates == [1.0]
    assert result.value["schedule"]["state"] == state
    assert job.apply(ScheduleStepped(caller(3), 0, None)).value["learning_rates"] == [0.25]


def test_a_setting_of_the_schedule_is_known_by_the_call_that_made_it(house: Build) -> None:
    job = house(W).running.job
    settings = []
    for seq in (1, 2):
        job.apply(ScheduleSet(caller(2 * seq), "StepLR", {"step_size": 2}))
        settings.append(job.schedule.setting)
        job.apply(ScheduleStepped(caller(2 * seq + 1), 0, None))
        assert job.schedule.setting == settings[-1]
    assert settings[0] != settings[1]


def test_a_setting_is_not_taken_for_one_that_was_lost(house: Build) -> None:
    """A server that came back before a call gets a call with the same identity, and another function."""
    settings = []
    for lineage in ("before", "after"):
        job = house(W).running.job
        job.position = replace(job.position, lineage_id=lineage)
        job.apply(ScheduleSet(caller(1), "StepLR", {"step_size": 2}))
        settings.append(job.schedule.setting)
    assert settings[0] != settings[1]


def test_what_a_schedule_does_to_momentum_must_be_allowed(house: Build) -> None:
    job = house(W, optimizer="adam").running.job
    with pytest.raises(errors.InvalidHyperparameterError, match="Invalid beta parameter at index 0"):
        job.checked_schedule(one_cycle(1, max_momentum=1.5))
    (group,) = job.checked_schedule(one_cycle(1, max_momentum=0.4))
    assert group["betas"] == (0.4, 0.999)
    assert job.groups[0]["betas"] == (0.9, 0.999)
    assert job.checked_schedule(ScheduleSet(caller(1), "LinearLR", {})) is job.groups
