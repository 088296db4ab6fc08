"""Which groups changed since a version: what workers have to be told."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from optserve.server.backends import select
from optserve.server.jobs import Job
from optserve.server.jobs import spec as specs
from optserve.server.records import (
    Caller,
    Changes,
    Decision,
    GroupAdded,
    GroupUpdated,
    Initialized,
    Joined,
    Record,
    Restored,
    RoundApplied,
    ScheduleSet,
    ScheduleStepped,
)
from optserve.v1 import jobs_pb2, types_pb2
from optserve.wire.rows import Sums
from optserve.wire.values import Value, to_hyperparameters

CALLER = Caller("s", 1, 1, "")
DTYPE = types_pb2.DATA_TYPE_FLOAT32


@pytest.fixture
def job() -> Job:
    """Two groups of SGD at version 3."""
    groups = [jobs_pb2.GroupSpec(parameters=[types_pb2.Parameter(name=name, shape=[2], dtype=DTYPE)]) for name in "ab"]
    spec = jobs_pb2.JobSpec(name="j", optimizer="sgd", workers=1, groups=groups, defaults=to_hyperparameters({"lr": 1.0}))
    found = Job("id", specs.plan(spec), select("numpy"), "first")
    found.store.set_values({name: np.zeros(2, np.float32) for name in "ab"})
    for record in (Initialized(), Joined("w", 0, "s", 1), round_of(found)):
        found.apply(record)
    return found


def round_of(job: Job, changes: Changes | None = None, skip_reason: str = "") -> RoundApplied:
    flats = {array_id: np.ones_like(flat) for array_id, flat in job.store.accumulators().items()}
    return RoundApplied((CALLER,), Decision((0,), 1.0, frozenset(), 1.0, skip_reason, {}, changes or {}), Sums(flats, {}))


def group(job: Job, **changes: Value) -> Mapping[str, Value]:
    return {**job.groups[0], **changes}


def test_a_worker_that_knows_nothing_is_told_everything(job: Job) -> None:
    assert job.groups_since("first", 0) == {0: True, 1: True}
    assert job.groups_since("another lineage", 3) == {0: True, 1: True}
    assert job.groups_since("first", 3) == {}


@pytest.mark.parametrize("skip_reason", ["", "nonfinite"])
def test_a_rounds_changes_are_of_its_version(job: Job, skip_reason: str) -> None:
    job.apply(round_of(job, {1: {"lr": 0.5}}, skip_reason))
    assert job.groups[1]["lr"] == 0.5
    assert job.groups_since("first", 3) == {1: False}
    assert job.groups_since("first", 4) == {}


@pytest.mark.parametrize(
    ("record", "changed"),
    [
        (lambda job: GroupUpdated(CALLER, 0, group(job, lr=0.5)), {0: False}),
        (lambda job: GroupUpdated(CALLER, 0, group(job)), {}),
        (lambda job: GroupAdded(CALLER, group(job), [("c", np.zeros(2, np.float32))]), {2: True}),
        (lambda _: ScheduleSet(CALLER, "ExponentialLR", {"gamma": 0.5}), {0: False, 1: False}),
        (lambda job: round_of(job), {}),
        (lambda _: Joined("w2", 0, "t", 1), {}),
    ],
    ids=["edited", "edited to what it was", "added", "scheduled", "round", "joined"],
)
def test_what_other_records_change(job: Job, record: Any, changed: dict[int, bool]) -> None:
    job.apply(record(job))
    assert job.groups_since("first", 3) == changed
    job.apply(round_of(job))
    assert job.groups_since("first", 3) == changed
    assert job.groups_since("first", 4) == {}


def test_a_step_of_the_schedule_changes_what_it_steps(job: Job) -> None:
    job.apply(ScheduleSet(CALLER, "ExponentialLR", {"gamma": 0.5}))
    job.apply(ScheduleStepped(CALLER, 0, None))
    assert job.groups_since("first", 4) == {0: False, 1: False}


def test_after_a_restore_everybody_is_told_everything(job: Job) -> None:
    exported = job.store.export()
    document = copy.deepcopy(job.to_document(exported.steps))
    before = group(job)
    job.apply(GroupUpdated(CALLER, 0, group(job, lr=0.5)))
    job.apply(GroupUpdated(CALLER, 1, group(job, lr=0.5)))
    job.apply(GroupUpdated(CALLER, 1, before))
    job.apply(Restored(CALLER, "second", document, exported.values, exported.state))
    assert job.groups[0]["lr"] == 1.0
    assert job.groups_since("first", 3) == {0: True, 1: True}
    assert job.groups_since("second", 3) == {}


def test_the_same_records_replayed_give_the_same_groups_and_weights(job: Job) -> None:
    exported = job.store.export()
    again = Job.from_document(
        "id", None, job.to_document(exported.steps), exported.values, exported.state, select("numpy"), "second"
    )
    records: list[Record] = [
        round_of(job, {0: {"lr": 0.5, "momentum": 0.9}, 1: {"weight_decay": 0.25}}),
        round_of(job),
        round_of(job, {0: {"nesterov": True}}, "nonfinite"),
        round_of(job),
    ]
    for record in records:
        results = [entry.apply(record) for entry in (job, again)]
        assert results[0].value == results[1].value
    assert job.groups == again.groups
    assert job.groups[0]["nesterov"] is True
    left, right = job.store.export(), again.store.export()
    for name in "ab":
        np.testing.assert_array_equal(left.values[name], right.values[name])
