"""Records of parameters that are renamed, replaced and removed: what the job tells of them, and what it keeps."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from recorded_jobs import caller, contents, new_job, round_of

from optserve.server.backends import select
from optserve.server.jobs import Job, parameters
from optserve.server.records import (
    GroupAdded,
    Initialized,
    ParameterRemoved,
    ParameterRenamed,
    ParameterReplaced,
    Restored,
    ScheduleSet,
)
from optserve.wire import errors


def trained() -> Job:
    """At version 3."""
    job = new_job()
    job.apply(Initialized())
    for turn in (1, 2):
        job.apply(round_of(job, turn, turn))
    return job


def test_each_edit_is_one_version_and_no_step() -> None:
    job = trained()
    for seq, record in enumerate(
        (
            ParameterRenamed(caller(3), "w", "v"),
            ParameterReplaced(caller(4), "v", np.ones(7), False),
            ParameterRemoved(caller(5), "h"),
        )
    ):
        result = job.apply(record)
        assert (result.position.version, result.position.step) == (4 + seq, 2)
        assert job.sessions.repeated(record.caller) == result
    assert job.group_names(0) == ["v"]
    assert job.group_names(1) == ["d", "s"]


def test_workers_are_told_the_names_of_the_group_that_changed() -> None:
    job = trained()
    job.apply(ParameterRenamed(caller(3), "d", "e"))
    assert job.groups_since("first", 3) == {1: True}
    job.apply(ParameterRemoved(caller(4), "h"))
    assert job.groups_since("first", 4) == {0: True}
    assert job.groups_since("first", 3) == {0: True, 1: True}
    assert job.groups_since("first", 5) == {}


def test_groups_rules_and_the_schedule_stay() -> None:
    job = trained()
    job.apply(ScheduleSet(caller(3), "StepLR", {"step_size": 2}))
    job.apply(GroupAdded(caller(4), dict(job.groups[0]), [("added", np.ones(3, np.float32))]))
    groups, schedule, rules = [dict(group) for group in job.groups], job.schedule, job.rules
    job.apply(ParameterReplaced(caller(5), "added", np.ones((2, 2), np.float32), False))
    job.apply(ParameterRemoved(caller(6), "w"))
    assert (job.groups, job.schedule, job.rules) == (groups, schedule, rules)


def test_the_layout_keeps_its_versions_over_a_restart_and_a_new_job_begins_anew() -> None:
    job = trained()
    job.apply(ParameterRenamed(caller(3), "w", "v"))
    job.apply(GroupAdded(caller(4), dict(job.groups[0]), [("added", np.ones(3, np.float32))]))
    assert (job.store.layout.version, job.store.layout.base_version) == (4, 3)
    exported = job.store.export()
    document = json.loads(json.dumps(job.to_document(exported.steps)))
    made = Job.from_document("id", None, document, exported.values, exported.tensors, select("numpy"), "next")
    assert made.store.layout == job.store.layout
    other = Job.from_document("new", "k", document, exported.values, exported.tensors, select("numpy"), "next")
    assert (other.store.layout.version, other.store.layout.base_version) == (3, 0)
    assert other.store.layout.places == job.store.layout.places


def test_a_document_from_before_an_edit_is_refused() -> None:
    job = trained()
    exported = job.store.export()
    record = Restored(caller(9), "r", job.to_document(exported.steps), exported.values, exported.tensors)
    job.apply(ParameterReplaced(caller(3), "w", np.ones((3, 4)), False))
    before = contents(job)
    with pytest.raises(errors.CheckpointMismatchError, match="the value of 'w' has dtype float32; the parameter has float64"):
        job.checked_restore(record)
    job.apply(ParameterRenamed(caller(4), "w", "v"))
    with pytest.raises(errors.CheckpointMismatchError, match="they differ in v, w; a new job can be made of it"):
        job.checked_restore(record)
    assert contents(job).keys() == {key.replace("/w", "/v").replace(":w", ":v") for key in before}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"w": np.ones((3, 4), np.int64)}, "parameter 'w' has dtype int64; allowed are float32"),
        ({"d": None}, "the value of parameter 'd' is missing"),
        ({"more": np.ones(2, np.float32)}, "a value names the parameter 'more', which the job does not have"),
    ],
    ids=["no parameter's dtype", "missing", "unexpected"],
)
def test_a_document_that_does_not_fit_its_values_is_refused(changed: dict[str, Any], message: str) -> None:
    job = trained()
    exported = job.store.export()
    values = {name: value for name, value in {**exported.values, **changed}.items() if value is not None}
    with pytest.raises(errors.CheckpointMismatchError, match=message):
        Job.from_document("k", "k", job.to_document(exported.steps), values, exported.tensors, select("numpy"), "next")


def test_the_plan_of_now_has_the_parameters_of_now_in_the_groups_it_was_made_with() -> None:
    job = trained()
    job.apply(ParameterRenamed(caller(3), "w", "v"))
    job.apply(ParameterReplaced(caller(4), "h", np.ones(2), False))
    job.apply(GroupAdded(caller(5), dict(job.groups[0]), [("added", np.ones(3, np.float32))]))
    found = parameters.as_now(job)
    assert [[name for name, _, _ in group] for group in found.parameters] == [["v", "h"], ["d", "s"]]
    assert found.parameters[0][1] == ("h", (2,), np.dtype(np.float64))
    assert [[name for name, _, _ in group] for group in job.plan.parameters] == [["w", "h"], ["d", "s"]]
