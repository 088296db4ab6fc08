"""`Job.apply`: each record, replay, and the round trip through a document."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from recorded_jobs import PARAMETERS, caller, contents, new_job, round_of

from optserve.server.backends import select
from optserve.server.jobs import Job
from optserve.server.records import (
    CheckpointDeleted,
    GroupAdded,
    GroupUpdated,
    Initialized,
    Joined,
    Left,
    Restored,
    ScheduleSet,
    ScheduleStepped,
    StateLoaded,
)
from optserve.wire import errors


def test_initialized_lets_the_job_begin() -> None:
    job = new_job()
    assert not job.initialized
    job.apply(Initialized())
    assert job.initialized
    assert (job.position.version, job.position.step) == (1, 0)


def test_joined_and_left_change_the_members() -> None:
    job = new_job()
    job.apply(Joined("a", 0, "s", 1))
    assert job.sessions.member_at(0).name == "a"
    job.apply(Joined("a", 0, "t", 2))
    assert job.sessions.member_of("s") is None
    assert "'a' (rank 0)" in job.sessions.fenced["s"]
    job.apply(Left("a"))
    assert job.sessions.members["a"].left
    assert job.position.version == 3


def test_group_updated_and_added() -> None:
    job = new_job()
    job.apply(GroupUpdated(caller(1), 1, job.checked_update(1, {"lr": 0.25})))
    assert job.learning_rates == [0.1, 0.25]
    added = GroupAdded(caller(2), {**job.groups[0], "lr": 3.0}, [("x", np.full(3, 7.0, np.float32))])
    job.apply(added)
    assert job.learning_rates == [0.1, 0.25, 3.0]
    assert job.group_names(2) == ["x"]
    np.testing.assert_array_equal(job.store.export().values["x"], np.full(3, 7.0, np.float32))
    assert job.sessions.last_seq("s") == 2


def test_schedule_set_stepped_and_removed() -> None:
    job = new_job()
    result = job.apply(ScheduleSet(caller(1), "StepLR", {"step_size": 1, "gamma": 0.5}))
    assert result.value["learning_rates"] == [0.1, 0.1]
    assert job.apply(ScheduleStepped(caller(2), 0, None)).value["learning_rates"] == [0.05, 0.05]
    assert job.schedule_steps == 0
    job.apply(ScheduleStepped(caller(3), 1, None))
    assert (job.schedule_steps, job.learning_rates) == (1, [0.025, 0.025])
    again = job.apply(ScheduleStepped(caller(1, "t"), 1, None))
    assert (job.schedule_steps, job.learning_rates) == (1, [0.025, 0.025])
    assert again.value["learning_rates"] == [0.025, 0.025]
    job.apply(ScheduleSet(caller(4), "", {}))
    assert job.schedule is None
    assert job.learning_rates == [0.025, 0.025]


def test_a_group_added_under_a_schedule_takes_part_in_it() -> None:
    job = new_job()
    job.apply(ScheduleSet(caller(1), "ExponentialLR", {"gamma": 0.5}))
    job.apply(ScheduleStepped(caller(2), 0, None))
    job.apply(GroupAdded(caller(3), {**dict(job.plan.optimizer.defaults), "lr": 8.0}, [("x", np.zeros(3, np.float32))]))
    job.apply(ScheduleStepped(caller(4), 0, None))
    assert job.learning_rates == [0.025, 0.025, 4.0]


def test_a_round_is_a_step_and_a_skipped_one_is_not() -> None:
    job = new_job()
    job.apply(Initialized())
    before = contents(job)
    result = job.apply(round_of(job, 1, 1, skip="nonfinite"))
    assert (result.position.version, result.position.step) == (2, 0)
    assert result.value["skip_reason"] == "nonfinite"
    after = contents(job)
    assert {key: value for key, value in after.items() if key != "document"} == {
        key: value for key, value in before.items() if key != "document"
    }
    result = job.apply(round_of(job, 1, 2))
    assert (result.position.version, result.position.step) == (3, 1)
    assert result.value == {
        "learning_rates": [0.1, 0.1],
        "grad_norm": 1.5,
        "clip_factor": 1.0,
        "skip_reason": "",
        "ranks": [0, 1],
        "accumulated": 0,
        "evaluations": 0,
        "metrics": {"loss": 1.0},
    }
    assert job.metrics == {"loss": 1.0}
    assert job.sessions.results["s"][1] == job.sessions.results["t"][1] == result


def test_absent_parameters_are_left_alone() -> None:
    job = new_job()
    job.apply(Initialized())
    job.apply(round_of(job, 1, 1, absent=frozenset({0, 3})))
    exported = job.store.export()
    np.testing.assert_array_equal(exported.values["w"], PARAMETERS[0]["w"])
    np.testing.assert_array_equal(exported.values["s"], PARAMETERS[1]["s"])
    assert exported.steps.get("w", 0) == exported.steps.get("s", 0) == 0
    assert exported.steps["h"] == exported.steps["d"] == 1


def test_state_loaded_replaces_state_and_groups_but_not_parameters() -> None:
    job = new_job()
    job.apply(Initialized())
    job.apply(round_of(job, 1, 1))
    saved = job.store.export()
    groups = [dict(group, lr=0.75) for group in job.groups]
    job.apply(round_of(job, 2, 2))
    values = job.store.export().values
    job.apply(StateLoaded(caller(3), groups, saved.steps, saved.state))
    now = job.store.export()
    assert now.steps == saved.steps
    assert job.learning_rates == [0.75, 0.75]
    for name, value in values.items():
        np.testing.assert_array_equal(now.values[name], value)
    for key, array in saved.state.items():
        if not key.startswith("master/"):
            np.testing.assert_array_equal(now.state[key], array)


def test_restored_puts_everything_back_in_a_new_lineage() -> None:
    job = new_job()
    for record in (Initialized(), Joined("a", 0, "s", 1), ScheduleSet(caller(1, "admin", 0), "ExponentialLR", {"gamma": 0.5})):
        job.apply(record)
    job.apply(round_of(job, 1, 1))
    saved = job.store.export()
    document = json.loads(json.dumps(job.to_document(saved.steps)))
    before = contents(job)
    for seq in (2, 3):
        job.apply(round_of(job, seq, seq))
        job.apply(ScheduleStepped(caller(seq, "admin", 0), seq - 1, None))
    result = job.apply(Restored(caller(4, "admin", 0), "second", document, saved.values, saved.state))
    assert (result.position.lineage_id, result.position.version, result.position.step) == ("second", 4, 1)
    after = contents(job)
    for key, value in before.items():
        if key != "document":
            assert after[key] == value, key
    assert job.learning_rates == [0.1, 0.1]
    assert job.sessions.last_seq("admin") == 4
    assert job.sessions.last_seq("s") == 3
    with pytest.raises(errors.RolledBackError):
        job.check_seen("first", 5)
    job.check_seen("first", 4)


def test_checkpoint_deleted_stores_the_result() -> None:
    job = new_job()
    result = job.apply(CheckpointDeleted(caller(1), "c"))
    assert job.sessions.repeated(caller(1)) == result


def test_a_new_job_of_a_document_has_no_members_and_no_past() -> None:
    job = new_job()
    for record in (Initialized(), Joined("a", 0, "s", 1)):
        job.apply(record)
    job.apply(round_of(job, 1, 1))
    exported = job.store.export()
    document = job.to_document(exported.steps)
    made = Job.from_document("other", "k", document, exported.values, exported.tensors, select("numpy"), "next")
    assert made.name == "k"
    assert not made.sessions.members
    assert made.sessions.last_seq("s") == 0
    assert made.position.step == 1
    made.check_seen("first", 0)


@pytest.mark.parametrize(
    "damage",
    [
        lambda d: d.pop("spec"),
        lambda d: d.pop("groups"),
        lambda d: d.pop("position"),
        lambda d: d.pop("sessions"),
        lambda d: d["spec"].update(optimizer="SGD"),
        lambda d: d["spec"].update(nonsense=1),
        lambda d: d["group_parameters"][0].append("other"),
        lambda d: d["groups"].pop(),
        lambda d: d["groups"][0].update(lr="fast"),
        lambda d: (d.update(schedule=None), d["groups"][0].pop("initial_lr"), d["groups"][0].update(lr=-1.0)),
        lambda d: d["position"].update(version="x"),
        lambda d: d["position"].update(version=None),
        lambda d: d.update(groups=3),
        lambda d: d.update(schedule={"name": "NoLR"}),
        lambda d: d.update(schedule=[1]),
        lambda d: d["schedule"]["state"].update(base_lrs=[0.1]),
        lambda d: d["groups"][0].update(max_lr="high"),
        lambda d: d.update(metrics=None),
        lambda d: d.update(metrics={"loss": "high"}),
        lambda d: d["sessions"].update(members=[{"name": "a"}]),
        lambda d: d["history"].update(ended={"first": "x"}),
    ],
    ids=range(21),
)
def test_a_document_that_does_not_fit_is_a_typed_error(damage: Callable[[dict[str, Any]], None]) -> None:
    job = new_job()
    for record in (Initialized(), ScheduleSet(caller(1, "admin", 0), "ExponentialLR", {"gamma": 0.5})):
        job.apply(record)
    exported = job.store.export()
    document = json.loads(json.dumps(job.to_document(exported.steps)))
    damage(document)
    with pytest.raises(errors.CheckpointMismatchError):
        Job.from_document("id", None, document, exported.values, exported.tensors, select("numpy"), "next")


def test_a_document_of_another_jobs_parameters_is_refused() -> None:
    job = new_job()
    job.apply(Initialized())
    document = job.to_document({})
    document["group_parameters"] = [["w", "h"], ["d", "other"]]
    with pytest.raises(errors.CheckpointMismatchError, match="other, s"):
        job.checked_document(document)
    document = job.to_document({})
    document["spec"]["optimizer"] = "SGD"
    with pytest.raises(errors.CheckpointMismatchError, match="the checkpoint is of SGD, the job of Adam"):
        job.checked_document(document)
